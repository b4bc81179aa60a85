"""The index's own life: built by a playbook, back to what served before, held there, and on again."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import fleet
import pytest
import yaml

HOSTS = fleet.hosts()
RAGRACK = "/opt/ragrack/current/venv/bin/ragrack"
FACT = "The lamp of the northern lighthouse is lit at dusk by a keeper named Aurelia."
QUESTION = "Who lights the lamp of the northern lighthouse?"


def snapshots(host: fleet.Host) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(host.run(f"{RAGRACK} index list --collection postgres --json"))
    return found


def current(host: fleet.Host) -> str:
    [snapshot] = [str(row["snapshot"]) for row in snapshots(host) if row["current"]]
    return snapshot


def held(host: fleet.Host) -> str | None:
    [row] = [row for row in snapshots(host) if row["current"]]
    return None if row["held"] is None else str(row["held"]["why"])


def knows(host: fleet.Host) -> bool:
    return any(source["document"] == "lamp.html" for source in host.ask(QUESTION)["sources"])


def soon(host: fleet.Host, known: bool) -> bool:
    """Whether the service answers from the page, or without it, within what its workers take to follow `current`."""
    deadline = time.monotonic() + 30
    while knows(host) is not known and time.monotonic() < deadline:
        time.sleep(0.5)
    return knows(host) is known


def audits(host: fleet.Host) -> list[dict[str, Any]]:
    return [event for event in host.history() if event["event"] == "audit"]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The inventory's collection with one page more; afterwards every host is as it was."""
    inventory = yaml.safe_load((fleet.INVENTORY / "group_vars/all.yml").read_text())
    [collection] = inventory["index_collections"]
    more = tmp_path_factory.mktemp("more") / "postgres"
    more.mkdir()
    for page in (fleet.ROOT / "build/documents/tests").iterdir():
        (more / page.name).hardlink_to(page)
    (more / "lamp.html").write_text(f"<html><title>The lamp</title><body><p>{FACT}</p></body></html>")
    yield {"index_collections": [collection | {"source": str(more), "golden": str(fleet.GOLDEN)}]}
    played = fleet.play("ingest", variables={"index_resume": True})
    assert played.status == 0, played.output
    for host in HOSTS:
        assert held(host) is None
        assert soon(host, known=False)


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    return {host.name: current(host) for host in HOSTS}


@pytest.mark.usefixtures("before")
def test_ingesting_tells_what_came_of_it(documents: dict[str, Any]) -> None:
    played = fleet.play("ingest", variables=documents | {"index_progress_every": 1})
    assert played.status == 0, played.output
    for host in HOSTS:
        assert f"postgres: snapshot {current(host)}, " in played.output
        assert soon(host, known=True)
    assert re.search(r", hit rate [01]\.\d", played.output)
    played = fleet.play("ingest", variables=documents)
    assert played.status == 0, played.output
    assert played.changed == 0, "the same documents again change nothing"


def test_a_rollback_tells_beforehand_what_it_would_do(before: dict[str, str]) -> None:
    serving = {host.name: current(host) for host in HOSTS}
    played = fleet.play("rollback", "--check", "--diff", variables={"what": "index"})
    assert played.status == 0, played.output
    assert played.changed > 0
    for snapshot in before.values():
        assert snapshot in played.output
    assert {host.name: current(host) for host in HOSTS} == serving
    assert all(held(host) is None for host in HOSTS)


def test_a_rollback_takes_every_host_back_and_holds_it(before: dict[str, str]) -> None:
    releases = [host.release for host in HOSTS]
    played = fleet.play("rollback", variables={"what": "index", "index_why": "the lamp page is wrong"})
    assert played.status == 0, played.output
    assert {host.name: current(host) for host in HOSTS} == before
    assert [host.release for host in HOSTS] == releases, "the release stays"
    for host in HOSTS:
        assert held(host) == "the lamp page is wrong"
        assert not knows(host), "the service answers from it when the play has ended"
        last = audits(host)[-1]
        assert (last["what"], last["result"], last["to"]) == (
            "index rollback (the lamp page is wrong)",
            "ok",
            before[host.name],
        )


def test_going_back_there_again_changes_nothing(before: dict[str, str]) -> None:
    several = len({*before.values()}) > 1
    for host in HOSTS if several else HOSTS[:1]:
        # Where every host ingests, each has snapshots of its own.
        limit = ["--limit", host.name] if several else []
        played = fleet.play("rollback", *limit, variables={"what": "index", "index_to": before[host.name]})
        assert played.status == 0, played.output
        assert played.changed == 0


def test_what_is_built_meanwhile_waits(documents: dict[str, Any], before: dict[str, str]) -> None:
    played = fleet.play("ingest", variables=documents)
    assert played.status == 0, played.output
    assert "not live, held since" in played.output
    for host in HOSTS:
        assert current(host) == before[host.name]
        for unit in ("ragrack-ingest@postgres", "ragrack-index-pull@postgres"):
            host.run(f"systemctl cat {unit}.service > /dev/null 2>&1 || exit 0; systemctl start {unit}.service")
        assert current(host) == before[host.name]
        assert not knows(host)


def test_the_service_can_still_change_what_root_has(before: dict[str, str]) -> None:
    for host in HOSTS:
        root = "/var/lib/ragrack/indexes"
        assert host.run(f"find {root} ! -user ragrack") == ""
        host.run(f"{RAGRACK} index rollback --to {before[host.name]} --why 'by hand'")
        host.run(f"{RAGRACK} index resume")
        assert host.run(f"find {root} ! -user ragrack") == ""
        assert held(host) is None
        host.run(f"{RAGRACK} index rollback --to {before[host.name]} --why 'the lamp page is wrong'")


def test_status_shows_it_on_one_page() -> None:
    played = fleet.play("status")
    assert played.status == 0, played.output
    assert played.changed == 0
    for host in HOSTS:
        [line] = [line for line in played.output.splitlines() if f'"{host.name} ' in line and "postgres" in line]
        assert host.release in line
        assert "ready" in line
        assert current(host) in line
        assert "(the lamp page is wrong)" in line
    assert "index rollback (the lamp page is wrong)" in played.output


def test_status_says_so_where_a_host_is_down() -> None:
    down, up = HOSTS
    fleet.machine("stop", down.name)
    try:
        played = fleet.play("status")
    finally:
        fleet.machine("start", down.name)
    [line] = [line for line in played.output.splitlines() if f'"{down.name} ' in line and "unreachable" in line]
    assert "postgres" not in line
    assert [line for line in played.output.splitlines() if f'"{up.name} ' in line and "ready" in line]


def test_an_unknown_snapshot_is_refused_with_those_there_are(before: dict[str, str]) -> None:
    played = fleet.play("rollback", variables={"what": "index", "index_to": "20000101T000000Z-00000000"})
    assert played.status != 0
    assert before[HOSTS[0].name] in played.output
    assert {host.name: current(host) for host in HOSTS} == before


def test_what_can_be_rolled_back_is_named() -> None:
    played = fleet.play("rollback", variables={"what": "documents"})
    assert played.status != 0
    assert "what=release (the default) or what=index" in played.output


def test_letting_go_moves_on(documents: dict[str, Any]) -> None:
    played = fleet.play("ingest", variables=documents | {"index_resume": True})
    assert played.status == 0, played.output
    for host in HOSTS:
        assert held(host) is None
        assert soon(host, known=True)
