"""New certificates and a new CA of the databases while clients ask: the primary stays what it is, nobody notices."""

from __future__ import annotations

import json

import fleet
import pytest
from load import Load

APPS, DATABASES = fleet.hosts(), fleet.hosts("database")
QUESTIONS = [entry["question"] for entry in fleet.questions()]
TLS = "/etc/ragrack/tls/postgres"


def members() -> dict[str, tuple[str, str]]:
    """Role and state of each member, as Patroni says it."""
    listed = json.loads(DATABASES[0].run("patronictl -c /etc/patroni/config.yml list --format json"))
    return {str(member["Member"]): (str(member["Role"]), str(member["State"])) for member in listed}


def whole() -> bool:
    return len(members()) == len(DATABASES) and {state for _, state in members().values()} <= {"running", "streaming"}


def etcd_answers() -> bool:
    files = f"--cacert={TLS}/ca.pem --cert={TLS}/cert.pem --key={TLS}/key.pem"
    return all(
        host.shell.run(f"etcdctl {files} --endpoints=https://{host.address}:2379 endpoint health").rc == 0
        for host in DATABASES
    )


def test_nobody_notices(capsys: pytest.CaptureFixture[str]) -> None:
    ca = fleet.CA.parent / "postgres/ca.pem"
    fleet.until("a whole cluster", whole, 120)
    [leader] = [name for name, (role, _) in members().items() if role == "Leader"]
    old = ca.read_text()
    with Load([host.url for host in APPS], key=fleet.api_key(), ca=fleet.CA, questions=QUESTIONS, clients=2) as load:
        for step in (None, "next", "finish"):
            certificates = {host.run(f"cat {TLS}/cert.pem") for host in DATABASES}
            played = fleet.play("rotate_certificates", variables={"ca": step} if step else None)
            assert played.status == 0, played.output
            assert certificates.isdisjoint(host.run(f"cat {TLS}/cert.pem") for host in DATABASES)
            fleet.until("a whole cluster", whole, 120)
            assert members()[leader][0] == "Leader"
            assert etcd_answers()
    with capsys.disabled():
        print(f"\nacross new certificates and a new CA of the databases: {load.count}")
    assert load.count.failures == []
    new = ca.read_text()
    assert old not in new
    for host in APPS:
        assert host.run("cat /etc/ragrack/postgres-ca.pem") == new.strip()
    played = fleet.play("site", "--tags", "postgres,app")
    assert (played.status, played.changed) == (0, 0), played.output
