"""The vector store of a snapshot: nodes in SQLite, memory-mapped and read-only, and vectors in FAISS or an engine.

The number of a vector is its node's row in SQLite. One of FAISS may have lost its node (`ragrack.writer`): no query
finds it. Filters are answered by SQLite, with bound parameters, and given to the vectors as a bitmap of rows, so a
filter never costs results, however few rows it leaves.
"""

from __future__ import annotations

import functools
import json
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from pydantic import PrivateAttr

from ragrack import hybrid, tenants
from ragrack.conditions import select
from ragrack.faiss_vectors import FaissVectors
from ragrack.readonly import SnapshotStore
from ragrack.snapshot import SnapshotError
from ragrack.stored import StoredNode
from ragrack.vectors import Mask, Selection, Vectors, by_score

NODES = "nodes.sqlite"

BATCH = 1000
FILTERS_KEPT = 64
WORDS_KEPT = 4096


class SnapshotVectorStore(SnapshotStore):
    """Opening takes the same time at any size. The words of a text are ranked by BM25."""

    _vectors: Vectors = PrivateAttr()
    _pool: ThreadPoolExecutor = PrivateAttr()
    _local: threading.local = PrivateAttr()
    _connections: list[sqlite3.Connection] = PrivateAttr()
    _all: Selection | None = PrivateAttr()
    _selected: Callable[[str], Selection] = PrivateAttr()
    _matches: Callable[[str, range], int] = PrivateAttr()

    @classmethod
    def open(cls, path: Path, threads: int = 2) -> SnapshotVectorStore:
        """The files of the snapshot at `path`; `threads` queries run at a time. Open it after a fork, never before.

        Raises SnapshotError when they are missing or do not fit each other.
        """
        return cls.over(FaissVectors(path), path, threads)

    @classmethod
    def over(cls, vectors: Vectors, path: Path, threads: int = 2) -> SnapshotVectorStore:
        """As `open`, with vectors that need not be there."""
        store = cls()
        store._vectors = vectors
        try:
            # All of them now: `path` may be pruned before the last thread starts.
            store._connections = [connect(path / NODES) for _ in range(threads)]
            rows, live = store._connections[0].execute("SELECT rows, live FROM extent").fetchone()
        except sqlite3.Error as error:
            raise SnapshotError(f"{path} cannot be opened: {error}") from error
        if rows != vectors.rows:
            raise SnapshotError(f"{path}: {vectors} has {vectors.rows} vectors, {NODES} has {rows} rows")
        store._all = None if live is None else Selection(np.frombuffer(live, dtype=np.uint8))
        free = queue.SimpleQueue[sqlite3.Connection]()
        for connection in store._connections:
            free.put(connection)
        store._local = threading.local()
        store._selected = functools.lru_cache(FILTERS_KEPT)(store._select)
        store._matches = functools.lru_cache(WORDS_KEPT)(store._count_matches)

        def start() -> None:
            vectors.start_thread()
            store._local.connection = free.get_nowait()

        store._pool = ThreadPoolExecutor(threads, thread_name_prefix="store", initializer=start)
        return store

    @classmethod
    def class_name(cls) -> str:
        return "SnapshotVectorStore"

    @property
    def client(self) -> Vectors:
        return self._vectors

    @property
    def dimensions(self) -> int:
        return self._vectors.dimensions

    def __len__(self) -> int:
        return self._rows if self._all is None else self._all.count

    @property
    def _rows(self) -> int:
        return self._vectors.rows

    def close(self) -> None:
        self._pool.shutdown()
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        # The caches hold this store, and the store the caches: none would go before the garbage collector comes.
        self._selected = self._select
        self._matches = self._count_matches
        self._vectors.close()

    def embedded_nodes(self) -> Iterator[BaseNode]:
        rows = np.flatnonzero(np.unpackbits(self.everything(), count=self._rows, bitorder="little"))
        for start in range(0, len(rows), BATCH):
            yield from self._pool.submit(self._embedded, rows[start : start + BATCH]).result()

    def _embedded(self, rows: Any) -> list[BaseNode]:
        nodes = self._read(rows.tolist())
        for node, vector in zip(nodes, self._vectors.read(rows.tolist()), strict=True):
            node.embedding = vector.tolist()
        return nodes

    def _threads(self) -> Executor:
        return self._pool

    def _query(self, query: VectorStoreQuery, similarity_cutoff: float | None = None) -> VectorStoreQueryResult:
        k = query.similarity_top_k
        # A retriever of a VectorStoreIndex gives an empty list of ids when it means all.
        chosen = self._choose(query.filters, query.node_ids or None, query.doc_ids)
        scored: list[tuple[int, float]]
        match query.mode:
            case VectorStoreQueryMode.DEFAULT:
                scored = _above(self._vectors.nearest(self._vector(query), k, chosen), similarity_cutoff)
            case VectorStoreQueryMode.HYBRID:
                scored = self._fused(self._vector(query), query.query_str or "", k, chosen, similarity_cutoff)
            case VectorStoreQueryMode.TEXT_SEARCH:
                scored = self._match(query.query_str or "", k, chosen)
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
        self, vector: Any, text: str, k: int, chosen: Selection | None, cutoff: float | None
    ) -> list[tuple[int, float]]:
        """Reciprocal rank fusion of the dense order with BM25's; each node with its cosine."""
        most = hybrid.candidates(k)
        dense = self._vectors.nearest(vector, most, chosen)
        similarity = dict(dense)
        matched = [row for row, _ in self._match(text, most, chosen)]
        new = [row for row in matched if row not in similarity]
        if new:
            similarity |= zip(new, self._vectors.cosines(vector, new), strict=True)
        return hybrid.fuse([row for row, _ in dense], matched, similarity, k, cutoff)

    def _match(self, text: str, k: int, chosen: Selection | None) -> list[tuple[int, float]]:
        """The nodes that hold any of the text's words, best first, by BM25.

        Its words are counted where they are looked for: what other tenants' nodes say takes no room.
        """
        everywhere = range(self._rows)
        spans = [everywhere] if chosen is None else chosen.spans
        looked_at = sum(map(len, spans))
        counts = {word: sum(self._matches(word, span) for span in spans) for word in hybrid.words_of(text)}
        frequent = (word for word in counts if hybrid.frequent(counts[word], looked_at))
        rare = [word for word in frequent if not hybrid.frequent(self._matches(word, everywhere), len(self))]
        asked = hybrid.worth_asking(counts, looked_at, rare)
        if not asked:
            return []
        best: list[tuple[int, float]] = []
        for span in spans:
            asking = [" OR ".join(f'"{word}"' for word in asked), span.start, span.stop]
            if chosen is None:
                best += self._execute(_BEST, *asking, k)
            else:
                first, mask = chosen.around(span)
                best += self._execute(_BEST_CHOSEN, *asking, _a_byte_for_each(mask), first, k)
        return sorted(best, key=by_score)[:k]

    def _count_matches(self, word: str, span: range) -> int:
        """How many nodes in the span hold the word in any form; it stops counting where the word is too frequent."""
        most = hybrid.most_matches(len(span)) + 1
        (count,) = self._execute(_COUNTED, f'"{word}"', span.start, span.stop, most).fetchone()
        return int(count)

    def _get_nodes(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> list[BaseNode]:
        chosen = self._choose(filters, node_ids, None)
        if chosen is None:
            return self._read(range(self._rows))
        return self._read(np.flatnonzero(np.unpackbits(chosen.mask, bitorder="little")).tolist())

    def _read(self, rows: Sequence[int]) -> list[BaseNode]:
        found = {
            row: StoredNode(*stored).node()
            for row, *stored in self._execute(
                "SELECT row, node_id, ref_doc_id, text, metadata, rest FROM node"
                " WHERE row IN (SELECT value FROM json_each(?))",
                json.dumps(list(rows)),
            )
        }
        return [found[row] for row in rows]

    def _execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        connection: sqlite3.Connection = self._local.connection
        return connection.execute(sql, parameters)

    def _choose(
        self, filters: MetadataFilters | None, node_ids: list[str] | None, doc_ids: list[str] | None
    ) -> Selection | None:
        """Which rows may be found; None for all."""
        chosen = []
        if filters is not None and filters.filters:
            chosen.append(self._selected(filters.model_dump_json()))
        if node_ids is not None:
            chosen.append(Selection(self.holding("SELECT row FROM node WHERE node_id = ?", node_ids)))
        if doc_ids is not None:
            chosen.append(Selection(self.holding("SELECT row FROM node WHERE ref_doc_id = ?", doc_ids)))
        if len(chosen) > 1:
            mask = functools.reduce(np.bitwise_and, (selection.mask for selection in chosen))
            return Selection(mask, chosen[0].tenant)
        return chosen[0] if chosen else self._all

    def holding(self, sql: str, values: Sequence[Any], *before: Any) -> Mask:
        """The rows that a statement selects for any of the values, which it takes as its last parameter, one at a time.

        (As one JSON list they would be cut at a NUL, and 'a' found for 'a\\0b'.)
        """
        found = np.zeros(self._rows, dtype=np.bool_)
        for value in values:
            cursor = self._execute(sql, *before, plain(value))
            found[np.fromiter((row for (row,) in cursor), dtype=np.int64)] = True
        return np.packbits(found, bitorder="little")

    def everything(self) -> Mask:
        """The rows that have a node."""
        if self._all is not None:
            return self._all.mask
        return np.packbits(np.ones(self._rows, dtype=np.bool_), bitorder="little")

    def _select(self, filters_json: str) -> Selection:
        filters = MetadataFilters.model_validate_json(filters_json)
        return Selection(select(filters, _Masks(self)), tenants.of_all(filters))


def _a_byte_for_each(mask: Mask) -> bytes:
    return np.unpackbits(mask, bitorder="little").tobytes()


def _above(scored: list[tuple[int, float]], cutoff: float | None) -> list[tuple[int, float]]:
    return scored if cutoff is None else [(row, score) for row, score in scored if score >= cutoff]


class _Masks:
    """Which rows a condition selects, as bitmaps."""

    def __init__(self, store: SnapshotVectorStore) -> None:
        self._store = store

    def everything(self) -> Mask:
        return self._store.everything()

    def all_but(self, selected: Mask) -> Mask:
        return self.everything() & ~selected

    def both(self, sets: Sequence[Mask]) -> Mask:
        return functools.reduce(np.bitwise_and, sets)

    def either(self, sets: Sequence[Mask]) -> Mask:
        return functools.reduce(np.bitwise_or, sets)

    def equal(self, key: str, values: Sequence[Any]) -> Mask:
        return self._store.holding(_IS, values, key)

    def hold(self, key: str, values: Sequence[Any]) -> Mask:
        return self._store.holding(_HOLDS, values, key)

    def filled(self, key: str) -> Mask:
        return self._store.holding(_IS_NOT, [""], key)

    def compare(self, key: str, comparison: str, value: Any) -> Mask:
        return self._store.holding(_COMPARED[comparison], [value], key, isinstance(value, str))

    def has_text(self, key: str, text: str, *, any_case: bool) -> Mask:
        if any_case:
            return self._store.holding(_HAS_TEXT_OF_ANY_CASE, [text.lower()], key)
        return self._store.holding(_HAS_TEXT, [text], key)


_BEST = """
SELECT rowid, -bm25(node_text) FROM node_text WHERE node_text MATCH ? AND rowid >= ? AND rowid < ?
ORDER BY bm25(node_text), rowid LIMIT ?"""
_BEST_CHOSEN = """
SELECT rowid, -bm25(node_text) FROM node_text WHERE node_text MATCH ? AND rowid >= ? AND rowid < ?
AND substr(?, rowid - ? + 1, 1) = x'01'
ORDER BY bm25(node_text), rowid LIMIT ?"""
_COUNTED = """
SELECT count(*) FROM (SELECT 1 FROM node_text WHERE node_text MATCH ? AND rowid >= ? AND rowid < ? LIMIT ?)"""
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


def plain(value: Any) -> Any:
    """As SQLite can hold it."""
    return float(value) if isinstance(value, int) and not -(2**63) <= value < 2**63 else value


def connect(path: Path) -> sqlite3.Connection:
    # Made in one thread of the pool, closed by whoever closes the store.
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?immutable=1&mode=ro", uri=True, isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA mmap_size = 2147418112")
    connection.create_function("python_lower", 1, str.lower, deterministic=True)
    return connection
