"""Retrieval, filters, streams and conversations over the real index; the LLM is a server that misbehaves on demand."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings
from ragrack import sse
from ragrack.settings import Settings

from .conftest import Running

QUESTION = "How far can the light of the lighthouse be seen?"
OUTSIDE = "Which enzyme splits lactose in the gut?"
Event = tuple[str, dict[str, Any]]


def events(text: str) -> list[Event]:
    blocks = [block.split("\n") for block in text.split("\n\n") if block and not block.startswith(":")]
    return [(block[0].removeprefix("event: "), json.loads(block[1].removeprefix("data: "))) for block in blocks]


class StreamingLLM:
    """An OpenAI-compatible server. `tokens` are sent one by one; `fails_after` so many the connection is cut."""

    def __init__(self) -> None:
        self.tokens = ["Nine", "teen", " miles."]
        self.fails_after: int | None = None
        self.waits_after: int | None = None
        self.status = 200
        self.asked: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self.waiting = asyncio.Event()
        self.url = ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.split("content-length: ")[1].split("\r\n")[0]) if "content-length" in head else 0
            body = json.loads(await reader.readexactly(length) or b"{}")
            if body:
                self.asked.append(body)
            if self.status != 200 or not body.get("stream"):
                text = json.dumps(
                    {
                        "id": "1",
                        "object": "chat.completion",
                        "created": 1,
                        "model": "m",
                        "choices": [
                            {
                                "index": 0,
                                "finish_reason": "stop",
                                "message": {"role": "assistant", "content": "".join(self.tokens)},
                            }
                        ],
                    }
                )
                writer.write(
                    f"HTTP/1.1 {self.status} X\r\nContent-Type: application/json\r\nConnection: close\r\n"
                    f"Content-Length: {len(text)}\r\n\r\n{text}".encode()
                )
                await writer.drain()
            else:
                await self._stream(reader, writer)
        writer.close()

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number, token in enumerate(self.tokens):
            if number == self.fails_after:
                return
            if number == self.waits_after:
                self.waiting.set()
                if not await reader.read():
                    self.left.set()
                return
            self._chunk(writer, {"choices": [{"index": 0, "delta": {"content": token}, "finish_reason": None}]})
            await writer.drain()
        self._chunk(writer, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()

    @staticmethod
    def _chunk(writer: asyncio.StreamWriter, more: dict[str, Any]) -> None:
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"} | more
        data = f"data: {json.dumps(chunk)}\n\n"
        writer.write(f"{len(data):x}\r\n{data}\r\n".encode())


@pytest.fixture
async def llm() -> AsyncIterator[StreamingLLM]:
    fake = StreamingLLM()
    server = await asyncio.start_server(fake._serve, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    yield fake
    server.close()


def with_llm(settings: Settings, llm: StreamingLLM, **more: object) -> Settings:
    own = {"llm_base_url": llm.url, "llm_model": "m", "answer": "generate", "llm_retries": 0}
    return Settings(**(dict(settings) | own | more))


async def test_retrieve_gives_the_nodes_and_what_their_filters_could_name(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/retrieve", json={"query": QUESTION})).json()
    best = answer["nodes"][0]
    assert best["document"] == best["metadata"]["document"] == "lighthouse.md"
    assert best["node_id"]
    assert set(answer["timings_ms"]) == {"embed", "retrieve", "total"}
    assert (await client.post("/retrieve", json={"query": OUTSIDE})).json()["nodes"] == []


@pytest.mark.parametrize("retrieval", ["hybrid", "dense"])
@pytest.mark.parametrize("question", [OUTSIDE, "the of and a", "Who won the chess tournament?", "qwertyuiop", "💡"])
async def test_a_question_outside_the_documents_is_not_answered_whatever_words_it_shares(
    settings: Settings, run: Running, retrieval: str, question: str
) -> None:
    async with run(Settings(**(dict(settings) | {"retrieval": retrieval}))) as client:
        answer = (await client.post("/query", json={"query": question})).json()
    assert answer["response"].startswith("I don't know")
    assert answer["sources"] == []


async def test_words_lift_what_holds_them(settings: Settings, run: Running) -> None:
    question = {"query": "ferry, lighthouse, crowns", "top_k": 1}
    async with run(settings) as client:
        assert (await client.post("/retrieve", json=question)).json()["nodes"][0]["document"] == "ferry.html"


@pytest.mark.parametrize(
    ("filters", "documents"),
    [
        ({"filters": [{"key": "document", "value": "ferry.html"}]}, {"ferry.html"}),
        ({"filters": [{"key": "document", "operator": "in", "value": ["ferry.html", "nowhere"]}]}, {"ferry.html"}),
        ({"filters": [{"key": "document", "operator": "!=", "value": "ferry.html"}]}, {"lighthouse.md"}),
        (
            {
                "condition": "not",
                "filters": [
                    {"filters": [{"key": "document", "value": "ferry.html"}, {"key": "title", "value": "The ferry"}]}
                ],
            },
            {"lighthouse.md"},
        ),
        ({"filters": [{"key": "document", "value": "' OR 1=1 --"}]}, set()),
        ({"filters": [{"key": "nothing", "operator": "is_empty"}]}, {"ferry.html", "lighthouse.md"}),
    ],
)
async def test_filters_narrow_what_is_retrieved(
    client: httpx.AsyncClient, filters: dict[str, Any], documents: set[str]
) -> None:
    body = {"query": "the ferry to the lighthouse of Skarholm", "filters": filters}
    found = (await client.post("/retrieve", json=body)).json()["nodes"]
    assert {node["document"] for node in found} == documents


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"key": "a", "value": 1}
    for _ in range(depth):
        inner = {"filters": [inner]}
    return inner


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        (nested(5), "deep"),
        ({"filters": [{"key": "a", "value": 1}] * 33}, "no more"),
        ({"filters": []}, "at least 1"),
        ({"filters": [{"key": "a", "operator": "~", "value": 1}]}, "Input should be"),
        ({"filters": [{"key": "a", "operator": "in", "value": "b"}]}, "takes a list"),
        ({"filters": [{"key": "a", "value": ["b"]}]}, "takes a single value"),
        ({"filters": [{"key": "a", "operator": ">", "value": None}]}, "takes a single value"),
        ({"filters": [{"key": "a", "operator": "text_match", "value": 1}]}, "takes a text"),
        ({"filters": [{"key": "a", "operator": "is_empty", "value": 1}]}, "takes no value"),
        ({"filters": [{"key": "a", "value": 10**400}]}, "filters"),
        ({"filters": [{"key": "a", "value": True}]}, "filters"),
        ({"filters": [{"key": "a", "operator": "in", "value": ["x"] * 65}]}, "at most 64"),
        ({"filters": [{"key": "", "value": 1}]}, "at least 1"),
        ({"filters": ["a"]}, "filters"),
        ([], "filters"),
    ],
)
async def test_filters_that_cannot_be_are_refused(client: httpx.AsyncClient, filters: Any, said: str) -> None:
    response = await client.post("/retrieve", json={"query": QUESTION, "filters": filters})
    assert response.status_code == 422
    assert said in response.json()["detail"]


anything = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
    lambda inner: (
        strategies.lists(inner, max_size=3)
        | strategies.fixed_dictionaries({"filters": strategies.lists(inner, max_size=3)})
        | strategies.fixed_dictionaries(
            {"key": strategies.sampled_from(["document", "title", "x"]), "value": inner},
            optional={"operator": strategies.sampled_from(["==", "in", "<", "any", "contains", "text_match", "?"])},
        )
    ),
    max_leaves=8,
)


@hypothesis_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(filters=anything)
def test_no_filters_break_the_service(filter_client: Any, filters: Any) -> None:
    content = json.dumps({"query": QUESTION, "filters": filters})
    assert filter_client(content).status_code in (200, 422)


@pytest.fixture
def filter_client(settings: Settings, run: Running) -> Any:
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        client = runner.run(stack.enter_async_context(run(settings)))
        headers = {"Content-Type": "application/json"}
        yield lambda content: runner.run(client.post("/retrieve", content=content, headers=headers))
        runner.run(stack.aclose())


async def test_a_stream_gives_sources_then_the_answer_then_its_timings(client: httpx.AsyncClient) -> None:
    response = await client.post("/query", json={"query": QUESTION, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    plain = (await client.post("/query", json={"query": QUESTION})).json()
    (first, sources), (second, token), (last, done) = events(response.text)
    assert (first, second, last) == ("sources", "token", "done")
    assert sources["sources"] == plain["sources"]
    assert sources["request_id"] == done["request_id"] == response.headers["X-Request-ID"]
    assert token["text"] == plain["response"]
    assert done["answer"] == "extractive"
    assert set(done["timings_ms"]) == {"embed", "retrieve", "answer", "total"}


async def test_a_stream_of_nothing_found_says_so(client: httpx.AsyncClient) -> None:
    response = await client.post("/query", json={"query": OUTSIDE, "stream": True})
    sources, token, done = events(response.text)
    assert sources[1]["sources"] == []
    assert token[1]["text"].startswith("I don't know")
    assert done[0] == "done"


async def test_what_is_refused_is_refused_before_a_stream_begins(client: httpx.AsyncClient) -> None:
    for body, status in (({"query": ""}, 422), ({"query": "a", "collection": "empty"}, 503)):
        response = await client.post("/query", json=body | {"stream": True})
        assert response.status_code == status
        assert response.headers["content-type"] == "application/problem+json"


async def test_the_llms_tokens_are_handed_on_one_by_one(settings: Settings, run: Running, llm: StreamingLLM) -> None:
    async with run(with_llm(settings, llm)) as client:
        seen = events((await client.post("/query", json={"query": QUESTION, "stream": True})).text)
    assert [name for name, _ in seen] == ["sources", "token", "token", "token", "done"]
    assert "".join(data["text"] for name, data in seen if name == "token") == "Nineteen miles."
    assert seen[-1][1]["answer"] == "generate"
    assert seen[-1][1]["degraded"] is False


async def test_an_llm_that_breaks_off_is_not_asked_again_and_it_is_said(
    settings: Settings, run: Running, llm: StreamingLLM
) -> None:
    llm.fails_after = 2
    async with run(with_llm(settings, llm, llm_retries=2)) as client:
        response = await client.post("/query", json={"query": QUESTION, "stream": True})
    seen = events(response.text)
    assert [name for name, _ in seen] == ["sources", "token", "token", "error"]
    assert seen[-1][1]["status"] == 502
    assert seen[-1][1]["request_id"] == response.headers["X-Request-ID"]
    assert len(llm.asked) == 1


@pytest.mark.parametrize("fault", ["status", "first token"])
async def test_an_llm_that_fails_before_its_first_token_is_replaced_by_sentences(
    settings: Settings, run: Running, llm: StreamingLLM, fault: str
) -> None:
    llm.status, llm.fails_after = (500, None) if fault == "status" else (200, 0)
    async with run(with_llm(settings, llm)) as client:
        seen = events((await client.post("/query", json={"query": QUESTION, "stream": True})).text)
    assert [name for name, _ in seen] == ["sources", "token", "done"]
    assert "19 nautical miles" in seen[1][1]["text"]
    assert seen[-1][1]["degraded"] is True
    assert seen[-1][1]["answer"] == "extractive"


async def test_where_nothing_else_is_wanted_a_stream_without_an_llm_ends_in_an_error(
    settings: Settings, run: Running, llm: StreamingLLM
) -> None:
    llm.status = 500
    async with run(with_llm(settings, llm, degrade=False)) as client:
        seen = events((await client.post("/query", json={"query": QUESTION, "stream": True})).text)
    assert [name for name, _ in seen] == ["sources", "error"]
    assert seen[-1][1]["status"] == 503


async def test_a_silent_llm_is_covered_by_pings(
    settings: Settings, run: Running, llm: StreamingLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "PING_SECONDS", 0.02)
    llm.waits_after = 1
    async with run(with_llm(settings, llm, llm_timeout=0.3)) as client:
        text = (await client.post("/query", json={"query": QUESTION, "stream": True})).text
    assert ": ping\n\n" in text
    assert [name for name, _ in events(text)] == ["sources", "token", "error"]


@pytest.mark.parametrize("waits_after", [0, 2])
async def test_a_client_that_leaves_takes_the_call_of_the_llm_with_it(
    settings: Settings, run: Running, llm: StreamingLLM, waits_after: int
) -> None:
    llm.waits_after = waits_after
    async with run(with_llm(settings, llm)) as client:
        body = {"query": QUESTION, "stream": True}
        leaving = asyncio.create_task(client.post("/query", json=body))
        await asyncio.wait_for(llm.waiting.wait(), 10)
        leaving.cancel()
        await asyncio.wait_for(llm.left.wait(), 10)
    assert len(llm.asked) == 1


CHAT = [
    {"role": "user", "content": "How far can the light of the lighthouse be seen?"},
    {"role": "assistant", "content": "19 nautical miles."},
    {"role": "user", "content": "And when was it built?"},
]


async def test_a_conversation_is_condensed_by_the_llm_and_kept_by_the_client(
    settings: Settings, run: Running, llm: StreamingLLM
) -> None:
    llm.tokens = ["When was the lighthouse of Skarholm built?"]
    async with run(with_llm(settings, llm)) as client:
        answer = (await client.post("/chat", json={"messages": CHAT})).json()
    condensing, answering = llm.asked
    assert "19 nautical miles." in json.dumps(condensing["messages"])
    assert answer["question"] == "When was the lighthouse of Skarholm built?"
    assert answer["question"] in json.dumps(answering["messages"])
    assert answer["sources"][0]["document"] == "lighthouse.md"
    assert answer["answer"] == "generate"
    assert answer["degraded"] is False


async def test_without_an_llm_the_question_before_is_put_in_front(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/chat", json={"messages": CHAT})).json()
    assert answer["question"] == f"{CHAT[0]['content']} {CHAT[2]['content']}"
    assert "1862" in answer["sources"][0]["text"]
    first = (await client.post("/chat", json={"messages": CHAT[:1]})).json()
    assert first["question"] == CHAT[0]["content"]
    assert "19 nautical miles" in first["response"]


async def test_a_conversation_whose_llm_is_down_is_answered_and_it_is_said(
    settings: Settings, run: Running, llm: StreamingLLM
) -> None:
    llm.status = 500
    async with run(with_llm(settings, llm)) as client:
        answer = (await client.post("/chat", json={"messages": CHAT})).json()
        seen = events((await client.post("/chat", json={"messages": CHAT, "stream": True})).text)
    assert answer["degraded"] is True
    assert answer["sources"][0]["document"] == "lighthouse.md"
    assert seen[0][1]["question"] == answer["question"]
    assert seen[-1][1]["degraded"] is True


@pytest.mark.parametrize(
    "messages",
    [
        [],
        CHAT[:2],
        [{"role": "system", "content": "x"}],
        [{"role": "user", "content": " "}],
        [{"role": "user", "content": "x" * 4001}],
        [{"role": "user", "content": "x"}] * 65,
        "x",
    ],
)
async def test_what_is_no_conversation_is_refused(client: httpx.AsyncClient, messages: Any) -> None:
    response = await client.post("/chat", json={"messages": messages})
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"].startswith("messages")
