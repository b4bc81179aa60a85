"""A process that answers from a snapshot as a worker of the service does: what it costs, and what it finds.

    python bench/index_worker.py SNAPSHOT QUESTIONS.npz

Prints a line of JSON when it has answered once, one when it has answered all, and goes when its input ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.vector_stores.types import (
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from ragrack.store import SnapshotVectorStore

K = 10
CASES = {
    "dense": ("default", None),
    "dense, tenant": ("default", "small"),
    "dense, big tenant": ("default", "big"),
    "hybrid": ("hybrid", None),
    "hybrid, tenant": ("hybrid", "small"),
}


def main() -> None:
    snapshot, questions = Path(sys.argv[1]), np.load(sys.argv[2])
    queries = {
        name: [
            _query(vector, text, mode, None if tenant is None else str(questions[tenant][number]))
            for number, (vector, text) in enumerate(
                zip(questions["vectors"].tolist(), questions["texts"].tolist(), strict=True)
            )
        ]
        for name, (mode, tenant) in CASES.items()
    }
    before = memory()
    began = time.perf_counter()
    store = SnapshotVectorStore.open(snapshot)
    store.query(queries["dense"][0])
    first = time.perf_counter() - began
    say({"first_answer_ms": first * 1000, "before": before, "opened": memory()})
    say({"cases": asyncio.run(answered(store, queries)), "answered": memory()})
    sys.stdin.read()


async def answered(store: SnapshotVectorStore, queries: dict[str, list[VectorStoreQuery]]) -> dict[str, Any]:
    """Of each case: milliseconds of each query, CPU milliseconds of all, and which nodes were found."""
    cases: dict[str, Any] = {}
    for name, asked in queries.items():
        seen: set[str] = set()
        cold: list[float] = []
        warm: list[float] = []
        found = []
        cpu = time.process_time()
        for query in asked:
            filters = "" if query.filters is None else query.filters.model_dump_json()
            began = time.perf_counter()
            result = await store.aquery(query)
            took = (time.perf_counter() - began) * 1000
            (warm if filters in seen or not filters else cold).append(took)
            seen.add(filters)
            found.append(result.ids)
        cases[name] = {
            "ms": warm,
            "first_of_a_tenant_ms": cold,
            "cpu_ms": (time.process_time() - cpu) * 1000,
            "ids": found,
        }
    return cases


def _query(vector: list[float], text: str, mode: str, tenant: str | None) -> VectorStoreQuery:
    return VectorStoreQuery(
        query_embedding=vector,
        query_str=text,
        similarity_top_k=K,
        mode=VectorStoreQueryMode(mode),
        filters=None if tenant is None else MetadataFilters(filters=[MetadataFilter(key="tenant", value=tenant)]),
    )


def memory() -> dict[str, float]:
    """MB: resident, private (no other process has them) and PSS, which counts a page that n share as one n-th."""
    rows = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    kb = {row[0].rstrip(":"): int(row[1]) for row in rows}
    private = kb["Private_Clean"] + kb["Private_Dirty"]
    return {"rss": kb["Rss"] / 1024, "private": private / 1024, "pss": kb["Pss"] / 1024}


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
