"""Questions asked without a pause, each answer counted: what a deploy must not disturb."""

from __future__ import annotations

import asyncio
import itertools
import ssl
import statistics
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import httpx

TIMEOUT_SECONDS = 20
"""What a client has not got by then has failed."""

Way = Callable[[httpx.AsyncClient, str], Awaitable[str | None]]
"""Asks in its way, and says what was wrong with the answer."""


@dataclass
class Count:
    """What the clients saw. `failures` holds what went wrong in words, `seconds` the time of each answer."""

    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return len(self.seconds) + len(self.failures)

    def __str__(self) -> str:
        if len(self.seconds) < 2:
            return f"{len(self.failures)} failed of {self.total}"
        p50, p99 = statistics.median(self.seconds), statistics.quantiles(self.seconds, n=100)[98]
        return f"{len(self.failures)} failed of {self.total} requests, p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms"


class Load:
    """Clients in a thread of their own that POST /query to each URL until the block ends, 20 minutes at most.

    Half of the clients keep their connection, half open one for each request: a switch can lose either kind. With
    `streams`, each asks for a stream of events and GETs something, too, in turn. Who connects trusts what `ca` holds
    then. `ways` asks in ways of one's own instead.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        key: str,
        ca: Path,
        questions: list[str],
        clients: int = 4,
        pause: float = 0.5,
        streams: bool = False,
        ways: list[Way] | None = None,
    ) -> None:
        self.count = Count()
        self._urls, self._key, self._ca, self._questions = urls, key, ca, questions
        self._clients, self._pause = clients, pause
        self._ways = ways or ([_post, _stream, _get] if streams else [_post])
        self._trusted_since = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        context = ssl.create_default_context(cafile=str(self._ca))
        self._trusted_since = self._ca.stat().st_mtime
        pairs = itertools.product(self._urls, range(self._clients))
        await asyncio.gather(*(self._client(url, context, keep=number % 2 == 0) for url, number in pairs))

    async def _client(self, url: str, context: ssl.SSLContext, *, keep: bool) -> None:
        client = httpx.AsyncClient(
            base_url=url,
            verify=context,
            limits=httpx.Limits(max_keepalive_connections=1 if keep else 0),
            headers={"Authorization": f"Bearer {self._key}"},
            timeout=TIMEOUT_SECONDS,
        )
        deadline = time.monotonic() + 1200
        async with client:
            for question, way in zip(itertools.cycle(self._questions), itertools.cycle(self._ways)):
                if self._stop.is_set() or time.monotonic() > deadline:
                    return
                self._trust(context)
                await self._ask(client, way, question)
                await asyncio.sleep(self._pause)

    def _trust(self, context: ssl.SSLContext) -> None:
        """Trust what a change of CA has added: what a context has learned it keeps."""
        written = self._ca.stat().st_mtime
        if written != self._trusted_since:
            context.load_verify_locations(self._ca)
            self._trusted_since = written

    async def _ask(self, client: httpx.AsyncClient, way: Way, question: str) -> None:
        begun = time.monotonic()
        try:
            problem = await way(client, question)
        except httpx.TransportError as error:
            problem = f"{type(error).__name__}: {error}"
        if problem is None:
            self.count.seconds.append(time.monotonic() - begun)
        else:
            self.count.failures.append(problem)


async def _post(client: httpx.AsyncClient, question: str) -> str | None:
    response = await client.post("/query", json={"query": question})
    if response.status_code != httpx.codes.OK:
        return f"{response.status_code}: {response.text[:200]}"
    return None if response.json()["response"] else "an empty answer"


async def _stream(client: httpx.AsyncClient, question: str) -> str | None:
    async with client.stream("POST", "/query", json={"query": question, "stream": True}) as response:
        if response.status_code != httpx.codes.OK:
            return f"{response.status_code}, of a stream"
        events = [line async for line in response.aiter_lines() if line.startswith("event: ")]
    return None if events and events[-1] == "event: done" else f"a stream that was cut after {events[-1:]}"


async def _get(client: httpx.AsyncClient, _: str) -> str | None:
    response = await client.get("/v1/models")
    return None if response.status_code == httpx.codes.OK else f"{response.status_code}: {response.text[:200]}"
