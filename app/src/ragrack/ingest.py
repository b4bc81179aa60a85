"""Documents to a live snapshot.

Read, embed what has changed, write a snapshot aside, ask it the golden questions, make it the live one. It writes only
below the index directory and can be killed at any point and run again. `current` moves last, or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.schema import BaseNode, Document
from llama_index.core.vector_stores.types import VectorStoreQuery

from ragrack import integrity, tenants
from ragrack.ahead import SplitAndEmbed
from ragrack.extract import KINDS, Limits
from ragrack.files import DocumentError, Found, find_documents, read_file
from ragrack.fingerprint import Fingerprint, ModelError
from ragrack.golden import GoldenError, GoldenReport, GoldenSet, evaluate
from ragrack.lock import BusyError, building
from ragrack.pages import PageByPage
from ragrack.parts import Embedding, node_parser, open_embedding
from ragrack.progress import Progress
from ragrack.readers import DocumentReader, ReaderError
from ragrack.readonly import Written
from ragrack.remote import EmbeddingUnavailableError
from ragrack.snapshot import Manifest, Snapshot, SnapshotDir, SnapshotError, timestamp
from ragrack.staging import Staging
from ragrack.store import SnapshotVectorStore
from ragrack.writer import update_snapshot_files, write_snapshot_files

if TYPE_CHECKING:
    from ragrack.settings import Settings

BATCH_CHARACTERS = 64_000
"""Of text, or one document: what a killed run loses, about a second's work."""


class IngestError(Exception):
    """The live snapshot is the one it was; the message says why and what mends it."""


def ingest(settings: Settings, collection: str, progress: Progress) -> Snapshot:
    """Builds a snapshot of the collection's documents and makes it live; the live one, where nothing has changed.

    One that is there already, of the same nodes, is not written again. While `current` is held it stays where it is.
    Raises IngestError: another run is at it, there are no documents, the disk is full, the golden questions failed.
    """
    documents = settings.documents_dir / collection
    golden_file = settings.golden_dir / f"{collection}.yml"
    try:
        golden = GoldenSet.load(golden_file, settings.golden_min_hit_rate) if golden_file.exists() else None
        fingerprint = Fingerprint.of(settings)
    except (GoldenError, ModelError) as error:
        raise IngestError(str(error)) from error
    found = find_documents(documents)
    if not found.documents:
        raise IngestError(
            f"{documents} holds no documents: put files there that end in {', '.join(KINDS)} "
            f"(an index is never emptied by itself){''.join(f'; {problem}' for problem in found.problems.values())}"
        )
    directory = SnapshotDir(settings.index_dir, collection, fingerprint.digest)
    staged = directory.root / "staging.sqlite"
    try:
        with building(settings.index_dir, collection), contextlib.ExitStack() as stack:
            directory.snapshots.mkdir(parents=True, exist_ok=True)
            threads = settings.ingest_threads or len(os.sched_getaffinity(0))
            embedding = open_embedding(settings, threads)
            stack.callback(embedding.close)
            staging = Staging(staged)
            stack.callback(staging.close)
            reader = stack.enter_context(DocumentReader(Limits.of(settings)))
            # What dead runs left, before the disk is needed.
            directory.prune(settings.keep_snapshots)
            _stage(staging, embedding, reader, settings, documents, found, progress)
            before = directory.current_id()
            snapshot = _publish(staging, embedding, directory, fingerprint, golden, progress)
            live = directory.offer(snapshot.id, "ingest")
            directory.prune(settings.keep_snapshots)
    except (BusyError, ModelError, SnapshotError, EmbeddingUnavailableError, ReaderError) as error:
        raise IngestError(str(error)) from error
    except sqlite3.OperationalError as error:
        raise IngestError(f"cannot write below {directory.root}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise IngestError(f"{staged} is damaged ({error}): remove it, and all is embedded anew") from error
    except OSError as error:
        raise IngestError(f"cannot write below {settings.index_dir}: {error}") from error
    manifest = snapshot.manifest
    outcome = "is still what the documents say" if snapshot.id == before else "is live"
    hold = directory.held()
    if not live and hold is not None:
        outcome = f"was built and is not live: {collection} is {hold.words()}"
    counts = f"{manifest.documents} documents, {manifest.nodes} nodes, {len(manifest.skipped)} skipped"
    progress("done", 1, 1, f"snapshot {snapshot.id} {outcome}: {counts}")
    return snapshot


def _stage(
    staging: Staging,
    embedding: Embedding,
    reader: DocumentReader,
    settings: Settings,
    root: Path,
    found: Found,
    progress: Progress,
) -> None:
    """Brings the staging area in step with the documents."""
    known = staging.files()
    with staging.transaction():
        for gone in known.keys() - set(found.documents):
            staging.forget(gone)
        for name, problem in found.problems.items():
            staging.note_file(name, "", problem)
    pipeline = IngestionPipeline(
        transformations=[
            SplitAndEmbed(
                parser=PageByPage(parser=node_parser(settings, embedding.tokens, _node_id)), embedding=embedding
            ),
        ],
        vector_store=staging.vector_store,
        docstore=staging.docstore,
        docstore_strategy=DocstoreStrategy.UPSERTS,
        disable_cache=True,
    )
    total = len(found.documents)

    def embed(batch: list[tuple[Document, str]]) -> None:
        try:
            with staging.transaction():
                pipeline.run(documents=[document for document, _ in batch], store_doc_text=False)
                for document, sha256 in batch:
                    staging.note_file(document.doc_id, sha256)
        except (ValueError, RecursionError) as error:
            if len(batch) > 1:
                for one in batch:
                    embed([one])
            else:
                document, sha256 = batch[0]
                skip(document.doc_id, sha256, f"{document.doc_id}: cannot be split into nodes ({error})")

    def skip(name: str, sha256: str, problem: str) -> None:
        with staging.transaction():
            staging.remove_nodes(name)
            staging.note_file(name, sha256, problem)

    limits = Limits.of(settings)
    progress("embed", 0, total)
    batch: list[tuple[Document, str]] = []
    for number, name in enumerate(found.documents, start=1):
        try:
            data = read_file(root, name, settings.document_max_bytes)
            sha256 = hashlib.sha256(data).hexdigest()
            # What was refused is tried again when the limits are others.
            refused = f"{sha256} within {limits}"
            if known.get(name) in (sha256, refused):
                continue
            document = reader.read(name, data)
            if settings.tenants == "by_folder":
                tenants.mark(document)
        except DocumentError as error:
            skip(name, "" if error.again else refused, str(error))
        except tenants.NoFolderError as error:
            skip(name, sha256, str(error))
        else:
            batch.append((document, sha256))
        if sum(len(document.text) for document, _ in batch) >= BATCH_CHARACTERS:
            embed(batch)
            batch = []
        # What is told as done would not be lost.
        progress("embed", number - len(batch), total)
    if batch:
        embed(batch)
    progress("embed", total, total)
    if found.others:
        kinds = ", ".join(f"{count} {suffix or 'without an ending'}" for suffix, count in found.others.most_common(10))
        progress("embed", total, total, f"not read, as they are no documents by their endings: {kinds}")
    for problem in staging.problems():
        progress("embed", total, total, f"skipped {problem}")


def _publish(
    staging: Staging,
    embedding: Embedding,
    directory: SnapshotDir,
    fingerprint: Fingerprint,
    golden: GoldenSet | None,
    progress: Progress,
) -> Snapshot:
    documents, nodes = staging.counts()
    skipped = staging.problems()
    if not nodes:
        raise IngestError(f"no document could be read: {'; '.join(skipped)}")
    content = staging.content()
    parent = _sound_current(directory)
    if parent is not None and parent.manifest.content == content:
        return parent
    same = _same_content(directory, content)
    if same is not None:
        _gate(golden, same.path, directory.collection, embedding, progress)
        integrity.note(directory, same)
        return same
    with directory.new() as new:
        progress("write", 0, nodes)
        written = _updated(staging, directory, parent, new)
        if written is None:
            every = _counted(staging.nodes(), nodes, progress)
            written = write_snapshot_files(every, nodes, fingerprint.dimensions, new)
        report = _gate(golden, new, directory.collection, embedding, progress)
        now = timestamp()
        manifest = Manifest(
            id=f"{now}-{content[:8]}",
            collection=directory.collection,
            fingerprint=fingerprint.digest,
            built_with=asdict(fingerprint),
            content=content,
            created=now,
            parent=parent.id if parent else None,
            documents=documents,
            nodes=nodes,
            dimensions=fingerprint.dimensions,
            engine=written.engine,
            files=written.files,
            golden=report.model_dump() if report else None,
            skipped=skipped,
        )
        snapshot = directory.publish(new, manifest)
        integrity.note(directory, snapshot)
        return snapshot


def _updated(staging: Staging, directory: SnapshotDir, parent: Snapshot | None, new: Path) -> Written | None:
    """The files, made out of the live snapshot's; None where those are damaged or all is better written anew."""
    if parent is None:
        return None
    try:
        directory.verify(parent.id)
    except SnapshotError:
        return None
    return update_snapshot_files(parent.path, staging, new)


def _gate(
    golden: GoldenSet | None, path: Path, collection: str, embedding: Embedding, progress: Progress
) -> GoldenReport | None:
    """What the golden questions found in the snapshot at `path`. Raises IngestError where that is not enough."""
    if golden is None:
        progress("check", 0, 0, f"collection {collection} has no golden questions: nothing was asked")
        return None
    progress("check", 0, len(golden.questions))
    report = _ask(golden, path, embedding)
    progress("check", len(golden.questions), len(golden.questions), report.summary())
    if not report.passed:
        raise IngestError(f"the new snapshot was not taken: {report.summary()}")
    return report


def _ask(golden: GoldenSet, path: Path, embedding: Embedding) -> GoldenReport:
    store = SnapshotVectorStore.open(path)

    async def retrieve(question: str, k: int) -> list[str]:
        vector = await embedding.aget_query_embedding(question)
        result = await store.aquery(VectorStoreQuery(query_embedding=vector, similarity_top_k=k))
        return [str(node.metadata["document"]) for node in result.nodes or []]

    try:
        return asyncio.run(evaluate(golden, retrieve))
    finally:
        store.close()


def _sound_current(directory: SnapshotDir) -> Snapshot | None:
    """The live snapshot; None where it is missing or damaged, which the one to come mends."""
    try:
        current = directory.current()
        if current is not None:
            current.check()
        return current
    except SnapshotError:
        return None


def _same_content(directory: SnapshotDir, content: str) -> Snapshot | None:
    """The newest snapshot of the same nodes whose every byte is right, as when documents are what they once were."""
    for snapshot in reversed(directory.list()):
        if snapshot.manifest.content == content:
            with contextlib.suppress(SnapshotError):
                directory.verify(snapshot.id)
                return snapshot
    return None


def _counted(nodes: Iterator[BaseNode], total: int, progress: Progress) -> Iterator[BaseNode]:
    for number, node in enumerate(nodes, start=1):
        yield node
        if number % 1000 == 0 or number == total:
            progress("write", number, total)


def _node_id(number: int, document: BaseNode) -> str:
    return f"{document.node_id}#{number}"
