"""Snapshots in PostgreSQL: a table of nodes for each, and a few tables that say which there are and which is live.

    ragrack.snapshot   every whole one, with its manifest and the number of its table
    ragrack.pointer    the live one of each collection and fingerprint
    ragrack.history    a row for each time that the live one changed
    ragrack.hold       where the live one is held where it is
    ragrack.node_<n>   the nodes of a snapshot

A snapshot is built in one transaction: a build that dies leaves nothing. What changes the live one, its history and its
hold is one transaction too, and waits for another that is at it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, LiteralString, Self

import psycopg
from psycopg import errors

from ragrack.postgres_client import Connection, Database, statement
from ragrack.snapshot import Hold, Manifest, SnapshotError, served, timestamp

if TYPE_CHECKING:
    from llama_index.core.schema import BaseNode

    from ragrack.catalog import Nodes, Snapshot
    from ragrack.postgres_store import PostgresVectorStore
    from ragrack.readonly import Written

POSTGRESQL = 17
"""The first with a collation of its own that knows Unicode: what a word is must not depend on the operating system."""
PGVECTOR = (0, 8)
"""The first that walks on along its graph until a filter has found enough."""
# All changes of a collection and fingerprint, one after the other; and its builds, of which there is one at a time.
CHANGING: LiteralString = "SELECT pg_advisory_xact_lock(hashtextextended('ragrack change ' || %s || ' ' || %s, 0))"
BUILDING: LiteralString = "SELECT pg_try_advisory_xact_lock(hashtextextended('ragrack build ' || %s || ' ' || %s, 0))"
SCHEMA: tuple[LiteralString, ...] = (
    "CREATE SEQUENCE IF NOT EXISTS ragrack.table_number",
    """CREATE TABLE IF NOT EXISTS ragrack.snapshot (
        collection text, fingerprint text, id text, number bigint NOT NULL UNIQUE, manifest json NOT NULL,
        created timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (collection, fingerprint, id)
    )""",
    """CREATE TABLE IF NOT EXISTS ragrack.pointer (
        collection text, fingerprint text, snapshot_id text NOT NULL, PRIMARY KEY (collection, fingerprint),
        FOREIGN KEY (collection, fingerprint, snapshot_id) REFERENCES ragrack.snapshot
    )""",
    """CREATE TABLE IF NOT EXISTS ragrack.history (
        number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        collection text NOT NULL, fingerprint text NOT NULL, entry jsonb NOT NULL
    )""",
    """CREATE TABLE IF NOT EXISTS ragrack.hold (
        collection text, fingerprint text, at text NOT NULL, why text NOT NULL, next text,
        PRIMARY KEY (collection, fingerprint)
    )""",
)


@dataclasses.dataclass(frozen=True)
class PostgresSnapshot:
    """A whole snapshot in the database."""

    database: Database
    table: str
    manifest: Manifest

    @property
    def id(self) -> str:
        return self.manifest.id

    def signature(self) -> object:
        """Its table: nothing writes to one that is published."""
        return self.table

    def check(self) -> None:
        """Its table is there. Raises SnapshotError."""
        ((found,),) = _rows(self.database, "SELECT to_regclass(%s) IS NOT NULL", f"ragrack.{self.table}")
        if not found:
            raise SnapshotError(f"snapshot {self.id}: its table {self.table} is not in the {self.database.target}")


class PostgresSnapshots:
    """The snapshots of one collection that were built with one fingerprint."""

    def __init__(self, database: Database, collection: str, fingerprint: str) -> None:
        self.database = database
        self.collection = collection
        self.fingerprint = fingerprint
        self._whose = (collection, fingerprint)

    def __str__(self) -> str:
        return str(self.database.target)

    @classmethod
    def every(cls, database: Database) -> Sequence[Self]:
        """Of every collection and fingerprint that has any, by name."""
        rows = _rows(database, "SELECT DISTINCT collection, fingerprint FROM ragrack.snapshot ORDER BY 1, 2")
        return [cls(database, collection, fingerprint) for collection, fingerprint in rows]

    def current_id(self) -> str | None:
        rows = _rows(self.database, _POINTER, *self._whose)
        return str(rows[0][0]) if rows else None

    def current(self) -> PostgresSnapshot | None:
        """The live one; None where none has been made. Raises SnapshotError when its manifest is damaged."""
        rows = _rows(self.database, _CURRENT, *self._whose)
        return self._snapshot(*rows[0]) if rows else None

    def get(self, snapshot_id: str) -> PostgresSnapshot:
        rows = _rows(self.database, _ONE, *self._whose, snapshot_id)
        if not rows:
            there = ", ".join(self.ids()) or "none"
            raise SnapshotError(f"no snapshot {snapshot_id!r} of {self.collection}. Those there are: {there}")
        return self._snapshot(*rows[0])

    def list(self) -> Sequence[PostgresSnapshot]:
        """The whole ones, oldest first; damaged ones are left out (`verify` says what is wrong with them)."""
        found = []
        for row in _rows(self.database, _ALL, *self._whose):
            with contextlib.suppress(SnapshotError):
                found.append(self._snapshot(*row))
        return found

    def verify(self, snapshot_id: str) -> None:
        """Reads every node and compares them with the manifest. Raises SnapshotError."""
        from ragrack.postgres_store import NODES, digest

        snapshot = self.get(snapshot_id)
        wanted = snapshot.manifest.files.get(NODES)
        try:
            # At the primary: it is the one that a rollback has to trust, and no standby cancels a long read there.
            with self.database.writing() as connection:
                connection.read_only = True
                found = digest(connection, snapshot.table)
                ((nodes,),) = connection.execute(statement("SELECT count(*) FROM {t}", t=snapshot.table)).fetchall()
        except errors.UndefinedTable as error:
            raise SnapshotError(f"snapshot {snapshot_id}: its table {snapshot.table} is gone") from error
        except psycopg.Error as error:
            raise SnapshotError(f"snapshot {snapshot_id}: its nodes cannot be read ({error})") from error
        wrong = [] if found == wanted else ["its nodes are not what was written"]
        if nodes != snapshot.manifest.nodes:
            wrong.append(f"it has {nodes} nodes, its manifest says {snapshot.manifest.nodes}")
        if wrong:
            raise SnapshotError(f"snapshot {snapshot_id}: {'; '.join(wrong)}")

    def trust(self, snapshot: Snapshot) -> None:
        """The database has checksums of its pages, and the rows that a transaction wrote whole."""
        snapshot.check()

    def note(self, snapshot: Snapshot) -> None:
        """There is nothing to note."""

    def open(self, snapshot_id: str, threads: int = 2) -> PostgresVectorStore:
        """How many queries run at a time is the database's to say, not `threads`."""
        from ragrack.postgres_store import PostgresVectorStore

        snapshot = self.get(snapshot_id)
        manifest = snapshot.manifest
        return PostgresVectorStore.open(self.database, snapshot.table, manifest.nodes, manifest.dimensions)

    @contextlib.contextmanager
    def draft(self) -> Iterator[_Draft]:
        """Raises SnapshotError where another build is at it, anywhere."""
        with in_words(self.database), self.database.writing() as connection:
            prepare(connection, self.database)
            connection.commit()
            ((free,),) = connection.execute(BUILDING, self._whose).fetchall()
            if not free:
                raise SnapshotError(
                    f"another build of {self.collection} is at work in the {self.database.target}: wait for it"
                )
            ((number,),) = connection.execute("SELECT nextval('ragrack.table_number')").fetchall()
            draft = _Draft(self, connection, number)
            yield draft
            if not draft.published:
                connection.rollback()

    def flip(self, snapshot_id: str, why: str, *, back: bool = False) -> None:
        with self._changing() as connection:
            self._flip(connection, snapshot_id, why, back=back)

    def offer(self, snapshot_id: str, why: str, *, back: bool = False) -> bool:
        with self._changing() as connection:
            if self._held(connection) is None:
                self._flip(connection, snapshot_id, why, back=back)
                return True
            self._need(connection, snapshot_id)
            connection.execute(_AWAIT, [snapshot_id, *self._whose])
            return self._pointer(connection) == snapshot_id

    def hold(self, why: str) -> None:
        with self._changing() as connection:
            if self._pointer(connection) is None:
                raise SnapshotError(f"{self.collection} has no live snapshot to hold")
            connection.execute(_HOLD, [*self._whose, timestamp(), why])

    def resume(self, to: str | None = None) -> None:
        with self._changing() as connection:
            held = self._held(connection)
            if held is None and to is None:
                return
            ids = self._ids(connection)
            target = to or (held.next if held and held.next in ids else ids[-1] if ids else None)
            if target is not None:
                self._flip(connection, target, "resume")
            connection.execute(_LET_GO, self._whose)

    def held(self) -> Hold | None:
        rows = _rows(self.database, _HELD, *self._whose)
        return Hold(*rows[0]) if rows else None

    def ways_back(self) -> Sequence[str]:
        current, there = self.current_id(), set(self.ids())
        before = dict.fromkeys(reversed(served(self.history(), current)))
        return [snapshot_id for snapshot_id in before if snapshot_id != current and snapshot_id in there]

    def previous_id(self) -> str | None:
        return next(iter(self.ways_back()), None)

    def history(self) -> Sequence[dict[str, Any]]:
        return [entry for (entry,) in _rows(self.database, _HISTORY, *self._whose)]

    def prunable(self, keep: int) -> Sequence[str]:
        held = self.held()
        ids = self.ids()
        stay = {self.current_id(), self.previous_id(), held and held.next, *ids[-keep:]}
        return [snapshot_id for snapshot_id in ids if snapshot_id not in stay]

    def prune(self, keep: int) -> Sequence[str]:
        """A worker that still has a removed snapshot open gets errors from it; those kept give it time to move on."""
        removed = self.prunable(keep)
        if removed:
            with self._changing() as connection:
                for snapshot_id in removed:
                    self._drop(connection, snapshot_id)
        return removed

    def discard(self) -> None:
        with self._changing() as connection:
            connection.execute(_UNPOINT, self._whose)
            for snapshot_id in self._ids(connection):
                self._drop(connection, snapshot_id)
            connection.execute(_FORGET, self._whose)
            connection.execute(_LET_GO, self._whose)

    def _snapshot(self, number: int, manifest: dict[str, Any]) -> PostgresSnapshot:
        try:
            return PostgresSnapshot(self.database, _table(number), Manifest.parse(manifest))
        except (TypeError, KeyError, AttributeError) as error:
            raise SnapshotError(
                f"the manifest of table {_table(number)} in the {self.database.target} is damaged: {error}"
            ) from error

    def ids(self) -> Sequence[str]:
        """Of all that are there, damaged ones too, oldest first."""
        return [snapshot_id for (snapshot_id,) in _rows(self.database, _IDS, *self._whose)]

    def _ids(self, connection: Connection) -> Sequence[str]:
        return [snapshot_id for (snapshot_id,) in connection.execute(_IDS, self._whose).fetchall()]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Connection]:
        """A transaction at the primary that no other change of this collection and fingerprint is beside."""
        with in_words(self.database), self.database.writing() as connection:
            prepare(connection, self.database)
            connection.execute(CHANGING, self._whose)
            yield connection

    def _pointer(self, connection: Connection) -> str | None:
        rows = connection.execute(_POINTER, self._whose).fetchall()
        return str(rows[0][0]) if rows else None

    def _held(self, connection: Connection) -> Hold | None:
        rows = connection.execute(_HELD, self._whose).fetchall()
        return Hold(*rows[0]) if rows else None

    def _need(self, connection: Connection, snapshot_id: str) -> None:
        ids = self._ids(connection)
        if snapshot_id not in ids:
            there = ", ".join(ids) or "none"
            raise SnapshotError(f"no snapshot {snapshot_id!r} of {self.collection}. Those there are: {there}")

    def _flip(self, connection: Connection, snapshot_id: str, why: str, *, back: bool = False) -> None:
        self._need(connection, snapshot_id)
        before = self._pointer(connection)
        if before == snapshot_id:
            return
        entry = {"at": timestamp(), "from": before, "to": snapshot_id, "why": why} | ({"back": True} if back else {})
        connection.execute(_POINT, [*self._whose, snapshot_id])
        connection.execute(_NOTE, [*self._whose, json.dumps(entry)])

    def _drop(self, connection: Connection, snapshot_id: str) -> None:
        for (number,) in connection.execute(_REMOVE, [*self._whose, snapshot_id]).fetchall():
            connection.execute(statement("DROP TABLE IF EXISTS {t}", t=_table(number)))


class _Draft:
    """A table in a transaction that is not committed yet."""

    def __init__(self, snapshots: PostgresSnapshots, connection: Connection, number: int) -> None:
        self._snapshots = snapshots
        self._connection = connection
        self._number = number
        self._written: tuple[int, int] = (0, 0)
        self.published = False

    def ids(self) -> Sequence[str]:
        return self._snapshots._ids(self._connection)

    def update(self, parent: Snapshot, nodes: Nodes) -> None:
        """A graph is built anew in any case, and that is what takes the time."""

    def write(self, nodes: Iterable[BaseNode], count: int, dimensions: int) -> Written:
        from ragrack.postgres_store import write_nodes

        written = write_nodes(self._connection, _table(self._number), nodes, count, dimensions)
        self._written = count, dimensions
        return written

    def open(self) -> PostgresVectorStore:
        from ragrack.postgres_store import PostgresVectorStore

        return PostgresVectorStore.writing(self._connection, _table(self._number), *self._written)

    def publish(self, manifest: Manifest) -> PostgresSnapshot:
        snapshots = self._snapshots
        whose = [snapshots.collection, snapshots.fingerprint, manifest.id]
        self._connection.execute(_PUBLISH, [*whose, self._number, json.dumps(dataclasses.asdict(manifest))])
        self._connection.commit()
        self.published = True
        return PostgresSnapshot(snapshots.database, _table(self._number), manifest)


_POINTER: LiteralString = "SELECT snapshot_id FROM ragrack.pointer WHERE collection = %s AND fingerprint = %s"
_IDS: LiteralString = "SELECT id FROM ragrack.snapshot WHERE collection = %s AND fingerprint = %s ORDER BY id"
_ALL: LiteralString = (
    "SELECT number, manifest FROM ragrack.snapshot WHERE collection = %s AND fingerprint = %s ORDER BY id"
)
_ONE: LiteralString = """
SELECT number, manifest FROM ragrack.snapshot WHERE collection = %s AND fingerprint = %s AND id = %s"""
_CURRENT: LiteralString = """
SELECT number, manifest FROM ragrack.pointer
JOIN ragrack.snapshot ON snapshot.id = snapshot_id AND snapshot.collection = pointer.collection
    AND snapshot.fingerprint = pointer.fingerprint
WHERE pointer.collection = %s AND pointer.fingerprint = %s"""
_PUBLISH: LiteralString = """
INSERT INTO ragrack.snapshot (collection, fingerprint, id, number, manifest) VALUES (%s, %s, %s, %s, %s)"""
_REMOVE: LiteralString = """
DELETE FROM ragrack.snapshot WHERE collection = %s AND fingerprint = %s AND id = %s RETURNING number"""
_POINT: LiteralString = """
INSERT INTO ragrack.pointer (collection, fingerprint, snapshot_id) VALUES (%s, %s, %s)
ON CONFLICT (collection, fingerprint) DO UPDATE SET snapshot_id = excluded.snapshot_id"""
_UNPOINT: LiteralString = "DELETE FROM ragrack.pointer WHERE collection = %s AND fingerprint = %s"
_NOTE: LiteralString = "INSERT INTO ragrack.history (collection, fingerprint, entry) VALUES (%s, %s, %s)"
_HISTORY: LiteralString = "SELECT entry FROM ragrack.history WHERE collection = %s AND fingerprint = %s ORDER BY number"
_FORGET: LiteralString = "DELETE FROM ragrack.history WHERE collection = %s AND fingerprint = %s"
_HELD: LiteralString = "SELECT at, why, next FROM ragrack.hold WHERE collection = %s AND fingerprint = %s"
_HOLD: LiteralString = """
INSERT INTO ragrack.hold (collection, fingerprint, at, why) VALUES (%s, %s, %s, %s)
ON CONFLICT (collection, fingerprint) DO UPDATE SET at = excluded.at, why = excluded.why"""
_AWAIT: LiteralString = "UPDATE ragrack.hold SET next = %s WHERE collection = %s AND fingerprint = %s"
_LET_GO: LiteralString = "DELETE FROM ragrack.hold WHERE collection = %s AND fingerprint = %s"


def _table(number: int) -> str:
    return f"node_{number}"


def _rows(database: Database, query: LiteralString, *parameters: Any) -> list[Any]:
    """None where nothing was ever written there."""
    with in_words(database):
        try:
            return database.read(lambda connection: connection.execute(query, parameters).fetchall())
        except errors.UndefinedTable:
            return []


@contextlib.contextmanager
def in_words(database: Database) -> Iterator[None]:
    """What PostgreSQL says no to, as a SnapshotError."""
    try:
        yield
    except errors.InsufficientPrivilege as error:
        raise SnapshotError(
            f"user {database.target.user} may not do that in the {database.target} ({_first_line(error)}): let it own "
            "the database, as role postgres does"
        ) from error
    except psycopg.Error as error:
        raise SnapshotError(f"the {database.target} refused: {_first_line(error)}") from error


def _first_line(error: psycopg.Error) -> str:
    return (error.diag.message_primary or str(error) or type(error).__name__).splitlines()[0]


def prepare(connection: Connection, database: Database) -> None:
    """Makes the tables where they are not, and looks whether all that is needed is there. Raises SnapshotError."""
    (ready,) = connection.execute("SELECT to_regclass('ragrack.hold') IS NOT NULL").fetchall()[0]
    if ready:
        return
    connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('ragrack schema', 0))")
    ((encoding, version, pgvector),) = connection.execute(
        "SELECT getdatabaseencoding(), current_setting('server_version_num')::int / 10000, "
        "(SELECT extversion FROM pg_extension WHERE extname = 'vector')"
    ).fetchall()
    if encoding != "UTF8":
        raise SnapshotError(f"the {database.target} is encoded in {encoding}: make it again with ENCODING 'UTF8'")
    if version < POSTGRESQL:
        raise SnapshotError(f"the {database.target} is of PostgreSQL {version}: {POSTGRESQL} or newer is needed")
    if pgvector is None:
        connection.execute("CREATE EXTENSION vector")
    elif tuple(int(part) for part in pgvector.split(".")[:2]) < PGVECTOR:
        wanted = ".".join(map(str, PGVECTOR))
        raise SnapshotError(f"the {database.target} has pgvector {pgvector}: {wanted} or newer is needed")
    # Who owns the schema alone may not make one, not even where it is there.
    ((there,),) = connection.execute("SELECT to_regnamespace('ragrack') IS NOT NULL").fetchall()
    if not there:
        connection.execute("CREATE SCHEMA ragrack")
    for command in SCHEMA:
        connection.execute(command)
