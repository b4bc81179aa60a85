"""A collection from one store to the other, without embedding anything anew.

What is staged on this host is published there; where nothing is, the nodes of the other store's live snapshot are, with
the vectors that it has. Serving goes on from where it was: what a release serves from, its settings say.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_index.core.schema import BaseNode

from ragrack import catalog
from ragrack.fingerprint import Fingerprint, ModelError
from ragrack.golden import GoldenError, GoldenSet
from ragrack.lock import BusyError, building
from ragrack.parts import open_embedding
from ragrack.publish import PublishError, Staged, publish, staged_at
from ragrack.remote import EmbeddingUnavailableError
from ragrack.snapshot import SnapshotError
from ragrack.staging import Staging
from ragrack.stored import StoredNode

if TYPE_CHECKING:
    from ragrack.catalog import Snapshot
    from ragrack.progress import Progress
    from ragrack.readonly import SnapshotStore
    from ragrack.settings import Settings

OTHER = {"embedded": "postgres", "postgres": "embedded"}
PRECISION = {"flat": "of half precision", "hnsw": "of 8 bits"}
"""Of the vectors, by the engine of a snapshot; PostgreSQL's are all of half precision."""


class MoveError(Exception):
    """Nothing has moved; the message says why and what mends it."""


@dataclass(frozen=True)
class Moved:
    """The snapshot, and in words where its nodes came from."""

    snapshot: Snapshot
    source: str


def move(settings: Settings, collection: str, to: str, progress: Progress) -> Moved:
    """Makes a snapshot live in the store `to` (`embedded` or `postgres`), gated as by an ingest. Raises MoveError."""
    try:
        golden = GoldenSet.of(settings, collection)
        fingerprint = Fingerprint.of(settings)
        with building(settings.index_dir, collection), contextlib.ExitStack() as stack:
            embedding = open_embedding(settings, 1)
            stack.callback(embedding.close)
            target = catalog.snapshots(settings, collection, fingerprint.digest, to)
            staged, source = _source(settings, collection, fingerprint.digest, to, stack)
            progress("read", 0, 0, f"{collection}: from {source}")
            outcome = publish(staged, embedding, target, fingerprint, golden, progress, f"move from {source}")
            target.prune(settings.keep_snapshots)
    except (BusyError, EmbeddingUnavailableError, GoldenError, ModelError, PublishError, SnapshotError) as error:
        raise MoveError(str(error)) from error
    except (OSError, sqlite3.Error) as error:
        raise MoveError(f"cannot read or write below {settings.index_dir}: {error}") from error
    progress("done", 1, 1, outcome.words())
    return Moved(outcome.snapshot, source)


def _source(
    settings: Settings, collection: str, fingerprint: str, to: str, stack: contextlib.ExitStack
) -> tuple[Staged, str]:
    path = staged_at(settings, collection, fingerprint)
    if path.exists():
        staging = Staging(path)
        stack.callback(staging.close)
        if staging.counts()[1]:
            return staging, f"what is staged at {path}"
    other = OTHER[to]
    if other == "postgres" and not settings.postgres_hosts:
        raise MoveError(f"nothing is staged at {path}, and RAGRACK_POSTGRES_HOSTS does not say where else it could be")
    snapshots = catalog.snapshots(settings, collection, fingerprint, other)
    live = snapshots.current()
    if live is None:
        raise MoveError(f"nothing is staged at {path}, and the {other} store has no live snapshot of {collection}")
    snapshots.verify(live.id)
    store = snapshots.open(live.id)
    stack.callback(store.close)
    precision = PRECISION.get(live.manifest.engine, "of half precision")
    return _Live(live, store), f"snapshot {live.id} of the {other} store, whose vectors are approximations {precision}"


class _Live:
    """The nodes of a live snapshot, as if they were staged."""

    def __init__(self, snapshot: Snapshot, store: SnapshotStore) -> None:
        self._snapshot = snapshot
        self._store = store

    def counts(self) -> tuple[int, int]:
        return self._snapshot.manifest.documents, self._snapshot.manifest.nodes

    def problems(self) -> list[str]:
        return list(self._snapshot.manifest.skipped)

    def content(self) -> str:
        # Of the same nodes: whether their vectors have become a little less exact does not make them others.
        return self._snapshot.manifest.content

    def nodes(self) -> Iterator[BaseNode]:
        return self._store.embedded_nodes()

    def digests(self) -> Iterator[tuple[str, bytes]]:
        return iter(sorted((node.node_id, StoredNode.of(node).digest()) for node in self.nodes()))

    def some(self, node_ids: Sequence[str]) -> Iterator[BaseNode]:
        wanted = set(node_ids)
        return (node for node in self.nodes() if node.node_id in wanted)
