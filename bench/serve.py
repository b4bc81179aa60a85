"""`bin/bench serve`: the seed's way and ours behind one nginx, asked by one tool in one run.

Each is started with one worker (start to ready, memory), then with two (memory of a further one, load). `retrieve` is
retrieval alone; `query` is an answer by an LLM that takes 50 ms. Figures are of this machine: compare within a run.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import newest_model
from ragrack.auth import ApiKey, add_key, hash_key, new_key
from ragrack.embedding import MiniLMEmbedding

BENCH = Path(__file__).parent
CONNECTIONS = (1, 16, 64)
LLM_SECONDS = 0.05
SENTENCES_OF_A_DOCUMENT = 3
READY_SECONDS = 900

WORDS = """
index table vacuum row lock transaction backup replica page buffer cache query plan join sort hash cursor
trigger function schema role grant column type array range text search vector partition tablespace log
checkpoint archive restore standby slot publication subscription statistics sequence view rule domain
operator extension timeout worker memory disk network socket certificate password connection pool signal
process parameter default value
"""

Json = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """A way to serve: its gunicorn application, its variables, and the headers that its clients send."""

    name: str
    app: str
    env: Mapping[str, str]
    config: tuple[str, ...]
    headers: tuple[str, ...] = ()


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench serve", description="The seed's way and ours, side by side.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--seconds", type=int, default=5, help="of load for each figure (default 5)")
    parser.add_argument("--nodes", default="200,10000", help="sizes of the index (default 200,10000)")
    arguments = parser.parse_args()
    missing = [tool for tool in ("nginx", "wrk") if shutil.which(tool) is None]
    if missing:
        print(f"{' and '.join(missing)} is missing. Mend: apt-get install {' '.join(missing)}", file=sys.stderr)
        return 1
    # So that what was started is stopped when this is.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    model = newest_model()
    with tempfile.TemporaryDirectory(prefix="ragrack-bench-") as directory:
        root = Path(directory)
        # nginx' workers are another user.
        root.chmod(0o755)
        figures = _measure(root, model, [int(n) for n in arguments.nodes.split(",")], arguments.seconds)
    _show(figures)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def _measure(root: Path, model: Path, sizes: list[int], seconds: int) -> Json:
    figures: Json = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
        "seconds": seconds,
        "llm_ms": LLM_SECONDS * 1000,
        "sizes": {},
    }
    echo = Side("echo", "small_apps:echo", {}, ())
    stand_in = Side("llm", "small_apps:llm", {"BENCH_LLM_SECONDS": str(LLM_SECONDS)}, ())
    with gunicorn(root, echo, workers=2), nginx(root, echo.name) as url:
        figures["echo"] = {str(n): load(url + "/", n, seconds) for n in CONNECTIONS}
    with gunicorn(root, stand_in, workers=1), nginx(root, stand_in.name) as llm:
        for nodes in sizes:
            corpus = root / f"corpus-{nodes}"
            write_documents(corpus / "documents/bench", nodes)
            sides = (_seed(corpus, model, llm), ours(corpus, model, llm))
            size = figures["sizes"][str(nodes)] = {side.name: _one(root, side, seconds) for side in sides}
            size["floor"] = _floor(corpus, model)
            for route in ("retrieve", "query"):
                size[f"{route}_times"] = {
                    str(n): _times(*(size[side][route][str(n)]["requests_per_second"] for side in ("ragrack", "seed")))
                    for n in CONNECTIONS
                }
    return figures


def _times(ours: float, seed: float) -> float | None:
    """None where the seed answered nothing in that time: give more seconds."""
    return round(ours / seed, 1) if seed else None


def write_documents(directory: Path, nodes: int) -> None:
    """Each is one node: some fifty words that a seed makes, so that every run reads the same."""
    rng, words = random.Random(7), WORDS.split()  # noqa: S311 - documents, not secrets
    directory.mkdir(parents=True)
    for number in range(nodes):
        sentences = [" ".join(rng.choices(words, k=14)).capitalize() + "." for _ in range(SENTENCES_OF_A_DOCUMENT)]
        (directory / f"{number:06}.txt").write_text(" ".join(sentences), encoding="utf-8")


def _seed(corpus: Path, model: Path, llm: str) -> Side:
    env = {
        "BENCH_MODEL": str(model),
        "BENCH_DOCUMENTS": str(corpus / "documents/bench"),
        "BENCH_LLM": llm + "/v1",
    }
    return Side("seed", "seed_app:app", env, ("--timeout", str(READY_SECONDS)))


def ours(corpus: Path, model: Path, llm: str) -> Side:
    """Its index is built here, once, as the ingest does it on a host."""
    key = new_key()
    add_key(corpus / "api-keys.json", ApiKey(name="bench", sha256=hash_key(key)))
    values = {
        "collections": "bench",
        "index_dir": corpus / "indexes",
        "documents_dir": corpus / "documents",
        "golden_dir": corpus / "golden",
        "embed_model_dir": model,
        "api_keys_file": corpus / "api-keys.json",
        "runtime_dir": corpus.parent / "ragrack",
        "similarity_cutoff": 0,
        "answer": "generate",
        "llm_base_url": llm + "/v1",
        "llm_model": "m",
        "llm_in_flight": 64,
        "llm_queue": 128,
        "max_in_flight": 256,
        "context_window": 8192,
        "log_level": "warning",
    }
    env = {f"RAGRACK_{name.upper()}": str(value) for name, value in values.items()}
    command = [sys.executable, "-m", "ragrack", "ingest", "--collection", "bench"]
    subprocess.run(command, env=_environment(env), check=True, stdout=subprocess.DEVNULL)
    headers = ("-H", f"Authorization: Bearer {key}")
    return Side("ragrack", "ragrack.api:create_app()", env, ("--config", "python:ragrack.gunicorn_conf"), headers)


def _one(root: Path, side: Side, seconds: int) -> Json:
    print(f"{side.name}: one worker", file=sys.stderr)
    with gunicorn(root, side, workers=1) as first:
        figures: Json = {"ready_seconds": round(first.ready, 2)}
        print(f"{side.name}: ready in {first.ready:.2f} s", file=sys.stderr)
        one = memory(first.pid)
    print(f"{side.name}: two workers, load", file=sys.stderr)
    with gunicorn(root, side, workers=2) as both, nginx(root, side.name) as url:
        figures["memory_first_mb"], figures["memory_further_mb"] = one, round(memory(both.pid) - one, 1)
        for route in ("retrieve", "query"):
            load(f"{url}/{route}", 4, 1, side.headers)
            figures[route] = {str(n): load(f"{url}/{route}", n, seconds, side.headers) for n in CONNECTIONS}
            print(f"{side.name}: {route}: {json.dumps(figures[route])}", file=sys.stderr)
    return figures


@dataclass(frozen=True)
class Running:
    pid: int
    ready: float


@contextlib.contextmanager
def gunicorn(root: Path, side: Side, workers: int) -> Iterator[Running]:
    """Seconds to ready are until /readyz has answered as often in a row as shows that every worker does."""
    directory = root / side.name
    directory.mkdir(exist_ok=True)
    sock = directory / "gunicorn.sock"
    command = [sys.executable, "-m", "gunicorn", *side.config, "--workers", str(workers), "--bind", f"unix:{sock}"]
    if not side.config or side.config[0] != "--config":
        command += ["--worker-class", "uvicorn_worker.UvicornWorker", "--log-level", "warning"]
    command += ["--umask", "0", side.app]
    env = _environment({**side.env, "RAGRACK_WORKERS": str(workers), "PYTHONPATH": str(BENCH)})
    started = time.monotonic()
    process = subprocess.Popen(command, env=env, cwd=directory, stdout=subprocess.DEVNULL)
    try:
        _wait_until_ready(process, sock, workers)
        yield Running(process.pid, time.monotonic() - started)
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_ready(process: subprocess.Popen[bytes], sock: Path, workers: int) -> None:
    needed, well = 1 if workers == 1 else 30, 0
    until = time.monotonic() + READY_SECONDS
    while well < needed:
        if process.poll() is not None or time.monotonic() > until:
            sys.exit("gunicorn did not become ready; what it said is above")
        if _answers(sock) and len(children(process.pid)) == workers:
            well += 1
        else:
            well = 0
            time.sleep(0.02)
    if workers > 1:
        # A worker that is still loading does not take connections: both must have spent their start's work.
        while any(_busy(child) for child in children(process.pid)):
            time.sleep(0.5)


def _answers(sock: Path) -> bool:
    connection = http.client.HTTPConnection("localhost", timeout=READY_SECONDS)
    with contextlib.closing(connection):
        try:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(str(sock))
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except OSError:
            return False


def _busy(pid: int) -> bool:
    """Has it used more than a tenth of a core for a moment?"""
    before = cpu(pid)
    time.sleep(0.5)
    return cpu(pid) - before > 0.05 * os.sysconf("SC_CLK_TCK")


def cpu(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def memory(pid: int) -> float:
    """MB of the master and its workers, a page that several share counted once (PSS)."""
    total = 0
    for each in (pid, *children(pid)):
        rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return round(total / 1024, 1)


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1", **more}


@contextlib.contextmanager
def nginx(root: Path, name: str) -> Iterator[str]:
    """The URL of an unprivileged nginx before the socket of that name; as between nginx and a release, no connection is
    kept open.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    directory = root / f"nginx-{name}"
    directory.mkdir(exist_ok=True)
    temporary = " ".join(
        f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (directory / "nginx.conf").write_text(
        f"""daemon off; pid {directory}/pid; error_log {directory}/error.log; worker_processes 1;
events {{ worker_connections 1024; }}
http {{
  access_log off; keepalive_requests 100000; {temporary}
  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://unix:{root / name}/gunicorn.sock:; }} }}
}}
""",
        encoding="utf-8",
    )
    process = subprocess.Popen(["nginx", "-e", str(directory / "error.log"), "-c", str(directory / "nginx.conf")])
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def load(url: str, connections: int, seconds: int, headers: tuple[str, ...] = (), more: str = "") -> Json:
    """`more`: further fields of the question, as `, "stream": true`."""
    command = ["wrk", "--threads", "1", "--connections", str(connections), "--duration", f"{seconds}s"]
    command += [
        "--timeout",
        "30s",
        "-H",
        "Content-Type: application/json",
        *headers,
        "--script",
        str(BENCH / "load.lua"),
    ]
    env = {"PATH": os.environ["PATH"], "BENCH_WORDS": WORDS, "BENCH_MORE": more}
    done = subprocess.run([*command, url], env=env, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    result: Json = json.loads(line.removeprefix("RESULT "))
    return result


def _floor(corpus: Path, model: Path) -> Json:
    """Milliseconds of one embedding and of one search, one after the other in one thread."""
    from llama_index.core.vector_stores.types import VectorStoreQuery
    from ragrack.store import SnapshotVectorStore

    current = next((corpus / "indexes/bench").glob("*/current"))
    embedding = MiniLMEmbedding.load(model)
    store = SnapshotVectorStore.open(current.resolve())
    rng = random.Random(11)  # noqa: S311 - questions, not secrets
    embed, search = [], []
    try:
        for _ in range(300):
            began = time.perf_counter()
            vector = embedding.get_query_embedding(" ".join(rng.choices(WORDS.split(), k=8)))
            embedded = time.perf_counter()
            store.query(VectorStoreQuery(query_embedding=vector, similarity_top_k=5))
            embed.append(embedded - began)
            search.append(time.perf_counter() - embedded)
    finally:
        store.close()
        embedding.close()
    return {"embed_ms": _median_ms(embed), "search_ms": _median_ms(search)}


def _median_ms(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1000, 3)


def _show(figures: Json) -> None:
    print(f"{figures['machine']['cpus']} cpus, {figures['seconds']} s a figure, an LLM of {figures['llm_ms']:.0f} ms")
    load = []
    for nodes, size in figures["sizes"].items():
        for route in ("retrieve", "query"):
            for n in map(str, CONNECTIONS):
                seed, ours = size["seed"][route][n], size["ragrack"][route][n]
                rates = [seed["requests_per_second"], ours["requests_per_second"], size[f"{route}_times"][n]]
                load.append([nodes, route, n, *rates, _latencies(seed), _latencies(ours)])
    _table(
        "nodes", "route", "connections", "seed req/s", "ours req/s", "times", "seed p50/p95/p99 ms", "ours", rows=load
    )
    start = [
        [nodes, side, *(size[side][key] for key in ("ready_seconds", "memory_first_mb", "memory_further_mb"))]
        for nodes, size in figures["sizes"].items()
        for side in ("seed", "ragrack")
    ]
    _table("nodes", "", "ready s", "first worker MB", "a further one MB", rows=start)
    floor = [[nodes, *size["floor"].values()] for nodes, size in figures["sizes"].items()]
    _table("nodes", "one embedding ms", "one search ms", rows=floor)
    echo = [[n, each["requests_per_second"]] for n, each in figures["echo"].items()]
    _table("connections", "bare ASGI echo req/s", rows=echo)


def _table(*heads: str, rows: list[list[Any]]) -> None:
    print("\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def _latencies(result: Json) -> str:
    failed = f" ({result['failed']} failed)" if result["failed"] else ""
    return f"{result['p50_ms']} / {result['p95_ms']} / {result['p99_ms']}{failed}"


if __name__ == "__main__":
    sys.exit(main())
