"""What `bin/bench index` measures in a process of its own.

    python bench/index_worker.py write STAGING OUT [PARENT]      a snapshot of what is staged, as an ingest writes it
    python bench/index_worker.py serve SNAPSHOT QUESTIONS        a worker of the service: opens, answers, stays
    python bench/index_worker.py seed STAGING QUESTIONS          the seed's way: LlamaIndex's SimpleVectorStore

Each prints lines of JSON; `serve` goes when its input ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from ragrack.faiss_vectors import VECTORS
from ragrack.snapshot import file_sha256, fsync
from ragrack.staging import Staging
from ragrack.store import NODES, SnapshotVectorStore
from ragrack.writer import update_snapshot_files, write_snapshot_files

K = 10
CASES = {
    "dense": ("default", None),
    "dense, tenant": ("default", "small"),
    "dense, big tenant": ("default", "big"),
    "hybrid": ("hybrid", None),
    "hybrid, tenant": ("hybrid", "small"),
}
"""What is asked how, and in whose nodes."""


def write(staged: Path, out: Path, parent: Path | None = None) -> None:
    """With what an ingest does around it: the content's digest, the parent's files compared with theirs, fsync."""
    with _clock() as took, contextlib.closing(Staging(staged)) as staging:
        staging.content()
        _, count = staging.counts()
        written = None
        if parent is not None:
            for name in (VECTORS, NODES):
                file_sha256(parent / name)
            written = update_snapshot_files(parent, staging, out)
        updated = written is not None
        if written is None:
            dimensions = len(next(staging.nodes()).get_embedding())
            written = write_snapshot_files(staging.nodes(), count, dimensions, out)
        for name in written.files:
            fsync(out / name)
    sizes = {name: entry.bytes / 1e6 for name, entry in written.files.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    say({**took, "updated": updated, "files_mb": sizes, "peak_mb": peak})


def serve(snapshot: Path, questions: Path) -> None:
    importing = _seconds_alive()
    queries = _queries(questions, CASES)
    before = memory()
    began = time.perf_counter()
    store = SnapshotVectorStore.open(snapshot)
    store.query(queries["dense"][0])
    first = time.perf_counter() - began
    say({"imports_s": importing, "first_answer_s": first, "before": before, "opened": memory()})
    say({"cases": asyncio.run(_answered(store, queries)), "answered": memory()})
    sys.stdin.read()
    store.close()


def seed(staged: Path, questions: Path) -> None:
    from llama_index.core import StorageContext, VectorStoreIndex, load_index_from_storage
    from llama_index.core.embeddings import MockEmbedding

    with contextlib.closing(Staging(staged)) as staging:
        nodes: list[BaseNode] = list(staging.nodes())
    # It embeds nothing: the nodes have their embeddings, and so have the queries.
    unused = MockEmbedding(embed_dim=len(nodes[0].get_embedding()))
    queries = _queries(questions, {name: case for name, case in CASES.items() if case[0] == "default"})
    with _clock() as built:
        index = VectorStoreIndex(nodes, embed_model=unused)
    with tempfile.TemporaryDirectory() as directory:
        index.storage_context.persist(directory)
        size = sum(path.stat().st_size for path in Path(directory).iterdir()) / 1e6
        del index, nodes
        before = memory()
        with _clock() as opened:
            stored = StorageContext.from_defaults(persist_dir=directory)
            loaded: Any = load_index_from_storage(stored, embed_model=unused)
            loaded.vector_store.query(queries["dense"][0])
    cases = asyncio.run(_answered(loaded.vector_store, queries))
    say({"built": built, "opened": opened, "files_mb": size, "before": before, "answered": memory(), "cases": cases})


async def _answered(store: BasePydanticVectorStore, queries: dict[str, list[VectorStoreQuery]]) -> dict[str, Any]:
    """Of each case: milliseconds of each query, those of the first for each tenant apart; which nodes were found."""
    cases: dict[str, Any] = {}
    for name, asked in queries.items():
        warm: list[float] = []
        cold: list[float] = []
        found, seen = [], set()
        with _clock() as took:
            for query in asked:
                whose = None if query.filters is None else query.filters.model_dump_json()
                began = time.perf_counter()
                result = await store.aquery(query)
                (cold if whose is not None and whose not in seen else warm).append(time.perf_counter() - began)
                seen.add(whose)
                found.append(result.ids)
        cases[name] = {"seconds": warm, "first_of_a_tenant": cold, "cpu": took["cpu"] / len(asked), "ids": found}
    return cases


def _queries(questions: Path, cases: dict[str, tuple[str, str | None]]) -> dict[str, list[VectorStoreQuery]]:
    asked = np.load(questions)
    vectors, texts = asked["vectors"].tolist(), asked["texts"].tolist()
    return {
        name: [
            as_query(vector, text, mode, None if tenant is None else str(asked[tenant][number]))
            for number, (vector, text) in enumerate(zip(vectors, texts, strict=True))
        ]
        for name, (mode, tenant) in cases.items()
    }


def as_query(vector: list[float], text: str, mode: str, tenant: str | None) -> VectorStoreQuery:
    # As it comes from the embedding and from the request: checked there already.
    return VectorStoreQuery(
        query_embedding=vector,
        query_str=text,
        similarity_top_k=K,
        mode=VectorStoreQueryMode(mode),
        filters=None if tenant is None else MetadataFilters(filters=[MetadataFilter(key="tenant", value=tenant)]),
    )


def memory() -> dict[str, float]:
    """MB: resident, and private, which no other process has."""
    rows = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    kb = {row[0].rstrip(":"): int(row[1]) for row in rows}
    return {"rss": kb["Rss"] / 1024, "private": (kb["Private_Clean"] + kb["Private_Dirty"]) / 1024}


@contextlib.contextmanager
def _clock() -> Iterator[dict[str, float]]:
    """Seconds and CPU seconds of the block, when it has ended."""
    took: dict[str, float] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    yield took
    took |= {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def _seconds_alive() -> float:
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main(command: str, paths: Sequence[str]) -> None:
    commands: dict[str, Callable[..., None]] = {"write": write, "serve": serve, "seed": seed}
    commands[command](*map(Path, paths))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
