"""What PostgreSQL promises beside what every store must do: failover, transactions, filters that cost no results."""

from __future__ import annotations

import contextlib
import gc
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from llama_index.core.vector_stores.types import VectorStoreQuery
from postgres_server import Server, database_settings
from ragrack import catalog, deadline, postgres_client
from ragrack.catalog import Snapshots
from ragrack.handle import IndexHandle
from ragrack.postgres_client import Database, DatabaseUnavailableError, Target, split_host
from ragrack.postgres_store import PostgresVectorStore
from ragrack.settings import Settings
from ragrack.snapshot import SnapshotError

from .suite import crowd, filters, found, node, publish, unit

pytestmark = pytest.mark.hosts
FINGERPRINT = "0123456789abcdef"
NODES = [node(number, {"tenant": "ab"[number % 2]}) for number in range(20)]


def settings_of(*servers: Server, **more: Any) -> Settings:
    return Settings.model_validate({"collections": ("manual",), **database_settings(*servers), **more})


@pytest.fixture
def snapshots(postgres: Server, request: pytest.FixtureRequest) -> Snapshots:
    """Of a collection that no other test has."""
    return catalog.snapshots(settings_of(postgres), request.node.name.replace("_", "-")[:60], FINGERPRINT)


def tables(server: Server) -> set[str]:
    return set(server.sql("SELECT relname FROM pg_class WHERE relname ~ '^node_[0-9]+$'", "ragrack").split())


def ids(snapshots: Snapshots) -> list[str]:
    return [snapshot.id for snapshot in snapshots.list()]


def test_a_build_that_fails_leaves_nothing(postgres: Server, snapshots: Snapshots) -> None:
    before = tables(postgres)
    with pytest.raises(ValueError, match="3 nodes were promised, 1 came"), snapshots.draft() as draft:
        draft.write(NODES[:1], 3, len(unit(0)))
    with snapshots.draft() as draft:
        draft.write(NODES, len(NODES), len(unit(0)))
    assert ids(snapshots) == []
    assert tables(postgres) == before


def test_a_build_whose_connection_dies_leaves_nothing(postgres: Server, snapshots: Snapshots) -> None:
    before = tables(postgres)
    with pytest.raises(DatabaseUnavailableError), snapshots.draft() as draft:
        draft.write(NODES, len(NODES), len(unit(0)))
        postgres.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'ragrack-ingest'")
        with contextlib.closing(draft.open()) as store:
            store.get_nodes()
    assert ids(snapshots) == []
    assert tables(postgres) == before


def test_what_is_being_built_answers_before_anybody_else_sees_it(snapshots: Snapshots) -> None:
    with snapshots.draft() as draft:
        draft.write(NODES, len(NODES), len(unit(0)))
        with contextlib.closing(draft.open()) as store:
            assert found(store, filters(("tenant", "==", "a"))) == {f"n{number}" for number in range(0, 20, 2)}
        assert ids(snapshots) == []


def test_two_builds_at_once_are_refused(snapshots: Snapshots) -> None:
    with snapshots.draft(), pytest.raises(SnapshotError, match="another build"), snapshots.draft():
        pass
    with snapshots.draft():
        pass


def test_the_life_of_a_collection(postgres: Server, snapshots: Snapshots) -> None:
    assert snapshots.current() is None
    first, second, third = (publish(snapshots, NODES, number, live=False).id for number in (1, 2, 3))
    assert snapshots.offer(first, "ingest")
    assert snapshots.offer(second, "ingest")
    assert (snapshots.current_id(), snapshots.previous_id()) == (second, first)
    snapshots.hold("bad answers")
    snapshots.flip(first, "rollback", back=True)
    assert not snapshots.offer(third, "ingest")
    held = snapshots.held()
    assert held is not None
    assert (held.why, held.next) == ("bad answers", third)
    assert snapshots.current_id() == first
    assert snapshots.ways_back() == []
    snapshots.resume()
    assert (snapshots.current_id(), snapshots.held()) == (third, None)
    assert [entry["to"] for entry in snapshots.history()] == [first, second, first, third]
    assert snapshots.prune(1) == [second]
    assert ids(snapshots) == [first, third], "the one that a rollback goes to stays"
    before = tables(postgres)
    snapshots.discard()
    assert (ids(snapshots), snapshots.current_id(), list(snapshots.history())) == ([], None, [])
    assert len(before - tables(postgres)) == 2


def test_an_unknown_snapshot_is_refused_with_those_there_are(snapshots: Snapshots) -> None:
    there = publish(snapshots, NODES).id
    for name in ("absent", "x'; DROP SCHEMA ragrack CASCADE; --", "../../etc", ""):
        for refuse in (snapshots.get, snapshots.verify, snapshots.open, lambda name: snapshots.flip(name, "test")):
            with pytest.raises(SnapshotError, match=there):
                refuse(name)
    assert snapshots.current_id() == there


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE {t} SET text = 'other' WHERE row = 3",
        'UPDATE {t} SET filter = \'{"tenant": "b"}\' WHERE row = 2',
        "UPDATE {t} SET embedding = (SELECT embedding FROM {t} WHERE row = 1) WHERE row = 4",
        "DELETE FROM {t} WHERE row = 19",
        "DROP TABLE {t}",
    ],
)
def test_damage_is_found(postgres: Server, snapshots: Snapshots, damage: str) -> None:
    snapshot = publish(snapshots, NODES)
    snapshots.verify(snapshot.id)
    postgres.sql(damage.replace("{t}", f"ragrack.{snapshot.signature()}"), "ragrack")
    with pytest.raises(SnapshotError, match=r"not what was written|is gone"):
        snapshots.verify(snapshot.id)


def test_a_pruned_snapshot_that_is_still_asked_says_so(snapshots: Snapshots) -> None:
    with contextlib.closing(snapshots.open(publish(snapshots, NODES).id)) as store:
        snapshots.discard()
        with pytest.raises(SnapshotError, match="is gone"):
            found(store, None)


def test_a_worker_follows_what_is_live(snapshots: Snapshots) -> None:
    handle = IndexHandle(snapshots)
    assert "run `ragrack ingest" in (handle.problem or "")
    for number in (1, 2):
        snapshot = publish(snapshots, [node(number, {})], number)
        assert handle.poll()
        with handle.use() as opened:
            assert opened.snapshot.id == snapshot.id
            assert found(opened.store, None) == {f"n{number}"}
    handle.close()


def test_reading_is_all_that_a_reader_can_do(postgres: Server) -> None:
    database = postgres_client.database(settings_of(postgres))
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        database.read(lambda connection: connection.execute("CREATE TABLE ragrack.own ()"))


def test_a_query_that_takes_too_long_is_ended_and_its_connection_goes_on(postgres: Server) -> None:
    database = postgres_client.database(settings_of(postgres, postgres_timeout=0.2, postgres_connections=1))
    with pytest.raises(DatabaseUnavailableError, match="statement timeout"):
        database.read(lambda connection: connection.execute("SELECT pg_sleep(60)"))
    assert database.read(lambda connection: connection.execute("SELECT 1").fetchone()) == (1,)


def test_without_time_left_nothing_is_asked(snapshots: Snapshots) -> None:
    with (
        contextlib.closing(snapshots.open(publish(snapshots, NODES).id)) as store,
        deadline.within(0),
        pytest.raises(DatabaseUnavailableError, match="no time left"),
    ):
        found(store, None)


def test_a_wrong_password_and_a_strangers_certificate_are_refused_without_secrets(
    postgres: Server, tmp_path: Path
) -> None:
    wrong = settings_of(postgres, postgres_password="wrong-and-secret")  # noqa: S106 - that it is none is the test
    with pytest.raises(DatabaseUnavailableError, match="password authentication failed") as refused:
        catalog.snapshots(wrong, "manual", FINGERPRINT).current_id()
    assert "wrong-and-secret" not in str(refused.value)
    assert "wrong-and-secret" not in repr(Target.of(wrong))
    stranger = Server(postgres.root, tmp_path / "stranger")
    stranger.directory.mkdir()
    stranger.certify()
    for settings, complaint in (
        (settings_of(postgres, postgres_sslrootcert=stranger.ca), "certificate verify failed"),
        (settings_of(postgres, postgres_hosts=(f"ip6-localhost:{postgres.port}",)), "cannot be used"),
    ):
        with pytest.raises(DatabaseUnavailableError, match=complaint):
            catalog.snapshots(settings, "manual", FINGERPRINT).current_id()


def test_connections_are_closed_when_nobody_has_the_database(postgres: Server) -> None:
    def backends() -> int:
        return int(postgres.sql("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ragrack'"))

    settings = settings_of(postgres, postgres_connections=3)
    before = backends()
    database: Database | None = postgres_client.database(settings)
    assert database is postgres_client.database(settings)
    barrier = threading.Barrier(3)

    def ask(connection: postgres_client.Connection) -> None:
        connection.execute("SELECT 1")
        barrier.wait()

    assert database is not None
    list(database.threads.map(database.read, [ask] * 3))
    assert backends() == before + 3
    database = None
    while backends() > before:
        gc.collect()


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("db1", "db1", "5432"),
        ("db1.example.org:6432", "db1.example.org", "6432"),
        ("198.18.0.1", "198.18.0.1", "5432"),
        ("[::1]", "::1", "5432"),
        ("[::1]:6432", "::1", "6432"),
        ("/run/postgresql", "/run/postgresql", "5432"),
        ("/run/postgresql:6432", "/run/postgresql", "6432"),
    ],
)
def test_a_host_is_read(text: str, host: str, port: str) -> None:
    assert split_host(text) == (host, port)


@pytest.fixture(scope="module")
def crowded(postgres: Server) -> Iterator[tuple[PostgresVectorStore, Any]]:
    """More nodes than are compared one by one, of which a tenant's lie where nobody asks; and their vectors."""
    nodes, vectors = crowd(12_000, far=11_000, ones=1000)
    snapshots = catalog.snapshots(settings_of(postgres), "crowded", FINGERPRINT)
    store = snapshots.open(publish(snapshots, nodes).id)
    assert isinstance(store, PostgresVectorStore)
    yield store, vectors
    store.close()


def recall(store: PostgresVectorStore, vectors: Any, allowed: Any, **chosen: Any) -> float:
    random = np.random.default_rng(2)
    hits = 0
    for _ in range(30):
        question = vectors[11_000 + random.integers(1000)]
        exact = allowed[np.argsort(-(vectors[allowed] @ question), kind="stable")[:10]]
        ids = store.query(VectorStoreQuery(query_embedding=question.tolist(), similarity_top_k=10, **chosen)).ids or []
        assert len(ids) == min(10, len(allowed))
        hits += len({f"n{number}" for number in exact} & set(ids))
    return hits / (30 * min(10, len(allowed)))


def test_the_graph_finds_nearly_all_that_is_nearest(crowded: tuple[PostgresVectorStore, Any]) -> None:
    store, vectors = crowded
    assert recall(store, vectors, np.arange(len(vectors))) >= 0.97


@pytest.mark.parametrize(
    ("condition", "allowed"),
    [
        (("tenant", "==", "far"), np.arange(11_000)),
        (("tenant", "==", "near"), np.arange(11_000, 12_000)),
        (("one", "==", 7), np.arange(7, 12_000, 1000)),
        (("one", "<", 2), np.sort(np.concatenate([np.arange(0, 12_000, 1000), np.arange(1, 12_000, 1000)]))),
    ],
)
def test_a_filter_costs_no_results_however_far_from_the_question_it_leaves_nodes(
    crowded: tuple[PostgresVectorStore, Any], condition: Any, allowed: Any
) -> None:
    store, vectors = crowded
    assert recall(store, vectors, allowed, filters=filters(condition)) >= 0.97


def test_a_selective_filter_is_answered_by_its_index(
    crowded: tuple[PostgresVectorStore, Any], postgres: Server
) -> None:
    store, _ = crowded
    asked = f"EXPLAIN SELECT FROM ragrack.{store.client} WHERE filter @> '{{\"one\": 7}}'::jsonb"
    assert "Bitmap Index Scan" in postgres.sql(asked, "ragrack")


@pytest.fixture
def pair(postgres: Server) -> Iterator[tuple[Server, Server]]:
    """A primary and its standby, of their own, as one of them will die."""
    directory = postgres.directory.with_name("pair")
    directory.mkdir(mode=0o755)
    primary, standby = Server(postgres.root, directory / "a"), Server(postgres.root, directory / "b")
    try:
        primary.initialise()
        standby.follow(primary)
        yield primary, standby
    finally:
        for server in (primary, standby):
            server.kill()
        shutil.rmtree(directory)


def caught_up(primary: Server, standby: Server) -> None:
    position = primary.sql("SELECT pg_current_wal_lsn()").strip()
    while standby.sql(f"SELECT pg_last_wal_replay_lsn() >= '{position}'").strip() != "t":
        pass


def test_readers_ask_a_standby_and_go_on_when_a_server_dies(pair: tuple[Server, Server]) -> None:
    primary, standby = pair
    settings = settings_of(primary, standby)
    snapshots = catalog.snapshots(settings, "manual", FINGERPRINT)
    publish(snapshots, NODES)
    caught_up(primary, standby)
    handle = IndexHandle(snapshots)
    assert handle.problem is None

    def ask() -> None:
        with handle.use() as opened:
            assert found(opened.store, filters(("tenant", "==", "a"))) == {f"n{number}" for number in range(0, 20, 2)}

    ask()
    (port,) = postgres_client.database(settings).read(
        lambda connection: connection.execute("SELECT inet_server_port()").fetchone() or ()
    )
    assert port == standby.port
    standby.kill()
    ask()
    standby.start()
    primary.kill()
    for _ in range(3):
        ask()
    assert not handle.poll()
    assert handle.problem is None
    standby.promote()
    second = publish(snapshots, NODES[:7], 2)
    assert handle.poll()
    assert handle.snapshot_id == second.id
    handle.close()


def test_a_standby_that_lags_behind_costs_no_answer(pair: tuple[Server, Server]) -> None:
    primary, standby = pair
    snapshots = catalog.snapshots(settings_of(primary, standby), "manual", FINGERPRINT)
    publish(snapshots, NODES)
    caught_up(primary, standby)
    standby.sql("SELECT pg_wal_replay_pause()")
    second = publish(snapshots, NODES[:7], 2)
    # As seen by a worker that learned of it from another server.
    table = str(catalog.snapshots(settings_of(primary), "manual", FINGERPRINT).get(second.id).signature())
    database = postgres_client.database(settings_of(primary, standby))
    with contextlib.closing(PostgresVectorStore.open(database, table, 7, len(unit(0)))) as store:
        assert found(store, None) == {f"n{number}" for number in range(7)}


def test_a_build_knows_the_snapshots_that_a_standby_has_not_heard_of(pair: tuple[Server, Server]) -> None:
    primary, standby = pair
    snapshots = catalog.snapshots(settings_of(primary, standby), "manual", FINGERPRINT)
    first = publish(snapshots, NODES)
    caught_up(primary, standby)
    standby.sql("SELECT pg_wal_replay_pause()")
    second = publish(snapshots, NODES[:7], 2, live=False)
    assert list(snapshots.ids()) == [first.id]
    with snapshots.draft() as draft:
        assert list(draft.ids()) == [first.id, second.id]


def test_with_no_server_left_it_says_so_and_comes_back(pair: tuple[Server, Server]) -> None:
    primary, standby = pair
    standby.kill()
    snapshots = catalog.snapshots(settings_of(primary, standby), "manual", FINGERPRINT)
    handle = IndexHandle(snapshots)
    publish(snapshots, NODES)
    assert handle.poll()
    primary.kill()
    with handle.use() as opened, pytest.raises(DatabaseUnavailableError, match="cannot be used"):
        found(opened.store, None)
    assert not handle.poll()
    assert "cannot be used" in (handle.problem or "")
    assert handle.unavailable
    primary.start()
    handle.poll()
    assert not handle.unavailable
    with handle.use() as opened:
        assert len(found(opened.store, None)) == len(NODES)
    handle.close()
