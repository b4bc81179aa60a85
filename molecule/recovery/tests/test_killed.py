"""A deploy is killed at each stage, with all that it started on the control node; the next begins where it left off.

Each run brings settings of its own, so that each has everything to do, and each finds what the one before has left: had
it not got past that, it would never reach its own end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fleet
import pytest
import yaml
from load import Load

HOSTS = fleet.hosts()
STAGES: list[str] = yaml.safe_load((fleet.ROOT / "roles/release/vars/main.yml").read_text())["release_stages"]
PATIENCE_SECONDS = 300


def killed_before(stage: str, directory: Path, **variables: object) -> None:
    """A deploy that dies when it comes to a stage. Raises AssertionError where it ends before."""
    reached, hook = directory / "reached", directory / "hook.yml"
    here = {"delegate_to": "localhost", "become": False, "run_once": True}
    tasks = [
        {"name": "Say how far it is", "ansible.builtin.file": {"path": str(reached), "state": "touch"}, **here},
        {"name": "Wait for the end", "ansible.builtin.wait_for": {"timeout": PATIENCE_SECONDS}, **here},
    ]
    hook.write_text(yaml.safe_dump(tasks))
    variables = {**variables, "release_hooks": {f"before_{stage}": [str(hook)]}}
    with fleet.killed("deploy", variables=variables) as runs:
        fleet.until(f"its end, or {stage}", lambda: reached.exists() or not runs(), PATIENCE_SECONDS)
        assert reached.exists(), f"it ended before {stage}"


@pytest.fixture(scope="module", autouse=True)
def load() -> Iterator[Load]:
    asked = [entry["question"] for entry in fleet.questions()]
    with Load([host.url for host in HOSTS], key=fleet.api_key(), ca=fleet.CA, questions=asked, clients=2) as running:
        yield running


@pytest.mark.parametrize(("number", "stage"), enumerate(STAGES), ids=STAGES)
def test_a_deploy_is_killed_before(number: int, stage: str, tmp_path: Path, load: Load) -> None:
    killed_before(stage, tmp_path, app_request_timeout=90 + number)
    assert load.count.failures == []
    for host in HOSTS:
        host.ask(fleet.questions()[0]["question"])


def test_the_next_one_leaves_one_release_and_nothing_of_theirs(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    played = fleet.play("deploy", variables={"release_keep_warm": 0})
    assert played.status == 0, played.output
    [release] = {host.release for host in HOSTS}
    for host in HOSTS:
        assert host.running() == [release]
        assert host.run("ls /run/ragrack") == release
        assert host.run("systemctl list-units --no-legend --plain --state=failed 'ragrack*'") == ""
        assert host.run("ls -A /opt/ragrack | grep -E 'lock|trial|new|part' || true") == ""
        # Each is whole.
        assert host.run("cd /opt/ragrack/releases && for r in *; do [ -e $r/release.json ] || echo $r; done") == ""
    again = fleet.play("deploy", variables={"release_keep_warm": 0})
    assert (again.status, again.changed) == (0, 0), again.output
    with capsys.disabled():
        print(f"\n{len(STAGES)} deploys killed, one that went on: {load.count}")
    assert load.count.failures == []
