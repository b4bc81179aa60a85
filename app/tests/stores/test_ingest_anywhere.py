"""An ingest into each store, from one store to the other, and a service that answers from PostgreSQL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from postgres_server import Server, database_settings
from ragrack import catalog, move
from ragrack.catalog import Snapshots
from ragrack.embedding import MiniLMEmbedding
from ragrack.fingerprint import Fingerprint
from ragrack.ingest import IngestError, ingest
from ragrack.move import MoveError
from ragrack.publish import staged_at
from ragrack.settings import Settings

pytestmark = pytest.mark.hosts


def quiet(stage: str, done: int, total: int, note: str = "") -> None:
    """A progress that nobody looks at."""


@pytest.fixture
def both(settings: Settings, postgres: Server, request: pytest.FixtureRequest) -> Settings:
    """Settings of a collection of this test's own, in PostgreSQL."""
    name = request.node.name.replace("_", "-")[:60].rstrip("-")
    (settings.documents_dir / "manual").rename(settings.documents_dir / name)
    (settings.golden_dir / "manual.yml").rename(settings.golden_dir / f"{name}.yml")
    return Settings.model_validate(settings.model_dump() | {"collections": (name,)} | database_settings(postgres))


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the model embeds as nodes, in their order."""
    texts: list[str] = []
    embed = MiniLMEmbedding._get_text_embeddings

    def told(self: MiniLMEmbedding, given: list[str]) -> list[list[float]]:
        texts.extend(given)
        return embed(self, given)

    monkeypatch.setattr(MiniLMEmbedding, "_get_text_embeddings", told)
    return texts


def of(settings: Settings, kept_in: str) -> Snapshots:
    return catalog.snapshots(settings, settings.default_collection, Fingerprint.of(settings).digest, kept_in)


def contents(snapshots: Snapshots) -> dict[str, tuple[str, Any]]:
    store = snapshots.open(snapshots.current_id() or "")
    nodes = {node.node_id: (node.get_content(), node.metadata) for node in store.get_nodes()}
    store.close()
    return nodes


def test_an_ingest_follows_its_documents(both: Settings, embedded: list[str]) -> None:
    name = both.default_collection
    first = ingest(both, name, quiet)
    assert first.manifest.engine == "pgvector"
    assert first.manifest.golden is not None
    snapshots = of(both, "postgres")
    assert snapshots.current_id() == first.id
    assert of(both, "embedded").current_id() is None
    all_texts = len(embedded)
    assert all_texts == first.manifest.nodes

    assert ingest(both, name, quiet).id == first.id
    documents = both.documents_dir / name
    (documents / "limits.txt").write_text("A table has at most 1600 columns, as of this test.")
    (documents / "vacuum.html").unlink()
    (both.golden_dir / f"{name}.yml").unlink()
    second = ingest(both, name, quiet)
    assert snapshots.current_id() == second.id
    found = contents(snapshots)
    assert "vacuum.html" not in {metadata["document"] for _, metadata in found.values()}
    assert any("as of this test" in text for text, _ in found.values())
    assert len(embedded) == all_texts + 1, "only what has changed is embedded"


def test_golden_questions_that_fail_keep_the_live_one(both: Settings) -> None:
    name = both.default_collection
    first = ingest(both, name, quiet)
    (both.golden_dir / f"{name}.yml").write_text(
        "questions: [{question: 'What is the colour of the sky?', sources: [absent.html]}]"
    )
    (both.documents_dir / name / "limits.txt").write_text("Something else.")
    with pytest.raises(IngestError, match="golden questions FAILED"):
        ingest(both, name, quiet)
    assert [snapshot.id for snapshot in of(both, "postgres").list()] == [first.id]


def test_there_and_back_embeds_nothing(both: Settings, embedded: list[str]) -> None:
    name = both.default_collection
    here = Settings.model_validate(both.model_dump() | {"vector_store": "embedded"})
    ingest(here, name, quiet)
    before = contents(of(both, "embedded"))
    embedded.clear()
    there = move.move(here, name, "postgres", quiet)
    assert "staged" in there.source
    assert contents(of(both, "postgres")) == before
    ingest(both, name, quiet)
    assert of(both, "postgres").current_id() == there.snapshot.id
    staged_at(both, name, Fingerprint.of(both).digest).unlink()
    of(both, "embedded").discard()
    back = move.move(both, name, "embedded", quiet)
    assert back.snapshot.manifest.content == there.snapshot.manifest.content
    assert "approximations of half precision" in back.source
    assert contents(of(both, "embedded")) == before
    of(both, "postgres").discard()
    again = move.move(here, name, "postgres", quiet)
    assert back.snapshot.id in again.source
    assert contents(of(both, "postgres")) == before
    assert embedded == []


def test_a_deploy_with_the_other_store_embeds_nothing(both: Settings, embedded: list[str]) -> None:
    name = both.default_collection
    ingest(Settings.model_validate(both.model_dump() | {"vector_store": "embedded"}), name, quiet)
    embedded.clear()
    ingest(both, name, quiet)
    assert contents(of(both, "postgres")) == contents(of(both, "embedded"))
    assert embedded == []


def test_a_move_from_nowhere_is_refused(both: Settings) -> None:
    name = both.default_collection
    with pytest.raises(MoveError, match="the embedded store has no live snapshot"):
        move.move(both, name, "postgres", quiet)
    alone = Settings.model_validate(both.model_dump() | {"vector_store": "embedded", "postgres_hosts": ()})
    with pytest.raises(MoveError, match="RAGRACK_POSTGRES_HOSTS"):
        move.move(alone, name, "embedded", quiet)


def test_the_command_line_is_the_same(
    both: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ragrack.cli import main

    (tmp_path / "credentials").mkdir()
    secret = both.postgres_password
    assert secret is not None
    (tmp_path / "credentials/credentials_postgres_password").write_text(secret.get_secret_value())
    variables = {
        "RAGRACK_COLLECTIONS": both.default_collection,
        "RAGRACK_INDEX_DIR": str(both.index_dir),
        "RAGRACK_DOCUMENTS_DIR": str(both.documents_dir),
        "RAGRACK_GOLDEN_DIR": str(both.golden_dir),
        "RAGRACK_EMBED_MODEL_DIR": str(both.embed_model_dir),
        "RAGRACK_VECTOR_STORE": "postgres",
        "RAGRACK_POSTGRES_HOSTS": ",".join(both.postgres_hosts),
        "RAGRACK_POSTGRES_SSLROOTCERT": str(both.postgres_sslrootcert),
        "CREDENTIALS_DIRECTORY": str(tmp_path / "credentials"),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> Any:
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    first = run("ingest", "--missing")
    assert first["live"]
    assert main(["ingest", "--missing"]) == 0
    assert "every collection has a snapshot" in capsys.readouterr().err
    (both.documents_dir / both.default_collection / "limits.txt").write_text("Something new.")
    second = run("ingest")
    mine = [row for row in run("index", "list") if row["collection"] == both.default_collection]
    assert {row["snapshot"]: (row["current"], row["previous"]) for row in mine} == {
        first["snapshot"]: (False, True),
        second["snapshot"]: (True, False),
    }
    assert [row["problem"] for row in run("index", "verify", "--collection", both.default_collection)] == [None]
    (shown,) = run("index", "show", "--collection", both.default_collection)
    assert shown["id"] == second["snapshot"]
    (back,) = run("index", "rollback", "--why", "a test")
    assert (back["to"], back["held"]["why"]) == (first["snapshot"], "a test")
    (on,) = run("index", "resume")
    assert (on["to"], on["held"]) == (second["snapshot"], None)
    moved = run("index", "move", "--to", "embedded")
    assert moved["to"] == "embedded"
    assert run("index", "prune", "--keep", "1")["snapshots"] == []
    assert secret.get_secret_value() not in capsys.readouterr().err
