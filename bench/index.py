"""`bin/bench index`: what an index costs to build, to open, to hold and to ask, at several sizes, beside its aims.

The ingest is real, of documents embedded here, and is compared with a bare loop over the same embedding. An index of a
hundred thousand nodes or more would take hours to embed: those are of nodes that resemble real ones (`index_corpus`),
and what embedding them would take is said by the rate measured before. Found is compared with exact search over all
vectors in 32 bits. The baseline is LlamaIndex's SimpleVectorStore, which the seed's example uses, at ten thousand
nodes: beyond, it takes minutes to open. Figures are of this machine: compare within a run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import index_corpus
import numpy as np
from index_corpus import NODES_OF_A_DOCUMENT, Corpus
from index_worker import CASES, K
from llama_index.core.schema import MetadataMode, TextNode
from models import newest_model
from ragrack.embedding import MiniLMEmbedding
from ragrack.fingerprint import Fingerprint
from ragrack.ingest import ingest
from ragrack.settings import Settings
from ragrack.snapshot import SnapshotDir
from ragrack.staging import Staging
from ragrack.store import SnapshotVectorStore

REPO = Path(__file__).parents[1]
CACHE = REPO / ".cache/bench"
DEMO = REPO / "inventories/demo/collections/postgres"
BASELINE_NODES = 10_000
NODES_OF_AN_INGESTED = 2
"""So much text has each document that is ingested for real."""
TENANTS_ASKED = 40
CHANGED = 100
"""One document of so many changes before the second ingest."""
CORES = len(os.sched_getaffinity(0))

Json = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench index", description="Build, open, hold and ask an index.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--nodes", default="10000,100000,1000000", help="sizes (default 10000,100000,1000000)")
    parser.add_argument("--documents", type=int, default=2000, help="to ingest for real (default 2000)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write indexes there and leave them, to look at")
    parser.add_argument("--pages", type=Path, help="whose sentences are used (default: PostgreSQL's manual, fetched)")
    parser.add_argument("--questions", type=Path, default=DEMO / "golden.yml", help="golden questions about the pages")
    arguments = parser.parse_args()
    # So that what was started is stopped when this is.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    model = newest_model()
    pages = arguments.pages or manual()
    corpus = Corpus.of(pages, arguments.questions, model, CACHE, CORES)
    with contextlib.ExitStack() as stack:
        root = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ragrack-bench-")))
        figures = _measure(root, model, corpus, [int(n) for n in arguments.nodes.split(",")], arguments.documents)
    _show(figures)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def manual() -> Path:
    subprocess.run([DEMO / "fetch", CACHE / "manual", "--all"], check=True, stdout=sys.stderr)
    return CACHE / "manual"


def _measure(root: Path, model: Path, corpus: Corpus, sizes: list[int], documents: int) -> Json:
    figures: Json = {
        "machine": {"cpus": CORES, "python": platform.python_version(), "system": platform.platform()},
        "load_before": os.getloadavg()[0],
        "ingest": _ingest(root / "ingest", model, corpus, documents),
        "sizes": {},
    }
    for nodes in sizes:
        directory = root / str(nodes)
        directory.mkdir(parents=True, exist_ok=True)
        figures["sizes"][str(nodes)] = _one(directory, corpus, nodes, figures["ingest"])
        if nodes <= BASELINE_NODES:
            figures["seed"] = _seed(directory, corpus, nodes, figures["ingest"])
    figures["load_after"] = os.getloadavg()[0]
    return figures


def _ingest(root: Path, model: Path, corpus: Corpus, documents: int) -> Json:
    """Of generated documents: all, the same again, and with one in a hundred changed."""
    say(f"ingest: {documents} documents")
    settings = _settings(root, model)
    texts = [node.text for node in corpus.nodes(documents * NODES_OF_AN_INGESTED)]
    paths = [settings.documents_dir / f"bench/{number:06}.txt" for number in range(documents)]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(paths):
        path.write_text("\n\n".join(texts[number * NODES_OF_AN_INGESTED :][:NODES_OF_AN_INGESTED]), encoding="utf-8")
    whole = _timed(lambda: ingest(settings, "bench", _quiet))
    again = _timed(lambda: ingest(settings, "bench", _quiet))
    changed = paths[::CHANGED]
    for path in changed:
        path.write_text("This has changed. " + path.read_text(encoding="utf-8"), encoding="utf-8")
    part = _timed(lambda: ingest(settings, "bench", _quiet))
    embedded = _ingested(settings)
    bare = _timed(lambda: _embed(model, embedded))
    return {
        "documents": documents,
        "nodes": len(embedded),
        "seconds": whole["seconds"],
        "nodes_per_second": len(embedded) / whole["seconds"],
        "bare_nodes_per_second": len(embedded) / bare["seconds"],
        "share_of_bare": bare["seconds"] / whole["seconds"],
        "share_of_bare_by_cpu": bare["cpu"] / whole["cpu"],
        "changed_documents": len(changed),
        "changed_seconds": part["seconds"],
        "changed_share": part["seconds"] / whole["seconds"],
        "unchanged_seconds": again["seconds"],
    }


def _settings(root: Path, model: Path) -> Settings:
    return Settings(
        collections=("bench",),
        index_dir=root / "indexes",
        documents_dir=root / "documents",
        golden_dir=root / "golden",
        embed_model_dir=model,
    )


def _ingested(settings: Settings) -> list[str]:
    """The texts that were embedded."""
    directory = SnapshotDir(settings.index_dir, "bench", Fingerprint.of(settings).digest)
    snapshot = directory.current()
    assert snapshot is not None  # noqa: S101 - it was just made
    with contextlib.closing(SnapshotVectorStore.open(snapshot.path)) as store:
        return [node.get_content(MetadataMode.EMBED) for node in store.get_nodes()]


def _embed(model: Path, texts: list[str]) -> None:
    """The bare loop: each core takes the next text."""
    embedding = MiniLMEmbedding.load(model)
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(embedding.get_text_embedding, texts))
    embedding.close()


def _one(root: Path, corpus: Corpus, nodes: int, ingested: Json) -> Json:
    staged, first, second = root / "staging.sqlite", root / "first", root / "second"
    say(f"{nodes} nodes: stage")
    stage(staged, corpus.nodes(nodes))
    say(f"{nodes} nodes: write all")
    full = _write(staged, first)
    say(f"{nodes} nodes: write with 1 % changed")
    _change(staged, corpus, nodes)
    changed = _write(staged, second, first)
    staged.unlink()
    say(f"{nodes} nodes: exact search, then ask")
    questions = root / "questions.npz"
    asked = _ask(questions, corpus)
    exact = _exact(corpus, nodes, asked)
    embedding = nodes / ingested["bare_nodes_per_second"]
    # What is not changed is read and compared, document by document.
    looking = nodes / NODES_OF_A_DOCUMENT * ingested["unchanged_seconds"] / ingested["documents"]
    partly = embedding / CHANGED + looking + changed["seconds"]
    figures: Json = {
        "write": full,
        "write_changed": changed,
        "build_seconds": embedding + full["seconds"],
        "build_share_of_bare": embedding / (embedding + full["seconds"]),
        "changed_seconds": partly,
        "changed_share": partly / (embedding + full["seconds"]),
        "mb": sum(full["files_mb"].values()),
        **_serve(first, questions, exact),
    }
    return figures


def stage(staged: Path, nodes: Iterator[TextNode]) -> None:
    staged.unlink(missing_ok=True)
    with contextlib.closing(Staging(staged)) as staging, staging.transaction():
        for node in nodes:
            staging.vector_store.add([node])


def _change(staged: Path, corpus: Corpus, nodes: int) -> None:
    """The nodes of one document of a hundred are others, with other vectors."""
    step = NODES_OF_A_DOCUMENT * CHANGED
    others = corpus.nodes(nodes, seed=8)
    with contextlib.closing(Staging(staged)) as staging, staging.transaction():
        for number, node in enumerate(others):
            if number % step < NODES_OF_A_DOCUMENT:
                if number % step == 0:
                    staging.vector_store.delete(node.metadata["document"])
                staging.vector_store.add([node])


def _write(staged: Path, out: Path, *parent: Path) -> Json:
    out.mkdir(exist_ok=True)
    with _worker("write", staged, out, *parent) as worker:
        return _hear(worker)


def _ask(path: Path, corpus: Corpus) -> Json:
    """The questions as the workers read them; each small tenant is asked for by turns."""
    count = len(corpus.questions)
    # Few enough that most find the filter of their tenant kept.
    tenants = min(TENANTS_ASKED, -(-count // 4))
    vectors, texts = corpus.question_vectors, np.array(corpus.questions)
    small = np.array([f"t{number % tenants:02}" for number in range(count)])
    big = np.full(count, index_corpus.BIG)
    np.savez(path, vectors=vectors, texts=texts, small=small, big=big)
    return {"vectors": vectors, "small": small, "big": big}


def _exact(corpus: Corpus, nodes: int, asked: Json) -> dict[str | None, list[list[str]]]:
    """The ids of the nearest nodes to each question: of all, of its small tenant's and of the big one's."""
    vectors, whose = asked["vectors"], np.array([index_corpus.tenant_of(number, nodes) for number in range(nodes)])
    best: dict[str | None, list[Any]] = {tenant: [] for tenant in (None, "small", "big")}
    start = 0
    for block, _ in corpus.blocks(nodes):
        here = whose[start : start + len(block)]
        similarities = vectors @ block.T
        for tenant, found in best.items():
            allowed = np.ones((1, len(block)), np.bool_) if tenant is None else here[None] == asked[tenant][:, None]
            if allowed.any():
                masked = np.where(allowed, similarities, -2)
                rows = np.argpartition(-masked, min(K, len(block)) - 1, axis=1)[:, :K]
                found.append((np.take_along_axis(masked, rows, axis=1), rows + start))
        start += len(block)
    return {tenant: [_ids(row, nodes) for row in _best(*zip(*found, strict=True))] for tenant, found in best.items()}


def _best(similarities: Any, rows: Any) -> Any:
    joined, where = np.concatenate(similarities, axis=1), np.concatenate(rows, axis=1)
    return np.take_along_axis(where, np.argsort(-joined, axis=1)[:, :K], axis=1)


def _ids(rows: Any, nodes: int) -> list[str]:
    return [index_corpus.node_id(int(row), nodes) for row in rows]


def _serve(snapshot: Path, questions: Path, exact: dict[str | None, list[list[str]]]) -> Json:
    """One worker, and another beside it."""
    with _worker("serve", snapshot, questions) as first:
        _, answered = _hear(first), _hear(first)
        with _worker("serve", snapshot, questions) as further:
            opened_too, answered_too = _hear(further), _hear(further)
    return {
        "imports_seconds": opened_too["imports_s"],
        # The first may have read from the disk.
        "first_answer_seconds": opened_too["first_answer_s"],
        "rss_mb": answered["answered"]["rss"],
        "further_private_mb": answered_too["answered"]["private"],
        "further_private_of_index_mb": answered_too["answered"]["private"] - opened_too["before"]["private"],
        "queries": _queries(answered_too["cases"], exact),
    }


def _queries(cases: Json, exact: dict[str | None, list[list[str]]]) -> Json:
    figures: Json = {}
    for name, case in cases.items():
        mode, tenant = CASES[name]
        figures[name] = {
            "p50_ms": float(np.percentile(case["seconds"], 50)) * 1000,
            "p95_ms": float(np.percentile(case["seconds"], 95)) * 1000,
            "cpu_ms": case["cpu"] * 1000,
        }
        if case["first_of_a_tenant"]:
            figures[name]["first_of_a_tenant_ms"] = float(np.median(case["first_of_a_tenant"])) * 1000
        if mode == "default":
            pairs = zip(case["ids"], exact[tenant], strict=True)
            figures[name]["recall"] = float(np.mean([len(set(ids) & set(best)) / len(best) for ids, best in pairs]))
    return figures


def _seed(root: Path, corpus: Corpus, nodes: int, ingested: Json) -> Json:
    say(f"{nodes} nodes: SimpleVectorStore")
    staged, questions = root / "seed.sqlite", root / "questions.npz"
    stage(staged, corpus.nodes(nodes))
    with _worker("seed", staged, questions) as worker:
        told = _hear(worker)
    staged.unlink()
    return {
        "nodes": nodes,
        "start_seconds": nodes / ingested["bare_nodes_per_second"] + told["built"]["seconds"],
        "first_answer_seconds": told["opened"]["seconds"],
        "mb": told["files_mb"],
        "rss_mb": told["answered"]["rss"],
        "further_private_of_index_mb": told["answered"]["private"] - told["before"]["private"],
        "queries": _queries(told["cases"], _exact(corpus, nodes, dict(np.load(questions)))),
    }


@contextlib.contextmanager
def _worker(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(REPO / "bench/index_worker.py"), *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
        process.communicate()
    finally:
        process.kill()
        process.wait()


def _hear(worker: subprocess.Popen[str]) -> Json:
    assert worker.stdout is not None  # noqa: S101 - it was opened with a pipe
    line = worker.stdout.readline()
    if not line:
        sys.exit("a measuring process died; what it said is above")
    told: Json = json.loads(line)
    return told


def _timed(work: Callable[[], object]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def _quiet(stage: str, done: int, total: int, note: str = "") -> None:
    pass


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _show(figures: Json) -> None:
    ingested, sizes = figures["ingest"], figures["sizes"]
    cpus, before, after = figures["machine"]["cpus"], figures["load_before"], figures["load_after"]
    print(f"{cpus} cpus; load {before:.1f} before, {after:.1f} after")
    print(f"\n| an ingest of {ingested['documents']} documents, {ingested['nodes']} nodes | aim | |\n|---|---|---|")
    for name, aim, key, form in (
        ("nodes a second", "", "nodes_per_second", "{:.0f}"),
        ("nodes a second of a bare loop over the embedding", "", "bare_nodes_per_second", "{:.0f}"),
        ("share of it", ">= 90 %", "share_of_bare", "{:.1%}"),
        ("share of it by CPU time", "", "share_of_bare_by_cpu", "{:.1%}"),
        ("seconds with 1 % changed", "", "changed_seconds", "{:.2f}"),
        ("of the whole", "< 3 %", "changed_share", "{:.1%}"),
        ("seconds with nothing changed", "", "unchanged_seconds", "{:.2f}"),
    ):
        print(f"| {name} | {aim} | {form.format(ingested[key])} |")
    seed = figures.get("seed")
    heads = [f"{int(nodes):,}" for nodes in sizes] + ([f"SimpleVectorStore, {seed['nodes']:,}"] if seed else [])
    print("\n| nodes | aim | " + " | ".join(heads) + " |\n|---|---|" + "---|" * len(heads))
    columns = [*sizes.values(), *([seed] if seed else [])]
    for name, aim, value in _ROWS:
        print(f"| {name} | {aim} | " + " | ".join(_cell(value, column) for column in columns) + " |")


def _cell(value: Callable[[Json], str], column: Json) -> str:
    try:
        return value(column)
    except KeyError:
        return ""


def _query_rows() -> Iterator[tuple[str, str, Callable[[Json], str]]]:
    aims = {
        "dense": "p50 < 0.5",
        "dense, tenant": "p50 < 1.5",
        "hybrid": "p95 < 15",
        "hybrid, tenant": "p95 < 15",
    }
    for name, (mode, _) in CASES.items():

        def times(column: Json, name: str = name) -> str:
            query = column["queries"][name]
            return f"{query['p50_ms']:.2f} / {query['p95_ms']:.2f}"

        def first(column: Json, name: str = name) -> str:
            return f"{column['queries'][name]['first_of_a_tenant_ms']:.1f}"

        def recall(column: Json, name: str = name) -> str:
            return f"{column['queries'][name]['recall']:.3f}"

        yield f"{name}: p50 / p95 ms", aims.get(name, ""), times
        if "tenant" in name:
            yield f"{name}: the first query of a tenant, ms", "", first
        if mode == "default":
            yield f"{name}: recall@{K}", ">= 0.98", recall


_ROWS: list[tuple[str, str, Callable[[Json], str]]] = [
    ("build, s: embedding at the rate above and the write measured", "", lambda c: f"{c['build_seconds']:.0f}"),
    ("of which written, s", "", lambda c: f"{c['write']['seconds']:.1f}"),
    ("share of a bare loop", ">= 90 %", lambda c: f"{c['build_share_of_bare']:.1%}"),
    ("memory of the write, MB", "", lambda c: f"{c['write']['peak_mb']:.0f}"),
    ("with 1 % changed, s, likewise", "", lambda c: f"{c['changed_seconds']:.1f}"),
    ("of which written, s", "", lambda c: f"{c['write_changed']['seconds']:.1f}"),
    ("of the whole build", "< 3 %", lambda c: f"{c['changed_share']:.1%}"),
    ("snapshot, MB", "", lambda c: f"{c['mb']:.0f}"),
    ("start as the seed's example does it, s: embeds all anew", "", lambda c: f"{c['start_seconds']:.0f}"),
    ("open to first answer, s (page cache warm)", "< 0.3", lambda c: f"{c['first_answer_seconds']:.3f}"),
    ("imports before that, s", "", lambda c: f"{c['imports_seconds']:.1f}"),
    ("first process, RSS, MB", "", lambda c: f"{c['rss_mb']:.0f}"),
    ("a further one, private, MB", "", lambda c: f"{c['further_private_mb']:.0f}"),
    ("of which the index's", "< 60", lambda c: f"{c['further_private_of_index_mb']:.0f}"),
    *_query_rows(),
]


if __name__ == "__main__":
    sys.exit(main())
