"""What a deploy refuses, in words, before anything has changed."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import fleet
import pytest

HOSTS = fleet.hosts()


def state() -> list[tuple[str, list[str], list[str], list[str]]]:
    """What a refused deploy must leave alone on each host."""
    return [
        (host.release, host.releases(), host.running(), [e["event"] for e in host.history() if e["event"] != "audit"])
        for host in HOSTS
    ]


@contextlib.contextmanager
def nothing_changes() -> Iterator[None]:
    before = state()
    yield
    assert state() == before


@pytest.mark.parametrize(("playbook", "hosts"), [("site", HOSTS[:1]), ("deploy", HOSTS)])
def test_check_mode_of_what_is_right_predicts_no_change(playbook: str, hosts: list[fleet.Host]) -> None:
    played = fleet.play(playbook, "--check", "--diff", "--limit", ",".join(host.name for host in hosts))
    assert played.status == 0, played.output
    assert played.changed == 0, played.output


def test_check_mode_of_a_new_setting_says_so_and_changes_nothing() -> None:
    with nothing_changes():
        played = fleet.play("deploy", "--check", "--diff", variables={"app_top_k": 2})
    assert played.status == 0, played.output
    assert played.changed > 0


def test_wrong_settings_are_all_named_in_one_message() -> None:
    wrong = {"app_top_k": "many", "app_chunk_size": 9999, "app_collections": [], "app_answer": "guess"}
    with nothing_changes():
        played = fleet.play("deploy", variables=wrong)
    assert played.status != 0
    for name in ("RAGRACK_TOP_K", "RAGRACK_CHUNK_SIZE", "RAGRACK_COLLECTIONS", "RAGRACK_ANSWER"):
        assert name in played.output
    assert "nothing was changed on any host" in played.output


def test_site_refuses_wrong_settings_before_it_touches_a_host() -> None:
    played = fleet.play("site", variables={"app_top_k": 0})
    assert played.status != 0
    assert "RAGRACK_TOP_K" in played.output
    assert played.changed == 0


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("sources.list.d/own.list", "deb [trusted=yes] https://packages.example.org/ stable main"),
        ("sources.list.d/own.sources", "Types: deb\nURIs: https://packages.example.org/\nSuites: /\nTrusted: yes"),
        ("apt.conf.d/99own", 'APT::Get::AllowUnauthenticated "true";'),
    ],
)
def test_site_refuses_packages_that_nobody_has_signed(file: str, line: str) -> None:
    HOSTS[0].run(f"printf '%s\n' '{line}' >/etc/apt/{file}")
    try:
        played = fleet.play("site")
    finally:
        HOSTS[0].run(f"rm /etc/apt/{file}")
    assert played.status != 0
    assert f"{HOSTS[0].name} takes packages that nobody has signed" in played.output
    assert played.changed == 0


def test_a_disk_that_is_not_encrypted_is_refused_where_one_is_asked_for() -> None:
    played = fleet.play("site", "--tags", "app", variables={"app_encrypted": True})
    assert played.status != 0
    assert "lies on no encrypted device, and app_encrypted asks for one" in " ".join(played.output.split())
    assert played.changed == 0


def test_a_full_disk_is_seen_before_anything_is_shipped() -> None:
    with nothing_changes():
        played = fleet.play("deploy", variables={"app_top_k": 2, "release_min_free_mb": 900_000_000})
    assert played.status != 0
    assert "MiB free" in played.output
    for host in HOSTS:
        assert f"{host.name}: /opt/ragrack" in played.output


def test_a_release_that_is_not_there_is_no_target_and_those_that_are_there_are_named() -> None:
    with nothing_changes():
        played = fleet.play("rollback", variables={"release_to": "0.0.1-000000000000"})
    assert played.status != 0
    assert "0.0.1-000000000000" in played.output
    assert HOSTS[0].release in played.output


def test_nothing_to_roll_back_to() -> None:
    with nothing_changes():
        played = fleet.play("rollback")
    assert played.status != 0
    assert "nothing to roll back to" in played.output


def test_a_second_deploy_is_told_who_deploys_since_when() -> None:
    holder = {"run": "elsewhere-1", "owner": "operator", "controller": "control2"}
    lock = json.dumps({"holder": holder, "why": "a deploy of tests"})
    on_hosts = ["ansible", "-i", str(fleet.INVENTORY), "app", "-m", "ragrack_lock", "-a"]

    def ad_hoc(arguments: str) -> None:
        subprocess.run([*on_hosts, arguments], cwd=fleet.ROOT, env=fleet.environment(), check=True)

    ad_hoc(lock)
    try:
        with nothing_changes():
            played = fleet.play("deploy", variables={"app_top_k": 2})
    finally:
        ad_hoc(json.dumps({"holder": holder, "state": "absent"}))
    assert played.status != 0
    assert "locked by operator on control2 since" in played.output


def test_two_deploys_at_once_one_wins() -> None:
    slow = subprocess.Popen(
        fleet.command("deploy"),
        cwd=fleet.ROOT,
        env=fleet.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with slow:
        deadline = time.monotonic() + 60
        while HOSTS[0].shell.run("test -e /opt/ragrack/lock.json").rc != 0:
            assert time.monotonic() < deadline, "the first deploy never took the lock"
        second = fleet.play("deploy", variables={"app_top_k": 2})
        first = slow.communicate()[0]
    assert second.status != 0
    assert "locked by" in second.output
    assert slow.returncode == 0, first


def test_a_run_that_was_killed_does_not_stand_in_the_way() -> None:
    killed = subprocess.Popen(
        fleet.command("deploy"), cwd=fleet.ROOT, env=fleet.environment(), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while HOSTS[0].shell.run("test -e /opt/ragrack/lock.json").rc != 0:
        assert time.monotonic() < deadline, "the deploy never took the lock"
    killed.kill()
    killed.wait()
    played = fleet.play("deploy")
    assert played.status == 0, played.output
    assert HOSTS[0].shell.run("test -e /opt/ragrack/lock.json").rc != 0


def test_a_damaged_artifact_is_named_by_its_file() -> None:
    """A byte of what was shipped is turned, with size and time kept, so that rsync sees nothing to send."""
    [wheel] = HOSTS[0].run("ls /var/cache/ragrack/artifact/wheels/fastapi-*.whl").split()
    HOSTS[0].run(f"cp -p {wheel} /var/tmp/good.whl && printf x | dd of={wheel} bs=1 seek=100 conv=notrunc status=none")
    HOSTS[0].run(f"touch -r /var/tmp/good.whl {wheel}")
    before = [(host.release, host.running()) for host in HOSTS]
    releases = HOSTS[0].releases()
    try:
        played = fleet.play("deploy", variables={"app_top_k": 2})
    finally:
        HOSTS[0].run(f"mv /var/tmp/good.whl {wheel}")
    assert played.status != 0
    assert Path(wheel).name in played.output
    assert [(host.release, host.running()) for host in HOSTS] == before
    assert HOSTS[0].releases() == releases


def test_a_host_that_is_down_stops_the_deploy_for_all() -> None:
    down, up = HOSTS
    before = (up.release, up.running())
    fleet.machine("stop", down.name)
    try:
        played = fleet.play("deploy", variables={"app_top_k": 2})
    finally:
        fleet.machine("start", down.name)
    assert played.status != 0
    assert f"{down.name}" in played.output
    assert (up.release, up.running()) == before
