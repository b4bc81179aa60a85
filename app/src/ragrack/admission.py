"""Whether a request is taken on, and until when: bounded numbers, its deadline, and its client still being there."""

from __future__ import annotations

import asyncio
import contextlib
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ragrack import deadline
from ragrack.problems import ProblemError
from ragrack.slots import FullError, Slots

# What must be answered most of all when there is too much to do.
EXEMPT = frozenset({"/healthz", "/readyz", "/metrics"})
QUEUE_SECONDS = 5.0
CLIENT_CLOSED_REQUEST = 499

BUSY = ProblemError(
    HTTPStatus.SERVICE_UNAVAILABLE, "The service has too much to do; ask again.", headers={"Retry-After": "1"}
)
LATE = ProblemError(HTTPStatus.GATEWAY_TIMEOUT, "No answer could be given in the time that the request had.")


class Admission:
    """ASGI middleware of one worker: `in_flight` requests at a time, `queue` waiting, each with at most `timeout` s."""

    def __init__(self, app: ASGIApp, in_flight: int, queue: int, timeout: float) -> None:
        self._app = app
        self._slots = Slots("requests", in_flight, queue)
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in EXEMPT:
            await self._app(scope, receive, send)
            return
        try:
            wished = deadline.wished(Headers(scope=scope).get(deadline.HEADER))
        except ValueError as error:
            await ProblemError(HTTPStatus.BAD_REQUEST, str(error)).response()(scope, receive, send)
            return
        with deadline.within(min(wished or self._timeout, self._timeout)):
            try:
                await self._slots.acquire(min(QUEUE_SECONDS, deadline.remaining()))
            except FullError:
                await BUSY.response()(scope, receive, send)
                return
            try:
                await self._in_time(scope, receive, send)
            finally:
                self._slots.release()

    async def _in_time(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_beginning(message: Message) -> None:
            nonlocal begun
            if not begun and not timeout.expired():
                # What has begun ends by its own means: a stream says in its own words that time is up.
                timeout.reschedule(None)
            begun = True
            await send(message)

        try:
            async with asyncio.timeout(deadline.remaining()) as timeout:
                await while_connected(self._app, scope, receive, send_beginning)
        except TimeoutError:
            if begun or not timeout.expired():
                raise
            await LATE.response()(scope, receive, send)


async def while_connected(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """The app, cancelled when its client leaves; then `scope["state"]["disconnected"]` is True.

    It is noticed from when the app has read the whole body: nothing is read ahead of it.
    """
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("an ASGI application is called in a task")
    gone = answered = False
    watching: asyncio.Task[None] | None = None

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        # Servers say so too once the answer is out, when the app may have work of its own left.
        if not answered:
            gone = True
            task.cancel()

    async def receive_and_watch() -> Message:
        nonlocal watching
        if watching is not None:
            await asyncio.wait({watching})
            return {"type": "http.disconnect"}
        message = await receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            watching = asyncio.create_task(watch())
        return message

    async def send_and_note(message: Message) -> None:
        nonlocal answered
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            answered = True
        await send(message)

    try:
        await app(scope, receive_and_watch, send_and_note)
    except asyncio.CancelledError:
        # Whoever else cancelled it, as the server does at its end, is to have it cancelled.
        if not gone or task.cancelling() > 1:
            raise
    finally:
        if watching is not None:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        if gone:
            task.uncancel()
            scope.setdefault("state", {})["disconnected"] = True
