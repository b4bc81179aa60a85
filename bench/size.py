"""`bin/bench size`: what `ragrack size` multiplies, measured on this machine.

One service over ten thousand nodes is asked as fast as it answers, and its workers' own CPU time is counted, so that
neither nginx nor what asks is in it. What grows with the index comes from the figures of `bin/bench index --json`, what
a database costs from those of `bin/bench postgres --json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from models import newest_model
from serve import LLM_SECONDS, Side, children, cpu, gunicorn, load, memory, nginx, ours, write_documents
from small_apps import TOKENS

NODES = 10_000
CONNECTIONS = 16
WORKERS = 2
ANSWERS = {"retrieve": "/retrieve", "extractive": "/query", "generate": "/query", "stream": "/query"}
NODES_OF_A_DOCUMENT = 7
"""PostgreSQL's manual: 8,339 nodes of 1,169 pages, at the default size of a node."""

Json = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench size", description="What ragrack size multiplies.")
    parser.add_argument("--index", type=Path, required=True, metavar="FILE", help="made by bin/bench index --json FILE")
    parser.add_argument(
        "--postgres", type=Path, required=True, metavar="FILE", help="made by bin/bench postgres --json FILE"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures there, for ragrack size --measured"
    )
    parser.add_argument("--seconds", type=int, default=10, help="of load for each figure (default 10)")
    parser.add_argument("--machine", default=f"{os.cpu_count()} cores", help="what to call this machine")
    arguments = parser.parse_args()
    missing = [tool for tool in ("nginx", "wrk") if shutil.which(tool) is None]
    if missing:
        print(f"{' and '.join(missing)} is missing. Mend: apt-get install {' '.join(missing)}", file=sys.stderr)
        return 1
    index = json.loads(arguments.index.read_text(encoding="utf-8"))
    if str(NODES) not in index["sizes"]:
        print(f"{arguments.index} has no size {NODES}. Mend: bin/bench index --nodes {NODES},100000", file=sys.stderr)
        return 1
    database = json.loads(arguments.postgres.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="ragrack-bench-") as directory:
        root = Path(directory)
        # nginx' workers are another user.
        root.chmod(0o755)
        figures = _figures(arguments.machine, _measure(root, arguments.seconds), index, database)
    text = json.dumps(figures, indent=2) + "\n"
    print(text, end="")
    if arguments.json is not None:
        arguments.json.write_text(text, encoding="utf-8")
    return 0


def _measure(root: Path, seconds: int) -> Json:
    corpus = root / "corpus"
    write_documents(corpus / "documents/bench", NODES)
    stand_in = Side("llm", "small_apps:llm", {"BENCH_LLM_SECONDS": str(LLM_SECONDS)}, ())
    found: Json = {"cpu_ms": {}}
    with gunicorn(root, stand_in, workers=1), nginx(root, stand_in.name) as llm:
        service = ours(corpus, newest_model(), llm)
        for answer, route in ANSWERS.items():
            kind = "generate" if answer in ("generate", "stream") else "extractive"
            side = replace(service, env={**service.env, "RAGRACK_ANSWER": kind})
            more = ', "stream": true' if answer == "stream" else ""
            with gunicorn(root, side, workers=1) as first:
                one = memory(first.pid)
            with gunicorn(root, side, workers=WORKERS) as both, nginx(root, side.name) as url:
                load(url + route, CONNECTIONS, 2, side.headers, more)
                before = sum(map(cpu, children(both.pid)))
                told = load(url + route, CONNECTIONS, seconds, side.headers, more)
                ticks = sum(map(cpu, children(both.pid))) - before
                found["cpu_ms"][answer] = (
                    ticks / os.sysconf("SC_CLK_TCK") / (told["requests_per_second"] * seconds) * 1000
                )
                found["first"], found["further"] = one, (memory(both.pid) - one) / (WORKERS - 1)
            print(f"{answer}: {found['cpu_ms'][answer]:.2f} ms of CPU, {told}", file=sys.stderr)
    return found


def _figures(machine: str, found: Json, index: Json, database: Json) -> Json:
    searches = {int(nodes): size for nodes, size in database["sizes"].items()}
    sizes = {int(nodes): size for nodes, size in index["sizes"].items()}
    largest = sizes[max(sizes)]
    base = sizes[NODES]["further_private_of_index_mb"]
    return {
        "machine": machine,
        "cpu_ms": {answer: round(ms, 2) for answer, ms in found["cpu_ms"].items() if answer != "stream"},
        "token_cpu_ms": round((found["cpu_ms"]["stream"] - found["cpu_ms"]["generate"]) / TOKENS, 3),
        "search_cpu_ms": {nodes: round(size["queries"]["hybrid"]["cpu_ms"], 2) for nodes, size in sizes.items()},
        "first_worker_mib": round(found["first"]),
        "further_worker_mib": {
            nodes: round(found["further"] + size["further_private_of_index_mb"] - base) for nodes, size in sizes.items()
        },
        "index_bytes_per_node": round(largest["mb"] * 1e6 / max(sizes)),
        "core_nodes_per_second": round(index["ingest"]["nodes_per_second"] / index["machine"]["cpus"], 1),
        "nodes_per_document": NODES_OF_A_DOCUMENT,
        "database_cpu_ms": {nodes: round(size["server_cpu_ms"], 2) for nodes, size in searches.items()},
        "client_cpu_ms": {nodes: round(size["client_cpu_ms"], 2) for nodes, size in searches.items()},
        "database_bytes_per_node": round(searches[max(searches)]["bytes_per_node"]),
    }


if __name__ == "__main__":
    sys.exit(main())
