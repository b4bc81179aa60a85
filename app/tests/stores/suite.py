"""What the tests of every store ask with: a few nodes whose metadata is odd, and queries of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import MetadataFilters, VectorStoreQuery, VectorStoreQueryMode
from ragrack.catalog import Snapshot, Snapshots
from ragrack.readonly import SnapshotStore
from ragrack.snapshot import Manifest

DIMENSIONS = 16
HOSTILE = "t3' OR '1'='1"
METADATA: list[dict[str, Any]] = [
    {"tenant": "a", "year": 2020, "tags": ["red", "blue"], "note": "The Quick brown fox"},
    {"tenant": "a", "year": 2021, "tags": ["red"], "note": ""},
    {"tenant": "b", "year": 2022, "tags": [], "score": 0.5},
    {"tenant": "b", "year": "2022", "tags": ["green", 7]},
    {"tenant": HOSTILE, "year": 2023, "odd \"key' --": "x"},
    {"tenant": "ü", "year": None, "big": 2**80, "nested": {"a": 1}, "flag": True},
    {},
]
Filter = tuple[str, str, Any]


def unit(number: int) -> list[float]:
    """Vectors of which each is nearest to itself."""
    vector = np.random.default_rng(number).normal(size=DIMENSIONS)
    return [float(value) for value in vector / np.linalg.norm(vector)]


def crowd(count: int, far: int, ones: int) -> tuple[list[TextNode], Any]:
    """Nodes and their vectors; those of tenant `far`, the first, are on the other side, where a walk along a graph does
    not come by soon. `one` has so many values."""
    vectors = np.random.default_rng(1).normal(size=(count, DIMENSIONS)).astype(np.float32)
    vectors[:, 0] = np.where(np.arange(count) < far, -3, 3)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    nodes = [
        TextNode(
            id_=f"n{number}",
            text="",
            metadata={"tenant": "far" if number < far else "near", "one": number % ones},
            embedding=vectors[number].tolist(),
        )
        for number in range(count)
    ]
    return nodes, vectors


def node(number: int, metadata: dict[str, Any]) -> TextNode:
    return TextNode(
        id_=f"n{number}",
        text=f"text of node {number}",
        metadata=metadata,
        embedding=unit(number),
        excluded_embed_metadata_keys=["year"],
        start_char_idx=number,
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"doc{number // 2}")},
    )


def publish(snapshots: Snapshots, nodes: Sequence[TextNode], number: int = 1, *, live: bool = True) -> Snapshot:
    """Writes them as a snapshot whose id has that number in it."""
    dimensions = len(nodes[0].get_embedding())
    with snapshots.draft() as draft:
        written = draft.write(nodes, len(nodes), dimensions)
        snapshot = draft.publish(
            Manifest(
                id=f"20261125T{number:06}Z-{number:08x}",
                collection=snapshots.collection,
                fingerprint=snapshots.fingerprint,
                built_with={},
                content=f"{number:064x}",
                created=f"20261125T{number:06}Z",
                parent=None,
                documents=1,
                nodes=len(nodes),
                dimensions=dimensions,
                engine=written.engine,
                files=written.files,
                golden=None,
            )
        )
    if live:
        snapshots.flip(snapshot.id, "test")
    return snapshot


def filters(*conditions: Filter | MetadataFilters, condition: str = "and") -> MetadataFilters:
    return MetadataFilters.model_validate(
        {
            "filters": [
                c if isinstance(c, MetadataFilters) else {"key": c[0], "operator": c[1], "value": c[2]}
                for c in conditions
            ],
            "condition": condition,
        }
    )


def found(store: SnapshotStore, chosen: MetadataFilters | None, **more: Any) -> set[str]:
    query = VectorStoreQuery(query_embedding=unit(0), similarity_top_k=100, filters=chosen, **more)
    return set(store.query(query).ids or [])


def ask(store: SnapshotStore, text: str, mode: str, vector: int = 4, k: int = 16, **more: Any) -> dict[str, float]:
    cutoff = more.pop("similarity_cutoff", None)
    query = VectorStoreQuery(
        query_embedding=unit(vector), query_str=text, similarity_top_k=k, mode=VectorStoreQueryMode(mode), **more
    )
    result = store.query(query, similarity_cutoff=cutoff)
    return dict(zip(result.ids or [], result.similarities or [], strict=True))
