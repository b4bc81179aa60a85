"""The vector store of a snapshot in PostgreSQL: one table of nodes, with pgvector's HNSW and full-text search.

Filters are conditions of the query, with bound parameters. Where a filter leaves few nodes each is compared with the
question; where it leaves many the graph is walked until it has found enough of them: a filter costs no results.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, LiteralString, TypeVar

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from psycopg import errors, sql
from pydantic import PrivateAttr

from ragrack import deadline, hybrid
from ragrack.postgres_client import EF_SEARCH, Connection, Database, statement
from ragrack.postgres_filters import EVERYTHING, Condition, condition
from ragrack.postgres_text import decode, encode, filterable
from ragrack.readonly import SnapshotStore, Written
from ragrack.snapshot import FileEntry, SnapshotError
from ragrack.stored import StoredNode

K = TypeVar("K")
GRAPH_FROM = 4096
"""Nodes. Comparing with each of fewer is as quick as a graph, and exact."""
EXACT_MOST = 10_000
"""Nodes that a filter may leave for each of them to be compared with."""
LINKS = 16
EF_CONSTRUCTION = 80
PLAIN_DIMENSIONS = 1000
"""Up to so many a vector fits into its row; longer ones PostgreSQL puts aside."""
BATCH = 1000
FILTERS_KEPT = 64
WORDS_KEPT = 4096


@dataclass(frozen=True)
class Read:
    """How a store reaches its rows: in the pool of a Database, or on the connection that is writing them."""

    run: Callable[[Callable[[Connection], Any], float], Any]
    threads: Executor


class PostgresVectorStore(SnapshotStore):
    """Opening asks for one row. The words of a text are ranked by their rarity, their number and the text's length."""

    _table: str = PrivateAttr()
    _read: Read = PrivateAttr()
    _own: Executor | None = PrivateAttr(default=None)
    _count: int = PrivateAttr()
    _dimensions: int = PrivateAttr()
    _left: dict[str, int] = PrivateAttr(default_factory=dict)
    _words: dict[tuple[str, str], int] = PrivateAttr(default_factory=dict)

    @classmethod
    def open(cls, database: Database, table: str, count: int, dimensions: int) -> PostgresVectorStore:
        """The nodes of `table`. Raises SnapshotError where they are not there."""

        def run(work: Callable[[Connection], Any], until: float) -> Any:
            try:
                return database.read(work, until)
            except errors.UndefinedTable as error:
                raise SnapshotError(
                    f"table {table} of the {database.target} is gone, and its snapshot with it"
                ) from error

        store = cls._of(table, count, dimensions, Read(run, database.threads))
        run(lambda connection: connection.execute(statement("SELECT FROM {t} LIMIT 1", t=table)), math.inf)
        return store

    @classmethod
    def writing(cls, connection: Connection, table: str, count: int, dimensions: int) -> PostgresVectorStore:
        """What `connection` has written and not yet committed."""
        threads = ThreadPoolExecutor(1, thread_name_prefix="postgres-draft")
        store = cls._of(table, count, dimensions, Read(lambda work, _: work(connection), threads))
        store._own = threads
        return store

    @classmethod
    def _of(cls, table: str, count: int, dimensions: int, read: Read) -> PostgresVectorStore:
        store = cls()
        store._table, store._count, store._dimensions, store._read = table, count, dimensions, read
        return store

    @classmethod
    def class_name(cls) -> str:
        return "PostgresVectorStore"

    @property
    def client(self) -> Any:
        """The name of its table in the schema `ragrack`."""
        return self._table

    @property
    def dimensions(self) -> int:
        return self._dimensions

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        if self._own is not None:
            self._own.shutdown()

    def embedded_nodes(self) -> Iterator[BaseNode]:
        last = -1
        while rows := self._read.run(functools.partial(self._embedded, last), math.inf):
            for row, vector, *stored in rows:
                node = _node(*stored)
                node.embedding = json.loads(vector)
                yield node
                last = row

    def _embedded(self, last: int, connection: Connection) -> list[Any]:
        return self._run(connection, _READ_ON, EVERYTHING, last=last, most=BATCH)

    def _threads(self) -> Executor:
        return self._read.threads

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        return super().query(query, until=time.monotonic() + deadline.remaining(), **kwargs)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        return await super().aquery(query, until=time.monotonic() + deadline.remaining(), **kwargs)

    def _query(
        self, query: VectorStoreQuery, similarity_cutoff: float | None = None, until: float = math.inf
    ) -> VectorStoreQueryResult:
        if query.mode not in _MODES:
            modes = "'default', 'hybrid' or 'text_search'"
            raise ValueError(f"query mode {query.mode.value!r} is not supported: use {modes}")
        vector = None if query.mode == VectorStoreQueryMode.TEXT_SEARCH else self._vector(query)
        # A retriever of a VectorStoreIndex gives an empty list of ids when it means all.
        allowed = condition(query.filters, query.node_ids or None, query.doc_ids)

        def work(connection: Connection) -> tuple[list[BaseNode], list[float]]:
            scored = self._scored(connection, query, vector, allowed, similarity_cutoff)
            return self._nodes(connection, [row for row, _ in scored]), [score for _, score in scored]

        nodes, similarities = self._read.run(work, until)
        return VectorStoreQueryResult(nodes=nodes, similarities=similarities, ids=[node.node_id for node in nodes])

    def _scored(
        self,
        connection: Connection,
        query: VectorStoreQuery,
        vector: str | None,
        allowed: Condition,
        cutoff: float | None,
    ) -> list[tuple[int, float]]:
        k, text = query.similarity_top_k, query.query_str or ""
        if vector is None:
            return [(row, score) for row, score, _ in self._match(connection, text, k, allowed, None)]
        if query.mode == VectorStoreQueryMode.DEFAULT:
            found = self._search(connection, vector, k, allowed)
            return [(row, cosine) for row, cosine in found if cutoff is None or cosine >= cutoff]
        most = hybrid.candidates(k)
        dense = self._search(connection, vector, most, allowed)
        matched = self._match(connection, text, most, allowed, vector)
        similarity = dict(dense) | {row: cosine for row, _, cosine in matched}
        return hybrid.fuse([row for row, _ in dense], [row for row, _, _ in matched], similarity, k, cutoff)

    def _vector(self, query: VectorStoreQuery) -> str:
        if query.query_embedding is None:
            raise ValueError("the query has no embedding: give the index an embed_model")
        if len(query.query_embedding) != self._dimensions:
            given = len(query.query_embedding)
            raise ValueError(f"the query's embedding has {given} dimensions, the snapshot's {self._dimensions}")
        return _vector_text(query.query_embedding)

    def _search(self, connection: Connection, vector: str, k: int, allowed: Condition) -> list[tuple[int, float]]:
        left = self._count if allowed is EVERYTHING else self._count_left(connection, allowed)
        k = min(k, left)
        if k <= 0:
            return []
        if self._count >= GRAPH_FROM and (allowed is EVERYTHING or left > EXACT_MOST):
            # Where the walk must go on for what is allowed, the nodes that it comes by first are not yet the nearest.
            most = k if allowed is EVERYTHING else max(2 * k, EF_SEARCH)
            found = self._run(connection, _GRAPH, allowed, vector=vector, k=most)
            if len(found) >= k:
                return sorted(found, key=lambda one: (-one[1], one[0]))[:k]
        return self._run(connection, _EXACT, allowed, vector=vector, k=k)

    def _count_left(self, connection: Connection, allowed: Condition) -> int:
        """How many nodes a filter leaves; it stops counting where they are too many to compare with each."""
        key = allowed.key()
        if key not in self._left:
            ((count,),) = self._run(connection, _COUNT, allowed, most=EXACT_MOST + 1)
            _keep(self._left, key, count, FILTERS_KEPT)
            return int(count)
        return self._left[key]

    def _match(
        self, connection: Connection, text: str, k: int, allowed: Condition, vector: str | None
    ) -> list[tuple[int, float, float]]:
        """Row, score and cosine of the nodes that hold any of the text's words, best first."""
        words = hybrid.words_of(text)
        everywhere = self._word_counts(connection, words, EVERYTHING)
        rare = [word for word in words if not hybrid.frequent(everywhere[word], self._count)]
        # A word is counted where it is looked for: what other tenants' nodes say takes no room.
        left = self._count if allowed is EVERYTHING else self._count_left(connection, allowed)
        few = left <= EXACT_MOST and allowed is not EVERYTHING
        counts = self._word_counts(connection, words, allowed) if few else everywhere
        nodes = left if few else self._count
        asked = list(hybrid.worth_asking(counts, nodes, rare))
        if not asked or k <= 0:
            return []
        weights = [math.log(1 + max(0, nodes - counts[word] + 0.5) / (counts[word] + 0.5)) for word in asked]
        vector = vector or _vector_text([0.0] * self._dimensions)
        return self._run(connection, _MATCH, allowed, vector=vector, words=asked, weights=weights, k=k)

    def _word_counts(self, connection: Connection, words: Sequence[str], allowed: Condition) -> dict[str, int]:
        """How many nodes hold each word in any of its forms; it stops counting where a word is too frequent."""
        where = allowed.key()
        counts = {word: self._words[where, word] for word in words if (where, word) in self._words}
        new = [word for word in words if word not in counts]
        if new:
            for word, count in self._run(
                connection, _WORDS, allowed, words=new, most=hybrid.most_matches(self._count) + 1
            ):
                counts[word] = count
                _keep(self._words, (where, word), count, WORDS_KEPT)
        return counts

    def _nodes(self, connection: Connection, rows: list[int]) -> list[BaseNode]:
        found = {row: _node(*rest) for row, *rest in self._run(connection, _READ, EVERYTHING, rows=rows)}
        return [found[row] for row in rows]

    def _get_nodes(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> list[BaseNode]:
        allowed = condition(filters, node_ids, None)
        rows = self._read.run(lambda connection: self._run(connection, _READ_ALL, allowed), math.inf)
        return [_node(*rest) for _, *rest in rows]

    def _run(self, connection: Connection, query: LiteralString, allowed: Condition, **parameters: Any) -> list[Any]:
        text = sql.SQL(query).format(t=sql.Identifier("ragrack", self._table), allowed=allowed.text)
        return connection.execute(text, parameters | allowed.parameters).fetchall()


_MODES = {VectorStoreQueryMode.DEFAULT, VectorStoreQueryMode.HYBRID, VectorStoreQueryMode.TEXT_SEARCH}
_GRAPH: LiteralString = """
SELECT row, -(embedding <#> %(vector)s::halfvec)
FROM {t} WHERE {allowed} ORDER BY embedding <#> %(vector)s::halfvec LIMIT %(k)s"""
# Materialized, so that the graph has no part in it.
_EXACT: LiteralString = """
WITH allowed AS MATERIALIZED (SELECT row, -(embedding <#> %(vector)s::halfvec) AS cosine FROM {t} WHERE {allowed})
SELECT row, cosine FROM allowed ORDER BY cosine DESC, row LIMIT %(k)s"""
_COUNT: LiteralString = "SELECT count(*) FROM (SELECT FROM {t} WHERE {allowed} LIMIT %(most)s) AS left_over"
_WORDS: LiteralString = """
SELECT word, (
    SELECT count(*) FROM (
        SELECT FROM {t} WHERE words @@ plainto_tsquery('english', word) AND {allowed} LIMIT %(most)s
    ) AS holding
) FROM unnest(%(words)s::text[]) AS asked (word)"""
_MATCH: LiteralString = """
WITH best AS MATERIALIZED (
    SELECT row, sum(weight * ts_rank(words, wanted, 1)) AS score
    FROM unnest(%(words)s::text[], %(weights)s::float8[]) AS asked (word, weight)
    CROSS JOIN LATERAL plainto_tsquery('english', word) AS wanted
    JOIN {t} ON words @@ wanted
    WHERE {allowed}
    GROUP BY row ORDER BY score DESC, row LIMIT %(k)s
)
SELECT row, score, -(embedding <#> %(vector)s::halfvec) FROM best JOIN {t} USING (row) ORDER BY score DESC, row"""
_READ: LiteralString = (
    "SELECT row, node_id, ref_doc_id, text, metadata, rest FROM {t} WHERE row = ANY (%(rows)s::bigint[])"
)
_READ_ON: LiteralString = """
SELECT row, embedding::text, node_id, ref_doc_id, text, metadata, rest FROM {t}
WHERE row > %(last)s ORDER BY row LIMIT %(most)s"""
_READ_ALL: LiteralString = "SELECT row, node_id, ref_doc_id, text, metadata, rest FROM {t} WHERE {allowed} ORDER BY row"


def _keep(kept: dict[K, int], key: K, value: int, most: int) -> None:
    if len(kept) >= most:
        kept.clear()
    kept[key] = value


def _vector_text(vector: Iterable[float]) -> str:
    """As pgvector reads it; half precision keeps four digits of it."""
    return f"[{','.join(f'{value:.7g}' for value in vector)}]"


def _node(node_id: str, ref_doc_id: str | None, text: str, metadata: str, rest: str) -> BaseNode:
    document = None if ref_doc_id is None else decode(ref_doc_id)
    return StoredNode(decode(node_id), document, decode(text), metadata, rest).node()


def write_nodes(connection: Connection, table: str, nodes: Iterable[BaseNode], count: int, dimensions: int) -> Written:
    """Makes `table` of `count` text nodes, which have their embeddings, in the order given, in the transaction at hand.

    Raises ValueError for a node without an embedding, psycopg.Error.
    """
    t = sql.Identifier("ragrack", table)
    storage = sql.SQL("PLAIN" if dimensions <= PLAIN_DIMENSIONS else "EXTERNAL")
    connection.execute(sql.SQL(_TABLE).format(t=t, dimensions=sql.Literal(dimensions), storage=storage))
    written = 0
    with connection.cursor() as cursor, cursor.copy(sql.SQL(_COPY_IN).format(t=t)) as copy:
        for row, node in enumerate(nodes):
            embedding = node.embedding
            if embedding is None or len(embedding) != dimensions:
                raise ValueError(f"node {node.node_id} has no embedding of {dimensions} dimensions")
            copy.write_row(_row(row, node, embedding))
            written += 1
    if written != count:
        raise ValueError(f"{count} nodes were promised, {written} came")
    graph = count >= GRAPH_FROM
    for index in (*_INDEXES, *([_GRAPH_INDEX] if graph else [])):
        connection.execute(sql.SQL(index).format(t=t, links=sql.Literal(LINKS), effort=sql.Literal(EF_CONSTRUCTION)))
    connection.execute(sql.SQL("ANALYZE {t}").format(t=t))
    return Written("pgvector hnsw" if graph else "pgvector", count, {NODES: digest(connection, table)})


def digest(connection: Connection, table: str) -> FileEntry:
    """SHA-256 and length of all that the table holds of its nodes, in their order. Raises psycopg.Error."""
    sha256 = hashlib.sha256()
    size = 0
    with connection.cursor() as cursor, cursor.copy(statement(_COPY_OUT, t=table)) as copy:
        for data in copy:
            sha256.update(data)
            size += len(data)
    return FileEntry(sha256.hexdigest(), size)


def _row(row: int, node: BaseNode, embedding: Sequence[float]) -> tuple[Any, ...]:
    node_id, ref_doc_id, text, metadata, rest = StoredNode.of(node)
    return (
        row,
        encode(node_id),
        None if ref_doc_id is None else encode(ref_doc_id),
        encode(text),
        metadata,
        rest,
        json.dumps(filterable(node.metadata)),
        _vector_text(embedding),
    )


NODES = "nodes"
# As FTS5's tokenizer in the embedded store: letters and digits are words, all else is between them. (PostgreSQL's own
# parser would take `sql-vacuum.html` for the name of a host.) With a collation of PostgreSQL's own, so that the answer
# is not the operating system's.
_TABLE: LiteralString = """
CREATE TABLE {t} (
    row bigint PRIMARY KEY,
    node_id text NOT NULL UNIQUE,
    ref_doc_id text,
    text text NOT NULL,
    metadata text NOT NULL,
    rest text NOT NULL,
    filter jsonb NOT NULL,
    embedding halfvec({dimensions}) STORAGE {storage} NOT NULL,
    words tsvector NOT NULL GENERATED ALWAYS AS (
        to_tsvector('english', regexp_replace(lower(text COLLATE "pg_c_utf8"), '[^[:alnum:]]+', ' ', 'g'))
    ) STORED
)"""
_INDEXES: tuple[LiteralString, ...] = (
    "CREATE INDEX ON {t} (ref_doc_id)",
    "CREATE INDEX ON {t} USING gin (filter jsonb_path_ops)",
    "CREATE INDEX ON {t} USING gin (words)",
)
_GRAPH_INDEX: LiteralString = (
    "CREATE INDEX ON {t} USING hnsw (embedding halfvec_ip_ops) WITH (m = {links}, ef_construction = {effort})"
)
# Frozen: the table is as new as the transaction, so no vacuum needs to come by later.
_COPY_IN: LiteralString = """
COPY {t} (row, node_id, ref_doc_id, text, metadata, rest, filter, embedding) FROM STDIN (FREEZE)"""
_COPY_OUT: LiteralString = """
COPY (SELECT row, node_id, ref_doc_id, text, metadata, rest, filter, embedding FROM {t} ORDER BY row) TO STDOUT"""
