"""A database that was spoilt or lost comes back from base backups and WAL: to a time, or on hosts that have nothing."""

from __future__ import annotations

import time
from typing import Any

import failures
import fleet
import pytest
from database import DATABASES, archived, sql, wait_for_replicas_and_answers

REPOSITORY = fleet.pulling()
PATH = "/srv/pgbackrest"
QUESTION = "How do I take a base backup?"
UNITS = ("ragrack-archive", "ragrack-archive-check")
LOST = ("/var/lib/postgresql/17/ragrack", "/var/lib/etcd/ragrack", "/etc/ragrack/etcd.first")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an inventory says where an app host keeps the backups."""
    key, known_host = fleet.let_in(REPOSITORY, tmp_path_factory.mktemp("archive"))
    return {
        "postgres_archive_repository": f"sftp:root@{REPOSITORY.address}:{PATH}",
        "postgres_archive_passphrase": "a-passphrase-of-the-tests",
        "postgres_archive_ssh_key": key,
        "postgres_archive_ssh_known_host": known_host,
        "postgres_archive_restore_sure": True,
    }


def test_backups_are_made_by_the_primary_alone(archive: dict[str, Any]) -> None:
    for expected in (True, False):
        played = fleet.play("site", "--tags", "postgres", variables=archive)
        assert played.status == 0, played.output
        assert (played.changed > 0) is expected, played.changes
        assert archive["postgres_archive_passphrase"] not in played.output
    for host in DATABASES:
        host.run("systemctl start ragrack-archive")
        for unit in UNITS:
            host.run(f"systemd-analyze security --no-pager --threshold=25 {unit}")
    for host in DATABASES:
        assert len(host.run("su postgres -c 'ragrack-archive list'").splitlines()) == 1
        host.run("systemctl start ragrack-archive-check")
        told = [line for line in host.run("cat /var/lib/ragrack-metrics/archive.prom").splitlines() if line[0] != "#"]
        assert all(float(line.split()[-1]) > time.time() - 600 for line in told), told
    assert REPOSITORY.run(f"grep -rlF ragrack.probe {PATH} || true") == "", "it is encrypted"


def test_what_was_spoilt_comes_back_as_of_a_time(archive: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    sql("CREATE TABLE ragrack.kept AS SELECT generate_series(1, 1000) AS number")
    before = sql("SELECT clock_timestamp()")
    time.sleep(2)
    sql("DROP TABLE ragrack.kept")
    sql("CREATE TABLE ragrack.later (number int)")
    archived()
    played = fleet.play(
        "restore_database", variables=archive | {"postgres_archive_restore_to": "2020-01-01 00:00:00+00"}
    )
    assert played.status != 0
    assert "has no base backup from before 2020-01-01" in played.output
    assert sql("SELECT to_regclass('ragrack.later')") == "ragrack.later"
    began = time.monotonic()
    played = fleet.play("restore_database", variables=archive | {"postgres_archive_restore_to": before})
    assert played.status == 0, played.output
    took = time.monotonic() - began
    assert sql("SELECT count(*) FROM ragrack.kept") == "1000"
    assert sql("SELECT to_regclass('ragrack.later') IS NULL") == "t"
    wait_for_replicas_and_answers(QUESTION)
    failures.tell(
        "the database is spoilt",
        requests="all that ask the database",
        until=f"it was brought back to a moment before: {took / 60:.1f} min",
        lost="what came after that moment",
        test="`postgres/tests/test_restored.py::test_what_was_spoilt_comes_back_as_of_a_time`",
    )
    with capsys.disabled():
        print(f"\na database brought back to a time on {len(DATABASES)} hosts: {took:.0f} s")


def test_hosts_that_lost_everything_get_it_back(archive: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    sql("CREATE TABLE ragrack.last AS SELECT generate_series(1, 10) AS number")
    archived()
    rows = sql("SELECT count(*) FROM ragrack.kept")
    for host in DATABASES:
        host.run(f"systemctl stop patroni etcd && rm -rf {' '.join(LOST)}")
    began = time.monotonic()
    played = fleet.play("site", "--tags", "postgres", variables=archive)
    assert played.status == 0, played.output
    assert "holds the backups of another database" in " ".join(played.output.split())
    assert sql("SELECT to_regclass('ragrack.kept') IS NULL") == "t", "a new database, and nothing in it"
    played = fleet.play("restore_database", variables=archive)
    assert played.status == 0, played.output
    took = time.monotonic() - began
    assert (sql("SELECT count(*) FROM ragrack.kept"), sql("SELECT count(*) FROM ragrack.last")) == (rows, "10")
    wait_for_replicas_and_answers(QUESTION)
    for host in DATABASES:
        host.run("systemctl start ragrack-archive")
    assert len(DATABASES[0].run("su postgres -c 'ragrack-archive list'").splitlines()) == 2
    failures.tell(
        "all database hosts are lost",
        requests="all that ask the database",
        until=f"new ones have its archive: {took / 60:.1f} min from bare machines with the packages",
        lost="what was written in the 5 min before, at most",
        test="`postgres/tests/test_restored.py::test_hosts_that_lost_everything_get_it_back`",
    )
    with capsys.disabled():
        print(f"\na database lost on {len(DATABASES)} hosts: back in {took:.0f} s, nothing that was archived was lost")


def test_a_damaged_repository_is_found() -> None:
    # Inside of a base backup, past what names it.
    bundle = REPOSITORY.run(f"find {PATH}/backup/ragrack -path '*bundle*' -type f -size +64k | head -n 1")
    REPOSITORY.run(f"printf spoilt | dd of={bundle} bs=1 seek=4096 conv=notrunc")
    assert DATABASES[0].shell.run("systemctl start ragrack-archive-check").rc != 0
    assert "the repository is damaged" in DATABASES[0].run("journalctl -u ragrack-archive-check -n 30 -o cat")
