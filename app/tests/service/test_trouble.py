"""The service under trouble: its LLM fails, its clients leave or are in a hurry, and there are too many of them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from llama_index.core.llms import ChatMessage, MockLLM
from prometheus_client import REGISTRY
from ragrack import llms
from ragrack.api import create_app
from ragrack.embedding import MiniLMEmbedding
from ragrack.fallback import FallbackLLM, LLMFailedError
from ragrack.settings import Settings

from . import faulty
from .conftest import KEY, Running
from .faulty import Behaviour, Faulty, answer, faulty_upstream, hangs, status, stream

QUESTION = "How far can the light of the lighthouse be seen?"


@pytest.fixture
async def first() -> AsyncIterator[Faulty]:
    async with faulty_upstream() as upstream:
        yield upstream


@pytest.fixture
async def second() -> AsyncIterator[Faulty]:
    async with faulty_upstream() as upstream:
        yield upstream


def generating(settings: Settings, first: Faulty, second: Faulty | None = None, **more: Any) -> Settings:
    values: dict[str, Any] = {"answer": "generate", "llm_base_url": first.url, "llm_model": "m", "llm_retries": 0}
    if second is not None:
        values |= {"llm_fallback_base_url": second.url, "llm_fallback_model": "m2"}
    return Settings.model_validate(settings.model_dump() | values | more)


def patience(fault: Behaviour) -> float:
    """Seconds: a busy machine makes the client of a first call in more than one."""
    return 1 if fault is hangs else 30


async def until(condition: Callable[[], bool]) -> None:
    """By polling: what is waited for belongs to a server that tells no one."""
    async with asyncio.timeout(20):
        for _ in itertools.count():
            if condition():
                return
            await asyncio.sleep(0.01)


async def ask(client: httpx.AsyncClient, **headers: str) -> httpx.Response:
    return await client.post("/query", json={"query": QUESTION}, headers=headers)


FAULTS = [
    status(500),
    status(429, Retry_After="3600"),
    status(200, b"<html>no json"),
    answer(" "),
    faulty.drops,
    faulty.drops_in_the_middle,
    hangs,
]


@pytest.mark.parametrize("fault", FAULTS)
async def test_the_second_llm_answers_where_the_first_does_not(
    settings: Settings, run: Running, first: Faulty, second: Faulty, fault: Behaviour
) -> None:
    first.default, second.default = fault, answer("From the second.")
    async with run(generating(settings, first, second, llm_timeout=patience(fault))) as client:
        got = (await ask(client)).json()
    assert (got["response"], got["degraded"]) == ("From the second.", False)
    assert len(first.calls) == len(second.calls) == 1
    assert second.calls[0].body["model"] == "m2"


@pytest.mark.parametrize("fault", FAULTS)
async def test_without_degraded_answers_a_failed_llm_is_a_503_and_sentences_are_still_given_to_who_asks(
    settings: Settings, run: Running, first: Faulty, fault: Behaviour
) -> None:
    first.default = fault
    async with run(generating(settings, first, degrade=False, llm_timeout=patience(fault))) as client:
        refused = await ask(client)
        extractive = await client.post("/query", json={"query": QUESTION, "answer": "extractive"})
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["title"] == "Service Unavailable"
    assert "19 nautical miles" in extractive.json()["response"]


async def test_a_fault_that_passes_is_not_seen(settings: Settings, run: Running, first: Faulty) -> None:
    first.script.extend([status(503), faulty.drops])
    async with run(generating(settings, first, llm_retries=2)) as client:
        got = (await ask(client)).json()
    assert (got["response"], got["degraded"], len(first.calls)) == ("Nineteen miles.", False, 3)


async def test_while_the_breaker_is_open_answers_are_degraded_and_the_llm_is_left_alone(
    settings: Settings, run: Running, first: Faulty
) -> None:
    first.default = status(500)
    async with run(generating(settings, first, llm_breaker_failures=2)) as client:
        answers = [(await ask(client)).json() for _ in range(4)]
        page = (await client.get("/metrics")).text
    assert [each["degraded"] for each in answers] == [True] * 4
    assert len(first.calls) == 2
    assert 'ragrack_breaker_workers{state="open",upstream="llm"} 1.0' in page


async def test_a_client_in_a_hurry_gets_the_sentences_in_its_time(
    settings: Settings, run: Running, first: Faulty
) -> None:
    first.default = hangs
    async with run(generating(settings, first)) as client:
        response = await ask(client, **{"X-Request-Timeout": "2"})
        assert response.json()["degraded"] is True
        await first.calls[0].left.wait()


async def test_a_client_gets_no_more_time_than_the_service_gives(
    settings: Settings, run: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stuck(*_: object) -> list[float]:
        await asyncio.Event().wait()
        return []

    async with run(settings.model_copy(update={"request_timeout": 0.2})) as client:
        monkeypatch.setattr(MiniLMEmbedding, "_aget_query_embedding", stuck)
        response = await ask(client, **{"X-Request-Timeout": "3000"})
        health = await client.get("/healthz")
    assert response.status_code == 504
    assert response.json()["request_id"] == response.headers["X-Request-ID"]
    assert health.status_code == 200


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", ""])
async def test_a_timeout_that_is_none_is_refused_in_words(client: httpx.AsyncClient, value: str) -> None:
    response = await ask(client, **{"X-Request-Timeout": value})
    assert response.status_code == 400
    assert "X-Request-Timeout" in response.json()["detail"]


async def test_more_than_it_can_do_is_refused_and_health_is_not(
    settings: Settings, run: Running, first: Faulty
) -> None:
    first.default = hangs
    async with run(generating(settings, first, max_in_flight=1, max_queue=1, collections=("island",))) as client:
        held = [asyncio.create_task(ask(client)) for _ in range(2)]
        await first.called()
        refused = await ask(client)
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await client.get(path)).status_code == 200
        for task in held:
            task.cancel()
        await asyncio.wait(held)
        first.default = answer()
        assert (await ask(client)).status_code == 200
    assert refused.status_code == 503
    assert refused.headers["Retry-After"] == "1"
    assert refused.headers["Content-Type"] == "application/problem+json"


async def test_a_slow_llm_leaves_room_for_retrieval(settings: Settings, run: Running, first: Faulty) -> None:
    first.default = hangs
    async with run(generating(settings, first, llm_in_flight=1, llm_queue=0)) as client:
        held = asyncio.create_task(ask(client))
        await first.called()
        second = (await ask(client)).json()
        held.cancel()
    assert second["degraded"] is True
    assert len(first.calls) == 1


@contextlib.asynccontextmanager
async def served(settings: Settings, tmp_path: Path) -> AsyncIterator[Path]:
    """On a real socket: a client that leaves is seen by a server only."""
    path = tmp_path / "served.sock"
    server = uvicorn.Server(
        uvicorn.Config(create_app(settings), uds=str(path), log_config=None, timeout_graceful_shutdown=1)
    )
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield path
    finally:
        server.should_exit = True
        await serving


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_that_leaves_takes_its_llm_call_along(
    settings: Settings, first: Faulty, tmp_path: Path, streamed: bool
) -> None:
    first.default = faulty.streams_one_token_and_hangs if streamed else hangs
    async with served(generating(settings, first, llm_in_flight=1, llm_queue=0), tmp_path) as path:
        before = _requests(499)
        reader, writer = await asyncio.open_unix_connection(path)
        body = json.dumps({"query": QUESTION, "stream": streamed}).encode()
        writer.write(
            b"POST /query HTTP/1.1\r\nHost: service\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s" % (KEY.encode(), len(body), body)
        )
        await first.called()
        if streamed:
            await reader.readuntil(b"Nineteen")
        writer.close()
        async with asyncio.timeout(20):
            await first.calls[0].left.wait()
        await until(lambda: _requests(499) > before)
        first.default = answer()
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://service", headers=headers) as client:
            assert (await ask(client)).json()["degraded"] is False, "the slot is free again"


@pytest.mark.parametrize("fault", [hangs, status(500), faulty.drops])
async def test_retrieval_never_notices_the_llm(
    settings: Settings, run: Running, first: Faulty, fault: Behaviour
) -> None:
    first.default = fault
    more: dict[str, Any] = {"llm_in_flight": 1, "llm_queue": 1, "llm_breaker_failures": 1, "degrade": False}
    async with run(generating(settings, first, **more)) as client:
        held = [asyncio.create_task(ask(client)) for _ in range(5)]
        await first.called()
        calls = len(first.calls)
        for _ in range(5):
            response = await client.post("/retrieve", json={"query": QUESTION})
            assert response.json()["nodes"][0]["document"] == "lighthouse.md"
        assert len(first.calls) == calls
        for task in held:
            task.cancel()
        await asyncio.wait(held)


def _requests(status: int) -> float:
    labels = {"route": "/query", "method": "POST", "status": str(status)}
    return REGISTRY.get_sample_value("ragrack_requests_total", labels) or 0.0


async def streamed(llm: FallbackLLM) -> list[str | None]:
    return [part.delta async for part in await llm.astream_chat([ChatMessage(content="?")])]


async def test_a_stream_is_taken_over_before_its_first_token_and_never_after(
    settings: Settings, first: Faulty, second: Faulty
) -> None:
    configured = generating(settings, first, second)
    async with llms.opened(configured) as models:
        llm = models.llm
        assert isinstance(llm, FallbackLLM)
        second.default = stream("From ", "the ", "second.")
        for fault in (status(500), faulty.opens_a_stream_and_drops, stream(ends=False), stream()):
            first.default = fault
            assert "".join(delta or "" for delta in await streamed(llm)) == "From the second."
        asked = len(second.calls)
        first.default = stream("Nine", "teen", ends=False)
        parts = await llm.astream_chat([ChatMessage(content="?")])
        assert [(await anext(parts)).delta for _ in range(2)] == ["Nine", "teen"]
        with pytest.raises(httpx.RemoteProtocolError):
            await anext(parts)
        assert len(second.calls) == asked


async def test_when_none_answers_the_error_tells_what_the_last_did() -> None:
    class Broken(MockLLM):
        async def achat(self, *_: object, **__: object) -> Any:
            raise ZeroDivisionError

        async def astream_chat(self, *_: object, **__: object) -> Any:
            raise ZeroDivisionError

    llm = FallbackLLM.over({"one": Broken(max_tokens=None), "two": Broken(max_tokens=None)}, timeout=10)
    for call in (llm.achat, llm.astream_chat):
        with pytest.raises(LLMFailedError) as failed:
            await call([ChatMessage(content="?")])
        assert isinstance(failed.value.__cause__, ZeroDivisionError)


async def test_an_llm_has_its_time_and_no_more(first: Faulty) -> None:
    class Slow(MockLLM):
        async def achat(self, *_: object, **__: object) -> Any:
            await asyncio.Event().wait()

    started = time.monotonic()
    with pytest.raises(LLMFailedError):
        await FallbackLLM.over({"slow": Slow(max_tokens=None)}, timeout=0.1).achat([ChatMessage(content="?")])
    assert time.monotonic() - started >= 0.1
