"""Documents to a live snapshot.

Read, embed what has changed, write a snapshot aside, ask it the golden questions, make it the live one. It writes only
below the index directory and can be killed at any point and run again. `current` moves last, or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.schema import BaseNode, Document

from ragrack import catalog, tenants
from ragrack.ahead import SplitAndEmbed
from ragrack.catalog import Snapshot
from ragrack.extract import KINDS, Limits
from ragrack.files import DocumentError, Found, find_documents, read_file
from ragrack.fingerprint import Fingerprint, ModelError
from ragrack.golden import GoldenError, GoldenSet
from ragrack.lock import BusyError, building
from ragrack.pages import PageByPage
from ragrack.parts import Embedding, node_parser, open_embedding
from ragrack.progress import Progress
from ragrack.publish import PublishError, publish, staged_at
from ragrack.readers import DocumentReader, ReaderError
from ragrack.remote import EmbeddingUnavailableError
from ragrack.snapshot import SnapshotError
from ragrack.staging import Staging, copy

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
    try:
        golden = GoldenSet.of(settings, collection)
        fingerprint = Fingerprint.of(settings)
    except (GoldenError, ModelError) as error:
        raise IngestError(str(error)) from error
    found = find_documents(documents)
    if not found.documents:
        raise IngestError(
            f"{documents} holds no documents: put files there that end in {', '.join(KINDS)} "
            f"(an index is never emptied by itself){''.join(f'; {problem}' for problem in found.problems.values())}"
        )
    snapshots = catalog.snapshots(settings, collection, fingerprint.digest)
    staged = staged_at(settings, collection, fingerprint.digest)
    try:
        with building(settings.index_dir, collection), contextlib.ExitStack() as stack:
            # As of an index on this host, wherever the snapshots are kept: so `ragrack index prune` finds it.
            (staged.parent / "snapshots").mkdir(parents=True, exist_ok=True)
            threads = settings.ingest_threads or len(os.sched_getaffinity(0))
            embedding = open_embedding(settings, threads)
            stack.callback(embedding.close)
            _take_over(staged_at(settings, collection, fingerprint.elsewhere.digest), staged)
            staging = Staging(staged)
            stack.callback(staging.close)
            limits = Limits.of(settings)
            reader = stack.enter_context(DocumentReader(limits))
            # What dead runs left, before the disk is needed.
            snapshots.prune(settings.keep_snapshots)
            _stage(staging, embedding, reader, limits, settings, documents, found, progress)
            outcome = publish(staging, embedding, snapshots, fingerprint, golden, progress)
            snapshots.prune(settings.keep_snapshots)
    except (BusyError, ModelError, PublishError, SnapshotError, EmbeddingUnavailableError, ReaderError) as error:
        raise IngestError(str(error)) from error
    except sqlite3.OperationalError as error:
        raise IngestError(f"cannot write below {staged.parent}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise IngestError(f"{staged} is damaged ({error}): remove it, and all is embedded anew") from error
    except OSError as error:
        raise IngestError(f"cannot write below {settings.index_dir}: {error}") from error
    progress("done", 1, 1, outcome.words())
    return outcome.snapshot


def _take_over(before: Path, staged: Path) -> None:
    """What is staged for an index of the same nodes that is kept another way need not be embedded again."""
    if before.exists() and not staged.exists():
        # What cannot be copied is embedded anew.
        with contextlib.suppress(sqlite3.Error):
            copy(before, staged)


def _stage(
    staging: Staging,
    embedding: Embedding,
    reader: DocumentReader,
    limits: Limits,
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


def _node_id(number: int, document: BaseNode) -> str:
    return f"{document.node_id}#{number}"
