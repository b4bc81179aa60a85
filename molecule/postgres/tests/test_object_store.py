"""Backups of the documents and of the database in an object store, by S3, and back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import fleet
import objects
import pytest
from database import DATABASES, archived, sql, wait_for_replicas_and_answers
from objects import KEY, SECRET, Store

INGESTING = fleet.ingesting()
DOCUMENTS = "/var/lib/ragrack/documents/postgres"
QUESTION = "How do I take a base backup?"


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    store = objects.serve(fleet.pulling())
    for host in (INGESTING, *DATABASES):
        store.introduce(host)
    yield store
    objects.stop(store)


def test_documents_go_there_and_come_back(store: Store) -> None:
    variables: dict[str, Any] = {
        "backup_repository": f"{store.bucket}/documents",
        "backup_password": "a-password-of-the-tests",
        "backup_environment": {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET},
        "backup_check_share": "100%",
        "backup_restore_sure": True,
    }
    for expected in (True, False):
        played = fleet.play("site", "--tags", "backup", "--limit", INGESTING.name, variables=variables)
        assert played.status == 0, played.output
        assert (played.changed > 0) is expected, played.output
        assert SECRET not in played.output
    INGESTING.run("systemctl start ragrack-backup ragrack-backup-check")
    counted = f"ls {DOCUMENTS} | wc -l"
    before = INGESTING.run(counted)
    INGESTING.run(f"rm -r {DOCUMENTS}")
    played = fleet.play("restore", "--limit", INGESTING.name, variables=variables)
    assert played.status == 0, played.output
    assert INGESTING.run(counted) == before != "0"
    INGESTING.run("systemctl disable --now ragrack-backup.timer ragrack-backup-check.timer")


def test_the_database_goes_there_and_comes_back(store: Store) -> None:
    variables: dict[str, Any] = {
        "postgres_archive_repository": f"{store.bucket}/database",
        "postgres_archive_passphrase": "a-passphrase-of-the-tests",
        "postgres_archive_s3": {"key": KEY, "secret": SECRET},
        "postgres_archive_addresses": [store.host.address],
        "postgres_archive_restore_sure": True,
    }
    for expected in (True, False):
        played = fleet.play("site", "--tags", "postgres", variables=variables)
        assert played.status == 0, played.output
        assert (played.changed > 0) is expected, played.changes
        assert SECRET not in played.output
    for host in DATABASES:
        host.run("systemctl start ragrack-archive ragrack-archive-check")
    sql("CREATE TABLE ragrack.stored AS SELECT generate_series(1, 1000) AS number")
    before = sql("SELECT clock_timestamp()")
    time.sleep(2)
    sql("DROP TABLE ragrack.stored")
    archived()
    played = fleet.play("restore_database", variables=variables | {"postgres_archive_restore_to": before})
    assert played.status == 0, played.output
    assert sql("SELECT count(*) FROM ragrack.stored") == "1000"
    wait_for_replicas_and_answers(QUESTION)
