"""What tests ask of PostgreSQL, one host or several."""

from __future__ import annotations

import shlex

import fleet

DATABASES = fleet.hosts("database")


def psql(host: fleet.Host, query: str) -> str:
    asked = f"psql -XqAt -v ON_ERROR_STOP=1 -d ragrack -c {shlex.quote(query)}"
    return host.run(f"su postgres -c {shlex.quote(asked)}")


def sql(query: str) -> str:
    """On the primary."""
    leading = next(host for host in DATABASES if psql(host, "SELECT pg_is_in_recovery()") == "f")
    return psql(leading, query)


def archived() -> None:
    """Until all that was committed is in the repository."""
    segment = sql("SELECT pg_walfile_name(pg_switch_wal())")
    fleet.until(
        f"WAL up to {segment} is archived",
        lambda: sql("SELECT last_archived_wal FROM pg_stat_archiver") >= segment,
        seconds=120,
    )


def streaming() -> bool:
    return sql("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'") == str(len(DATABASES) - 1)


def wait_for_replicas_and_answers(question: str) -> None:
    fleet.until("all replicas follow", streaming, seconds=120)
    fleet.until("the service answers", lambda: all(host.ask(question)["sources"] for host in fleet.hosts()), seconds=60)
