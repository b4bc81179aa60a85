"""`bin/bench index` measures what it says that it does: here of an index so small that it takes no time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
DATA = Path(__file__).parent / "data"


def test_bench_index_at_a_tiny_size(model_dir: Path, tmp_path: Path) -> None:
    assert model_dir.is_relative_to(REPO / ".cache/models"), "where the bench looks for it"
    arguments = ["--nodes", "1600", "--documents", "10", "--json", str(tmp_path / "figures.json")]
    pages = ["--pages", str(DATA / "manual"), "--questions", str(DATA / "manual.golden.yml")]
    command = [sys.executable, str(REPO / "bench/index.py"), *arguments, *pages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["ingest"]["documents"] == 10
    assert figures["ingest"]["nodes"] >= 10
    ours, seed = figures["sizes"]["1600"], figures["seed"]
    assert 0 < ours["mb"] < seed["mb"]
    for name in ("dense", "dense, tenant", "dense, big tenant"):
        assert ours["queries"][name]["recall"] >= 0.99
        assert seed["queries"][name]["recall"] >= 0.99
    assert set(ours["queries"]) == {*seed["queries"], "hybrid", "hybrid, tenant"}
    assert "| dense, tenant: p50 / p95 ms | p50 < 1.5 |" in done.stdout
