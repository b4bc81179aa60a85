"""The module as Ansible runs it: each state in check mode and for real, in one play each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from modules import ragrack_lock, ragrack_release
from testing.release_host import REPO, Place, play

A, B, BAD = "0.1.0-aaaaaaaaaaaa", "0.1.0-bbbbbbbbbbbb", "0.1.0-dddddddddddd"
CASES: list[tuple[str, dict[str, Any]]] = [
    ("staged", {"id": A}),
    ("staged", {"id": A}),
    ("indexed", {"id": A}),
    ("started", {"id": A}),
    ("gated", {"id": A}),
    ("live", {"id": A}),
    ("staged", {"id": B}),
    ("started", {"id": B}),
    ("gated", {"id": B}),
    ("live", {"id": B}),
    ("drained", {"keep_warm": 0}),
    ("pruned", {"id": B}),
    ("query", {"target": "previous"}),
    ("bad", {"id": A, "reason": "slow"}),
    ("audit", {"what": "deploy", "result": "ok", "to": B}),
]


def tasks(place: Place, cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{"ragrack_release": place.parameters(state, **changes)} for state, changes in cases]


def test_every_state(place: Place) -> None:
    before = place.snapshot()
    bare = [case for case in CASES if case[0] not in ("query", "bad")]
    code, predicted = play(place.path, tasks(place, bare), "--check", "--diff")
    assert code == 0, "on a bare host"
    assert {path: seen for path, seen in place.snapshot().items() if "/play.yml" not in path} == before
    assert [state for (state, _), result in zip(bare, predicted, strict=True) if result["changed"]] == [
        *("staged", "staged", "indexed", "started", "live", "staged", "started", "live")
    ]

    code, made = play(place.path, tasks(place, CASES), "--diff")
    assert code == 0
    changed = [(state, result["changed"]) for (state, _), result in zip(CASES, made, strict=True)]
    assert changed == [
        ("staged", True),
        ("staged", False),
        ("indexed", True),
        ("started", True),
        ("gated", False),
        ("live", True),
        ("staged", True),
        ("started", True),
        ("gated", False),
        ("live", True),
        ("drained", True),
        ("pruned", False),
        ("query", False),
        ("bad", True),
        ("audit", False),
    ]
    assert made[12]["target"] == A
    assert (made[9]["diff"]["before"]["current"], made[9]["diff"]["after"]["current"]) == (A, B)

    code, after = play(place.path, tasks(place, CASES[6:10]), "--check", "--diff")
    assert code == 0
    assert [result["changed"] for result in after] == [False] * 4


def test_a_failure_shows_the_log_in_its_message(place: Place) -> None:
    faulty = 'RAGRACK_COLLECTIONS="postgres"\nFAULT="crash"\n'
    code, results = play(place.path, tasks(place, [("staged", {"id": BAD, "env": faulty}), ("started", {"id": BAD})]))
    assert code != 0
    assert f"release {BAD} did not start" in results[1]["msg"]
    assert "ImportError: no module named nonsense" in results[1]["msg"]
    assert results[1]["log"][-1] == "ImportError: no module named nonsense"


def test_a_missing_argument_is_named(place: Place) -> None:
    code, [result] = play(place.path, [{"ragrack_release": {"state": "live"}}])
    assert code != 0
    assert result["msg"] == "id: state live needs it"


@pytest.mark.parametrize("module", [ragrack_release, ragrack_lock])
def test_the_documentation_is_what_the_module_takes(module: Any) -> None:
    documented = yaml.safe_load(module.DOCUMENTATION)["options"]
    assert {
        name: {key: value for key, value in option.items() if key not in ("description", "suboptions")}
        for name, option in documented.items()
    } == {
        name: {key: value for key, value in argument.items() if key != "options"}
        for name, argument in module.ARGUMENTS.items()
    }
    for option in documented.values():
        assert option["description"]
    assert yaml.safe_load(module.EXAMPLES)
    assert yaml.safe_load(module.RETURN)


@pytest.mark.parametrize("name", ["ragrack_release", "ragrack_lock"])
def test_ansible_doc_renders_it(name: str) -> None:
    program = str(Path(sys.executable).with_name("ansible-doc"))
    done = subprocess.run(
        [program, "-M", "plugins/modules", name],
        cwd=REPO,
        env={**os.environ, "ANSIBLE_CONFIG": str(REPO / "ansible.cfg"), "PAGER": "cat"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert name in done.stdout
