"""Several servers of one model: who is asked, and what becomes of a call when one of them fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from ragrack.api import create_app
from ragrack.balanced import Balanced
from ragrack.settings import Settings, SettingsError, load
from ragrack.upstream import Policy

from . import faulty
from .conftest import running_app
from .faulty import Behaviour, Call, Faulty, answer, faulty_upstream, status, stream

POLICY = Policy(timeout=20, in_flight=8, queue=8, retries=2, breaker_failures=3, breaker_seconds=60)
DOWN = "http://127.0.0.1:9/v1"


@pytest.fixture
async def servers() -> AsyncIterator[list[Faulty]]:
    async with faulty_upstream() as one, faulty_upstream() as other:
        yield [one, other]


def client(*urls: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=urls[0], transport=Balanced("llm", [*urls], POLICY), timeout=20)


async def ask(client: httpx.AsyncClient) -> httpx.Response:
    return await client.post("/chat/completions", json={"messages": []})


async def test_each_call_goes_to_the_one_that_has_the_fewest(servers: list[Faulty]) -> None:
    enough = asyncio.Event()

    async def wait(call: Call) -> None:
        await enough.wait()
        await answer()(call)

    for server in servers:
        server.default = wait
    async with client(*(server.url for server in servers)) as http:
        asked = [asyncio.create_task(ask(http)) for _ in range(6)]
        for server in servers:
            await server.called(3)
        enough.set()
        assert all(response.is_success for response in await asyncio.gather(*asked))
    assert [len(server.calls) for server in servers] == [3, 3]
    assert [server.calls[0].headers["host"] for server in servers] == [server.url.split("/")[2] for server in servers]


async def test_one_that_is_down_is_left_alone_and_costs_no_answer(servers: list[Faulty]) -> None:
    down, up = servers
    down.default = faulty.drops
    async with client(down.url, up.url) as http:
        for _ in range(10):
            assert (await ask(http)).content == faulty.completion()
    assert len(down.calls) == POLICY.breaker_failures
    assert len(up.calls) == 10


@pytest.mark.parametrize("fault", [status(502), status(503), status(429), faulty.drops_in_the_middle])
async def test_what_another_may_mend_is_asked_of_another(servers: list[Faulty], fault: Behaviour) -> None:
    servers[0].default = fault
    async with client(*(server.url for server in servers)) as http:
        assert (await ask(http)).is_success
    assert [len(server.calls) for server in servers] == [1, 1]


@pytest.mark.parametrize("fault", [status(400), status(401), status(500)])
async def test_what_it_cannot_mend_is_handed_on(servers: list[Faulty], fault: Behaviour) -> None:
    servers[0].default = fault
    async with client(*(server.url for server in servers)) as http:
        assert not (await ask(http)).is_success
    assert [len(server.calls) for server in servers] == [1, 0]


async def test_after_the_first_token_no_other_is_asked(servers: list[Faulty]) -> None:
    servers[0].default = stream("Nine", "teen", ends=False)
    async with client(*(server.url for server in servers)) as http:
        with pytest.raises(httpx.TransportError):
            await ask(http)
    assert [len(server.calls) for server in servers] == [1, 0]


async def test_when_none_answers_the_last_one_s_failure_is_told() -> None:
    async with client(DOWN, DOWN.replace("/v1", "/other/v1")) as http:
        with pytest.raises(httpx.ConnectError):
            await ask(http)


async def test_readiness_is_that_of_any(servers: list[Faulty]) -> None:
    async with client(DOWN, servers[1].url) as http:
        assert (await http.get("models")).is_success


async def test_the_service_answers_while_one_of_two_is_down(servers: list[Faulty], settings: Settings) -> None:
    at = {"llm_base_url": DOWN, "llm_also_at": servers[0].url, "llm_model": "m", "answer": "generate"}
    configured = Settings.model_validate(settings.model_dump() | at)
    async with running_app(create_app(configured)) as client:
        found = (await client.post("/query", json={"query": "How far does the light reach?"})).json()
        checks = {check["name"]: check for check in (await client.get("/readyz")).json()["checks"]}
        metrics = (await client.get("/metrics")).text
    assert (found["answer"], found["degraded"]) == ("generate", False)
    assert checks["llm"]["ok"]
    assert 'upstream="llm_2"' in metrics


def test_further_servers_need_a_first() -> None:
    with pytest.raises(
        SettingsError, match=f"RAGRACK_LLM_BASE_URL: is not set, but RAGRACK_LLM_ALSO_AT={DOWN} needs it"
    ):
        load({"RAGRACK_LLM_ALSO_AT": DOWN}, on_host=False)
