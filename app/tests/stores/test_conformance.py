"""The conformance suite: what any store of ours must do, asked of each of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import MetadataFilters, VectorStoreQuery, VectorStoreQueryMode
from pydantic import SecretStr
from ragrack import catalog
from ragrack.catalog import Snapshots
from ragrack.embedding import MiniLMEmbedding
from ragrack.readonly import ReadOnlyError, SnapshotStore
from ragrack.settings import Settings
from ragrack.writer import FLAT_BELOW

from .conftest import Make
from .suite import DIMENSIONS, HOSTILE, METADATA, Filter, ask, filters, found, node, unit

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


@pytest.fixture(scope="module")
def few(make: Make) -> Snapshots:
    return make([node(number, metadata) for number, metadata in enumerate(METADATA)])


@pytest.fixture(scope="module")
def many(make: Make) -> Snapshots:
    count = FLAT_BELOW + 1000
    return make([node(number, {"half": number % 2, "rare": number % 500, "rank": number}) for number in range(count)])


@pytest.fixture(scope="module")
def worded(make: Make) -> Snapshots:
    return make(
        [TextNode(id_=f"n{i}", text=text, metadata={"half": i % 2}, embedding=unit(i)) for i, text in enumerate(WORDS)]
    )


def opened(snapshots: Snapshots) -> SnapshotStore:
    return snapshots.open(snapshots.current_id() or "")


@pytest.fixture
def store(few: Snapshots) -> Iterator[SnapshotStore]:
    with contextlib.closing(opened(few)) as store:
        yield store


@pytest.fixture
def graph(many: Snapshots) -> Iterator[SnapshotStore]:
    with contextlib.closing(opened(many)) as store:
        yield store


@pytest.fixture
def texts(worded: Snapshots) -> Iterator[SnapshotStore]:
    with contextlib.closing(opened(worded)) as store:
        yield store


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
def test_a_filter_finds_what_it_says(store: SnapshotStore, condition: Filter, expected: set[int]) -> None:
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
def test_filters_combine(store: SnapshotStore, chosen: MetadataFilters, expected: set[int]) -> None:
    assert found(store, chosen) == {f"n{number}" for number in expected}


def test_ids_and_filters_are_both_kept_to(store: SnapshotStore) -> None:
    assert found(store, None, node_ids=["n1", "n2", "absent"]) == {"n1", "n2"}
    assert found(store, None, doc_ids=["doc0", "doc1"]) == {"n0", "n1", "n2", "n3"}
    assert found(store, filters(("tenant", "==", "a")), node_ids=["n1", "n2"]) == {"n1"}
    assert len(found(store, None, node_ids=[])) == len(METADATA)
    assert store.get_nodes(node_ids=[]) == []


@pytest.mark.parametrize(
    "condition",
    [("year", "in", 3), ("year", "==", [1]), ("year", "==", None), ("year", ">", None), ("note", "text_match", 3)],
)
def test_a_filter_without_sense_is_refused_by_key(store: SnapshotStore, condition: Filter) -> None:
    with pytest.raises(ValueError, match=f"the filter on '{condition[0]}' with '{condition[1]}' needs"):
        found(store, filters(condition))


def test_a_query_finds_the_nearest_first_with_cosines(store: SnapshotStore) -> None:
    for number in range(len(METADATA)):
        result = store.query(VectorStoreQuery(query_embedding=unit(number), similarity_top_k=3))
        assert result.ids is not None
        assert result.similarities is not None
        assert result.ids[0] == f"n{number}"
        assert result.similarities == sorted(result.similarities, reverse=True)
        exact = [float(np.dot(unit(number), unit(int(found_id[1:])))) for found_id in result.ids]
        np.testing.assert_allclose(result.similarities, exact, atol=2e-3)


def test_a_node_comes_back_as_it_went_in(store: SnapshotStore) -> None:
    for number, metadata in enumerate(METADATA):
        (back,) = store.get_nodes(node_ids=[f"n{number}"])
        went = node(number, metadata)
        went.embedding = None
        assert back == went
        assert back.hash == went.hash


def test_nodes_are_read_in_order_and_by_filter(store: SnapshotStore) -> None:
    assert [found.node_id for found in store.get_nodes()] == [f"n{number}" for number in range(len(METADATA))]
    assert [found.node_id for found in store.get_nodes(filters=filters(("tenant", "==", "b")))] == ["n2", "n3"]


async def test_async_gives_the_same_beside_others(store: SnapshotStore) -> None:
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
    store: SnapshotStore, query: VectorStoreQuery, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        store.query(query)


def test_it_takes_no_writes(store: SnapshotStore) -> None:
    with pytest.raises(ReadOnlyError, match="ragrack ingest"):
        store.add([node(9, {})])
    with pytest.raises(ReadOnlyError, match="ragrack ingest"):
        store.delete("doc0")


async def test_llama_index_retrieves_through_it(make: Make, embedding: MiniLMEmbedding) -> None:
    texts = ["VACUUM reclaims the space of dead rows.", "A partial index has a predicate.", "Tables have limits."]
    nodes = [TextNode(id_=text, text=text, metadata={"tenant": text[0]}) for text in texts]
    store = opened(make([node for node in embedding(nodes) if isinstance(node, TextNode)]))
    index = VectorStoreIndex.from_vector_store(store, embed_model=embedding)
    best = await index.as_retriever(similarity_top_k=2).aretrieve("What are partial indexes?")
    assert len(best) == 2
    assert best[0].text == texts[1]
    only = index.as_retriever(filters=filters(("tenant", "==", "T"))).retrieve("What are partial indexes?")
    assert [item.text for item in only] == [texts[2]]
    none = index.as_retriever(filters=filters(("tenant", "==", "x"))).retrieve("What are partial indexes?")
    assert none == []
    store.close()


def test_the_graph_finds_nearly_all_that_is_nearest(graph: SnapshotStore) -> None:
    vectors = np.array([unit(number) for number in range(len(graph))])
    hits = 0
    for number in range(0, 1000, 20):
        query = VectorStoreQuery(query_embedding=unit(number), similarity_top_k=10)
        exact = {f"n{i}" for i in np.argsort(-(vectors @ vectors[number]))[:10]}
        hits += len(exact & set(graph.query(query).ids or []))
    assert hits / 500 >= 0.95


@pytest.mark.parametrize("chosen", [("half", "==", 1), ("rare", "==", 3), ("rank", "==", 77), ("rank", "<", 40)])
def test_a_filter_costs_the_graph_no_results(graph: SnapshotStore, chosen: Filter) -> None:
    allowed = {found.node_id for found in graph.get_nodes(filters=filters(chosen))}
    query = VectorStoreQuery(query_embedding=unit(5), similarity_top_k=10, filters=filters(chosen))
    ids = graph.query(query).ids or []
    assert len(ids) == min(10, len(allowed))
    assert set(ids) <= allowed


def test_a_text_query_finds_words_in_any_of_their_forms(texts: SnapshotStore) -> None:
    assert list(ask(texts, "CHECKPOINTS timeouts", "text_search")) == ["n2"]
    assert list(ask(texts, "archiving a log", "text_search")) == ["n6", "n5"], "rarer words count for more"
    assert list(ask(texts, "checkpoint_timeout", "text_search")) == ["n2"]


def test_only_the_rarest_words_are_looked_for_when_all_would_cost_too_much(
    texts: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(ask(texts, "archived dead log", "text_search")) == {"n0", "n5", "n6"}
    monkeypatch.setattr("ragrack.hybrid.MATCHES", 2)
    assert set(ask(texts, "archived dead log", "text_search")) == {"n0", "n6"}


def test_a_word_in_more_than_an_eighth_of_the_nodes_is_not_looked_for(texts: SnapshotStore) -> None:
    assert ask(texts, "the table of a", "text_search") == {}
    assert list(ask(texts, "the dead table", "text_search")) == ["n0"]


@pytest.fixture(scope="module")
def apart(make: Make) -> Snapshots:
    """A small tenant among others, all of whose nodes are about pumps; its own seldom are, and one is about rotors."""
    few = ["a pump", "a valve", *("a pipe" for _ in range(18)), "the rotor of a pump", "the rotor"]
    return make(
        [
            TextNode(id_=f"{tenant}{i}", text=text, metadata={"tenant": tenant}, embedding=unit(i))
            for tenant, texts in (("a", ["a pump and its rotor"] * 200), ("m", few), ("z", ["a pump"] * 200))
            for i, text in enumerate(texts)
        ]
    )


@pytest.mark.parametrize("mode", ["text_search", "hybrid"])
def test_what_others_often_say_is_looked_for_where_it_is_rare(apart: Snapshots, mode: str) -> None:
    own = filters(("tenant", "==", "m"))
    with contextlib.closing(opened(apart)) as tenants:
        assert set(list(ask(tenants, "which pump", mode, filters=own))[:2]) == {"m0", "m20"}
        assert set(list(ask(tenants, "which rotor", mode, filters=own))[:2]) == {"m20", "m21"}
        assert ask(tenants, "which pump", "text_search") == {}, "of all nodes too many say it"


def test_what_is_rare_over_all_is_looked_for_in_however_few_nodes(texts: SnapshotStore) -> None:
    assert set(ask(texts, "planner", "text_search", node_ids=["n1", "n3"])) == {"n1", "n3"}
    assert ask(texts, "table", "text_search", node_ids=["n1", "n3"]) == {}


@pytest.mark.parametrize(
    "text",
    ["", "\0", '"', "dead OR", "NEAR(a b)", "text:dead", "-dead *", "dead'; DROP TABLE node --", "💡", "x " * 9999],
)
def test_a_text_is_words_and_never_a_query_language(texts: SnapshotStore, text: str) -> None:
    assert set(ask(texts, text, "text_search")) <= {"n0"}
    assert len(ask(texts, text, "hybrid")) == len(WORDS)


def test_a_hybrid_query_ranks_what_both_halves_find_first_and_gives_cosines(texts: SnapshotStore) -> None:
    dense = ask(texts, "", "default", vector=1)
    hybrid = ask(texts, "archived logs", "hybrid", vector=1)
    assert next(iter(hybrid)) in {"n1", "n6"}
    assert list(hybrid).index("n6") < list(dense).index("n6")
    assert hybrid == pytest.approx(dense), "the order is fused, a node's similarity is not"


def test_what_only_its_words_find_has_its_cosine_too(graph: SnapshotStore) -> None:
    far = min(ask(graph, "", "default", vector=0, k=len(graph)).items(), key=lambda item: item[1])
    number = far[0].removeprefix("n")
    hybrid = ask(graph, number, "hybrid", vector=0, k=5)
    assert hybrid[far[0]] == pytest.approx(far[1], abs=0.01)


def test_the_cut_off_is_of_the_cosine_in_either_mode(graph: SnapshotStore) -> None:
    for mode in ("default", "hybrid"):
        near = ask(graph, "4321", mode, vector=0, k=5, similarity_cutoff=0.6)
        assert 0 < len(near) <= 5
        assert all(similarity >= 0.6 for similarity in near.values())
        assert ask(graph, "4321", mode, vector=0, k=5, similarity_cutoff=1.01) == {}


def test_a_filter_holds_for_both_halves(texts: SnapshotStore) -> None:
    chosen = filters(("half", "==", 1))
    assert list(ask(texts, "dead archived log", "text_search", filters=chosen)) == ["n5"]
    assert set(ask(texts, "dead archived log", "hybrid", filters=chosen)) == {f"n{i}" for i in range(1, 16, 2)}
    assert ask(texts, "dead", "hybrid", filters=filters(("half", "==", 2))) == {}


async def test_a_hybrid_query_is_answered_the_same_in_a_loop(texts: SnapshotStore) -> None:
    query = VectorStoreQuery(
        query_embedding=unit(3), query_str="dead logs", similarity_top_k=3, mode=VectorStoreQueryMode.HYBRID
    )
    results = await asyncio.gather(*(texts.aquery(query, similarity_cutoff=-1.0) for _ in range(9)))
    assert all(result.ids == texts.query(query).ids for result in results)


@pytest.mark.parametrize("text", ["a\0b", "\0", "\1", "\1\2", "\1\1", "\ue000", "\\u0000 \\", "💡", "e\u0301"])
def test_any_text_comes_back_and_is_found(make: Make, text: str) -> None:
    odd = TextNode(id_=f"id {text}", text=text, metadata={"note": text, f"key {text}": [text]}, embedding=unit(1))
    other = TextNode(id_="other", text="", metadata={"note": "other"}, embedding=unit(2))
    with contextlib.closing(opened(make([odd, other]))) as store:
        (back,) = store.get_nodes(node_ids=[f"id {text}"])
        assert (back.get_content(), back.metadata) == (text, odd.metadata)
        assert found(store, filters(("note", "==", text))) == {f"id {text}"}
        assert found(store, filters((f"key {text}", "contains", text))) == {f"id {text}"}
        assert found(store, filters(("note", "text_match", text))) == {f"id {text}"}
        assert found(store, filters(("note", "!=", text))) == {"other"}


@pytest.mark.parametrize("value", [1e300, -0.0, 2**63, 2**63 - 1, -(2**63), 0.1])
def test_any_number_is_found(make: Make, value: float) -> None:
    nodes = [
        TextNode(id_="it", text="", metadata={"number": value}, embedding=unit(1)),
        TextNode(id_="none", text="", metadata={"number": float("nan")}, embedding=unit(2)),
        TextNode(id_="text", text="", metadata={"number": "1"}, embedding=unit(3)),
    ]
    with contextlib.closing(opened(make(nodes))) as store:
        for operator in ("==", ">=", "<="):
            assert found(store, filters(("number", operator, value))) == {"it"}, operator
        for operator in (">", "<"):
            assert found(store, filters(("number", operator, value))) == set(), operator


def test_infinity_is_beyond_every_number(make: Make) -> None:
    nodes = [
        TextNode(id_=str(value), text="", metadata={"number": value}, embedding=unit(1))
        for value in (float("inf"), 1.0, -float("inf"))
    ]
    with contextlib.closing(opened(make(nodes))) as store:
        assert found(store, filters(("number", ">", 1e308))) == {"inf"}
        assert found(store, filters(("number", "<", -1e308))) == {"-inf"}
        assert [back.metadata["number"] for back in store.get_nodes()] == [float("inf"), 1.0, -float("inf")]


def test_a_value_of_any_length_is_kept_and_found(make: Make) -> None:
    long = "word " * 20_000
    nodes = [TextNode(id_="long", text=long, metadata={"note": long}, embedding=unit(1))]
    with contextlib.closing(opened(make([*nodes, TextNode(id_="short", text="", embedding=unit(2))]))) as store:
        assert found(store, filters(("note", "==", long))) == {"long"}


def _answer(settings: Settings, snapshots: Snapshots) -> None:
    with contextlib.closing(opened(catalog.snapshots(settings, snapshots.collection, snapshots.fingerprint))) as store:
        assert found(store, filters(("tenant", "==", "a"))) == {"n0", "n1"}


def test_forked_processes_answer_alike_beside_the_one_that_forked(
    few: Snapshots, store: SnapshotStore, store_settings: Settings
) -> None:
    assert found(store, filters(("tenant", "==", "a"))) == {"n0", "n1"}
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_answer, args=(store_settings, few)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(600)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert found(store, filters(("tenant", "==", "b"))) == {"n2", "n3"}


def test_processes_of_their_own_answer_alike(few: Snapshots, store_settings: Settings) -> None:
    keys = {name: secret.get_secret_value() for name, secret in store_settings if isinstance(secret, SecretStr)}
    values = store_settings.model_dump(mode="json") | keys
    script = f"""
import json
from ragrack import catalog
from ragrack.settings import Settings
settings = Settings.model_validate(json.loads({json.dumps(values)!r}))
snapshots = catalog.snapshots(settings, {few.collection!r}, {few.fingerprint!r})
print(sorted(node.node_id for node in snapshots.open(snapshots.current_id()).get_nodes()))
"""
    workers = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {worker.communicate(timeout=600)[0] for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert len(answers) == 1
