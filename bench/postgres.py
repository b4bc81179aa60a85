"""`bin/bench postgres`: what one search costs where the nodes are in PostgreSQL, the server's part and the client's.

A real PostgreSQL 17 with pgvector, as role postgres sets it up, gets the nodes that `bin/bench index` makes, and the
questions are asked of it one after the other, in words and in meaning. The CPU time of all its processes is what a
database host spends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from index import CACHE, CORES, DEMO, manual, say, stage
from index_corpus import Corpus
from index_worker import as_query
from models import newest_model
from postgres_server import Server, database_settings, installed
from ragrack import catalog
from ragrack.fingerprint import Fingerprint
from ragrack.move import move
from ragrack.publish import staged_at
from ragrack.settings import Settings

ROUNDS = 3
SET_UP = {
    "shared_buffers": "2GB",
    "effective_cache_size": "5GB",
    "maintenance_work_mem": "1GB",
    "max_parallel_maintenance_workers": "1",
    "random_page_cost": "1.1",
}
"""By role postgres, on a host of 8 GiB."""
Json = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench postgres", description="What a search in PostgreSQL costs.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, for bin/bench size")
    parser.add_argument("--nodes", default="10000,100000,1000000", help="sizes (default 10000,100000,1000000)")
    parser.add_argument("--pages", type=Path, help="whose sentences are used (default: PostgreSQL's manual, fetched)")
    parser.add_argument("--questions", type=Path, default=DEMO / "golden.yml", help="golden questions about the pages")
    arguments = parser.parse_args()
    model = newest_model()
    corpus = Corpus.of(arguments.pages or manual(), arguments.questions, model, CACHE, CORES)
    figures: Json = {"load_before": os.getloadavg()[0], "sizes": {}}
    with _server() as (server, root):
        for nodes in map(int, arguments.nodes.split(",")):
            say(f"{nodes} nodes: stage and write")
            figures["sizes"][str(nodes)] = _one(server, root / str(nodes), model, corpus, nodes)
    text = json.dumps(figures, indent=2) + "\n"
    print(text, end="")
    if arguments.json is not None:
        arguments.json.write_text(text, encoding="utf-8")
    return 0


@contextlib.contextmanager
def _server() -> Iterator[tuple[Server, Path]]:
    """It, and a directory for the rest; short, for the path of a socket has room for a hundred characters."""
    root = Path(tempfile.mkdtemp(prefix="ragrack-pg-"))
    root.chmod(0o755)
    server = Server(installed(say), root / "server")
    try:
        server.initialise()
        for name, value in SET_UP.items():
            server.sql(f"ALTER SYSTEM SET {name} = '{value}'")
        server.kill()
        server.start()
        yield server, root
    finally:
        server.kill()
        shutil.rmtree(root)


def _one(server: Server, root: Path, model: Path, corpus: Corpus, nodes: int) -> Json:
    settings = Settings.model_validate(
        {
            "collections": ("bench",),
            "index_dir": root / "indexes",
            "documents_dir": root / "documents",
            "golden_dir": root / "golden",
            "embed_model_dir": model,
            **database_settings(server),
        }
    )
    fingerprint = Fingerprint.of(settings).digest
    staged = staged_at(settings, "bench", fingerprint)
    staged.parent.mkdir(parents=True)
    stage(staged, corpus.nodes(nodes))
    before = _bytes(server)
    began = time.perf_counter()
    moved = move(settings, "bench", "postgres", lambda *_: None)
    written = time.perf_counter() - began
    size = _bytes(server) - before
    say(f"{nodes} nodes: ask")
    store = catalog.snapshots(settings, "bench", fingerprint).open(moved.snapshot.id)
    asked = zip(corpus.question_vectors.tolist(), corpus.questions, strict=True)
    queries = [as_query(vector, text, "hybrid", None) for vector, text in asked]
    with contextlib.closing(store):
        for query in queries:
            store.query(query)
        times = []
        theirs, ours = _cpu(server), time.process_time()
        for query in queries * ROUNDS:
            began = time.perf_counter()
            store.query(query)
            times.append(time.perf_counter() - began)
        theirs, ours = _cpu(server) - theirs, time.process_time() - ours
    return {
        "questions": len(times),
        "p50_ms": float(np.percentile(times, 50)) * 1000,
        "p95_ms": float(np.percentile(times, 95)) * 1000,
        "server_cpu_ms": theirs / len(times) * 1000,
        "client_cpu_ms": ours / len(times) * 1000,
        "bytes_per_node": size / nodes,
        "write_seconds": written,
    }


def _bytes(server: Server) -> int:
    return int(server.sql("SELECT pg_database_size('ragrack')"))


def _cpu(server: Server) -> float:
    """Seconds of all its processes, those that have ended too."""
    assert server.process is not None  # noqa: S101 - it was started
    ticks, waiting = 0, [server.process.pid]
    while waiting:
        process = Path("/proc") / str(waiting.pop())
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            ticks += sum(map(int, (process / "stat").read_text().rpartition(")")[2].split()[11:15]))
            for thread in (process / "task").iterdir():
                waiting += map(int, (thread / "children").read_text().split())
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
