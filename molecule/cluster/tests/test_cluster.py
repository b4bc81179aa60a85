"""Edge hosts of their own over app hosts: nothing that is done to one host is seen by who asks.

The tests tell one story and run in this order. Clients ask the shared address by POST, GET and streams from the first
to the last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import failures
import fleet
import httpx
import pytest
from fleet import Host
from load import TIMEOUT_SECONDS, Load

EDGES, APPS = fleet.hosts("edge"), fleet.hosts()
ADDRESS = EDGES[0].address.rsplit(".", 1)[0] + ".200"
URL = f"https://{ADDRESS}"
FLEET = "/etc/ragrack/tls/fleet"
PATIENCE_SECONDS = 120
# What was in flight when something died has failed by then.
IN_FLIGHT_SECONDS = TIMEOUT_SECONDS + 2
QUESTIONS = [entry["question"] for entry in fleet.questions()]


@pytest.fixture(scope="module", autouse=True)
def load() -> Iterator[Load]:
    with Load([URL], key=fleet.api_key(), ca=fleet.CA, questions=QUESTIONS, clients=4, streams=True) as running:
        yield running


def until(what: str, holds: Callable[[], bool]) -> None:
    fleet.until(what, holds, PATIENCE_SECONDS)


def served(edge: Host, since: str) -> dict[str, int]:
    """How many requests each app host was given by an edge host since a time of its clock (ISO, in the host's zone)."""
    lines = edge.run(f"awk -F'\"' '$4 >= \"{since}\"' /var/log/nginx/access.log").splitlines()
    asked = [json.loads(line)["upstream"].rsplit(", ", 1)[-1].rsplit(":", 1)[0] for line in lines]
    return {app.name: asked.count(app.address) for app in APPS}


def now(host: Host) -> str:
    return host.run("date --iso-8601=seconds")


def has_address(edge: Host) -> bool:
    return bool(edge.shell.run(f"ip -br address | grep -qw {ADDRESS}").rc == 0)


def at_the_edge() -> Host:
    """The edge host that has the address."""
    host = next(filter(has_address, EDGES), None)
    assert host is not None, "no edge host has the address"
    return host


def asked_by(edge: Host, app: Host, path: str, certificate: str | None) -> int:
    """The status that an app host's port for edge hosts gives."""
    with_certificate = f".load_cert_chain('{certificate}/cert.pem', '{certificate}/key.pem')" if certificate else ""
    code = f"""
import http.client, ssl
context = ssl.create_default_context(cafile='{FLEET}/ca.pem')
{"context" + with_certificate if certificate else ""}
connection = http.client.HTTPSConnection('{app.address}', 8443, context=context, timeout=10)
connection.request('GET', '{path}')
print(connection.getresponse().status)
"""
    return int(edge.run(f"python3 - <<'EOF'\n{code}\nEOF"))


def test_the_edge_that_has_the_address_asks_all_app_hosts(load: Load) -> None:
    edge = at_the_edge()
    since = now(edge)
    until("every app host's turn", lambda: 0 not in served(edge, since).values())


def test_an_app_host_knows_who_asked(load: Load) -> None:
    lines = APPS[0].run("tail -n 200 /var/log/nginx/access.log").splitlines()
    asked = [json.loads(line) for line in lines]
    clients = {one["client"] for one in asked if one["path"] == "/query"}
    assert clients
    assert clients.isdisjoint({edge.address for edge in EDGES})


def test_only_who_has_a_certificate_of_the_fleet_is_answered() -> None:
    assert asked_by(EDGES[0], APPS[0], "/readyz", FLEET) == httpx.codes.OK
    assert asked_by(EDGES[0], APPS[0], "/readyz", None) == httpx.codes.BAD_REQUEST
    # Clients know it by a certificate of another CA.
    assert asked_by(EDGES[0], APPS[0], "/readyz", "/etc/ragrack/tls/default") == httpx.codes.BAD_REQUEST


def test_documents_go_to_the_host_that_ingests() -> None:
    edge = at_the_edge()
    with httpx.Client(verify=False) as client:  # noqa: S501 - who answers is not what is asked here
        client.get(f"{URL}/documents/postgres/none.md")
    lines = edge.run("grep '/documents/' /var/log/nginx/access.log | tail -n 1")
    assert json.loads(lines)["upstream"] == f"{fleet.ingesting().address}:8443"


def test_a_canary_that_does_worse_goes_back_by_itself(load: Load) -> None:
    """The limit is one that no release keeps: to be ten seconds faster than the others."""
    [before] = {host.release for host in APPS}
    canary = {"release_strategy": "canary", "release_canary_seconds": 20, "release_canary_requests": 20}
    played = fleet.play("deploy", variables={**canary, "release_canary_slower": -10, "app_top_k": 3})
    assert played.status != 0
    assert f"As a canary on {APPS[0].name} it did worse: p95 is" in played.output
    assert {host.release for host in APPS} == {before}
    mark = [event for event in APPS[0].history() if event["event"] == "bad"][-1]
    assert mark["reason"].startswith("canary: p95 is")
    for host in APPS[1:]:
        assert [event["event"] for event in host.history() if event["event"] in ("bad", "live")][-1] == "live"
    assert load.count.failures == []


def test_a_canary_that_does_as_well_is_followed_and_so_is_the_way_back(
    load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    [before] = {host.release for host in APPS}
    canary = {"release_strategy": "canary", "release_canary_seconds": 20, "release_canary_slower": 5}
    played = fleet.play("deploy", variables={**canary, "app_top_k": 6})
    assert played.status == 0, played.output
    [after] = {host.release for host in APPS}
    assert after != before
    assert fleet.play("rollback").status == 0
    assert {host.release for host in APPS} == {before}
    with capsys.disabled():
        print(f"\nacross a deploy by canary and a rollback: {load.count}")
    assert load.count.failures == []


def test_a_drained_host_gets_nothing_new(load: Load, tmp_path: Path) -> None:
    edge = at_the_edge()
    played = fleet.play("drain", "--limit", APPS[1].name, variables={"nginx_drain_why": "a test"})
    assert played.status == 0, played.output
    again = fleet.play("drain", "--limit", APPS[1].name)
    assert (again.status, again.changed) == (0, 0), again.output
    assert json.loads(APPS[1].run("cat /etc/ragrack/drained.json"))["why"] == "a test"
    assert asked_by(edge, APPS[1], "/query", FLEET) == httpx.codes.BAD_GATEWAY
    time.sleep(1)
    since = now(edge)
    time.sleep(10)
    given = served(edge, since)
    assert given[APPS[1].name] == 0
    assert min(given[APPS[0].name], given[APPS[2].name]) > 0
    page = tmp_path / "fleet.html"
    played = fleet.play("status", variables={"format": "html", "page": str(page)})
    assert played.status == 0, played.output
    assert "a test" in played.output
    text = page.read_text()
    for word in ("a test", "fleet 89 days", ">staged<", ">gated<", ">live<", *(host.name for host in [*EDGES, *APPS])):
        assert word in text
    assert "Not what was installed" not in text
    refused = fleet.play("drain", "--limit", f"{APPS[0].name},{APPS[2].name}")
    assert refused.status != 0
    assert "no other host would answer in its place" in refused.output
    assert APPS[0].shell.run("test -e /etc/ragrack/drained.json").rc != 0
    played = fleet.play("undrain", "--limit", APPS[1].name)
    assert played.status == 0, played.output
    since = now(edge)
    until("requests again", lambda: served(edge, since)[APPS[1].name] > 0)
    assert load.count.failures == []


def test_app_hosts_are_rebooted_one_after_the_other(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    boots = {host.name: host.run("cat /proc/sys/kernel/random/boot_id") for host in APPS}
    played = fleet.play("reboot", "--limit", "app")
    assert played.status == 0, played.output
    for host in APPS:
        assert host.run("cat /proc/sys/kernel/random/boot_id") != boots[host.name]
    with capsys.disabled():
        print(f"\nacross a reboot of every app host: {load.count}")
    assert load.count.failures == []


def test_an_edge_s_nginx_is_reloaded(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    """It closes idle connections: who sends on one at that moment may lose its request, and nothing else is lost."""
    for _ in range(3):
        at_the_edge().run("systemctl reload nginx")
        time.sleep(1)
    with capsys.disabled():
        print(f"\nacross three reloads of the edge's nginx: {load.count}")
    assert [one for one in load.count.failures if not one.startswith(("RemoteProtocolError", "ReadError"))] == []
    load.count.failures.clear()


def test_an_app_host_dies(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    asked = load.count.total
    fleet.machine("kill", APPS[2].name)
    time.sleep(IN_FLIGHT_SECONDS)
    within = list(load.count.failures)
    asked = load.count.total - asked
    time.sleep(5)
    assert load.count.failures == within, "what fails is what was in flight when it died"
    fleet.machine("start", APPS[2].name)
    edge = at_the_edge()
    since = now(edge)
    until("its return", lambda: served(edge, since)[APPS[2].name] > 0)
    with capsys.disabled():
        print(f"\napp host killed: {within or 'nothing failed'}")
    failures.tell(
        "an app host dies",
        requests=f"{len(within)} of {asked}",
        until=f"{IN_FLIGHT_SECONDS} s at most",
        lost="nothing: the others have the same index",
        test="`cluster/tests/test_cluster.py::test_an_app_host_dies`",
    )
    assert len(within) <= 4, within
    load.count.failures.clear()


def test_a_host_that_is_down_is_left_out_until_it_is_deployed_to(load: Load) -> None:
    down, up = APPS[2], APPS[:2]
    before = down.release
    fleet.machine("stop", down.name)
    time.sleep(5)
    load.count.failures.clear()
    refused = fleet.play("deploy", variables={"app_top_k": 4})
    assert refused.status != 0
    refused = fleet.play("rotate_certificates")
    assert refused.status != 0
    assert f"Nothing was changed. {down.name} cannot be reached" in " ".join(refused.output.split()), refused.output
    played = fleet.play("deploy", variables={"app_top_k": 4, "deploy_allow_unreachable": 1})
    assert played.status == 0, played.output
    [after] = {host.release for host in up}
    assert after != before
    fleet.machine("start", down.name)
    edge = at_the_edge()
    until("its app", lambda: down.shell.run(f"systemctl is-active ragrack@{before} nginx").rc == 0)
    until("its answer", lambda: asked_by(edge, down, "/readyz", FLEET) == httpx.codes.OK)
    since = now(edge)
    time.sleep(8)
    assert served(edge, since)[down.name] == 0
    shown = fleet.play("status")
    assert f"sends nothing to {down.name} (could not be reached when deploy" in shown.output
    played = fleet.play("deploy", variables={"app_top_k": 4})
    assert played.status == 0, played.output
    assert {host.release for host in APPS} == {after}
    since = now(edge)
    until("requests again", lambda: served(edge, since)[down.name] > 0)
    assert load.count.failures == []


def test_an_app_host_is_cut_off_from_the_edge(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    """As by a cable: what it sends the edge hosts is lost, and they hear nothing of it."""
    cut, edge = APPS[1], at_the_edge()
    load.count.failures.clear()
    asked = load.count.total
    for one in EDGES:
        cut.run(f"ip route add blackhole {one.address}/32")
    try:
        time.sleep(IN_FLIGHT_SECONDS)
        within = list(load.count.failures)
        asked = load.count.total - asked
        time.sleep(5)
        assert load.count.failures == within, "what fails is what was on its way"
    finally:
        for one in EDGES:
            cut.run(f"ip route del blackhole {one.address}/32")
    since = now(edge)
    until("its return", lambda: served(edge, since)[cut.name] > 0)
    with capsys.disabled():
        print(f"\napp host cut off: {within or 'nothing failed'}")
    failures.tell(
        "an app host is cut off from the edge",
        requests=f"{len(within)} of {asked}",
        until=f"{IN_FLIGHT_SECONDS} s at most",
        lost="nothing",
        test="`cluster/tests/test_cluster.py::test_an_app_host_is_cut_off_from_the_edge`",
    )
    assert len(within) <= 8, within
    load.count.failures.clear()
    time.sleep(5)
    assert load.count.failures == []


def test_an_app_host_has_no_room_for_an_index(load: Load) -> None:
    full, source = APPS[1], fleet.ingesting()
    indexes, document = "/var/lib/ragrack/indexes", "/var/lib/ragrack/documents/postgres/lighthouse.md"
    unit = "ragrack-index-pull@postgres"
    before = full.opened()
    assert len(before) == 1
    full.run(
        f"""set -e; mkdir /run/small
mount -t tmpfs -o size=$(($(du -sm {indexes} | cut -f1) + 4))m none /run/small
cp -a {indexes}/. /run/small/; chown --reference={indexes} /run/small; chmod --reference={indexes} /run/small
mount --bind /run/small {indexes}
dd if=/dev/zero of={indexes}/full bs=64k 2>/dev/null || true"""
    )
    try:
        source.run(f"echo 'The lighthouse of Skarholm was painted green in 1931.' >{document}")
        source.run("systemctl start ragrack-ingest@postgres")
        until("the new index elsewhere", lambda: source.opened().isdisjoint(before))
        assert full.shell.run(f"systemctl start {unit}").rc != 0
        assert "No space left on device" in full.run(f"journalctl --no-pager -o cat -n 20 -u {unit}")
        assert full.opened() == before
        assert asked_by(at_the_edge(), full, "/readyz", FLEET) == httpx.codes.OK
        full.run(f"rm {indexes}/full")
        full.run(f"umount -l {indexes} /run/small")
        full.run(f"systemctl start {unit}")
        until("the new index", lambda: full.opened() == source.opened())
    finally:
        full.shell.run(f"umount -l {indexes} /run/small")
        source.run(f"rm -f {document}; systemctl start ragrack-ingest@postgres")
    until("one index", lambda: len({one for app in APPS for one in app.opened()}) == 1)
    assert load.count.failures == []
    failures.tell(
        "an app host has no room for a new index",
        requests="0",
        until="there is room: it answers from the index before",
        lost="nothing",
        test="`cluster/tests/test_cluster.py::test_an_app_host_has_no_room_for_an_index`",
    )


def test_the_edge_dies(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    dead = at_the_edge()
    asked = load.count.total
    fleet.machine("kill", dead.name)
    begun = time.monotonic()
    until("the other's turn", lambda: any(edge is not dead and has_address(edge) for edge in EDGES))
    seconds = time.monotonic() - begun
    time.sleep(IN_FLIGHT_SECONDS)
    failed = list(load.count.failures)
    asked = load.count.total - asked
    load.count.failures.clear()
    time.sleep(5)
    failures.tell(
        "an edge host dies",
        requests=f"{len(failed)} of {asked}",
        until=f"its address has moved: {seconds:.0f} s",
        lost="nothing",
        test="`cluster/tests/test_cluster.py::test_the_edge_dies`",
    )
    with capsys.disabled():
        print(
            f"\nedge host killed: its address moved within {seconds:.0f} s, {len(failed)} requests failed;"
            f" then {load.count}"
        )
    assert load.count.failures == []
    fleet.machine("start", dead.name)
    until("its return", lambda: dead.shell.run("systemctl is-active nginx keepalived").rc == 0)
    time.sleep(5)
    assert at_the_edge() is not dead, "it takes nothing back"
    assert load.count.failures == []
