"""Writes the files of a snapshot: of all its nodes, or out of the snapshot before it and what has changed since.

A graph of vectors lets none go. What is made out of a snapshot that was there before keeps the vectors of removed nodes
as rows without a node, which no query is given; when they have become too many, all is written anew.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import operator
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
from llama_index.core.schema import BaseNode

from ragrack.catalog import Nodes
from ragrack.faiss_vectors import VECTORS
from ragrack.readonly import Written
from ragrack.snapshot import FileEntry, file_sha256
from ragrack.store import NODES, connect, plain
from ragrack.stored import StoredNode

# Its stubs know neither its Python constructors nor all of its classes.
faiss: Any = _faiss

FLAT_BELOW = 4096
"""Nodes. Comparing with each of fewer is as quick as a graph, and exact."""
HNSW_LINKS = 32
HNSW_EF_CONSTRUCTION = 200
TRAINING = 100_000
"""Vectors that the range of the 8-bit scale is taken from."""
BATCH = 16_384
"""Vectors that the graph takes at a time. It shuffles them, for which they should be many, and locks every row anew."""
GONE_SHARE = 8
"""Written anew when more than one row of so many has lost its node: each makes every search a little longer."""
SQLITE_CACHE_KIB = 200_000

SCHEMA = """
CREATE TABLE node (
    row INTEGER PRIMARY KEY,
    node_id TEXT NOT NULL UNIQUE,
    ref_doc_id TEXT,
    text TEXT NOT NULL,
    metadata TEXT NOT NULL,
    rest TEXT NOT NULL,
    digest BLOB NOT NULL
);
CREATE INDEX node_ref_doc_id ON node (ref_doc_id);
-- One row. `live` has a bit for each row of the graph, set where there is a node; NULL where there is one everywhere.
CREATE TABLE extent (rows INTEGER NOT NULL, live BLOB);
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


def write_snapshot_files(nodes: Iterable[BaseNode], count: int, dimensions: int, out_dir: Path) -> Written:
    """Writes `count` text nodes, which have their embeddings, in the order given. All cores are used.

    Memory: the 8-bit index (about 0.7 kB a node), twice while it grows, and one batch. Raises ValueError for a node
    without an embedding, OSError or sqlite3.Error when the disk is full.
    """
    vectors = out_dir / ".vectors.f32"
    try:
        with vectors.open("wb") as file:

            def take(row: int, node: BaseNode) -> None:
                file.write(np.array(embedding_of(node, dimensions), dtype=np.float32).tobytes())

            write_nodes(nodes, count, out_dir, take)
        return _finished(_index(vectors, count, dimensions), count, out_dir)
    finally:
        vectors.unlink(missing_ok=True)


def write_nodes(nodes: Iterable[BaseNode], count: int, out_dir: Path, take: Callable[[int, BaseNode], None]) -> None:
    """Writes all but the vectors; `take` is given each node with the number of its row, in their order."""
    with contextlib.closing(_writable(out_dir / NODES)) as connection:
        connection.executescript(SCHEMA)
        written = 0
        for row, node in enumerate(nodes):
            take(row, node)
            _insert(connection, row, StoredNode.of(node))
            written += 1
        if written != count:
            raise ValueError(f"{count} nodes were promised, {written} came")
        connection.execute("INSERT INTO node_text (node_text) VALUES ('rebuild')")
        connection.execute("INSERT INTO extent VALUES (?, NULL)", (count,))
        connection.commit()


def update_snapshot_files(parent: Path, nodes: Nodes, out_dir: Path) -> Written | None:
    """Writes what `nodes` holds into out_dir: a copy of the files in `parent`, with what differs taken out and put in.

    None, and nothing is written, where all should be written anew: too much has changed, or had before; the parent has
    no graph, or another kind. Whether the parent's files are sound is for the caller to know. Memory: the index, twice
    while it grows. Raises what `write_snapshot_files` does.
    """
    graph = faiss.read_index(str(parent / VECTORS), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)
    if not isinstance(graph, faiss.IndexHNSW) or graph.hnsw.nb_neighbors(1) != HNSW_LINKS:
        return None
    with contextlib.closing(connect(parent / NODES)) as before:
        rows, live = before.execute("SELECT rows, live FROM extent").fetchone()
        has_node = (
            np.ones(rows, np.bool_)
            if live is None
            else np.unpackbits(np.frombuffer(live, np.uint8), count=rows, bitorder="little")
        )
        stored = before.execute("SELECT node_id, digest, row FROM node ORDER BY node_id")
        gone, new = _changes(stored, nodes.digests())
    has_node = np.concatenate([has_node.astype(np.bool_), np.ones(len(new), np.bool_)])
    has_node[gone] = False
    count = int(has_node.sum())
    if count < FLAT_BELOW or (len(has_node) - count) * GONE_SHARE > len(has_node) or len(new) * 2 > count:
        return None
    # Into memory: what is mapped cannot grow.
    graph = faiss.read_index(str(parent / VECTORS))
    _copy(parent / NODES, out_dir / NODES)
    with contextlib.closing(_writable(out_dir / NODES)) as connection:
        for row in gone:
            _remove(connection, row)
        batch: list[list[float]] = []
        for row, node in enumerate(nodes.some(new), start=rows):
            batch.append(embedding_of(node, graph.d))
            stored_node = StoredNode.of(node)
            _insert(connection, row, stored_node)
            connection.execute("INSERT INTO node_text (rowid, text) VALUES (?, ?)", (row, stored_node.text))
            if len(batch) == BATCH:
                graph.add(np.array(batch, dtype=np.float32))
                batch.clear()
        if batch:
            graph.add(np.array(batch, dtype=np.float32))
        bits = None if has_node.all() else np.packbits(has_node, bitorder="little").tobytes()
        connection.execute("UPDATE extent SET rows = ?, live = ?", (len(has_node), bits))
        connection.commit()
    return _finished(graph, count, out_dir)


def _changes(
    before: Iterator[tuple[str, bytes, int]], after: Iterator[tuple[str, bytes]]
) -> tuple[list[int], list[str]]:
    """The rows of what is gone and the ids of what is new, a node that has changed being both; each comes by id."""
    gone, new = [], []
    both = heapq.merge(before, ((node_id, digest, -1) for node_id, digest in after), key=operator.itemgetter(0, 1))
    for _, same in itertools.groupby(both, key=operator.itemgetter(0, 1)):
        (node_id, _, row), *other = same
        if not other:
            if row < 0:
                new.append(node_id)
            else:
                gone.append(row)
    return gone, new


def _finished(index: Any, count: int, out_dir: Path) -> Written:
    try:
        faiss.write_index(index, str(out_dir / VECTORS))
    except RuntimeError as error:
        raise OSError(str(error)) from error
    return Written("hnsw" if isinstance(index, faiss.IndexHNSW) else "flat", count, entries(out_dir, VECTORS, NODES))


def entries(out_dir: Path, *names: str) -> dict[str, FileEntry]:
    """Of files in it, as a manifest has them."""
    return {name: FileEntry(file_sha256(out_dir / name), (out_dir / name).stat().st_size) for name in names}


def _index(vectors: Path, count: int, dimensions: int) -> Any:
    if count < FLAT_BELOW:
        index = faiss.IndexScalarQuantizer(dimensions, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    else:
        index = faiss.IndexHNSWSQ(dimensions, faiss.ScalarQuantizer.QT_8bit, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = HNSW_EF_CONSTRUCTION
        step = max(1, count // TRAINING)
        index.train(np.concatenate([batch[::step] for batch in _batches(vectors, dimensions)]))
    for batch in _batches(vectors, dimensions):
        index.add(batch)
    return index


def _batches(vectors: Path, dimensions: int) -> Iterator[Any]:
    with vectors.open("rb") as file:
        while len(batch := np.fromfile(file, dtype=np.float32, count=BATCH * dimensions)):
            yield batch.reshape(-1, dimensions)


def embedding_of(node: BaseNode, dimensions: int) -> list[float]:
    if node.embedding is None or len(node.embedding) != dimensions:
        raise ValueError(f"node {node.node_id} has no embedding of {dimensions} dimensions")
    return node.embedding


def _writable(path: Path) -> sqlite3.Connection:
    """Without a journal: a run that dies leaves a directory that is never published."""
    connection = sqlite3.connect(path)
    connection.executescript(
        "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA temp_store = MEMORY;"
        f"PRAGMA cache_size = -{SQLITE_CACHE_KIB};"
    )
    return connection


def _insert(connection: sqlite3.Connection, row: int, node: StoredNode) -> None:
    connection.execute("INSERT INTO node VALUES (?, ?, ?, ?, ?, ?, ?)", (row, *node, node.digest()))
    connection.executemany("INSERT OR IGNORE INTO metadata VALUES (?, ?, ?, ?)", _metadata(row, node.metadata))


def _remove(connection: sqlite3.Connection, row: int) -> None:
    text, metadata = connection.execute("SELECT text, metadata FROM node WHERE row = ?", (row,)).fetchone()
    connection.execute("INSERT INTO node_text (node_text, rowid, text) VALUES ('delete', ?, ?)", (row, text))
    connection.executemany(
        "DELETE FROM metadata WHERE key = ? AND element = ? AND value = ? AND row = ?", _metadata(row, metadata)
    )
    connection.execute("DELETE FROM node WHERE row = ?", (row,))


def _metadata(row: int, metadata: str) -> Iterator[tuple[str, int, Any, int]]:
    for key, value in json.loads(metadata).items():
        for element, one in [(1, item) for item in value] if isinstance(value, list) else [(0, value)]:
            if isinstance(one, str | int | float):
                yield key, element, plain(one), row


def _copy(source: Path, target: Path) -> None:
    """Shares the data where the file system can."""
    with source.open("rb") as read, target.open("wb") as written:
        try:
            while os.copy_file_range(read.fileno(), written.fileno(), 2**30):
                pass
        except OSError:  # a file system that cannot: nothing has been written
            shutil.copyfileobj(read, written)
