"""A collection in PostgreSQL: answered from on every host, and what the death of the primary costs."""

from __future__ import annotations

import json
import time
from typing import Any

import failures
import fleet
import pytest
from load import Load

APPS = fleet.hosts()
DATABASES = fleet.hosts("database")
INGESTING = fleet.ingesting()
PYTHON = "/opt/ragrack/current/venv/bin/python"
RAGRACK = "/opt/ragrack/current/venv/bin/ragrack"
QUESTIONS = [entry["question"] for entry in fleet.questions()]
PATIENCE_SECONDS = 180
# Commits a row every tenth of a second for 90 seconds and writes down which were acknowledged.
WRITER = """
import sys, time
import psycopg
from ragrack.command import settings_here

password = settings_here().postgres_password.get_secret_value()
acknowledged = open('/root/acknowledged', 'w')
longest, last = 0.0, time.monotonic()
number, until = 0, time.monotonic() + 90
while time.monotonic() < until:
    try:
        with psycopg.connect(host=sys.argv[1], user='ragrack', password=password, dbname='ragrack',
                             sslmode='verify-full', sslrootcert='/etc/ragrack/postgres-ca.pem',
                             target_session_attrs='read-write', connect_timeout=3, autocommit=True) as connection:
            connection.execute('CREATE TABLE IF NOT EXISTS ragrack.probe (number int)')
            while time.monotonic() < until:
                number += 1
                connection.execute('INSERT INTO ragrack.probe VALUES (%s)', [number])
                print(number, file=acknowledged, flush=True)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
                time.sleep(0.1)
    except psycopg.Error:
        time.sleep(0.2)
print(f'{longest:.1f}', file=open('/root/stood', 'w'))
"""
ROWS = """
import sys
import psycopg
from ragrack.command import settings_here

password = settings_here().postgres_password.get_secret_value()
with psycopg.connect(host=sys.argv[1], user='ragrack', password=password, dbname='ragrack', sslmode='verify-full',
                     sslrootcert='/etc/ragrack/postgres-ca.pem', target_session_attrs='read-write') as connection:
    print(*(number for (number,) in connection.execute('SELECT number FROM ragrack.probe')))
"""


def members(host: fleet.Host) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(host.run("patronictl -c /etc/patroni/config.yml list --format json"))
    return found


def primary(host: fleet.Host) -> str | None:
    """The name of the one that takes writes, as this host sees it."""
    return next((str(m["Member"]) for m in members(host) if m["Role"] == "Leader" and m["State"] == "running"), None)


def until(what: str, condition: Any) -> None:
    fleet.until(what, condition, PATIENCE_SECONDS)


def put(host: fleet.Host, path: str, text: str) -> None:
    host.run(f"cat > {path} <<'EOF'\n{text}\nEOF")


def test_every_host_answers_from_the_one_snapshot_in_the_database() -> None:
    assert len({host.snapshot() for host in APPS}) == 1
    for host in APPS:
        assert host.ask("How do I take a base backup?")["sources"]
        assert host.run("find /var/lib/ragrack/indexes -name vectors.faiss") == ""
        assert host.run("systemctl list-timers --no-legend 'ragrack-index-pull@*'") == ""


def test_the_password_is_nowhere_to_be_read() -> None:
    secret = (fleet.INVENTORY / "pki/ragrack.password").read_text().strip()
    for host in APPS:
        put(host, "/root/secret", secret)
        assert host.run("grep -rlaFf /root/secret /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null || true") == ""
        assert host.run("journalctl --no-pager | grep -cFf /root/secret || true") == "0"
        assert host.run("grep -rlFf /root/secret /opt/ragrack/releases/*/app.env /etc/systemd || true") == ""
        host.run("rm /root/secret")


def test_the_index_goes_back_and_on_for_all_hosts_at_once() -> None:
    before = INGESTING.snapshot()
    page = "/var/lib/ragrack/documents/postgres/lamp.html"
    put(INGESTING, page, "<title>Lamp</title><p>The lamp of the northern lighthouse is lit by Aurelia.</p>")
    INGESTING.run(f"chown root:ragrack {page} && systemctl start ragrack-ingest@postgres")
    after = json.loads(INGESTING.run(f"{RAGRACK} index show --json"))[0]["id"]
    assert after != before
    until("the switch", lambda: {host.snapshot() for host in APPS} == {after})
    played = fleet.play("rollback", variables={"what": "index", "index_why": "a test"})
    assert played.status == 0, played.output
    until("the way back", lambda: {host.snapshot() for host in APPS} == {before})
    INGESTING.run(f"rm {page}")
    played = fleet.play("ingest", variables={"index_resume": True})
    assert played.status == 0, played.output
    assert len({host.snapshot() for host in APPS}) == 1


def test_the_second_login_takes_over_while_the_first_gets_a_new_password(capsys: pytest.CaptureFixture[str]) -> None:
    pki = fleet.INVENTORY / "pki"
    first, second = pki / "ragrack.password", pki / "ragrack2.password"

    def rotate(user: str, password: str) -> None:
        wanted = {"app_postgres_user": user, "app_credentials": {"postgres_password": password}}
        played = fleet.play("rotate_credentials", variables=wanted)
        assert played.status == 0, played.output
        for app in APPS:
            assert app.run("grep POSTGRES_USER /opt/ragrack/current/app.env") == f'RAGRACK_POSTGRES_USER="{user}"'

    with Load([host.url for host in APPS], key=fleet.api_key(), ca=fleet.CA, questions=QUESTIONS, clients=2) as load:
        rotate("ragrack2", second.read_text().strip())
        former = first.read_text()
        first.write_text(former.strip()[::-1] + "\n")
        played = fleet.play("site", "--tags", "postgres")
        assert played.status == 0, played.output
        rotate("ragrack", first.read_text().strip())
        # What the second one would have built belongs to the first, which it acts as.
        INGESTING.run("systemctl start ragrack-ingest@postgres")
    with capsys.disabled():
        print(f"\nacross new passwords of the database: {load.count}")
    assert load.count.failures == []


def test_the_primary_dies(capsys: pytest.CaptureFixture[str]) -> None:
    names = {host.name for host in DATABASES}
    until("a whole cluster", lambda: {m["State"] for m in members(DATABASES[0])} <= {"running", "streaming"})
    dead = primary(DATABASES[0])
    assert dead is not None
    witness = next(host for host in DATABASES if host.name != dead)
    addresses = ",".join(host.address for host in DATABASES)
    put(INGESTING, "/root/writer.py", WRITER)
    put(INGESTING, "/root/rows.py", ROWS)
    INGESTING.run(f"systemd-run --unit=probe-writer {PYTHON} /root/writer.py {addresses}")
    page = "/var/lib/ragrack/documents/postgres/lamp.html"
    with Load([host.url for host in APPS], key=fleet.api_key(), ca=fleet.CA, questions=QUESTIONS, clients=2) as load:
        time.sleep(10)
        fleet.machine("kill", dead)
        put(INGESTING, page, "<title>Lamp</title><p>The lamp of the northern lighthouse is lit by Aurelia.</p>")
        INGESTING.run(f"chown root:ragrack {page} && systemctl start --no-block ragrack-ingest@postgres")
        until("another primary", lambda: primary(witness) not in (None, dead))
        within = load.count.total
        failed_within = len(load.count.failures)
        until("the end of the ingestion", lambda: not INGESTING.shell.service("ragrack-ingest@postgres").is_running)
        until("the end of the writer", lambda: not INGESTING.shell.service("probe-writer").is_running)
        outside = load.count.failures[failed_within:]
    result = INGESTING.run("systemctl show -P Result ragrack-ingest@postgres")
    assert result == "success", INGESTING.journal()
    acknowledged = set(INGESTING.run("cat /root/acknowledged").split())
    kept = set(INGESTING.run(f"{PYTHON} /root/rows.py {addresses}").split())
    stood = INGESTING.run("cat /root/stood")
    with capsys.disabled():
        print(
            f"\nprimary killed: {failed_within} failed of {within} until another one was, then {len(outside)} failed;"
        )
        print(
            f"{load.count}; writes stood {stood} s;"
            f" {len(acknowledged - kept)} of {len(acknowledged)} acknowledged rows lost"
        )
    failures.tell(
        "the database's primary dies",
        requests=f"{failed_within} of {within} while there was none",
        until=f"a replica leads: nothing is written for {stood} s",
        lost=f"{len(acknowledged - kept)} of {len(acknowledged)} acknowledged rows",
        test="`postgres/tests/test_failover.py::test_the_primary_dies`",
    )
    assert acknowledged
    assert acknowledged - kept == set()
    assert outside == [], "errors belong into the failover window alone"
    assert INGESTING.ask("Who lights the lamp of the northern lighthouse?")["sources"][0]["document"] == "lamp.html"
    fleet.machine("start", dead)
    until(
        "its return as a replica",
        lambda: {m["Member"] for m in members(witness) if m["State"] in ("running", "streaming")} == names,
    )
    assert primary(witness) != dead
