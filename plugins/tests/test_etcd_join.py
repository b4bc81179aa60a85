"""Who an etcd member that joins replaces, and what it is told. Real clusters are Molecule's (scenario postgres)."""

from __future__ import annotations

from modules import ragrack_etcd_join as join

PEERS = {name: f"https://192.0.2.{number}:2380" for number, name in enumerate(["db1", "db2", "db3"], start=1)}
MEMBERS = [{"ID": 10 + n, "name": name, "peerURLs": [url]} for n, (name, url) in enumerate(PEERS.items())]


def test_a_member_of_the_same_name_or_address_is_replaced() -> None:
    assert join.stale(MEMBERS, "db2", "https://192.0.2.99:2380") == ["b"]
    assert join.stale(MEMBERS, "new", PEERS["db3"]) == ["c"]
    assert join.stale(MEMBERS, "new", "https://192.0.2.99:2380") == []


def test_a_member_that_was_announced_and_never_started_is_known_by_its_address() -> None:
    assert join.stale([{"ID": 255, "peerURLs": [PEERS["db3"]]}], "db3", PEERS["db3"]) == ["ff"]


def test_founders_all_name_the_same_members() -> None:
    told = {join.first(name, PEERS, False, []) for name in PEERS}
    assert len(told) == 1
    assert 'STATE="new"' in told.pop()


def test_who_joins_names_the_members_that_there_are_and_itself() -> None:
    told = join.first("db3", PEERS, True, MEMBERS[:1])
    assert f'ETCD_INITIAL_CLUSTER="db1={PEERS["db1"]},db3={PEERS["db3"]}"' in told
    assert 'STATE="existing"' in told
