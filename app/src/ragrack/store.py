"""The vector store of a snapshot: vectors in FAISS, nodes in SQLite, both memory-mapped and read-only.

The number of a node in FAISS is its row in SQLite, from 0 without gaps. Filters are answered by SQLite, with bound
parameters, and given to FAISS as a bitmap of rows, so a filter never costs results, however few rows it leaves.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import faiss as _faiss
import numpy as np
from llama_index.core.schema import BaseNode, MetadataMode, TextNode
from llama_index.core.vector_stores.types import (
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from pydantic import PrivateAttr

from ragrack import hybrid
from ragrack.conditions import select
from ragrack.readonly import SnapshotStore
from ragrack.snapshot import FileEntry, SnapshotError, file_sha256

# Its stubs know neither its Python constructors nor all of its classes.
faiss: Any = _faiss

VECTORS = "vectors.faiss"
NODES = "nodes.sqlite"

FLAT_BELOW = 4096
"""Nodes. Comparing with each of fewer is as quick as a graph, and exact."""
HNSW_LINKS = 16
HNSW_EF_CONSTRUCTION = 80
HNSW_EF_SEARCH = 64
HNSW_EF_SEARCH_MOST = 1024
TRAINING = 100_000
"""Vectors that the range of the 8-bit scale is taken from."""
WRITE_BATCH = 1024
FILTERS_KEPT = 64
WORDS_KEPT = 4096

SCHEMA = """
CREATE TABLE node (
    row INTEGER PRIMARY KEY,
    node_id TEXT NOT NULL UNIQUE,
    ref_doc_id TEXT,
    text TEXT NOT NULL,
    metadata TEXT NOT NULL,
    rest TEXT NOT NULL
);
CREATE INDEX node_ref_doc_id ON node (ref_doc_id);
-- A list is a row for each element, with element = 1. No type for the value: 1 and '1' must differ.
CREATE TABLE metadata (
    key TEXT NOT NULL,
    element INTEGER NOT NULL,
    value NOT NULL,
    row INTEGER NOT NULL,
    PRIMARY KEY (key, element, value, row)
) WITHOUT ROWID;
CREATE VIRTUAL TABLE node_text USING fts5 (
    text, content = 'node', content_rowid = 'row', tokenize = 'porter unicode61'
);
"""

Mask = np.ndarray[Any, np.dtype[np.uint8]]
"""A bit for each row, the first in the lowest bit of the first byte, as FAISS reads them."""


@dataclass(frozen=True)
class Written:
    """What `write_snapshot_files` wrote."""

    engine: str
    nodes: int
    files: dict[str, FileEntry]


class SnapshotVectorStore(SnapshotStore):
    """Opening takes the same time at any size. The words of a text are ranked by BM25."""

    _index: Any = PrivateAttr()
    _pool: ThreadPoolExecutor = PrivateAttr()
    _local: threading.local = PrivateAttr()
    _connections: list[sqlite3.Connection] = PrivateAttr()
    _selected: Callable[[str], Mask] = PrivateAttr()
    _matches: Callable[[str], int] = PrivateAttr()

    @classmethod
    def open(cls, path: Path, threads: int = 2) -> SnapshotVectorStore:
        """The files of the snapshot at `path`; `threads` queries run at a time. Open it after a fork, never before.

        Raises SnapshotError when they are missing or do not fit each other.
        """
        store = cls()
        try:
            store._index = faiss.read_index(str(path / VECTORS), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)
            # All of them now: `path` may be pruned before the last thread starts.
            store._connections = [_connect(path / NODES) for _ in range(threads)]
            (rows,) = store._connections[0].execute("SELECT coalesce(max(row) + 1, 0) FROM node").fetchone()
        except (RuntimeError, sqlite3.Error) as error:
            raise SnapshotError(f"{path} cannot be opened: {error}") from error
        if rows != store._index.ntotal:
            raise SnapshotError(f"{path}: {VECTORS} has {store._index.ntotal} vectors, {NODES} has {rows} nodes")
        free = queue.SimpleQueue[sqlite3.Connection]()
        for connection in store._connections:
            free.put(connection)
        store._local = threading.local()
        store._selected = functools.lru_cache(FILTERS_KEPT)(store._select)
        store._matches = functools.lru_cache(WORDS_KEPT)(store._count_matches)

        def start() -> None:
            # For this thread alone: a second one would spin beside it for nothing.
            faiss.omp_set_num_threads(1)
            store._local.connection = free.get_nowait()

        store._pool = ThreadPoolExecutor(threads, thread_name_prefix="store", initializer=start)
        return store

    @classmethod
    def class_name(cls) -> str:
        return "SnapshotVectorStore"

    @property
    def client(self) -> Any:
        """The FAISS index."""
        return self._index

    @property
    def dimensions(self) -> int:
        return int(self._index.d)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def close(self) -> None:
        self._pool.shutdown()
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        # The caches hold this store, and the store the caches: none would go before the garbage collector comes.
        self._selected = self._select
        self._matches = self._count_matches
        self._index = None

    def _threads(self) -> Executor:
        return self._pool

    def _query(self, query: VectorStoreQuery, similarity_cutoff: float | None = None) -> VectorStoreQueryResult:
        k = query.similarity_top_k
        # A retriever of a VectorStoreIndex gives an empty list of ids when it means all.
        mask = self._mask(query.filters, query.node_ids or None, query.doc_ids)
        scored: list[tuple[int, float]]
        match query.mode:
            case VectorStoreQueryMode.DEFAULT:
                scored = _above(self._search(self._vector(query), k, mask), similarity_cutoff)
            case VectorStoreQueryMode.HYBRID:
                scored = self._fused(self._vector(query), query.query_str or "", k, mask, similarity_cutoff)
            case VectorStoreQueryMode.TEXT_SEARCH:
                scored = self._match(query.query_str or "", k, mask)
            case _:
                modes = "'default', 'hybrid' or 'text_search'"
                raise ValueError(f"query mode {query.mode.value!r} is not supported: use {modes}")
        nodes = self._read([row for row, _ in scored])
        similarities = [score for _, score in scored]
        return VectorStoreQueryResult(nodes=nodes, similarities=similarities, ids=[node.node_id for node in nodes])

    def _vector(self, query: VectorStoreQuery) -> Any:
        if query.query_embedding is None:
            raise ValueError("the query has no embedding: give the index an embed_model")
        vector = np.asarray([query.query_embedding], dtype=np.float32)
        if vector.shape != (1, self.dimensions):
            raise ValueError(f"the query's embedding has {vector.size} dimensions, the snapshot's {self.dimensions}")
        return vector

    def _fused(
        self, vector: Any, text: str, k: int, mask: Mask | None, cutoff: float | None
    ) -> list[tuple[int, float]]:
        """Reciprocal rank fusion of the dense order with BM25's; each node with its cosine."""
        most = hybrid.candidates(k)
        dense = self._search(vector, most, mask)
        similarity = dict(dense)
        matched = [row for row, _ in self._match(text, most, mask)]
        new = [row for row in matched if row not in similarity]
        if new:
            cosines = self._index.reconstruct_batch(np.asarray(new, dtype=np.int64)) @ vector[0]
            similarity |= zip(new, cosines.tolist(), strict=True)
        return hybrid.fuse([row for row, _ in dense], matched, similarity, k, cutoff)

    def _match(self, text: str, k: int, mask: Mask | None) -> list[tuple[int, float]]:
        """The nodes that hold any of the text's words, best first, by BM25."""
        counts = {word: self._matches(word) for word in hybrid.words_of(text)}
        asked = hybrid.worth_asking(counts, len(self))
        if not asked:
            return []
        ranked = self._execute(
            "SELECT rowid, -bm25(node_text) FROM node_text WHERE node_text MATCH ? ORDER BY bm25(node_text), rowid",
            " OR ".join(f'"{word}"' for word in asked),
        )
        allowed = (found for found in ranked if mask is None or mask[found[0] >> 3] >> (found[0] & 7) & 1)
        best = list(itertools.islice(allowed, k))
        ranked.close()
        return best

    def _count_matches(self, word: str) -> int:
        """How many nodes hold the word in any of its forms; it stops counting where a word is too frequent."""
        (count,) = self._execute(
            "SELECT count(*) FROM (SELECT 1 FROM node_text WHERE node_text MATCH ? LIMIT ?)",
            f'"{word}"',
            hybrid.MATCHES + 1,
        ).fetchone()
        return int(count)

    def _search(self, vector: Any, k: int, mask: Mask | None) -> list[tuple[int, float]]:
        total = len(self)
        allowed = total if mask is None else int(np.bitwise_count(mask).sum())
        k = min(k, allowed)
        if k <= 0:
            return []
        chosen: dict[str, Any] = {}
        if mask is not None:
            chosen["sel"] = faiss.IDSelectorBitmap(mask)
        index = self._index
        parameters: Any = faiss.SearchParameters(**chosen)
        if isinstance(index, faiss.IndexHNSW):
            effort = max(HNSW_EF_SEARCH, 2 * k) * total // allowed
            if effort > HNSW_EF_SEARCH_MOST:
                # So few are allowed that a walk along the graph would miss some: compare with each of them.
                index = faiss.downcast_index(index.storage)
            else:
                parameters = faiss.SearchParametersHNSW(efSearch=effort, **chosen)
        similarities, rows = index.search(vector, k, params=parameters)
        found = rows[0] >= 0
        return list(zip(rows[0][found].tolist(), similarities[0][found].tolist(), strict=True))

    def _get_nodes(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> list[BaseNode]:
        mask = self._mask(filters, node_ids, None)
        if mask is None:
            return self._read(range(len(self)))
        return self._read(np.flatnonzero(np.unpackbits(mask, count=len(self), bitorder="little")).tolist())

    def _read(self, rows: Sequence[int]) -> list[BaseNode]:
        found = {
            row: TextNode(id_=node_id, text=text, metadata=json.loads(metadata), **json.loads(rest))
            for row, node_id, text, metadata, rest in self._execute(
                "SELECT row, node_id, text, metadata, rest FROM node WHERE row IN (SELECT value FROM json_each(?))",
                json.dumps(list(rows)),
            )
        }
        return [found[row] for row in rows]

    def _execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        connection: sqlite3.Connection = self._local.connection
        return connection.execute(sql, parameters)

    def _mask(
        self, filters: MetadataFilters | None, node_ids: list[str] | None, doc_ids: list[str] | None
    ) -> Mask | None:
        """Which rows may be found; None for all."""
        masks = []
        if filters is not None and filters.filters:
            masks.append(self._selected(filters.model_dump_json()))
        if node_ids is not None:
            masks.append(self.rows("SELECT row FROM node WHERE node_id = ?", node_ids))
        if doc_ids is not None:
            sql = "SELECT row FROM node WHERE ref_doc_id = ?"
            masks.append(self.rows(sql, doc_ids))
        return functools.reduce(np.bitwise_and, masks) if masks else None

    def rows(self, sql: str, values: Sequence[Any], *before: Any) -> Mask:
        """The rows that a statement selects for any of the values, which it takes as its last parameter, one at a time.

        (As one JSON list they would be cut at a NUL, and 'a' found for 'a\\0b'.)
        """
        found = np.zeros(len(self), dtype=np.bool_)
        for value in values:
            cursor = self._execute(sql, *before, _plain(value))
            found[np.fromiter((row for (row,) in cursor), dtype=np.int64)] = True
        return np.packbits(found, bitorder="little")

    def _select(self, filters_json: str) -> Mask:
        return select(MetadataFilters.model_validate_json(filters_json), _Masks(self))


def _above(scored: list[tuple[int, float]], cutoff: float | None) -> list[tuple[int, float]]:
    return scored if cutoff is None else [(row, score) for row, score in scored if score >= cutoff]


class _Masks:
    """Which rows a condition selects, as bitmaps."""

    def __init__(self, store: SnapshotVectorStore) -> None:
        self._store = store

    def everything(self) -> Mask:
        return np.packbits(np.ones(len(self._store), dtype=np.bool_), bitorder="little")

    def all_but(self, selected: Mask) -> Mask:
        return self.everything() & ~selected

    def both(self, sets: Sequence[Mask]) -> Mask:
        return functools.reduce(np.bitwise_and, sets)

    def either(self, sets: Sequence[Mask]) -> Mask:
        return functools.reduce(np.bitwise_or, sets)

    def equal(self, key: str, values: Sequence[Any]) -> Mask:
        return self._store.rows(_IS, values, key)

    def hold(self, key: str, values: Sequence[Any]) -> Mask:
        return self._store.rows(_HOLDS, values, key)

    def filled(self, key: str) -> Mask:
        return self._store.rows(_IS_NOT, [""], key)

    def compare(self, key: str, comparison: str, value: Any) -> Mask:
        return self._store.rows(_COMPARED[comparison], [value], key, isinstance(value, str))

    def has_text(self, key: str, text: str, *, any_case: bool) -> Mask:
        if any_case:
            return self._store.rows(_HAS_TEXT_OF_ANY_CASE, [text.lower()], key)
        return self._store.rows(_HAS_TEXT, [text], key)


_IS = """
SELECT row FROM metadata WHERE key = ? AND element = 0 AND value = ?"""
_IS_NOT = """
SELECT row FROM metadata WHERE key = ? AND value != ?"""
_HOLDS = """
SELECT row FROM metadata WHERE key = ? AND element = 1 AND value = ?"""
_HAS_TEXT = """
SELECT row FROM metadata WHERE key = ? AND element = 0 AND typeof(value) = 'text'
AND instr(value, ?)"""
_HAS_TEXT_OF_ANY_CASE = """
SELECT row FROM metadata WHERE key = ? AND element = 0 AND typeof(value) = 'text'
AND instr(python_lower(value), ?)"""
# For SQLite every text is greater than every number, which is never what a filter means.
_COMPARED = {
    ">": """
SELECT row FROM metadata WHERE key = ? AND element = 0 AND (typeof(value) = 'text') = ?
AND value > ?""",
    ">=": """
SELECT row FROM metadata WHERE key = ? AND element = 0 AND (typeof(value) = 'text') = ?
AND value >= ?""",
    "<": """
SELECT row FROM metadata WHERE key = ? AND element = 0 AND (typeof(value) = 'text') = ?
AND value < ?""",
    "<=": """
SELECT row FROM metadata WHERE key = ? AND element = 0 AND (typeof(value) = 'text') = ?
AND value <= ?""",
}


def write_snapshot_files(nodes: Iterable[BaseNode], count: int, dimensions: int, out_dir: Path) -> Written:
    """Writes `count` text nodes, which have their embeddings, in the order given. All cores are used.

    Memory: the 8-bit index (about 0.6 kB a node) and one batch. Raises ValueError for a node without an embedding,
    OSError or sqlite3.Error when the disk is full.
    """
    vectors_path = out_dir / ".vectors.f32"
    connection = sqlite3.connect(out_dir / NODES)
    try:
        connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA temp_store = MEMORY;")
        connection.executescript(SCHEMA)
        with vectors_path.open("wb") as file:
            # A hole in a file that a full disk cannot fill would end the process without a word.
            os.posix_fallocate(file.fileno(), 0, max(count, 1) * dimensions * 4)
        vectors = np.memmap(vectors_path, np.float32, "r+", shape=(max(count, 1), dimensions))[:count]
        written = 0
        for row, node in enumerate(nodes):
            embedding = node.embedding
            if embedding is None or len(embedding) != dimensions:
                raise ValueError(f"node {node.node_id} has no embedding of {dimensions} dimensions")
            vectors[row] = embedding
            _insert(connection, row, node)
            written += 1
        if written != count:
            raise ValueError(f"{count} nodes were promised, {written} came")
        connection.execute("INSERT INTO node_text (node_text) VALUES ('rebuild')")
        connection.commit()
        index = _index(vectors)
        del vectors
        try:
            faiss.write_index(index, str(out_dir / VECTORS))
        except RuntimeError as error:
            raise OSError(str(error)) from error
    finally:
        connection.close()
        vectors_path.unlink(missing_ok=True)
    files = {name: FileEntry(file_sha256(out_dir / name), (out_dir / name).stat().st_size) for name in (VECTORS, NODES)}
    return Written("hnsw" if isinstance(index, faiss.IndexHNSW) else "flat", count, files)


def _index(vectors: Any) -> Any:
    count, dimensions = vectors.shape
    if count < FLAT_BELOW:
        index = faiss.IndexScalarQuantizer(dimensions, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    else:
        index = faiss.IndexHNSWSQ(dimensions, faiss.ScalarQuantizer.QT_8bit, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = HNSW_EF_CONSTRUCTION
        index.train(np.ascontiguousarray(vectors[:: max(1, count // TRAINING)]))
    for start in range(0, count, WRITE_BATCH):
        index.add(np.ascontiguousarray(vectors[start : start + WRITE_BATCH]))
    return index


def _insert(connection: sqlite3.Connection, row: int, node: BaseNode) -> None:
    rest = node.model_dump(
        mode="json", exclude_defaults=True, exclude={"id_", "embedding", "metadata", "text", "text_resource"}
    )
    rest.pop("class_name", None)
    connection.execute(
        "INSERT INTO node VALUES (?, ?, ?, ?, ?, ?)",
        (
            row,
            node.node_id,
            node.ref_doc_id,
            node.get_content(MetadataMode.NONE),
            json.dumps(node.metadata, ensure_ascii=False),
            json.dumps(rest, ensure_ascii=False),
        ),
    )
    connection.executemany(
        "INSERT OR IGNORE INTO metadata VALUES (?, ?, ?, ?)",
        [(key, element, value, row) for key, element, value in _flat(node.metadata)],
    )


def _flat(metadata: dict[str, Any]) -> Iterator[tuple[str, int, Any]]:
    for key, value in metadata.items():
        for element, one in [(1, item) for item in value] if isinstance(value, list) else [(0, value)]:
            if isinstance(one, str | int | float):
                yield key, element, _plain(one)


def _plain(value: Any) -> Any:
    """As SQLite can hold it."""
    return float(value) if isinstance(value, int) and not -(2**63) <= value < 2**63 else value


def _connect(path: Path) -> sqlite3.Connection:
    # Made in one thread of the pool, closed by whoever closes the store.
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?immutable=1&mode=ro", uri=True, isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA mmap_size = 2147418112")
    connection.create_function("python_lower", 1, str.lower, deterministic=True)
    return connection
