"""A snapshot made out of the one before it answers as one that was written anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.schema import BaseNode, TextNode
from llama_index.core.vector_stores.types import MetadataFilters, VectorStoreQuery, VectorStoreQueryMode
from ragrack.faiss_vectors import VECTORS
from ragrack.store import NODES, SnapshotVectorStore
from ragrack.stored import StoredNode
from ragrack.writer import FLAT_BELOW, GONE_SHARE, update_snapshot_files, write_snapshot_files

DIMENSIONS = 16
COUNT = FLAT_BELOW + 1000
TENANTS = 50


class Held:
    """As the staging area holds nodes."""

    def __init__(self, nodes: dict[str, TextNode]) -> None:
        self.by_id = nodes

    def digests(self) -> Iterator[tuple[str, bytes]]:
        return ((node_id, StoredNode.of(self.by_id[node_id]).digest()) for node_id in sorted(self.by_id))

    def some(self, node_ids: Sequence[str]) -> Iterator[BaseNode]:
        return (self.by_id[node_id] for node_id in node_ids)


def node(number: int, version: int = 0) -> TextNode:
    vector = np.random.default_rng([number, version]).normal(size=DIMENSIONS)
    return TextNode(
        id_=f"n{number:05}",
        text=f"number{number} version{version} of all",
        metadata={"tenant": f"t{number * TENANTS // COUNT}", "version": version, "tags": ["all", version]},
        embedding=[float(value) for value in vector / np.linalg.norm(vector)],
    )


def nodes(numbers: range, version: int = 0) -> dict[str, TextNode]:
    return {made.node_id: made for made in (node(number, version) for number in numbers)}


def write(held: Held, out: Path) -> Path:
    out.mkdir()
    write_snapshot_files(held.by_id.values(), len(held.by_id), DIMENSIONS, out)
    return out


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(Held(nodes(range(COUNT))), tmp_path_factory.mktemp("w") / "first")


CHANGED = Held(nodes(range(40, COUNT)) | nodes(range(100, 150), version=1) | nodes(range(COUNT, COUNT + 30)))
"""Forty are gone, fifty are others, thirty are new."""


@pytest.fixture(scope="module")
def stores(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SnapshotVectorStore, ...]]:
    """The changed nodes: made out of the first, and written anew."""
    out = tmp_path_factory.mktemp("w") / "second"
    out.mkdir()
    written = update_snapshot_files(first, CHANGED, out)
    assert written is not None
    assert written.nodes == len(CHANGED.by_id)
    anew = write(CHANGED, out.with_name("anew"))
    opened = SnapshotVectorStore.open(out), SnapshotVectorStore.open(anew)
    yield opened
    for store in opened:
        store.close()


def ask(store: SnapshotVectorStore, about: TextNode, mode: str = "default", **filters: Any) -> list[str]:
    chosen = [{"key": key, "value": value} for key, value in filters.items()]
    query = VectorStoreQuery(
        query_embedding=about.embedding,
        query_str=about.text,
        similarity_top_k=5,
        mode=VectorStoreQueryMode(mode),
        filters=MetadataFilters.model_validate({"filters": chosen}) if chosen else None,
    )
    return store.query(query).ids or []


def test_it_holds_what_is_there_now_and_nothing_else(stores: tuple[SnapshotVectorStore, ...]) -> None:
    for store in stores:
        assert len(store) == len(CHANGED.by_id)
        assert {found.node_id: found.get_content() for found in store.get_nodes()} == {
            node_id: held.text for node_id, held in CHANGED.by_id.items()
        }


@pytest.mark.parametrize("mode", ["default", "hybrid", "text_search"])
def test_what_is_new_is_found_and_what_is_gone_is_not(stores: tuple[SnapshotVectorStore, ...], mode: str) -> None:
    for store in stores:
        assert ask(store, node(120, version=1), mode)[0] == "n00120"
        assert ask(store, node(COUNT + 7), mode)[0] == f"n{COUNT + 7:05}"
        gone = ask(store, node(7), mode)
        assert "n00007" not in gone
        assert len(gone) == (0 if mode == "text_search" else 5)
    changed = [ask(store, node(120), "text_search") for store in stores]
    assert changed[0] == changed[1], "a word of the old version finds nothing"


@pytest.mark.parametrize("mode", ["default", "hybrid"])
@pytest.mark.parametrize(
    "filters",
    [{"tenant": "t0"}, {"tenant": "t1"}, {"tenant": "t49"}, {"tenant": "t50"}, {"version": 1}, {"version": 9}],
)
def test_a_filter_finds_the_same_in_both(
    stores: tuple[SnapshotVectorStore, ...], mode: str, filters: dict[str, Any]
) -> None:
    for number in (3, 45, 120, 2000, COUNT + 1):
        assert ask(stores[0], node(number), mode, **filters) == ask(stores[1], node(number), mode, **filters)


def test_not_is_of_the_nodes_that_are_there(stores: tuple[SnapshotVectorStore, ...]) -> None:
    other = MetadataFilters.model_validate({"filters": [{"key": "version", "operator": "!=", "value": 0}]})
    for store in stores:
        assert sorted(found.node_id for found in store.get_nodes(filters=other)) == [
            f"n{i:05}" for i in range(100, 150)
        ]


def test_the_parent_stays_as_it_was(first: Path, tmp_path: Path) -> None:
    before = [(first / name).read_bytes() for name in (VECTORS, NODES)]
    assert update_snapshot_files(first, CHANGED, tmp_path) is not None
    assert [(first / name).read_bytes() for name in (VECTORS, NODES)] == before


def test_one_after_another_until_too_many_rows_are_gone(first: Path, tmp_path: Path) -> None:
    path, version, held = first, 0, dict(nodes(range(COUNT)))
    step = COUNT // GONE_SHARE // 3
    while True:
        version += 1
        held |= nodes(range(version * 10, version * 10 + step), version)
        out = tmp_path / str(version)
        out.mkdir()
        if update_snapshot_files(path, Held(held), out) is None:
            break
        path = out
    assert version == 4
    store = SnapshotVectorStore.open(path)
    assert len(store) == COUNT
    assert ask(store, node(25, version=2))[0] == "n00025"
    assert [found.get_content() for found in store.get_nodes(["n00035"])] == ["number35 version3 of all"]
    store.close()


@pytest.mark.parametrize(
    "held",
    [
        pytest.param(nodes(range(FLAT_BELOW - 1)), id="too few for a graph"),
        pytest.param(nodes(range(COUNT), version=1), id="all others"),
        pytest.param(nodes(range(3 * COUNT)), id="far more"),
    ],
)
def test_where_all_is_better_written_anew_nothing_is_written(
    first: Path, tmp_path: Path, held: dict[str, TextNode]
) -> None:
    assert update_snapshot_files(first, Held(held), tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_without_a_graph_all_is_written_anew(tmp_path: Path) -> None:
    few = write(Held(nodes(range(10))), tmp_path / "few")
    assert update_snapshot_files(few, Held(nodes(range(11))), tmp_path) is None
