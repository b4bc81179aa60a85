"""Whose a node is follows from where its document lies, and from nothing that the document says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_index.core.schema import MetadataMode
from llama_index.core.vector_stores.types import FilterCondition, MetadataFilter, MetadataFilters
from ragrack.auth import THE_GATE, Identity
from ragrack.embedded import EmbeddedSnapshots
from ragrack.fingerprint import Fingerprint
from ragrack.ingest import ingest
from ragrack.settings import Settings
from ragrack.store import SnapshotVectorStore
from ragrack.tenants import NoTenantError, may_touch, tenant_filter, within

ACME = Identity("a", "acme")


def quiet(*_: Any, **__: Any) -> None:
    pass


@pytest.fixture
def store(settings: Settings) -> SnapshotVectorStore:
    root = settings.documents_dir / "manual"
    for path in list(root.rglob("*")):
        if path.is_file():
            path.unlink()
    for name in ("acme/deep/one.md", "beta/two.md", "nobodys.md", "bad name/three.md", "acme.b/four.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"---\ntenant: beta\n---\n# Of {name}\n\ntenant: acme. The lamp is lit at dusk.\n")
    (settings.golden_dir / "manual.yml").unlink()
    apart = Settings.model_validate(settings.model_dump() | {"tenants": "by_folder"})
    snapshot = ingest(apart, "manual", quiet)
    assert len(snapshot.manifest.skipped) == 2
    assert all("tenant's folder" in problem for problem in snapshot.manifest.skipped)
    return EmbeddedSnapshots(apart.index_dir, "manual", Fingerprint.of(apart).digest).open(snapshot.id)


def test_a_document_is_its_first_folders_whatever_it_says(store: SnapshotVectorStore) -> None:
    nodes = {node.metadata["document"]: node for node in store.get_nodes()}
    assert {name: node.metadata["tenant"] for name, node in nodes.items()} == {
        "acme/deep/one.md": "acme",
        "acme.b/four.txt": "acme.b",
        "beta/two.md": "beta",
    }
    for mode in (MetadataMode.EMBED, MetadataMode.LLM):
        assert "tenant: beta" not in nodes["beta/two.md"].get_content(mode).split("\n")
    assert [n.metadata["document"] for n in store.get_nodes(filters=tenant_filter(ACME))] == ["acme/deep/one.md"]
    assert len(store.get_nodes(filters=tenant_filter(THE_GATE))) == 3
    store.close()


def test_a_requests_filters_can_only_narrow(store: SnapshotVectorStore) -> None:
    beta = MetadataFilter(key="tenant", value="beta")
    for condition in FilterCondition:
        asked = MetadataFilters(filters=[beta, MetadataFilter(key="title", value="x")], condition=condition)
        found = store.get_nodes(filters=within(ACME, asked))
        assert {node.metadata["tenant"] for node in found} <= {"acme"}
    assert within(THE_GATE, asked) is asked
    store.close()


def test_an_identity_that_may_see_nothing_gets_no_filter_that_means_all() -> None:
    for filters in (None, MetadataFilters(filters=[])):
        with pytest.raises(NoTenantError):
            within(Identity("nobody"), filters)
    assert not may_touch(Identity("nobody"), "acme/x.md")


@pytest.mark.parametrize(
    ("document", "may"),
    [
        ("acme/x.md", True),
        ("acme/deep/x.md", True),
        ("acme", False),
        ("acme.md", False),
        ("x.md", False),
        ("beta/x.md", False),
        ("acme/../beta/x.md", False),
        ("../acme/x.md", False),
        ("/acme/x.md", False),
        ("ACME/x.md", False),
        ("acme.b/x.md", False),
    ],
)
def test_which_documents_an_identity_may_touch(document: str, may: bool) -> None:
    assert may_touch(ACME, document) is may
    assert may_touch(THE_GATE, document)


def test_turning_tenants_on_is_a_new_index(settings: Settings, tmp_path: Path) -> None:
    apart = Settings.model_validate(settings.model_dump() | {"tenants": "by_folder"})
    assert Fingerprint.of(apart).digest != Fingerprint.of(settings).digest
