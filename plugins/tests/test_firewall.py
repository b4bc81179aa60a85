"""Rules that revert themselves unless they are confirmed, with the real nftables in a network namespace of its own."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from modules.ragrack_firewall import ANEW, Firewall, FirewallError, run

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace and its rules are root's")

CLONE_NEWNET = 0x40000000
RULES = ANEW + "table inet ragrack {\n  chain input {\n    tcp dport 22 accept\n  }\n}\n"
OTHER = RULES.replace("22", "23")
SYSTEMCTL = """#!/bin/sh
case "$1" in
  is-active) test -e "$TIMER" ;;
  stop) rm -f "$TIMER" ;;
esac
"""
SYSTEMD_RUN = """#!/bin/sh
for word; do case "$word" in /*) break;; esac; shift; done
echo "$@" >"$TIMER"
"""


def apart(test: Callable[[], None]) -> None:
    """Run it in a process with a network of its own."""

    def body(failure: multiprocessing.connection.Connection) -> None:
        assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) == 0
        try:
            test()
        except BaseException as error:
            failure.send(repr(error))
            raise

    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=body, args=(send,))
    process.start()
    process.join(30)
    assert process.exitcode == 0, receive.recv() if receive.poll() else process.exitcode


@pytest.fixture
def firewall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Firewall:
    """Of a host whose timer is a file: this machine's own systemd is none of a test's business."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("systemctl", SYSTEMCTL), ("systemd-run", SYSTEMD_RUN)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}:/usr/sbin")
    monkeypatch.setenv("TIMER", str(tmp_path / "timer"))
    return Firewall(tmp_path / "etc/firewall.nft")


def timer_fires(firewall: Firewall) -> None:
    timer = Path(os.environ["TIMER"])
    command = timer.read_text().split()
    assert run(*command).returncode == 0
    timer.unlink()


def loaded() -> str:
    return run("nft", "list", "ruleset").stdout


def test_rules_are_on_trial_until_they_are_confirmed(firewall: Firewall) -> None:
    def life() -> None:
        firewall.load(RULES, 60)
        assert "dport 22" in loaded()
        assert firewall.on_trial()
        assert not firewall.path.exists()
        assert not firewall.stands(RULES)
        firewall.confirm()
        assert firewall.path.read_text() == RULES
        assert firewall.stands(RULES)
        assert sorted(path.name for path in firewall.path.parent.iterdir()) == ["firewall.nft"]
        firewall.confirm()  # nothing to confirm is no fault

    apart(life)


def test_rules_that_nobody_confirms_go(firewall: Firewall) -> None:
    def life() -> None:
        firewall.load(RULES, 60)
        timer_fires(firewall)
        assert loaded() == ""
        with pytest.raises(FirewallError, match="what was before is in force again"):
            firewall.confirm()
        assert not firewall.path.exists()

    apart(life)


def test_what_was_confirmed_comes_back(firewall: Firewall) -> None:
    def life() -> None:
        firewall.load(RULES, 60)
        firewall.confirm()
        firewall.load(OTHER, 60)
        assert "dport 23" in loaded() and "dport 22" not in loaded()
        # Again before it was confirmed, as after a run that died: what comes back is still what was confirmed.
        firewall.load(OTHER.replace("23", "24"), 60)
        timer_fires(firewall)
        assert "dport 22" in loaded() and "dport 24" not in loaded()
        assert firewall.path.read_text() == RULES
        assert firewall.stands(RULES)
        firewall.forget_trial()
        firewall.confirm()

    apart(life)


def test_rules_that_are_none_change_nothing(firewall: Firewall) -> None:
    def life() -> None:
        firewall.load(RULES, 60)
        firewall.confirm()
        before = loaded()
        with pytest.raises(FirewallError, match="nftables does not take them; nothing was changed"):
            firewall.load(RULES.replace("accept", "acept"), 60)
        assert loaded() == before
        assert not firewall.on_trial()

    apart(life)


def test_rules_that_somebody_flushed_are_loaded_again(firewall: Firewall) -> None:
    def life() -> None:
        firewall.load(RULES, 60)
        firewall.confirm()
        run("nft", "flush", "ruleset")
        assert not firewall.stands(RULES)

    apart(life)


def test_other_tables_are_left_alone(firewall: Firewall) -> None:
    def life() -> None:
        run("nft", "add", "table", "inet", "site")
        firewall.load(RULES, 60)
        timer_fires(firewall)
        assert loaded() == "table inet site {\n}\n"

    apart(life)
