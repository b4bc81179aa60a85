"""A single database server, whose archive is a directory of its own, is brought back to a moment."""

from __future__ import annotations

import time

import fleet
from database import archived, sql


def test_one_server_comes_back_as_of_a_time() -> None:
    [host] = fleet.hosts("database")
    host.run("systemctl start ragrack-archive ragrack-archive-check")
    sql("CREATE TABLE ragrack.kept AS SELECT generate_series(1, 1000) AS number")
    before = sql("SELECT clock_timestamp()")
    time.sleep(2)
    sql("DROP TABLE ragrack.kept")
    archived()
    sure = {"postgres_archive_restore_sure": True, "postgres_archive_restore_to": before}
    played = fleet.play("restore_database", variables=sure)
    assert played.status == 0, played.output
    assert sql("SELECT count(*) FROM ragrack.kept") == "1000"
    # What the next restore would need is made again from here.
    host.run("systemctl start ragrack-archive")
