"""The fleet's lock: of two runs exactly one has it, and everybody is told who."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from module_utils.fleet_lock import FleetLock, Holder
from module_utils.release_state import History, StateError
from testing.release_host import play

ANN = Holder("run-1", "ann", "control1", "machine1", "boot1", 41, "1000", "deploy 0.2.0")
BEN = Holder("run-2", "ben", "control2", "machine2", "boot2", 42, "2000", "rollback")


@pytest.fixture
def lock(tmp_path: Path) -> FleetLock:
    return FleetLock(tmp_path / "root")


def test_one_has_it_and_the_other_is_told_who(lock: FleetLock) -> None:
    assert lock.acquire(ANN)[0]
    taken, holder = lock.acquire(BEN)
    assert not taken
    assert replace(holder, since="") == ANN
    assert holder.words().startswith("locked by ann on control1 since 20")
    assert holder.words().endswith(" s): deploy 0.2.0")


def test_the_same_run_may_take_it_again_and_keeps_its_time(lock: FleetLock) -> None:
    first = lock.acquire(ANN)[1]
    assert lock.acquire(replace(ANN, why="again")) == (False, first)


def test_only_its_own_run_or_force_releases_it(lock: FleetLock) -> None:
    lock.acquire(ANN)
    assert lock.release("run-2")[0] is False
    assert lock.holder() is not None
    assert lock.release("run-1")[0] is True
    assert lock.release("run-1") == (False, None)
    lock.acquire(ANN)
    assert lock.release("run-2", force=True)[0] is True
    assert [event["event"] for event in History(lock.root / "history.jsonl").read()] == ["lock_broken"]


def test_take_over_replaces_exactly_the_dead_run_and_is_logged(lock: FleetLock) -> None:
    lock.acquire(ANN)
    cat = Holder("run-3", "cat", "control1", "machine1", "boot1", 43, "3000", "deploy 0.3.0")
    assert lock.acquire(BEN, takeover_of="run-1")[0]
    taken, holder = lock.acquire(cat, takeover_of="run-1")
    assert not taken, "ben came first, so there is nothing left to take over from ann"
    assert holder.run == "run-2"
    [event] = History(lock.root / "history.jsonl").read()
    assert (event["event"], event["who"], event["from"]["owner"]) == ("lock_taken_over", "ben", "ann")


def test_a_file_that_is_no_lock_is_named(lock: FleetLock) -> None:
    lock.root.mkdir()
    lock.path.write_text("nonsense")
    with pytest.raises(StateError, match=r"lock\.json is not a lock"):
        lock.acquire(ANN)


def contend(root: Path, number: int, gate: Any, results: Any) -> None:
    gate.wait()
    won, _ = FleetLock(root).acquire(replace(ANN, run=f"run-{number}", pid=os.getpid()))
    results.put(won)


@pytest.mark.parametrize("attempt", range(5))
def test_of_many_at_once_one_wins(lock: FleetLock, attempt: int) -> None:
    context = multiprocessing.get_context("fork")
    gate, results = context.Event(), context.Queue()
    runs = [context.Process(target=contend, args=(lock.root, number, gate, results)) for number in range(8)]
    for run in runs:
        run.start()
    gate.set()
    won = [results.get(timeout=30) for _ in runs]
    for run in runs:
        run.join()
    assert sum(won) == 1
    assert sorted(path.name for path in lock.root.iterdir()) == ["lock.json"]


def test_as_ansible_runs_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    me: dict[str, Any] = {"holder": "{{ lookup('ragrack_controller') }}", "root": str(root), "why": "deploy"}
    other = {**me, "holder": {"run": "other", "owner": "ben", "controller": "control2"}}
    tasks: list[dict[str, Any]] = [
        {"ragrack_lock": {"state": "query", "root": str(root)}},
        {"ragrack_lock": me},
        {"ragrack_lock": me},
        {"ragrack_lock": other, "ignore_errors": True},
        {"ragrack_lock": {**other, "state": "absent"}},
        {"ragrack_lock": {"state": "query", "root": str(root)}},
        {"ragrack_lock": {**me, "state": "absent"}},
    ]
    code, predicted = play(tmp_path, tasks, "--check")
    assert code == 0
    assert not root.exists(), "check mode on a bare host takes nothing"
    assert predicted[1]["changed"]
    code, results = play(tmp_path, tasks)
    assert code == 0
    assert [result["changed"] for result in results] == [False, True, False, False, False, False, True]
    assert "locked by" in results[3]["msg"]
    assert results[3]["holder"] == results[5]["holder"]
    assert results[6]["released"]["why"] == "deploy"
    assert not (root / "lock.json").exists()


def test_check_mode_fails_where_it_is_held(tmp_path: Path) -> None:
    FleetLock(tmp_path / "root").acquire(ANN)
    me = {
        "holder": {"run": "me", "owner": "ben", "controller": "c"},
        "root": str(tmp_path / "root"),
        "mend": "call ann",
    }
    code, [result] = play(tmp_path, [{"ragrack_lock": me}], "--check")
    assert code != 0
    assert result["msg"].startswith("locked by ann on control1 since ")
    assert result["msg"].endswith("deploy 0.2.0; call ann")
    assert result["holder"]["run"] == "run-1"
