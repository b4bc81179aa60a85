"""Several servers of one model as one way to it: each call goes to the one that has the fewest, and on to the next
where that one gives no answer.

A call goes on as it is tried again (ragrack.upstream): while nothing of an answer has been handed on. Which server a
call goes to is up to each worker, by its own calls and its own breakers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import httpx

from ragrack.upstream import RETRIED, Policy, Upstream

NEXT = RETRIED | {httpx.codes.TOO_MANY_REQUESTS}
"""Answers of a server that is busy or down, where another may not be."""


class Balanced(httpx.AsyncBaseTransport):
    """Of one event loop. Requests name the first server; their URL is changed to that of the one that they go to."""

    def __init__(self, name: str, urls: list[str], policy: Policy) -> None:
        """`urls`: the base URL of each, which has slots and a breaker of its own. To go on is to try again."""
        self._first = httpx.URL(urls[0].rstrip("/"))
        once = replace(policy, retries=0)
        self._servers: Mapping[httpx.URL, Upstream] = {
            httpx.URL(url.rstrip("/")): Upstream(name if number == 1 else f"{name}_{number}", once)
            for number, url in enumerate(urls, 1)
        }

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Raises httpx.TransportError, that of the last one asked."""
        body = await request.aread()
        # The order of the settings decides between equals, so that a quiet service warms one server's cache.
        order = sorted(self._servers.items(), key=lambda each: (each[1].breaker.state == "open", each[1].calls))
        for number, (base, upstream) in enumerate(order, 1):
            last = number == len(order)
            try:
                response = await upstream.handle_async_request(self._towards(base, request, body))
            except httpx.TransportError:
                if last:
                    raise
                continue
            if last or response.status_code not in NEXT:
                return response
            await response.aclose()
        raise AssertionError("the last one returns or raises")

    async def aclose(self) -> None:
        for upstream in self._servers.values():
            await upstream.aclose()

    def _towards(self, base: httpx.URL, request: httpx.Request, body: bytes) -> httpx.Request:
        path = request.url.raw_path.removeprefix(self._first.raw_path.rstrip(b"/"))
        url = base.copy_with(raw_path=base.raw_path.rstrip(b"/") + path)
        headers = [(name, value) for name, value in request.headers.raw if name.lower() != b"host"]
        return httpx.Request(request.method, url, headers=headers, content=body, extensions=dict(request.extensions))
