"""Connections to PostgreSQL: to a standby where there is one for what only reads, to the primary for what writes.

libpq knows all hosts and asks them in turn, so a host that dies costs a query one more try and nobody a change of
settings. Everything here blocks: queries run in the threads of a `Database`, of which a process has one.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, LiteralString, TypeVar

import psycopg
from psycopg import errors

from ragrack.snapshot import UnavailableError

if TYPE_CHECKING:
    from ragrack.settings import Settings

T = TypeVar("T")
Connection = psycopg.Connection[tuple[Any, ...]]
Attributes = Literal["prefer-standby", "read-write"]

CONNECT_SECONDS = 2
"""For each host; libpq takes no less."""
LIFETIME_SECONDS = 300
"""Of a connection, half as much again at random: so that after a failover readers spread over the standbys again."""
EF_SEARCH = 100
MAX_SCAN_TUPLES = 20_000
PORT = "5432"
# A peer whose machine is gone answers nothing at all: it counts as dead after these seconds of silence.
ALIVE = {
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "6000",
}
READING = {
    "default_transaction_read_only": "on",
    "hnsw.ef_search": str(EF_SEARCH),
    "hnsw.iterative_scan": "relaxed_order",
    "hnsw.max_scan_tuples": str(MAX_SCAN_TUPLES),
    # A plan made without the values of a filter cannot know whether the filter leaves ten nodes or all.
    "plan_cache_mode": "force_custom_plan",
    "jit": "off",
}
WRITING = {
    "synchronous_commit": "on",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "hnsw.iterative_scan": "relaxed_order",
    "hnsw.ef_search": str(EF_SEARCH),
}
# The connection died, or the server is on its way down or up: another host, or the same in a moment, may answer.
GONE = (
    errors.AdminShutdown,
    errors.CrashShutdown,
    errors.CannotConnectNow,
    errors.SerializationFailure,
    errors.IdleSessionTimeout,
)


class DatabaseUnavailableError(UnavailableError):
    """PostgreSQL did not answer; the message says where it was looked for and what it said, and holds no secret."""


@dataclass(frozen=True)
class Target:
    """Where a database is, and who asks. `hosts` are all TCP, or one directory of a socket."""

    hosts: tuple[str, ...]
    ports: tuple[str, ...]
    database: str
    user: str
    password: str = field(repr=False)
    root_certificate: str | None
    connections: int
    timeout: float

    @classmethod
    def of(cls, settings: Settings) -> Target:
        hosts, ports = zip(*map(split_host, settings.postgres_hosts), strict=True)
        secret = settings.postgres_password
        return cls(
            hosts=hosts,
            ports=ports,
            database=settings.postgres_database,
            user=settings.postgres_user,
            password=secret.get_secret_value() if secret else "",
            root_certificate=str(settings.postgres_sslrootcert) if settings.postgres_sslrootcert else None,
            connections=settings.postgres_connections,
            timeout=settings.postgres_timeout,
        )

    def __str__(self) -> str:
        at = ", ".join(f"{host}:{port}" for host, port in zip(self.hosts, self.ports, strict=True))
        return f"database {self.database} of {at}"

    def connect(self, attributes: Attributes) -> Connection:
        """Commits by itself, statement by statement, where it reads. Raises DatabaseUnavailableError."""
        reads = attributes == "prefer-standby"
        session = READING | {"statement_timeout": str(int(self.timeout * 1000))} if reads else WRITING
        parameters: dict[str, Any] = {
            "host": ",".join(self.hosts),
            "port": ",".join(self.ports),
            "dbname": self.database,
            "user": self.user,
            "password": self.password or None,
            "target_session_attrs": attributes,
            "load_balance_hosts": "random",
            "connect_timeout": CONNECT_SECONDS,
            "application_name": "ragrack" if reads else "ragrack-ingest",
            "client_encoding": "UTF8",
            "options": " ".join(f"-c {name}={value}" for name, value in session.items()),
            **ALIVE,
        }
        if is_socket(self.hosts[0]):
            parameters["sslmode"] = "disable"
        else:
            parameters |= {"sslmode": "verify-full", "sslrootcert": self.root_certificate}
            # Never a password in clear or by MD5, whatever a server that stands in for ours asks for.
            parameters["require_auth"] = "scram-sha-256"
        try:
            return psycopg.connect(autocommit=reads, **parameters)
        except psycopg.Error as error:
            raise self.unavailable(error) from error

    def unavailable(self, error: Exception) -> DatabaseUnavailableError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return DatabaseUnavailableError(f"the {self} cannot be used: {reason}")


def split_host(text: str) -> tuple[str, str]:
    """`host`, `host:port`, `[::1]:port` or the directory of a socket as (host, port)."""
    if is_socket(text):
        directory, _, port = text.rpartition(":")
        return (directory, port) if port.isdecimal() else (text, PORT)
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        return host, port.removeprefix(":") or PORT
    host, _, port = text.partition(":")
    return host, port or PORT


def is_socket(host: str) -> bool:
    return host.startswith("/")


class Database:
    """Reads in `target.connections` threads, each with a connection of its own while it reads."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.threads = ThreadPoolExecutor(target.connections, thread_name_prefix="postgres")
        self._idle: list[tuple[Connection, float]] = []
        self._lock = threading.Lock()
        # A connection that nobody holds any more is closed, not left to the garbage collector.
        weakref.finalize(self, _close_all, self._idle)

    def read(self, work: Callable[[Connection], T], until: float = float("inf")) -> T:
        """What `work` returns. Where its connection dies it is done once more on a new one, if `until` is not past.

        Where a table is not there, as on a standby that lags behind, the primary is asked. Raises
        DatabaseUnavailableError.
        """
        if time.monotonic() >= until:
            raise DatabaseUnavailableError("there was no time left to ask the database")
        try:
            return self._once(work, fresh=False)
        except (_DiedError, errors.UndefinedTable) as error:
            if time.monotonic() >= until:
                raise self.target.unavailable(error) from error
            behind = isinstance(error, errors.UndefinedTable)
        if behind:
            return self._at_primary(work)
        try:
            return self._once(work, fresh=True)
        except _DiedError as error:
            raise self.target.unavailable(error) from error

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction at the primary: at the end of the block all of it is on disk, or nothing is there.

        Raises DatabaseUnavailableError; then nobody knows whether the last of it was done.
        """
        with contextlib.closing(self.target.connect("read-write")) as connection:
            try:
                yield connection
                connection.commit()
            except psycopg.OperationalError as error:
                raise self.target.unavailable(error) from error

    def close(self) -> None:
        """Lets go of connections that nobody uses now."""
        with self._lock:
            _close_all(self._idle)

    def _at_primary(self, work: Callable[[Connection], T]) -> T:
        with self.writing() as connection:
            connection.read_only = True
            return work(connection)

    def _once(self, work: Callable[[Connection], T], *, fresh: bool) -> T:
        connection, until = self._take(fresh=fresh)
        try:
            result = work(connection)
        except psycopg.Error as error:
            if connection.closed or isinstance(error, (*GONE, psycopg.InterfaceError)):
                connection.close()
                # What was connected to the same server has died with it.
                self.close()
                raise _DiedError(" ".join(str(error).split())) from error
            self._give_back(connection, until)
            if isinstance(error, psycopg.OperationalError):
                raise self.target.unavailable(error) from error
            raise
        except BaseException:
            connection.close()
            raise
        self._give_back(connection, until)
        return result

    def _take(self, *, fresh: bool) -> tuple[Connection, float]:
        while not fresh:
            with self._lock:
                if not self._idle:
                    break
                connection, until = self._idle.pop()
            if time.monotonic() < until and not connection.closed:
                return connection, until
            connection.close()
        lifetime = LIFETIME_SECONDS * random.uniform(1, 1.5)  # noqa: S311 - spreads load, keeps no secret
        return self.target.connect("prefer-standby"), time.monotonic() + lifetime

    def _give_back(self, connection: Connection, until: float) -> None:
        with self._lock:
            self._idle.append((connection, until))


class _DiedError(Exception):
    """The connection is gone, and with it what was asked on it."""


def _close_all(connections: list[tuple[Connection, float]]) -> None:
    while connections:
        connections.pop()[0].close()


_databases: weakref.WeakValueDictionary[tuple[int, Target], Database] = weakref.WeakValueDictionary()
_databases_lock = threading.Lock()


def database(settings: Settings) -> Database:
    """The one of this process for these settings; connections are made when they are needed, none before a fork."""
    key = os.getpid(), Target.of(settings)
    with _databases_lock:
        known = _databases.get(key)
        if known is None:
            known = _databases[key] = Database(key[1])
        return known


def statement(text: LiteralString, **tables: str) -> psycopg.sql.Composed:
    """SQL with names of tables put in as identifiers of the schema `ragrack`."""
    names = {name: psycopg.sql.Identifier("ragrack", table) for name, table in tables.items()}
    return psycopg.sql.SQL(text).format(**names)
