from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ragrack import sizing
from ragrack.cli import main
from ragrack.sizing import Measured, SizeError, Wanted, size

ROOT = Path(__file__).parents[2]
MEASURED = Measured(
    machine="a test's",
    cpu_ms={"retrieve": 4, "extractive": 30, "generate": 8},
    token_cpu_ms=0.1,
    search_cpu_ms={10_000: 2, 100_000: 3, 1_000_000: 10},
    first_worker_mib=300,
    further_worker_mib={10_000: 60, 1_000_000: 80},
    index_bytes_per_node=2_000,
    core_nodes_per_second=50,
    nodes_per_document=8,
    database_cpu_ms={10_000: 5, 100_000: 6},
    client_cpu_ms={10_000: 1, 100_000: 1},
    database_bytes_per_node=4_000,
)


def test_each_figure_is_what_was_measured_multiplied_out() -> None:
    found = size(Wanted(nodes=10_000, questions=100, cores=4, memory_gib=8, spare=1), MEASURED)
    assert found.questions_per_host == 80, "4 cores of which 60 % are used, 30 ms each"
    assert (found.hosts, found.workers, found.store, found.limits) == (3, 4, "embedded", [])
    assert found.memory_mib == pytest.approx(1024 + 300 + 3 * 60 + 10_000 * 2_000 / 2**20, abs=1)
    assert found.build_hours == pytest.approx(10_000 / 200 / 3600, abs=1e-3)
    assert found.changed_hours == pytest.approx(found.build_hours / 100, abs=1e-3)
    assert found.pull_seconds == pytest.approx(0.4, abs=0.1), "20 MB to each of two hosts"


@pytest.mark.parametrize(
    ("nodes", "expected"), [(10_000, 30), (100_000, 31), (1_000_000, 38), (10_000_000, 45), (1_000, 30)]
)
def test_a_search_costs_more_in_a_larger_index(nodes: int, expected: float) -> None:
    assert MEASURED.question_ms("extractive", nodes, 200) == pytest.approx(expected)


def test_each_token_that_is_handed_on_costs_something() -> None:
    few, many = (MEASURED.question_ms("generate", 10_000, tokens) for tokens in (0, 200))
    assert (few, many) == (8, 28)


@pytest.mark.parametrize(
    ("wanted", "limit"),
    [
        (Wanted(nodes=20_000_000, questions=10, memory_gib=32), "GiB on every host, of which 25.6 may be used"),
        (Wanted(nodes=4_000_000, questions=2_000, memory_gib=64, cores=8), "a new snapshot takes"),
    ],
)
def test_it_says_from_where_on_files_on_each_host_do_not_do(wanted: Wanted, limit: str) -> None:
    found = size(wanted, MEASURED)
    assert found.store == "postgres"
    assert limit in found.limits[0]
    assert limit in found.words()


def test_the_database_has_hosts_of_its_own() -> None:
    found = size(Wanted(nodes=4_000_000, questions=2_000, memory_gib=64, cores=8), MEASURED)
    assert found.questions_per_host == pytest.approx(8 * 0.6 * 1000 / 29, abs=0.1), "of a search, 1 ms is the app's"
    assert found.databases == 5, "2,000 times 7.6 ms keep three of eight cores busy, and one may be down"
    assert found.index_mib == pytest.approx(4_000_000 * 4_000 / 2**20, abs=1)
    assert size(Wanted(nodes=40_000_000, questions=1, memory_gib=32), MEASURED).databases == 3, "it outlives one"


def test_where_it_does_not_fit_into_the_databases_memory_it_says_so() -> None:
    assert "will read the disk" in size(Wanted(nodes=40_000_000, questions=1), MEASURED).words()


def test_what_the_database_cannot_answer_stays_in_files_where_it_fits() -> None:
    found = size(Wanted(nodes=4_000_000, questions=20_000, memory_gib=64, cores=8), MEASURED)
    assert (found.store, found.databases) == ("embedded", 0)
    assert "a new snapshot takes" in found.words()
    with pytest.raises(SizeError, match="of 5 at most; give hosts with more memory or cores, or run"):
        size(Wanted(nodes=40_000_000, questions=20_000, memory_gib=64, cores=8), MEASURED)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"nodes": 0, "questions": 1}, "nodes: 0 is below 1"),
        ({"nodes": 1, "questions": 0}, "qps: 0 is not above 0"),
        ({"nodes": 1, "questions": float("nan")}, "qps: nan is not above 0"),
        ({"nodes": 1, "questions": 1, "tokens": -1}, "tokens: -1 is below 0"),
        ({"nodes": 1, "questions": 1, "changed_share": 2}, "changed: 2 is no share"),
        ({"nodes": 1, "questions": 1, "memory_gib": 1}, "without any index"),
        ({"nodes": 10**10, "questions": 1}, "a day's changes take"),
    ],
)
def test_what_makes_no_sense_is_refused(wanted: dict[str, float], words: str) -> None:
    with pytest.raises(SizeError, match=words):
        size(Wanted(**wanted), MEASURED)  # type: ignore[arg-type]


@given(st.integers(1, 10**8), st.floats(0.1, 10**5), st.floats(1, 100))
def test_more_questions_never_need_fewer_hosts(nodes: int, questions: float, times: float) -> None:
    few, many = (
        size(Wanted(nodes, asked, memory_gib=1024, changed_share=0), MEASURED)
        for asked in (questions, questions * times)
    )
    assert few.hosts >= 2
    # In the database a search is not the app host's.
    assert few.store != many.store or few.hosts <= many.hosts


def test_the_command_counts_documents_and_takes_a_machine_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs/part").mkdir(parents=True)
    for name in ("a.md", "part/b.md"):
        (tmp_path / "docs" / name).write_text("text")
    mine = tmp_path / "mine.json"
    assert main(["size", "--docs", str(tmp_path / "docs"), "--measured", str(mine)]) == 1
    assert "cannot be read" in capsys.readouterr().err
    mine.write_text('{"machine": "mine"}')
    assert main(["size", "--docs", "2", "--measured", str(mine)]) == 1
    assert "is no file of bin/bench size (KeyError" in capsys.readouterr().err
    mine.write_text(json.dumps(vars(MEASURED)))
    assert main(["size", "--docs", str(tmp_path / "docs"), "--measured", str(mine), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nodes"] == 16
    assert main(["size", "--docs", "nowhere"]) == 1
    assert "neither a number nor a folder" in capsys.readouterr().err


def test_the_table_in_the_docs_is_that_of_the_command() -> None:
    assert sizing.table(Measured.load()) in (ROOT / "docs/scaling.md").read_text()
