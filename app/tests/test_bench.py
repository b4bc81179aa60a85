"""`bin/bench` measures what it says that it does, here of an index so small that it takes no time, and what it
simulates is what theory says of the cases that it knows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from simulate import PULL_EVERY, SPREAD, Fleet, behind, latencies

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


@pytest.mark.hosts
def test_bench_postgres_at_a_tiny_size(model_dir: Path, tmp_path: Path) -> None:
    pages = ["--pages", str(DATA / "manual"), "--questions", str(DATA / "manual.golden.yml")]
    command = [sys.executable, str(REPO / "bench/postgres.py"), "--nodes", "1600", *pages]
    environment = os.environ | {"PYTHONPATH": str(REPO / "molecule/shared")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["sizes"]["1600"]
    # A vector of 384 half floats, and what else a node has.
    assert 768 < figures["bytes_per_node"] < 20_000
    assert figures["server_cpu_ms"] > 0
    assert figures["client_cpu_ms"] > 0


def test_a_question_that_is_alone_takes_what_it_costs() -> None:
    assert latencies(Fleet(10, 0.03), load=0.001, questions=20_000).mean() == pytest.approx(0.03, rel=0.05)
    both = latencies(Fleet(10, 0.03, database=2, database_seconds=0.01), load=0.001, questions=20_000)
    assert both.mean() == pytest.approx(0.04, rel=0.05)


def test_questions_wait_as_pollaczek_and_khinchine_say() -> None:
    """Of one host each worker is a queue of its own, in which they come at random."""
    load, cost = 0.6, 0.03
    waited = load * cost * (1 + SPREAD**2) / (2 * (1 - load))
    assert latencies(Fleet(1, cost), load, questions=400_000).mean() == pytest.approx(cost + waited, rel=0.05)


def test_the_edge_makes_them_wait_less_than_chance_would() -> None:
    one, many = (latencies(Fleet(hosts, 0.03), 0.8, questions=100_000) for hosts in (1, 20))
    assert np.percentile(many, 95) < np.percentile(one, 95)


def test_a_database_with_less_to_do_than_the_apps_adds_its_cost_and_no_more() -> None:
    cost, search = 0.03, 0.005
    alone = latencies(Fleet(4, cost), 0.6, questions=100_000)
    with_database = latencies(Fleet(4, cost, database=1, database_seconds=search), 0.6, questions=100_000)
    assert with_database.mean() - alone.mean() == pytest.approx(search, rel=0.3)


@pytest.mark.parametrize(("hosts", "expected"), [(1, 10 / 60), (3, 30 / 60), (12, 1)])
def test_hosts_that_share_a_link_are_behind_for_as_long_as_that_takes(hosts: int, expected: float) -> None:
    """A snapshot that one host pulls in ten minutes, each hour."""
    late = behind(hosts, megabytes=100 * 600, made_every=3600)
    assert np.mean(late > 0) == pytest.approx(expected + PULL_EVERY / 2 / 3600 * (expected < 1), abs=0.04)
    assert behind(hosts, megabytes=0, made_every=3600).max() <= PULL_EVERY
