"""What a Patroni cluster says of itself, and what follows from it. Real clusters are Molecule's (scenario postgres)."""

from __future__ import annotations

from typing import Any

from modules import ragrack_patroni as patroni

NAMES = ["db1", "db2", "db3"]


def state(**changes: dict[str, Any]) -> list[dict[str, Any]]:
    """A healthy cluster, but for what changes of its members."""
    members: dict[str, dict[str, Any]] = {
        "db1": {"role": "leader", "state": "running"},
        "db2": {"role": "sync_standby", "state": "streaming"},
        "db3": {"role": "replica", "state": "streaming"},
    }
    return [{"name": name} | member | changes.get(name, {}) for name, member in members.items()]


def test_a_healthy_cluster_has_no_trouble() -> None:
    assert patroni.trouble(state(), NAMES) == []
    assert patroni.leader(state()) == "db1"


def test_each_member_that_is_missing_or_not_up_is_named() -> None:
    assert patroni.trouble(state(db3={"state": "starting"}), [*NAMES, "db4"]) == [
        "db4 has not joined",
        "db3 is starting",
    ]


def test_a_member_that_nobody_expects_may_be_away() -> None:
    assert patroni.trouble(state(db3={"state": "stopped"}), ["db1", "db2"]) == []


def test_a_cluster_without_primary_is_in_trouble() -> None:
    assert patroni.trouble(state(db1={"role": "replica"}), NAMES) == ["there is no primary"]
    assert patroni.leader(state(db1={"role": "replica"})) is None


def test_the_next_is_not_touched_before_a_replica_has_everything_that_was_acknowledged() -> None:
    assert patroni.trouble(state(db2={"role": "replica"}), NAMES) == ["no replica is synchronous yet"]
    assert patroni.trouble(state(db2={"role": "replica"}), ["db1"]) == [], "one alone has none to wait for"


def test_replicas_are_restarted_before_the_primary() -> None:
    waiting = {name: {"pending_restart": True} for name in NAMES}
    assert patroni.pending(state(**waiting)) == ["db2", "db3", "db1"]
    assert patroni.pending(state()) == []
