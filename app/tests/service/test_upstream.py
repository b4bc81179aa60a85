"""What the way to an upstream does with each fault of a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from ragrack import deadline, upstream
from ragrack.breaker import Breaker, BreakerOpenError
from ragrack.upstream import Policy, Upstream, UpstreamError, retry_after

from . import faulty
from .faulty import Behaviour, Faulty, answer, faulty_upstream, hangs, status, stream

POLICY = Policy(timeout=20, in_flight=2, queue=1, retries=2, breaker_failures=100, breaker_seconds=60)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
async def server() -> AsyncIterator[Faulty]:
    async with faulty_upstream() as server:
        yield server


def client(server: Faulty, transport: Upstream) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, transport=transport, timeout=20)


async def ask(client: httpx.AsyncClient) -> httpx.Response:
    return await client.post("/chat/completions", json={"messages": []})


@pytest.mark.parametrize(
    "fault",
    [
        status(502),
        status(503, Retry_After="0"),
        status(504),
        status(429, Retry_After="0"),
        status(429, Retry_After=format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True)),
        faulty.drops,
        faulty.drops_in_the_middle,
        faulty.opens_a_stream_and_drops,
    ],
)
async def test_a_fault_before_the_first_token_is_tried_again(server: Faulty, fault: Behaviour) -> None:
    server.script.extend([fault, fault])
    async with client(server, Upstream("llm", POLICY)) as http:
        response = await ask(http)
    assert response.content == faulty.completion()
    assert len(server.calls) == 3


@pytest.mark.parametrize(
    "fault",
    [
        status(500),
        status(400),
        status(401),
        status(429),
        status(429, Retry_After="3600"),
        status(503, Retry_After="3600"),
    ],
)
async def test_what_asking_again_does_not_mend_is_handed_on_at_once(server: Faulty, fault: Behaviour) -> None:
    server.default = fault
    async with client(server, Upstream("llm", POLICY)) as http:
        assert not (await ask(http)).is_success
    assert len(server.calls) == 1


async def test_it_gives_up_after_its_retries(server: Faulty) -> None:
    server.default = faulty.drops
    async with client(server, Upstream("llm", POLICY)) as http:
        with pytest.raises(httpx.TransportError):
            await ask(http)
    assert len(server.calls) == 3


async def test_after_the_first_token_nothing_is_tried_again(server: Faulty) -> None:
    server.script.append(stream("Nine", "teen", ends=False))
    transport = Upstream("llm", POLICY)
    async with client(server, transport) as http, http.stream("POST", "/chat/completions", json={}) as response:
        with pytest.raises(httpx.RemoteProtocolError):
            await response.aread()
        assert len(server.calls) == 1
        # Its slot is free again: as many calls as there are slots go through.
        await asyncio.gather(ask(http), ask(http))


async def test_a_call_ends_with_the_requests_time_and_the_upstream_sees_it(server: Faulty) -> None:
    server.default = hangs
    async with client(server, Upstream("llm", POLICY)) as http:
        with deadline.within(0.3), pytest.raises(httpx.ReadTimeout):
            await ask(http)
    assert len(server.calls) == 1
    await server.calls[0].left.wait()


async def test_a_stream_ends_with_the_requests_time(server: Faulty) -> None:
    server.default = faulty.streams_one_token_and_hangs
    async with client(server, Upstream("llm", POLICY)) as http:
        with deadline.within(0.3):
            async with http.stream("POST", "/chat/completions", json={}) as response:
                with pytest.raises(httpx.ReadTimeout):
                    await response.aread()
    await server.calls[0].left.wait()


async def test_a_wait_that_would_outlast_the_request_is_not_begun(server: Faulty) -> None:
    server.default = status(429, Retry_After="5")
    async with client(server, Upstream("llm", POLICY)) as http:
        with deadline.within(2):
            assert (await ask(http)).status_code == 429
    assert len(server.calls) == 1


async def test_beyond_slots_and_queue_calls_are_turned_away_and_a_cancelled_one_leaves_its_place(
    server: Faulty,
) -> None:
    server.default = hangs
    async with client(server, Upstream("llm", POLICY)) as http:
        held = [asyncio.create_task(ask(http)) for _ in range(3)]
        await server.called(2)
        with pytest.raises(UpstreamError, match="too many"):
            await ask(http)
        assert len(server.calls) == 2
        server.default = answer()
        for task in held[:2]:
            task.cancel()
        assert (await held[2]).is_success
        await asyncio.gather(ask(http), ask(http))


async def test_a_stream_that_is_left_frees_its_slot(server: Faulty) -> None:
    server.default = faulty.streams_one_token_and_hangs
    async with client(server, Upstream("llm", Policy(timeout=20, in_flight=1, queue=0))) as http:
        async with http.stream("POST", "/chat/completions", json={}) as response:
            await anext(response.aiter_bytes())
            with pytest.raises(UpstreamError):
                await ask(http)
        await server.calls[0].left.wait()
        server.default = answer()
        assert (await ask(http)).is_success


async def test_an_answer_without_end_is_not_read_to_the_end(server: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "MAX_ANSWER_BYTES", 10)
    async with client(server, Upstream("llm", POLICY)) as http:
        with pytest.raises(UpstreamError, match="larger"):
            await ask(http)
    assert len(server.calls) == 1


async def test_an_upstream_that_is_down_is_left_alone_and_found_again(server: Faulty) -> None:
    policy = Policy(timeout=20, retries=0, breaker_failures=2, breaker_seconds=0.2)
    transport = Upstream("llm", policy)
    server.default = status(500)
    async with client(server, transport) as http:
        await ask(http)
        await ask(http)
        assert transport.breaker.state == "open"
        with pytest.raises(UpstreamError, match="left alone") as refused:
            await ask(http)
        assert retry_after(refused.value) == 1
        assert len(server.calls) == 2
        server.default = answer()
        await asyncio.sleep(0.25)
        assert (await ask(http)).is_success
        await ask(http)


async def test_a_server_that_refuses_connections_opens_the_breaker() -> None:
    async with faulty_upstream() as gone:
        pass
    transport = Upstream("llm", Policy(timeout=20, retries=1, breaker_failures=2))
    async with client(gone, transport) as http:
        with pytest.raises(httpx.ConnectError):
            await ask(http)
    assert transport.breaker.state == "open"


async def test_clients_errors_and_busy_answers_open_no_breaker(server: Faulty) -> None:
    transport = Upstream("llm", Policy(timeout=20, retries=0, breaker_failures=1))
    async with client(server, transport) as http:
        for code in (400, 401, 404, 429):
            server.default = status(code)
            await ask(http)
    assert transport.breaker.state == "closed"


def test_a_half_open_breaker_lets_one_call_through() -> None:
    now = 0.0
    breaker = Breaker("llm", failures=1, seconds=10, clock=lambda: now)
    breaker.enter()
    breaker.failed()
    with pytest.raises(BreakerOpenError) as refused:
        breaker.enter()
    assert refused.value.retry_after == 10
    now = 10.0
    breaker.enter()
    assert breaker.state == "half_open"
    with pytest.raises(BreakerOpenError):
        breaker.enter()
    breaker.abandoned()
    breaker.enter()
    breaker.failed()
    with pytest.raises(BreakerOpenError):
        breaker.enter()
    now = 20.0
    breaker.enter()
    breaker.succeeded()
    breaker.enter()
    breaker.enter()
