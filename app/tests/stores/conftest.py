"""A PostgreSQL server and one that stands in for Qdrant, for the tests of a run, and a store of each kind."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from llama_index.core.schema import TextNode
from postgres_server import Server, database_settings, installed
from ragrack import catalog
from ragrack.catalog import Snapshots
from ragrack.settings import Settings
from testhosts import runs
from testhosts.shell import UnsuitableMachineError

from .qdrant_server import QdrantServer
from .suite import publish

STORES = ["embedded", "qdrant", pytest.param("postgres", marks=pytest.mark.hosts)]
Make = Callable[[Sequence[TextNode]], Snapshots]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """PostgreSQL 17 with pgvector, as role postgres leaves it: TLS, scram, a schema that the role ragrack owns."""
    try:
        runs.check_machine()
    except UnsuitableMachineError as error:
        pytest.skip(str(error))
    root = installed(lambda message: print(message, file=sys.stderr))
    # Short, for the path of a socket has room for a hundred characters.
    directory = Path(tempfile.mkdtemp(prefix="ragrack-pg-"))
    directory.chmod(0o755)
    server = Server(root, directory / "a")
    try:
        server.initialise()
        yield server
    finally:
        server.kill()
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def qdrant() -> Iterator[QdrantServer]:
    server = QdrantServer()
    server.start()
    yield server
    server.kill()


def qdrant_settings(server: QdrantServer) -> dict[str, object]:
    return {"vector_store": "qdrant", "qdrant_url": server.url, "qdrant_api_key": server.key}


@pytest.fixture(scope="session", params=STORES)
def kept_in(request: pytest.FixtureRequest) -> str:
    """Which store: all that a test promises, it promises of each."""
    return str(request.param)


@pytest.fixture(scope="session")
def store_settings(kept_in: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    more: dict[str, object] = {}
    if kept_in == "postgres":
        more = database_settings(request.getfixturevalue("postgres"))
    if kept_in == "qdrant":
        more = qdrant_settings(request.getfixturevalue("qdrant"))
    return Settings.model_validate({"collections": ("manual",), "index_dir": tmp_path_factory.mktemp("indexes")} | more)


@pytest.fixture(scope="session")
def make(store_settings: Settings) -> Make:
    """Publishes nodes as the only and live snapshot of a collection of their own."""
    made = iter(range(1000))

    def make(nodes: Sequence[TextNode]) -> Snapshots:
        snapshots = catalog.snapshots(store_settings, f"collection-{next(made)}", "0123456789abcdef")
        publish(snapshots, nodes)
        return snapshots

    return make
