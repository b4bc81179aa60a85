"""The way to an upstream, as an httpx transport: whichever client speaks over it, and streamed or not, it is bounded
in time and number, tried again where that is safe, and left alone while it is down.

Safe means: nothing of the answer has been handed on. An answer in one piece is read whole before it is; a stream is
handed on with its first bytes, and from then on a failure is the caller's to see. The calls only read, so asking
twice costs work and nothing else.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

import httpx

from ragrack import deadline, metrics, tracing
from ragrack.breaker import Breaker, BreakerOpenError
from ragrack.slots import FullError, Slots

if TYPE_CHECKING:
    from ragrack.settings import Settings

STREAMS = ("text/event-stream", "application/x-ndjson")
MAX_ANSWER_BYTES = 16 * 1024 * 1024
CONNECT_SECONDS = 5.0
RETRIED = frozenset({502, 503, 504})
# Asked to wait for longer than this, a client is better served by another answer.
LONGEST_WAIT_SECONDS = 10.0
FIRST_WAIT_SECONDS = 0.25

_random = secrets.SystemRandom()


class UpstreamError(httpx.TransportError):
    """No call was made, or the answer was cut short, by what is decided here. `retry_after`: seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Policy:
    """`timeout`: seconds for one call, its waiting and its repetitions included, where the request has that long."""

    timeout: float
    in_flight: int = 8
    queue: int = 16
    retries: int = 2
    breaker_failures: int = 5
    breaker_seconds: float = 10.0

    @classmethod
    def of(cls, settings: Settings, timeout: float) -> Policy:
        """The settings' for LLMs, which hold for every model behind an API."""
        return cls(
            timeout=timeout,
            in_flight=settings.llm_in_flight,
            queue=settings.llm_queue,
            retries=settings.llm_retries,
            breaker_failures=settings.llm_breaker_failures,
            breaker_seconds=settings.llm_breaker_seconds,
        )


class Upstream(httpx.AsyncBaseTransport):
    """Of one event loop. GET, by which readiness looks for itself, goes straight through."""

    def __init__(self, name: str, policy: Policy, inner: httpx.AsyncBaseTransport | None = None) -> None:
        self._name = name
        self._policy = policy
        self._inner = inner or httpx.AsyncHTTPTransport()
        self._slots = Slots(name, policy.in_flight, policy.queue)
        self.breaker = Breaker(name, policy.breaker_failures, policy.breaker_seconds)

    @property
    def calls(self) -> int:
        """Under way or waiting."""
        return self._slots.load

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Raises httpx.TransportError."""
        if request.method == "GET":
            return await self._inner.handle_async_request(request)
        tracing.inject(request.headers)
        until = time.monotonic() + deadline.for_upstream(self._policy.timeout)
        try:
            await self._slots.acquire(until - time.monotonic())
        except FullError as error:
            raise UpstreamError(f"too many calls to {self._name} already") from error
        try:
            response = await self._tried(request, until)
        except BaseException:
            self._slots.release()
            raise
        if not isinstance(response.stream, _Begun):
            self._slots.release()
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _tried(self, request: httpx.Request, until: float) -> httpx.Response:
        for attempt in range(self._policy.retries + 1):
            last = attempt == self._policy.retries
            if attempt:
                metrics.RETRIES.labels(self._name).inc()
            try:
                response = await self._once(request, until)
            except (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout):
                wait = _jittered(attempt)
                if last or not _fits(wait, until):
                    raise
            else:
                asked = _retry_after(response.headers.get("retry-after"))
                if response.status_code in RETRIED:
                    wait = max(asked or 0.0, _jittered(attempt))
                elif response.status_code == httpx.codes.TOO_MANY_REQUESTS and asked is not None:
                    wait = asked + _jittered(attempt)
                else:
                    return response
                if last or not _fits(wait, until):
                    return response
            await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    async def _once(self, request: httpx.Request, until: float) -> httpx.Response:
        try:
            self.breaker.enter()
        except BreakerOpenError as error:
            metrics.ATTEMPTS.labels(self._name, "breaker open").inc()
            raise UpstreamError(f"{self._name} is down and left alone for a while", error.retry_after) from error
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + until - time.monotonic()):
                left = max(0.001, until - time.monotonic())
                timeout = {"connect": min(CONNECT_SECONDS, left), "read": left, "write": left, "pool": left}
                request.extensions["timeout"] = timeout
                response = await self._inner.handle_async_request(request)
                try:
                    response = await self._begun(response, until)
                except BaseException:
                    await response.aclose()
                    raise
        except TimeoutError as error:
            self._note("ReadTimeout", ok=False)
            raise httpx.ReadTimeout(f"{self._name} did not answer in time", request=request) from error
        except httpx.TransportError as error:
            self._note(type(error).__name__, ok=False)
            raise
        except BaseException:
            self.breaker.abandoned()
            raise
        if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
            # It is up; that it is busy is told to this caller alone.
            metrics.ATTEMPTS.labels(self._name, "429").inc()
            self.breaker.abandoned()
        else:
            self._note(str(response.status_code), ok=response.status_code < 500)
        return response

    def _note(self, outcome: str, *, ok: bool) -> None:
        metrics.ATTEMPTS.labels(self._name, outcome).inc()
        if ok:
            self.breaker.succeeded()
        else:
            self.breaker.failed()

    async def _begun(self, response: httpx.Response, until: float) -> httpx.Response:
        """The same, read whole, or as far as to the first bytes of its stream."""
        if not isinstance(response.stream, httpx.AsyncByteStream):
            raise TypeError("an asynchronous transport gives asynchronous streams")
        chunks = aiter(response.stream)
        stream: httpx.AsyncByteStream
        if response.is_success and response.headers.get("content-type", "").startswith(STREAMS):
            first = await anext(chunks, b"")
            stream = _Begun(first, chunks, response.stream, until, self._ended)
        else:
            whole = bytearray()
            async for chunk in chunks:
                whole += chunk
                if len(whole) > MAX_ANSWER_BYTES:
                    raise UpstreamError(f"the answer of {self._name} is larger than {MAX_ANSWER_BYTES} bytes")
            await response.aclose()
            stream = httpx.ByteStream(bytes(whole))
        return httpx.Response(
            response.status_code, headers=response.headers, stream=stream, extensions=response.extensions
        )

    def _ended(self, error: BaseException | None) -> None:
        """Of a stream, once."""
        self._slots.release()
        if isinstance(error, httpx.TransportError):
            self._note(f"{type(error).__name__} in stream", ok=False)


class _Begun(httpx.AsyncByteStream):
    """A stream whose first bytes are here; `ended` is called once, however it ends."""

    def __init__(
        self,
        first: bytes,
        rest: AsyncIterator[bytes],
        inner: httpx.AsyncByteStream,
        until: float,
        ended: Callable[[BaseException | None], None],
    ) -> None:
        self._first = first
        self._rest = rest
        self._inner = inner
        self._until = until
        self._ended: Callable[[BaseException | None], None] | None = ended

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            yield self._first
            while True:
                try:
                    async with asyncio.timeout(self._until - time.monotonic()):
                        chunk = await anext(self._rest)
                except StopAsyncIteration:
                    break
                except TimeoutError as error:
                    raise httpx.ReadTimeout("the stream did not end in time") from error
                yield chunk
        except BaseException as error:
            await self._end(error)
            raise
        await self._end(None)

    async def aclose(self) -> None:
        await self._end(None)

    async def _end(self, error: BaseException | None) -> None:
        if self._ended is not None:
            ended, self._ended = self._ended, None
            ended(error)
            await self._inner.aclose()


def retry_after(error: BaseException) -> int:
    """Whole seconds, at least 1, after which it is worth asking again; looks at what caused `error` too."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UpstreamError):
            return max(1, round(cause.retry_after))
        cause = cause.__cause__
    return 1


def _jittered(attempt: int) -> float:
    """Between nothing and twice as long as the time before: those that failed together do not come back together."""
    return _random.uniform(0, min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**attempt))


def _fits(wait: float, until: float) -> bool:
    return wait <= LONGEST_WAIT_SECONDS and time.monotonic() + wait < until


def _retry_after(value: str | None) -> float | None:
    """Seconds, from either form of the header; None where there is none or it cannot be read."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
