"""What only a store with its vectors in Qdrant must do, asked of the server that stands in for one."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from llama_index.core.schema import BaseNode, TextNode
from llama_index.core.vector_stores.types import MetadataFilters, VectorStoreQuery
from qdrant_client import QdrantClient
from qdrant_client.http.models import PointStruct
from ragrack import catalog, qdrant_vectors
from ragrack.catalog import Snapshots
from ragrack.cli import main
from ragrack.embedding import MiniLMEmbedding
from ragrack.fingerprint import Fingerprint
from ragrack.handle import IndexHandle
from ragrack.ingest import ingest
from ragrack.qdrant_snapshots import WHERE
from ragrack.qdrant_vectors import QdrantUnavailableError
from ragrack.settings import Settings
from ragrack.snapshot import SnapshotError, UnavailableError

from .conftest import qdrant_settings
from .qdrant_server import QdrantServer
from .suite import DIMENSIONS, ask, crowd, filters, found, node, publish, unit

FINGERPRINT = "0123456789abcdef"
NODES = [node(number, {"tenant": "ab"[number % 2], "secret": "nobody's business"}) for number in range(20)]


def quiet(stage: str, done: int, total: int, note: str = "") -> None:
    """A progress that nobody looks at."""


@pytest.fixture
def here(qdrant: QdrantServer, tmp_path: Path) -> Settings:
    given = {"collections": ("manual",), "index_dir": tmp_path / "indexes"}
    return Settings.model_validate(given | qdrant_settings(qdrant))


@pytest.fixture
def snapshots(here: Settings) -> Iterator[Snapshots]:
    snapshots = catalog.snapshots(here, "manual", FINGERPRINT)
    (here.index_dir / "manual" / FINGERPRINT).mkdir(parents=True)
    yield snapshots
    with contextlib.suppress(FileNotFoundError):
        snapshots.discard()


@pytest.fixture
def client(qdrant: QdrantServer) -> QdrantClient:
    return QdrantClient(url=qdrant.url, headers={"api-key": qdrant.key}, check_compatibility=False)


def names(client: QdrantClient, collection: str = "manual") -> set[str]:
    """Of what the server has of a collection of ours."""
    return {one.name for one in client.get_collections().collections if one.name.startswith(f"ragrack-{collection}-")}


def test_the_server_knows_vectors_and_whose_they_are_and_no_more(snapshots: Snapshots, client: QdrantClient) -> None:
    publish(snapshots, NODES)
    (name,) = names(client)
    points, _ = client.scroll(name, limit=100, with_vectors=True)
    assert len(points) == len(NODES)
    for point in points:
        assert "text of node" not in str(point.payload)
        assert "nobody" not in str(point.payload)
    assert {(point.payload or {})["tenant"] for point in points} == {"a", "b"}


@pytest.mark.parametrize("mode", ["default", "hybrid"])
@pytest.mark.parametrize("named", [0, 1000])
def test_a_server_that_gives_others_rows_gives_them_to_nobody(
    snapshots: Snapshots, client: QdrantClient, monkeypatch: pytest.MonkeyPatch, mode: str, named: int
) -> None:
    monkeypatch.setattr(qdrant_vectors, "NAMED", named)
    publish(snapshots, NODES)
    (name,) = names(client)
    points, _ = client.scroll(name, limit=100, with_vectors=True)
    # As if all were tenant a's there.
    client.upsert(
        name,
        [
            PointStruct(id=point.id, vector=cast(Any, point.vector), payload={**(point.payload or {}), "tenant": "a"})
            for point in points
        ],
    )
    with contextlib.closing(snapshots.open(snapshots.current_id() or "")) as store:
        got = ask(store, "text of node", mode, filters=filters(("tenant", "==", "a")))
    assert set(got) == {f"n{number}" for number in range(0, 20, 2)}


@pytest.fixture(scope="module")
def crowded(qdrant: QdrantServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Snapshots, Any]]:
    """A tenant's nodes lie where nobody asks."""
    nodes, vectors = crowd(1200, far=1000, ones=10)
    given = {"collections": ("crowded",), "index_dir": tmp_path_factory.mktemp("crowded")}
    snapshots = catalog.snapshots(Settings.model_validate(given | qdrant_settings(qdrant)), "crowded", FINGERPRINT)
    publish(snapshots, nodes)
    yield snapshots, vectors
    snapshots.discard()


@pytest.mark.parametrize("named", [0, 100, 10_000])
@pytest.mark.parametrize("at_most", [7, 10_000])
@pytest.mark.parametrize(
    ("chosen", "allowed"),
    [
        (None, np.arange(1200)),
        (filters(("tenant", "==", "far")), np.arange(1000)),
        (filters(("tenant", "==", "far"), ("one", "==", 3)), np.arange(3, 1000, 10)),
        (filters(("one", "==", 3)), np.arange(3, 1200, 10)),
        (filters(("one", "<", 3), ("tenant", "!=", "near")), np.flatnonzero(np.arange(1000) % 10 < 3)),
        (filters(("tenant", "==", "far"), ("tenant", "==", "near"), condition="or"), np.arange(1200)),
        (filters(("tenant", "==", "nobody")), np.arange(0)),
    ],
)
def test_a_filter_costs_no_results_whichever_way_the_server_is_asked(
    crowded: tuple[Snapshots, Any],
    monkeypatch: pytest.MonkeyPatch,
    named: int,
    at_most: int,
    chosen: MetadataFilters | None,
    allowed: Any,
) -> None:
    monkeypatch.setattr(qdrant_vectors, "NAMED", named)
    monkeypatch.setattr(qdrant_vectors, "NAMED_AT_MOST", at_most)
    snapshots, vectors = crowded
    question = vectors[1100]
    with contextlib.closing(snapshots.open(snapshots.current_id() or "")) as store:
        query = VectorStoreQuery(query_embedding=question.tolist(), similarity_top_k=5, filters=chosen)
        ids = store.query(query).ids
    exact = allowed[np.argsort(-(vectors[allowed] @ question), kind="stable")[:5]]
    assert ids == [f"n{number}" for number in exact]


def test_vectors_go_with_their_snapshot(snapshots: Snapshots, client: QdrantClient) -> None:
    for number in range(1, 5):
        publish(snapshots, NODES[: number + 2], number)
    assert len(names(client)) == 4
    assert len(snapshots.prune(1)) == 2
    assert len(names(client)) == 2
    for one in snapshots.list():
        snapshots.verify(one.id)
    snapshots.discard()
    assert names(client) == set()


def test_a_build_that_fails_leaves_nothing(snapshots: Snapshots, client: QdrantClient) -> None:
    with pytest.raises(RuntimeError, match="golden"), snapshots.draft() as draft:
        draft.write(NODES, len(NODES), DIMENSIONS)
        assert len(names(client)) == 1
        raise RuntimeError("golden questions failed")
    assert names(client) == set()


def test_a_build_without_an_embedding_is_refused(snapshots: Snapshots) -> None:
    with pytest.raises(ValueError, match="has no embedding of 16 dimensions"), snapshots.draft() as draft:
        draft.write([TextNode(id_="bare", text="")], 1, DIMENSIONS)


def _die_at_work(settings: Settings) -> None:
    def nodes() -> Iterator[BaseNode]:
        yield from NODES
        os._exit(9)

    with catalog.snapshots(settings, "manual", FINGERPRINT).draft() as draft:
        draft.write(nodes(), 1000, DIMENSIONS)


def test_what_a_killed_build_left_goes_with_the_next_prune(
    snapshots: Snapshots, here: Settings, client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = publish(snapshots, NODES)
    kept = names(client)
    monkeypatch.setattr(qdrant_vectors, "BATCH", 5)
    dying = multiprocessing.get_context("fork").Process(target=_die_at_work, args=(here,))
    dying.start()
    dying.join(600)
    assert dying.exitcode == 9
    assert len(names(client) - kept) == 1
    with snapshots.draft() as draft:
        draft.write(NODES, len(NODES), DIMENSIONS)
        catalog.snapshots(here, "manual", FINGERPRINT).prune(1)
        assert len(names(client) - kept) == 1, "the dead one's is gone, not that of the build that is at work"
        with contextlib.closing(draft.open()) as store:
            assert len(found(store, None)) == len(NODES)
    assert names(client) == kept
    snapshots.verify(live.id)


def test_a_host_that_pulls_answers_and_removes_nothing_there(
    snapshots: Snapshots, here: Settings, client: QdrantClient, tmp_path: Path
) -> None:
    for number in (1, 2, 3):
        publish(snapshots, NODES, number)
    root = here.index_dir / "manual" / FINGERPRINT
    # As `ragrack index pull` leaves it: the snapshots and what is live.
    shutil.copytree(root, tmp_path / "other/manual" / FINGERPRINT, symlinks=True, ignore=lambda *_: {"qdrant"})
    there = catalog.snapshots(here.model_copy(update={"index_dir": tmp_path / "other"}), "manual", FINGERPRINT)
    handle = IndexHandle(there)
    with handle.use() as opened:
        assert len(found(opened.store, filters(("tenant", "==", "a")))) == 10
    handle.close()
    assert len(there.prune(1)) == 1
    there.discard()
    assert len(names(client)) == 3
    snapshots.verify(snapshots.current_id() or "")


def test_vectors_that_are_gone_or_too_few_are_seen(snapshots: Snapshots, here: Settings, client: QdrantClient) -> None:
    first = publish(snapshots, NODES)
    (name,) = names(client)
    snapshots.verify(first.id)
    client.delete_collection(name)
    handle = IndexHandle(snapshots)
    assert "its vectors are gone" in (handle.problem or "")
    assert not handle.unavailable
    with pytest.raises(SnapshotError, match="its vectors are gone"):
        snapshots.verify(first.id)
    second = publish(snapshots, NODES, 2)
    where = here.index_dir / "manual" / FINGERPRINT / "snapshots" / second.id / WHERE
    where.chmod(0o644)
    where.write_text(where.read_text().replace('"rows": 20', '"rows": 21'))
    with pytest.raises(SnapshotError, match=f"{WHERE} is not what was written"):
        snapshots.verify(second.id)
    with pytest.raises(SnapshotError, match="has 20 vectors, the snapshot has 21 nodes"):
        snapshots.open(second.id)


def test_without_the_server_it_says_so_and_comes_back(tmp_path: Path) -> None:
    server = QdrantServer(tmp_path / "server")
    server.start()
    try:
        given = {"collections": ("manual",), "index_dir": tmp_path / "indexes"} | qdrant_settings(server)
        snapshots = catalog.snapshots(Settings.model_validate(given), "manual", FINGERPRINT)
        publish(snapshots, NODES[:5])
        handle = IndexHandle(snapshots)
        server.kill()
        with handle.use() as opened, pytest.raises(QdrantUnavailableError, match="cannot be used") as refused:
            found(opened.store, None)
        assert server.key not in str(refused.value)
        assert server.key not in repr(vars(snapshots))
        assert IndexHandle(snapshots).unavailable
        assert snapshots.prune(1) == []
        with pytest.raises(UnavailableError):
            snapshots.discard()
        assert len(snapshots.ids()) == 1
        with pytest.raises(UnavailableError):
            publish(snapshots, NODES, 2)
        server.start()
        with handle.use() as opened:
            assert len(found(opened.store, None)) == 5
        handle.close()
        snapshots.prune(1)
        wrong = Settings.model_validate(given | {"qdrant_api_key": "wrong-and-secret"})
        with pytest.raises(UnavailableError, match="401") as denied:
            catalog.snapshots(wrong, "manual", FINGERPRINT).verify(snapshots.ids()[0])
        assert "wrong-and-secret" not in str(denied.value)
    finally:
        server.kill()


def test_an_ingest_follows_its_documents_beside_the_index_in_files(
    settings: Settings, qdrant: QdrantServer, client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    (settings.documents_dir / "manual").rename(settings.documents_dir / "ingested")
    (settings.golden_dir / "manual.yml").rename(settings.golden_dir / "ingested.yml")
    files = settings.model_copy(update={"collections": ("ingested",)})
    here = Settings.model_validate(files.model_dump() | qdrant_settings(qdrant))
    in_files = ingest(files, "ingested", quiet)
    with monkeypatch.context() as patch:
        patch.setattr(MiniLMEmbedding, "_get_text_embeddings", lambda *_: pytest.fail("it is embedded again"))
        first = ingest(here, "ingested", quiet)
    assert first.manifest.engine == "qdrant"
    assert first.manifest.golden is not None
    assert first.manifest.fingerprint != in_files.manifest.fingerprint
    assert ingest(here, "ingested", quiet).id == first.id
    (here.documents_dir / "ingested/limits.txt").write_text("A table has at most 1600 columns, as of this test.")
    second = ingest(here, "ingested", quiet)
    snapshots = catalog.snapshots(here, "ingested", Fingerprint.of(here).digest)
    with contextlib.closing(snapshots.open(second.id)) as store:
        assert any("as of this test" in node.get_content() for node in store.get_nodes())
    assert (snapshots.current_id(), snapshots.previous_id()) == (second.id, first.id)
    assert len(names(client, "ingested")) == 2
    other = catalog.snapshots(files, "ingested", Fingerprint.of(files).digest)
    assert other.current_id() == in_files.id
    for index in catalog.every(here):
        index.verify(index.current_id() or "")
        index.discard()
    assert names(client, "ingested") == set()


def test_the_command_line_is_the_same(
    snapshots: Snapshots,
    here: Settings,
    client: QdrantClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "credentials_qdrant_api_key").write_text(
        here.qdrant_api_key.get_secret_value() if here.qdrant_api_key else ""
    )
    for name, value in {
        "RAGRACK_COLLECTIONS": "manual",
        "RAGRACK_INDEX_DIR": str(here.index_dir),
        "RAGRACK_VECTOR_STORE": "qdrant",
        "RAGRACK_QDRANT_URL": str(here.qdrant_url),
        "CREDENTIALS_DIRECTORY": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    for number in (1, 2, 3):
        publish(snapshots, NODES, number)

    def run(*arguments: str) -> Any:
        status = main(["index", *arguments, "--json"])
        return status, json.loads(capsys.readouterr().out)

    assert [row["engine"] for row in run("list")[1]] == ["qdrant"] * 3
    assert run("verify")[0] == 0
    assert len(run("prune", "--keep", "1")[1]["snapshots"]) == 1
    for name in names(client):
        client.delete_collection(name)
    status, rows = run("verify")
    assert (status, "its vectors are gone" in rows[0]["problem"]) == (1, True)
    assert main(["index", "move", "--to", "embedded"]) == 1
    assert "a fingerprint of its own" in capsys.readouterr().err


def test_without_the_extra_it_is_named(here: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ragrack.qdrant_snapshots", None)
    for ask_for in (lambda: catalog.snapshots(here, "manual", FINGERPRINT), lambda: catalog.every(here)):
        with pytest.raises(SnapshotError, match=r"install `ragrack\[qdrant\]`"):
            ask_for()


def test_all_vectors_can_be_read(snapshots: Snapshots) -> None:
    publish(snapshots, NODES)
    with contextlib.closing(snapshots.open(snapshots.current_id() or "")) as store:
        read = {one.node_id: one.get_embedding() for one in store.embedded_nodes()}
    for number in range(len(NODES)):
        assert read[f"n{number}"] == pytest.approx(unit(number), abs=1e-6)
