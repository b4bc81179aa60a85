"""What `POST /query` promises: the seed's contract, sources, honesty, and clear refusals."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx
import pytest
from llama_index.core import Settings as LlamaSettings
from llama_index.core.callbacks import CallbackManager
from pytest import MonkeyPatch
from ragrack.embedding import MiniLMEmbedding
from ragrack.llama import GlobalFallbackError
from ragrack.settings import Settings

from .conftest import KEY, Running

QUESTION = "How far can the light of the lighthouse be seen?"


async def test_the_sentences_that_answer_come_back_with_their_source(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/query", json={"query": QUESTION})).json()
    assert "19 nautical miles" in answer["response"]
    assert "[1]" in answer["response"]
    best = answer["sources"][0]
    assert best["document"] == "lighthouse.md"
    assert "Skarholm" in best["title"]
    assert 0.3 <= best["score"] <= 1
    assert best["position"]["start"] < best["position"]["end"]
    assert "1862" in best["text"], "a source is the whole node, not only what is quoted of it"
    assert answer["answer"] == "extractive"
    assert answer["degraded"] is False
    assert set(answer["timings_ms"]) == {"embed", "retrieve", "answer", "total"}


async def test_a_question_outside_the_documents_is_not_answered(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/query", json={"query": "Which enzyme splits lactose in the gut?"})).json()
    assert answer["response"].startswith("I don't know")
    assert answer["sources"] == []


async def test_top_k_bounds_the_sources(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/query", json={"query": "ferry to Skarholm", "top_k": 1})).json()
    assert [source["document"] for source in answer["sources"]] == ["ferry.html"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "query"),
        ({"query": None}, "query"),
        ({"query": 7}, "query"),
        ({"query": ["a"]}, "query"),
        ({"query": ""}, "query"),
        ({"query": " \n\t"}, "query"),
        ({"query": "x" * 4001}, "query"),
        ({"query": "ferry", "top_k": 0}, "top_k"),
        ({"query": "ferry", "top_k": 51}, "top_k"),
        ({"query": "ferry", "top_k": True}, "top_k"),
        ({"query": "ferry", "answer": "guess"}, "answer"),
        ({"query": "ferry", "answer": "generate"}, "answer"),
        ({"query": "ferry", "collection": "nowhere"}, "collection"),
        ({"query": "ferry", "steam": True}, "steam"),
        (["ferry"], "body"),
    ],
)
async def test_what_cannot_be_asked_is_refused_by_its_field(
    client: httpx.AsyncClient, body: object, field: str
) -> None:
    response = await client.post("/query", json=body)
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert [error["field"] for error in problem["errors"]] == [field]
    assert problem["detail"].startswith(field)
    assert problem["request_id"] == response.headers["X-Request-ID"]


@pytest.mark.parametrize("body", [b"{", b"", b'{"query": "\xff"}', b'{"query": "\\ud800"}', b"\x00", b"[" * 30000])
async def test_what_is_no_json_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post("/query", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    assert response.headers["content-type"] == "application/problem+json"


async def test_odd_text_is_answered(client: httpx.AsyncClient) -> None:
    for question in ("\x00", "💡" * 500, "' OR 1=1 --", "{context_str} {query_str}", "a" * 4000, "\u202eferry"):
        assert (await client.post("/query", json={"query": question})).status_code == 200


async def test_a_body_too_large_is_refused_whether_or_not_it_says_so(client: httpx.AsyncClient) -> None:
    async def chunks() -> Any:
        for _ in range(100):
            yield b" " * 1000

    for content in (b" " * 100_000, chunks()):
        response = await client.post("/query", content=content)
        assert response.status_code == 413
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["request_id"] == response.headers["X-Request-ID"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"X-API-Key": ""}, {"Authorization": KEY}])
async def test_without_a_key_nothing_is_answered(
    client: httpx.AsyncClient, settings: Settings, headers: dict[str, str]
) -> None:
    del client.headers["Authorization"]
    for request in (
        client.post("/query", json={"query": QUESTION}, headers=headers),
        client.get("/version", headers=headers),
    ):
        response = await request
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert response.headers["content-type"] == "application/problem+json"


async def test_a_key_in_its_own_header_is_as_good(client: httpx.AsyncClient) -> None:
    del client.headers["Authorization"]
    response = await client.post("/query", json={"query": QUESTION}, headers={"X-API-Key": KEY})
    assert response.status_code == 200


async def test_the_callers_request_id_is_kept_unless_it_could_forge_a_log_line(client: httpx.AsyncClient) -> None:
    kept = await client.post("/query", json={"query": QUESTION}, headers={"X-Request-ID": "trace-1.a_b"})
    assert kept.headers["X-Request-ID"] == kept.json()["request_id"] == "trace-1.a_b"
    for forged in ('a","level":"x', "a b", "x" * 65, ""):
        response = await client.get("/healthz", headers={"X-Request-ID": forged})
        assert response.headers["X-Request-ID"] not in (forged, "")


async def test_a_failure_of_ours_tells_the_client_nothing_but_where_to_look(
    settings: Settings, run: Running, monkeypatch: MonkeyPatch
) -> None:
    async with run(settings) as client:

        async def broken(*_: object) -> list[float]:
            raise RuntimeError("the password is swordfish")

        monkeypatch.setattr(MiniLMEmbedding, "_aget_query_embedding", broken)
        response = await client.post("/query", json={"query": QUESTION})
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert "swordfish" not in response.text
    assert response.json()["request_id"] == response.headers["X-Request-ID"]


async def test_embedding_and_extraction_leave_the_event_loop_alone(
    client: httpx.AsyncClient, monkeypatch: MonkeyPatch
) -> None:
    threads: set[threading.Thread] = set()
    embed = MiniLMEmbedding._embed

    def spy(self: MiniLMEmbedding, text: str) -> list[float]:
        threads.add(threading.current_thread())
        return embed(self, text)

    monkeypatch.setattr(MiniLMEmbedding, "_embed", spy)
    assert (await client.post("/query", json={"query": QUESTION})).status_code == 200
    assert threads
    assert threading.current_thread() not in threads


async def test_no_request_writes_to_llamaindexs_globals(client: httpx.AsyncClient) -> None:
    before = dict(vars(LlamaSettings))
    await asyncio.gather(*(client.post("/query", json={"query": f"{QUESTION} {n}"}) for n in range(8)))
    assert vars(LlamaSettings) == before
    for name in ("llm", "embed_model"):
        with pytest.raises(GlobalFallbackError, match=name):
            getattr(LlamaSettings, name)
    with pytest.raises(GlobalFallbackError):
        LlamaSettings.chunk_size = 1
        LlamaSettings.num_output = 1
        LlamaSettings.callback_manager = CallbackManager()


async def test_the_openapi_describes_errors_as_problems(client: httpx.AsyncClient) -> None:
    description = (await client.get("/openapi.json")).json()
    responses = description["paths"]["/query"]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "403", "413", "422", "503", "504"}
    for status in ("401", "413", "422", "503"):
        assert list(responses[status]["content"]) == ["application/problem+json"]
    text = json.dumps(description)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in description["components"]["schemas"]


@pytest.mark.parametrize("request_", [("GET", "/query"), ("GET", "/nowhere"), ("DELETE", "/healthz")])
async def test_what_is_not_there_is_a_problem_too(client: httpx.AsyncClient, request_: tuple[str, str]) -> None:
    response = await client.request(*request_)
    assert response.status_code in (404, 405)
    assert response.headers["content-type"] == "application/problem+json"


async def test_the_page_needs_nothing_from_elsewhere_and_no_key_to_be_read(client: httpx.AsyncClient) -> None:
    del client.headers["Authorization"]
    page = await client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "//" not in page.text, "a reference to another host would break the Content-Security-Policy"
    for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript")):
        assert name in page.text
        assert (await client.get(f"/{name}")).headers["content-type"].startswith(kind)
