"""What an ingest has done so far, in one SQLite file: embedded nodes, and the docstore of the documents they are of.

It outlives the run, so that the next one embeds only what has changed. Each batch is one transaction: a run that is
killed loses the batch it was at.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.schema import BaseNode
from llama_index.core.storage.docstore.keyval_docstore import KVDocumentStore
from llama_index.core.storage.kvstore.types import DEFAULT_BATCH_SIZE, DEFAULT_COLLECTION, BaseKVStore
from llama_index.core.vector_stores.types import BasePydanticVectorStore, VectorStoreQuery, VectorStoreQueryResult
from pydantic import PrivateAttr

from ragrack.snapshot import fsync
from ragrack.stored import StoredNode

SCHEMA = """
CREATE TABLE IF NOT EXISTS file (document TEXT PRIMARY KEY, sha256 TEXT NOT NULL, problem TEXT);
CREATE TABLE IF NOT EXISTS node (
    number INTEGER PRIMARY KEY,
    ref_doc_id TEXT NOT NULL,
    node_id TEXT NOT NULL UNIQUE,
    text TEXT NOT NULL,
    metadata TEXT NOT NULL,
    rest TEXT NOT NULL,
    digest BLOB NOT NULL,
    embedding BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS node_ref_doc_id ON node (ref_doc_id, number);
CREATE TABLE IF NOT EXISTS docstore (collection TEXT, key TEXT, value TEXT NOT NULL, PRIMARY KEY (collection, key));
"""

_NODES = """
SELECT embedding, node_id, ref_doc_id, text, metadata, rest FROM node ORDER BY ref_doc_id, number"""
_SOME = """
SELECT embedding, node_id, ref_doc_id, text, metadata, rest FROM node
WHERE node_id IN (SELECT value FROM json_each(?)) ORDER BY ref_doc_id, number"""


class Staging:
    """The file, and the two sides of it that an IngestionPipeline writes to."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA temp_store = MEMORY")
        self._connection.executescript(SCHEMA)
        self.vector_store = StagingVectorStore.over(self._connection)
        self.docstore = KVDocumentStore(_KVStore(self._connection))

    def close(self) -> None:
        self._connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block or nothing."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def files(self) -> dict[str, str]:
        """The SHA-256 of every file that has been dealt with, by document."""
        return dict(self._connection.execute("SELECT document, sha256 FROM file"))

    def problems(self) -> list[str]:
        """Of the files that could not be read."""
        rows = self._connection.execute("SELECT problem FROM file WHERE problem IS NOT NULL ORDER BY document")
        return [problem for (problem,) in rows]

    def note_file(self, document: str, sha256: str, problem: str | None = None) -> None:
        self._connection.execute("INSERT OR REPLACE INTO file VALUES (?, ?, ?)", (document, sha256, problem))

    def forget(self, document: str) -> None:
        """The file and its nodes."""
        self._connection.execute("DELETE FROM file WHERE document = ?", (document,))
        self.remove_nodes(document)

    def remove_nodes(self, document: str) -> None:
        self.vector_store.delete(document)
        self.docstore.delete_ref_doc(document, raise_error=False)
        self.docstore.delete_document(document, raise_error=False)

    def counts(self) -> tuple[int, int]:
        """Documents and nodes."""
        row: tuple[int, int] = self._connection.execute(
            "SELECT count(DISTINCT ref_doc_id), count(*) FROM node"
        ).fetchone()
        return row

    def content(self) -> str:
        """SHA-256 over the nodes, in order."""
        digest = hashlib.sha256()
        for node_id, node_digest in self._connection.execute(
            "SELECT node_id, digest FROM node ORDER BY ref_doc_id, number"
        ):
            digest.update(f"{json.dumps(node_id)} {node_digest.hex()}\n".encode())
        return digest.hexdigest()

    def digests(self) -> Iterator[tuple[str, bytes]]:
        """Of each node its id and what tells its versions apart, by id."""
        return self._connection.execute("SELECT node_id, digest FROM node ORDER BY node_id")

    def nodes(self) -> Iterator[BaseNode]:
        """With their embeddings, by document, in the order of its text."""
        return map(_node, self._connection.execute(_NODES))

    def some(self, node_ids: Sequence[str]) -> Iterator[BaseNode]:
        """The nodes with these ids, as `nodes` gives them."""
        return map(_node, self._connection.execute(_SOME, (json.dumps(node_ids),)))


def copy(source: Path, target: Path) -> None:
    """Whole or not at all. Raises sqlite3.Error."""
    aside = target.with_name(f".{target.name}")
    aside.unlink(missing_ok=True)
    with (
        contextlib.closing(sqlite3.connect(f"{source.as_uri()}?mode=rw", uri=True)) as read,
        contextlib.closing(sqlite3.connect(aside)) as written,
    ):
        read.backup(written)
    fsync(aside)
    aside.replace(target)


class StagingVectorStore(BasePydanticVectorStore):
    """Takes nodes and gives them up again; it is not for queries."""

    stores_text: bool = True
    _connection: sqlite3.Connection = PrivateAttr()

    @classmethod
    def over(cls, connection: sqlite3.Connection) -> StagingVectorStore:
        store = cls()
        store._connection = connection
        return store

    @property
    def client(self) -> sqlite3.Connection:
        return self._connection

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        self._connection.executemany(
            "INSERT INTO node (node_id, ref_doc_id, text, metadata, rest, digest, embedding)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (*stored, stored.digest(), np.asarray(node.get_embedding(), dtype="<f4").tobytes())
                for node, stored in ((node, StoredNode.of(node)) for node in nodes)
            ],
        )
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        self._connection.execute("DELETE FROM node WHERE ref_doc_id = ?", (ref_doc_id,))

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        raise TypeError("the staging area of an ingest answers no queries: open a snapshot")


def _node(row: tuple[Any, ...]) -> BaseNode:
    embedding, *stored = row
    node = StoredNode(*stored).node()
    node.embedding = np.frombuffer(embedding, dtype="<f4").tolist()
    return node


class _KVStore(BaseKVStore):
    """LlamaIndex's interface of the docstore table."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def put(self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION) -> None:
        self.put_all([(key, val)], collection)

    def put_all(
        self,
        kv_pairs: list[tuple[str, dict[str, Any]]],
        collection: str = DEFAULT_COLLECTION,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        self._connection.executemany(
            "INSERT OR REPLACE INTO docstore VALUES (?, ?, ?)",
            [(collection, key, json.dumps(value)) for key, value in kv_pairs],
        )

    def get(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        row = self._connection.execute(
            "SELECT value FROM docstore WHERE collection = ? AND key = ?", (collection, key)
        ).fetchone()
        return json.loads(row[0]) if row else None

    def get_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        rows = self._connection.execute("SELECT key, value FROM docstore WHERE collection = ?", (collection,))
        return {key: json.loads(value) for key, value in rows}

    def delete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        cursor = self._connection.execute("DELETE FROM docstore WHERE collection = ? AND key = ?", (collection, key))
        return cursor.rowcount > 0

    async def aput(self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION) -> None:
        self.put(key, val, collection)

    async def aget(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        return self.get(key, collection)

    async def aget_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        return self.get_all(collection)

    async def adelete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        return self.delete(key, collection)
