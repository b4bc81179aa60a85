"""Staged nodes to a live snapshot: written aside, asked the golden questions, made the live one. It moves last."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import VectorStoreQuery

from ragrack.catalog import Nodes, Snapshot, Snapshots
from ragrack.golden import GoldenReport, GoldenSet, evaluate
from ragrack.parts import Embedding
from ragrack.snapshot import Hold, Manifest, SnapshotError, UnavailableError, timestamp, timestamp_after

if TYPE_CHECKING:
    from ragrack.fingerprint import Fingerprint
    from ragrack.progress import Progress
    from ragrack.readonly import SnapshotStore
    from ragrack.settings import Settings

PATIENCE_SECONDS = 120
"""How long a store that cannot be reached is waited for, as when another server takes over."""
ASK_AGAIN_SECONDS = 5


class PublishError(Exception):
    """The live snapshot is the one it was; the message says why."""


class Staged(Nodes, Protocol):
    """Nodes that are to become a snapshot."""

    def nodes(self) -> Iterator[BaseNode]:
        """All, with their embeddings, in the order that a snapshot gives them."""

    def counts(self) -> tuple[int, int]:
        """Documents and nodes."""

    def problems(self) -> list[str]:
        """Of the documents that could not be read."""

    def content(self) -> str:
        """SHA-256 over the nodes, in order."""


@dataclass(frozen=True)
class Outcome:
    """A snapshot of what was staged; `before` was live until then, `hold` is why the new one is not."""

    snapshot: Snapshot
    before: str | None
    hold: Hold | None

    def words(self) -> str:
        manifest = self.snapshot.manifest
        if self.hold is not None:
            outcome = f"was built and is not live: {manifest.collection} is {self.hold.words()}"
        else:
            outcome = "is still what the documents say" if self.snapshot.id == self.before else "is live"
        counts = f"{manifest.documents} documents, {manifest.nodes} nodes, {len(manifest.skipped)} skipped"
        return f"snapshot {self.snapshot.id} {outcome}: {counts}"


def staged_at(settings: Settings, collection: str, fingerprint: str) -> Path:
    """Where the nodes of a collection are staged, whichever store they go to."""
    return settings.index_dir / collection / fingerprint / "staging.sqlite"


def publish(
    staged: Staged,
    embedding: Embedding,
    snapshots: Snapshots,
    fingerprint: Fingerprint,
    golden: GoldenSet | None,
    progress: Progress,
    why: str = "ingest",
) -> Outcome:
    """Makes what is staged the live snapshot; the live one, where that is the same; any other that is, if it is whole.

    Where the live one is held it stays that. Raises PublishError, where there is nothing or the golden questions fail,
    and SnapshotError.
    """
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            before = snapshots.current_id()
            snapshot = _snapshot(staged, embedding, snapshots, fingerprint, golden, progress)
            live = snapshots.offer(snapshot.id, why)
            return Outcome(snapshot, before, None if live else snapshots.held())
        except UnavailableError as error:
            if time.monotonic() > until:
                raise
            progress("wait", 0, 0, str(error))
            time.sleep(ASK_AGAIN_SECONDS)


def _snapshot(
    staged: Staged,
    embedding: Embedding,
    snapshots: Snapshots,
    fingerprint: Fingerprint,
    golden: GoldenSet | None,
    progress: Progress,
) -> Snapshot:
    documents, nodes = staged.counts()
    skipped = staged.problems()
    if not nodes:
        raise PublishError(f"no document could be read: {'; '.join(skipped)}")
    content = staged.content()
    parent = _sound_current(snapshots)
    if parent is not None and parent.manifest.content == content:
        return parent
    same = _same_content(snapshots, content)
    if same is not None:
        same_id = same.id
        _gate(golden, lambda: snapshots.open(same_id), snapshots.collection, embedding, progress)
        snapshots.note(same)
        return same
    with snapshots.draft() as draft:
        progress("write", 0, nodes)
        written = draft.update(parent, staged) if parent is not None and _is_whole(snapshots, parent) else None
        if written is None:
            written = draft.write(_counted(staged.nodes(), nodes, progress), nodes, fingerprint.dimensions)
        report = _gate(golden, draft.open, snapshots.collection, embedding, progress)
        return draft.publish(
            Manifest(
                id=f"{timestamp_after(draft.ids())}-{content[:8]}",
                collection=snapshots.collection,
                fingerprint=fingerprint.digest,
                built_with=asdict(fingerprint),
                content=content,
                created=timestamp(),
                parent=parent.id if parent else None,
                documents=documents,
                nodes=nodes,
                dimensions=fingerprint.dimensions,
                engine=written.engine,
                files=written.files,
                golden=report.model_dump() if report else None,
                skipped=skipped,
            )
        )


def _gate(
    golden: GoldenSet | None,
    open_store: Callable[[], SnapshotStore],
    collection: str,
    embedding: Embedding,
    progress: Progress,
) -> GoldenReport | None:
    """What the golden questions found in a snapshot. Raises PublishError where that is not enough."""
    if golden is None:
        progress("check", 0, 0, f"collection {collection} has no golden questions: nothing was asked")
        return None
    progress("check", 0, len(golden.questions))
    with contextlib.closing(open_store()) as store:
        report = _ask(golden, store, embedding)
    progress("check", len(golden.questions), len(golden.questions), report.summary())
    if not report.passed:
        raise PublishError(f"the new snapshot was not taken: {report.summary()}")
    return report


def _ask(golden: GoldenSet, store: SnapshotStore, embedding: Embedding) -> GoldenReport:
    async def retrieve(question: str, k: int) -> list[str]:
        vector = await embedding.aget_query_embedding(question)
        result = await store.aquery(VectorStoreQuery(query_embedding=vector, similarity_top_k=k))
        return [str(node.metadata["document"]) for node in result.nodes or []]

    return asyncio.run(evaluate(golden, retrieve))


def _sound_current(snapshots: Snapshots) -> Snapshot | None:
    """The live snapshot; None where it is missing or damaged, which the one to come mends."""
    try:
        current = snapshots.current()
        if current is not None:
            current.check()
        return current
    except UnavailableError:
        raise
    except SnapshotError:
        return None


def _same_content(snapshots: Snapshots, content: str) -> Snapshot | None:
    """The newest snapshot of the same nodes whose every byte is right, as when documents are what they once were."""
    same = (snapshot for snapshot in reversed(snapshots.list()) if snapshot.manifest.content == content)
    return next((snapshot for snapshot in same if _is_whole(snapshots, snapshot)), None)


def _is_whole(snapshots: Snapshots, snapshot: Snapshot) -> bool:
    try:
        snapshots.verify(snapshot.id)
    except UnavailableError:
        raise
    except SnapshotError:
        return False
    return True


def _counted(nodes: Iterator[BaseNode], total: int, progress: Progress) -> Iterator[BaseNode]:
    for number, node in enumerate(nodes, start=1):
        yield node
        if number % 1000 == 0 or number == total:
            progress("write", number, total)
