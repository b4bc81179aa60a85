"""What the previous release of this repository set up goes on answering while today's is put over it, and back."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import fleet
import pytest
from load import Load

[HOST] = fleet.hosts()
QUESTION = "How do I take a base backup?"
# Before the first tag: what was on main when the monitoring began.
UNTAGGED = "14f400f"
PLAYBOOKS = ("site", "deploy")


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=fleet.ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def previous() -> Path:
    """A checkout of the newest tag before today's commit, with its own environment."""
    tags = git("tag", "--merged", "HEAD", "--no-contains", "HEAD", "--sort=-version:refname").split()
    path = fleet.ROOT / ".state/previous"
    if not path.exists():
        git("worktree", "prune")
        git("worktree", "add", "--detach", str(path), tags[0] if tags else UNTAGGED)
        (path / ".cache").symlink_to(fleet.ROOT / ".cache")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "UV_"))}
    subprocess.run([path / "bin/setup"], cwd=path, check=True, env=environment, stdout=subprocess.DEVNULL)
    return path


def by_the_previous(path: Path, playbook: str) -> None:
    done = subprocess.run(
        [path / ".venv/bin/ansible-playbook", "-i", fleet.INVENTORY, f"playbooks/{playbook}.yml"],
        cwd=path,
        env=fleet.environment()
        | {"ANSIBLE_CONFIG": str(path / "ansible.cfg"), "PATH": f"{path}/.venv/bin:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_over_the_previous_release_and_back(previous: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for playbook in PLAYBOOKS:
        by_the_previous(previous, playbook)
    before, sources = HOST.release, HOST.ask(QUESTION)["sources"]
    with Load([HOST.url], key=fleet.api_key(), ca=fleet.CA, questions=[QUESTION], streams=True) as load:
        for playbook in PLAYBOOKS:
            played = fleet.play(playbook)
            assert played.status == 0, played.output
        after = HOST.release
        assert after != before
        played = fleet.play("rollback")
        assert played.status == 0, played.output
        assert HOST.release == before
        assert HOST.ask(QUESTION)["sources"] == sources
        played = fleet.play("deploy")
        assert played.status == 0, played.output
        assert HOST.release == after
    for playbook in PLAYBOOKS:
        played = fleet.play(playbook)
        assert (played.status, played.changed) == (0, 0), played.changes
    with capsys.disabled():
        print(f"\nacross an upgrade from {before} to {after}, back and again: {load.count}")
    assert load.count.failures == []
