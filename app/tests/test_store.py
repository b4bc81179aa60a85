"""What any store of ours must do (the conformance suite), and what this one promises beside it."""

from __future__ import annotations

import asyncio
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import MetadataFilters, VectorStoreQuery, VectorStoreQueryMode
from ragrack.embedding import MiniLMEmbedding
from ragrack.readonly import ReadOnlyError
from ragrack.snapshot import SnapshotError
from ragrack.store import NODES, VECTORS, SnapshotVectorStore
from ragrack.writer import FLAT_BELOW, write_snapshot_files

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


def write(path: Path, nodes: list[TextNode]) -> Path:
    path.mkdir()
    write_snapshot_files(nodes, len(nodes), DIMENSIONS, path)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("s") / "few", [node(i, metadata) for i, metadata in enumerate(METADATA)])


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    count = FLAT_BELOW + 1000
    nodes = [node(i, {"half": i % 2, "rare": i % 500, "rank": i}) for i in range(count)]
    return write(tmp_path_factory.mktemp("s") / "many", nodes)


@pytest.fixture
def store(path: Path) -> Iterator[SnapshotVectorStore]:
    opened = SnapshotVectorStore.open(path)
    yield opened
    opened.close()


@pytest.fixture
def graph(many: Path) -> Iterator[SnapshotVectorStore]:
    opened = SnapshotVectorStore.open(many)
    yield opened
    opened.close()


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


def found(store: SnapshotVectorStore, chosen: MetadataFilters | None, **more: Any) -> set[str]:
    query = VectorStoreQuery(query_embedding=unit(0), similarity_top_k=100, filters=chosen, **more)
    return set(store.query(query).ids or [])


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (("tenant", "==", "a"), {0, 1}),
        (("tenant", "!=", "a"), {2, 3, 4, 5, 6}),
        (("tenant", "in", ["a", "ü"]), {0, 1, 5}),
        (("tenant", "in", []), set()),
        (("tenant", "nin", ["a", "b"]), {4, 5, 6}),
        (("year", "==", 2022), {2}),
        (("year", "==", "2022"), {3}),
        (("year", "==", 2022.0), {2}),
        (("year", ">", 2020), {1, 2, 4}),
        (("year", ">=", 2022), {2, 4}),
        (("year", "<", 2021), {0}),
        (("year", "<=", 2021), {0, 1}),
        (("year", ">", "2000"), {3}),
        (("score", ">", 0), {2}),
        (("score", "<", 0.6), {2}),
        (("flag", "==", 1), {5}),
        (("big", ">", 2**70), {5}),
        (("tags", "contains", "red"), {0, 1}),
        (("tags", "contains", 7), {3}),
        (("tags", "any", ["blue", "green"]), {0, 3}),
        (("tags", "all", ["red", "blue"]), {0}),
        (("tags", "==", "red"), set()),
        (("note", "contains", "Quick"), {0}),
        (("note", "text_match", "Quick"), {0}),
        (("note", "text_match", "quick"), set()),
        (("note", "text_match_insensitive", "qUICK"), {0}),
        (("note", "is_empty", None), {1, 2, 3, 4, 5, 6}),
        (("tags", "is_empty", None), {2, 4, 5, 6}),
        (("absent", "==", "x"), set()),
        (("absent", "!=", "x"), {0, 1, 2, 3, 4, 5, 6}),
        (("tenant", "==", HOSTILE), {4}),
        (("tenant", "in", [HOSTILE]), {4}),
        (("tenant", "==", "a' OR '1'='1"), set()),
        (("tenant' OR 1=1 --", "==", "a"), set()),
        (("odd \"key' --", "==", "x"), {4}),
        (("note", "text_match", "%"), set()),
        (("tenant", "==", "a\0b"), set()),
        (("tenant", "in", ["a\0b", "b"]), {2, 3}),
        (("tenant\0", "==", "a"), set()),
    ],
)
def test_a_filter_finds_what_it_says(store: SnapshotVectorStore, condition: Filter, expected: set[int]) -> None:
    assert found(store, filters(condition)) == {f"n{number}" for number in expected}


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (filters(("tenant", "==", "a"), ("year", ">", 2020)), {1}),
        (filters(("tenant", "==", "a"), ("year", "==", 2022), condition="or"), {0, 1, 2}),
        (filters(("tenant", "==", "a"), ("tenant", "==", "b"), condition="not"), {4, 5, 6}),
        (filters(("tenant", "==", "b"), filters(("year", "==", 2022), ("year", "==", "2022"), condition="or")), {2, 3}),
        (filters(filters(filters(("tenant", "==", "a"), condition="not"), ("year", ">", 2022))), {4}),
        (filters(), {0, 1, 2, 3, 4, 5, 6}),
        (filters(("tenant", "==", "a"), filters()), {0, 1}),
    ],
)
def test_filters_combine(store: SnapshotVectorStore, chosen: MetadataFilters, expected: set[int]) -> None:
    assert found(store, chosen) == {f"n{number}" for number in expected}


def test_ids_and_filters_are_both_kept_to(store: SnapshotVectorStore) -> None:
    assert found(store, None, node_ids=["n1", "n2", "absent"]) == {"n1", "n2"}
    assert found(store, None, doc_ids=["doc0", "doc1"]) == {"n0", "n1", "n2", "n3"}
    assert found(store, filters(("tenant", "==", "a")), node_ids=["n1", "n2"]) == {"n1"}
    assert len(found(store, None, node_ids=[])) == len(METADATA)
    assert store.get_nodes(node_ids=[]) == []


@pytest.mark.parametrize(
    "condition",
    [("year", "in", 3), ("year", "==", [1]), ("year", "==", None), ("year", ">", None), ("note", "text_match", 3)],
)
def test_a_filter_without_sense_is_refused_by_key(store: SnapshotVectorStore, condition: Filter) -> None:
    with pytest.raises(ValueError, match=f"the filter on '{condition[0]}' with '{condition[1]}' needs"):
        found(store, filters(condition))


def test_a_query_finds_the_nearest_first_with_cosines(store: SnapshotVectorStore) -> None:
    for number in range(len(METADATA)):
        result = store.query(VectorStoreQuery(query_embedding=unit(number), similarity_top_k=3))
        assert result.ids is not None
        assert result.similarities is not None
        assert result.ids[0] == f"n{number}"
        assert result.similarities == sorted(result.similarities, reverse=True)
        exact = [float(np.dot(unit(number), unit(int(found_id[1:])))) for found_id in result.ids]
        np.testing.assert_allclose(result.similarities, exact, atol=2e-3)


def test_a_node_comes_back_as_it_went_in(store: SnapshotVectorStore) -> None:
    for number, metadata in enumerate(METADATA):
        (back,) = store.get_nodes(node_ids=[f"n{number}"])
        went = node(number, metadata)
        went.embedding = None
        assert back == went
        assert back.hash == went.hash


def test_nodes_are_read_in_order_and_by_filter(store: SnapshotVectorStore) -> None:
    assert [found.node_id for found in store.get_nodes()] == [f"n{number}" for number in range(len(METADATA))]
    assert [found.node_id for found in store.get_nodes(filters=filters(("tenant", "==", "b")))] == ["n2", "n3"]


async def test_async_gives_the_same_beside_others(store: SnapshotVectorStore) -> None:
    queries = [VectorStoreQuery(query_embedding=unit(number % 7), similarity_top_k=2) for number in range(50)]
    results = await asyncio.gather(*(store.aquery(query) for query in queries))
    assert [result.ids for result in results] == [store.query(query).ids for query in queries]
    assert [found.node_id for found in await store.aget_nodes(node_ids=["n3"])] == ["n3"]


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        (VectorStoreQuery(query_embedding=[1.0, 2.0]), "has 2 dimensions, the snapshot's 16"),
        (VectorStoreQuery(query_embedding=None, query_str="x"), "has no embedding"),
        (VectorStoreQuery(query_embedding=[0.0] * DIMENSIONS, mode=VectorStoreQueryMode.MMR), "'mmr' is not supported"),
    ],
)
def test_a_query_that_cannot_be_answered_is_refused(
    store: SnapshotVectorStore, query: VectorStoreQuery, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        store.query(query)


def test_it_takes_no_writes(store: SnapshotVectorStore) -> None:
    with pytest.raises(ReadOnlyError, match="ragrack ingest"):
        store.add([node(9, {})])
    with pytest.raises(ReadOnlyError, match="ragrack ingest"):
        store.delete("doc0")


async def test_llama_index_retrieves_through_it(tmp_path: Path, embedding: MiniLMEmbedding) -> None:
    texts = ["VACUUM reclaims the space of dead rows.", "A partial index has a predicate.", "Tables have limits."]
    nodes = embedding([TextNode(id_=text, text=text, metadata={"tenant": text[0]}) for text in texts])
    tmp_path.joinpath("s").mkdir()
    write_snapshot_files(nodes, len(nodes), 384, tmp_path / "s")
    store = SnapshotVectorStore.open(tmp_path / "s")
    index = VectorStoreIndex.from_vector_store(store, embed_model=embedding)
    best = await index.as_retriever(similarity_top_k=2).aretrieve("What are partial indexes?")
    assert len(best) == 2
    assert best[0].text == texts[1]
    only = index.as_retriever(filters=filters(("tenant", "==", "T"))).retrieve("What are partial indexes?")
    assert [item.text for item in only] == [texts[2]]
    none = index.as_retriever(filters=filters(("tenant", "==", "x"))).retrieve("What are partial indexes?")
    assert none == []
    store.close()


def test_the_graph_finds_nearly_all_that_is_nearest(graph: SnapshotVectorStore) -> None:
    vectors = np.array([unit(number) for number in range(len(graph))])
    hits = 0
    for number in range(0, 1000, 20):
        query = VectorStoreQuery(query_embedding=unit(number), similarity_top_k=10)
        exact = {f"n{i}" for i in np.argsort(-(vectors @ vectors[number]))[:10]}
        hits += len(exact & set(graph.query(query).ids or []))
    assert hits / 500 >= 0.95


@pytest.mark.parametrize("chosen", [("half", "==", 1), ("rare", "==", 3), ("rank", "==", 77), ("rank", "<", 40)])
def test_a_filter_costs_the_graph_no_results(graph: SnapshotVectorStore, chosen: Filter) -> None:
    allowed = {found.node_id for found in graph.get_nodes(filters=filters(chosen))}
    query = VectorStoreQuery(query_embedding=unit(5), similarity_top_k=10, filters=filters(chosen))
    ids = graph.query(query).ids or []
    assert len(ids) == min(10, len(allowed))
    assert set(ids) <= allowed


def test_opening_reads_neither_vectors_nor_nodes(many: Path, path: Path) -> None:
    def read_by_opening(where: Path) -> int:
        def count() -> int:
            lines = Path("/proc/self/io").read_text().splitlines()
            return int(lines[0].split()[1])

        before = count()
        SnapshotVectorStore.open(where).close()
        return count() - before

    size = (many / VECTORS).stat().st_size + (many / NODES).stat().st_size
    assert size > 10 * ((path / VECTORS).stat().st_size + (path / NODES).stat().st_size)
    assert read_by_opening(many) - read_by_opening(path) < 64 * 1024


def test_closing_lets_go_of_every_file(many: Path) -> None:
    store = SnapshotVectorStore.open(many)
    store.query(VectorStoreQuery(query_embedding=unit(1), filters=filters(("half", "==", 1))))
    assert str(many) in Path("/proc/self/maps").read_text()
    store.close()
    assert str(many) not in Path("/proc/self/maps").read_text()
    links = {fd: fd.readlink() for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}
    assert [link for link in links.values() if many in link.parents] == []


def test_it_answers_when_its_files_have_been_removed(tmp_path: Path) -> None:
    where = write(tmp_path / "s", [node(i, metadata) for i, metadata in enumerate(METADATA)])
    store = SnapshotVectorStore.open(where, threads=3)
    for name in (VECTORS, NODES):
        (where / name).unlink()
    assert found(store, filters(("tenant", "==", "a"))) == {"n0", "n1"}
    store.close()


def _answer(where: Path) -> None:
    store = SnapshotVectorStore.open(where)
    assert found(store, filters(("tenant", "==", "a"))) == {"n0", "n1"}
    store.close()


def test_forked_processes_read_the_same_files(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_answer, args=(path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(600)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]


def test_processes_of_their_own_read_the_same_files(path: Path) -> None:
    script = f"""
from pathlib import Path
from ragrack.store import SnapshotVectorStore
print(sorted(node.node_id for node in SnapshotVectorStore.open(Path({str(path)!r})).get_nodes()))
"""
    workers = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {worker.communicate(timeout=600)[0] for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert len(answers) == 1


def test_missing_damaged_or_strange_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="cannot be opened"):
        SnapshotVectorStore.open(tmp_path)
    where = write(tmp_path / "s", [node(0, {})])
    other = write(tmp_path / "other", [node(0, {}), node(1, {})])
    (where / NODES).write_bytes((other / NODES).read_bytes())
    with pytest.raises(SnapshotError, match=r"has 1 vectors, nodes\.sqlite has 2 rows"):
        SnapshotVectorStore.open(where)
    (where / NODES).write_bytes(b"no database at all" * 100)
    with pytest.raises(SnapshotError, match="cannot be opened"):
        SnapshotVectorStore.open(where)
    (other / VECTORS).write_bytes((other / VECTORS).read_bytes()[:60])
    with pytest.raises(SnapshotError, match="cannot be opened"):
        SnapshotVectorStore.open(other)


def test_a_node_without_its_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="node x has no embedding of 16 dimensions"):
        write_snapshot_files([TextNode(id_="x", text="x")], 1, DIMENSIONS, tmp_path)
    with pytest.raises(ValueError, match="2 nodes were promised, 1 came"):
        write_snapshot_files([node(0, {})], 2, DIMENSIONS, tmp_path / "..")


WORDS = [
    "The vacuum reclaims dead rows of a table",
    "Every table has rows and the planner reads statistics of a table",
    "checkpoint_timeout is how long the server waits",
    "The planner may choose an index of a table",
    "Nothing here",
    "The standby replays the log",
    "The log of a primary is archived",
    "The autovacuum of a table",
    *("The table of a" for _ in range(8)),
]


@pytest.fixture
def texts(tmp_path: Path) -> Iterator[SnapshotVectorStore]:
    nodes = [
        TextNode(id_=f"n{i}", text=text, metadata={"half": i % 2}, embedding=unit(i)) for i, text in enumerate(WORDS)
    ]
    opened = SnapshotVectorStore.open(write(tmp_path / "texts", nodes))
    yield opened
    opened.close()


def ask(
    store: SnapshotVectorStore, text: str, mode: str, vector: int = 4, k: int = 16, **more: Any
) -> dict[str, float]:
    cutoff = more.pop("similarity_cutoff", None)
    query = VectorStoreQuery(
        query_embedding=unit(vector), query_str=text, similarity_top_k=k, mode=VectorStoreQueryMode(mode), **more
    )
    result = store.query(query, similarity_cutoff=cutoff)
    return dict(zip(result.ids or [], result.similarities or [], strict=True))


def test_a_text_query_finds_words_in_any_of_their_forms(texts: SnapshotVectorStore) -> None:
    assert list(ask(texts, "CHECKPOINTS timeouts", "text_search")) == ["n2"]
    assert list(ask(texts, "archiving a log", "text_search")) == ["n6", "n5"], "rarer words count for more"
    assert list(ask(texts, "checkpoint_timeout", "text_search")) == ["n2"]


def test_only_the_rarest_words_are_looked_for_when_all_would_cost_too_much(
    texts: SnapshotVectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(ask(texts, "archived dead log", "text_search")) == {"n0", "n5", "n6"}
    monkeypatch.setattr("ragrack.hybrid.MATCHES", 2)
    assert set(ask(texts, "archived dead log", "text_search")) == {"n0", "n6"}


def test_a_word_in_more_than_an_eighth_of_the_nodes_is_not_looked_for(texts: SnapshotVectorStore) -> None:
    assert ask(texts, "the table of a", "text_search") == {}
    assert list(ask(texts, "the dead table", "text_search")) == ["n0"]


@pytest.fixture
def tenants(tmp_path: Path) -> Iterator[SnapshotVectorStore]:
    """A small one among others, all of whose nodes are about pumps; its own seldom are, and one is about rotors."""
    few = ["a pump", "a valve", *("a pipe" for _ in range(18)), "the rotor of a pump", "the rotor"]
    nodes = [
        TextNode(id_=f"{tenant}{i}", text=text, metadata={"tenant": tenant}, embedding=unit(i))
        for tenant, texts in (("a", ["a pump and its rotor"] * 200), ("m", few), ("z", ["a pump"] * 200))
        for i, text in enumerate(texts)
    ]
    opened = SnapshotVectorStore.open(write(tmp_path / "tenants", nodes))
    yield opened
    opened.close()


@pytest.mark.parametrize("mode", ["text_search", "hybrid"])
def test_what_others_often_say_is_looked_for_where_it_is_rare(tenants: SnapshotVectorStore, mode: str) -> None:
    own = filters(("tenant", "==", "m"))
    assert set(list(ask(tenants, "which pump", mode, filters=own))[:2]) == {"m0", "m20"}
    assert set(list(ask(tenants, "which rotor", mode, filters=own))[:2]) == {"m20", "m21"}
    assert ask(tenants, "which pump", "text_search") == {}, "of all nodes too many say it"


def test_what_is_rare_over_all_is_looked_for_in_however_few_nodes(texts: SnapshotVectorStore) -> None:
    assert set(ask(texts, "planner", "text_search", node_ids=["n1", "n3"])) == {"n1", "n3"}
    assert ask(texts, "table", "text_search", node_ids=["n1", "n3"]) == {}


@pytest.mark.parametrize(
    "text",
    ["", "\0", '"', "dead OR", "NEAR(a b)", "text:dead", "-dead *", "dead'; DROP TABLE node --", "💡", "x " * 9999],
)
def test_a_text_is_words_and_never_a_query_language(texts: SnapshotVectorStore, text: str) -> None:
    assert set(ask(texts, text, "text_search")) <= {"n0"}
    assert len(ask(texts, text, "hybrid")) == len(WORDS)


def test_a_hybrid_query_ranks_what_both_halves_find_first_and_gives_cosines(texts: SnapshotVectorStore) -> None:
    dense = ask(texts, "", "default", vector=1)
    hybrid = ask(texts, "archived logs", "hybrid", vector=1)
    assert next(iter(hybrid)) in {"n1", "n6"}
    assert list(hybrid).index("n6") < list(dense).index("n6")
    assert hybrid == pytest.approx(dense), "the order is fused, a node's similarity is not"


def test_what_only_its_words_find_has_its_cosine_too(graph: SnapshotVectorStore) -> None:
    far = min(ask(graph, "", "default", vector=0, k=len(graph)).items(), key=lambda item: item[1])
    number = far[0].removeprefix("n")
    hybrid = ask(graph, number, "hybrid", vector=0, k=5)
    assert hybrid[far[0]] == pytest.approx(far[1], abs=0.01)


def test_the_cut_off_is_of_the_cosine_in_either_mode(graph: SnapshotVectorStore) -> None:
    for mode in ("default", "hybrid"):
        near = ask(graph, "4321", mode, vector=0, k=5, similarity_cutoff=0.6)
        assert 0 < len(near) <= 5
        assert all(similarity >= 0.6 for similarity in near.values())
        assert ask(graph, "4321", mode, vector=0, k=5, similarity_cutoff=1.01) == {}


def test_a_filter_holds_for_both_halves(texts: SnapshotVectorStore) -> None:
    chosen = filters(("half", "==", 1))
    assert list(ask(texts, "dead archived log", "text_search", filters=chosen)) == ["n5"]
    assert set(ask(texts, "dead archived log", "hybrid", filters=chosen)) == {f"n{i}" for i in range(1, 16, 2)}
    assert ask(texts, "dead", "hybrid", filters=filters(("half", "==", 2))) == {}


async def test_a_hybrid_query_is_answered_the_same_in_a_loop(texts: SnapshotVectorStore) -> None:
    query = VectorStoreQuery(
        query_embedding=unit(3), query_str="dead logs", similarity_top_k=3, mode=VectorStoreQueryMode.HYBRID
    )
    results = await asyncio.gather(*(texts.aquery(query, similarity_cutoff=-1.0) for _ in range(9)))
    assert all(result.ids == texts.query(query).ids for result in results)
