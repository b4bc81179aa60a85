"""Server-sent events out of an async generator, with a ping where it is silent, in FastAPI's own form.

FastAPI streams an endpoint that is a generator; ours answer with JSON or with events, as the request says, so the
stream is made here. Everything that can be refused is refused before it begins, with a status of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic import BaseModel

log = logging.getLogger(__name__)

PING_SECONDS = 15.0


@dataclass(frozen=True)
class Event:
    """`data` is sent as JSON; a text is sent as it is."""

    data: BaseModel | dict[str, Any] | str
    name: str | None = None

    def encode(self) -> bytes:
        data = self.data
        if isinstance(data, BaseModel):
            data = data.model_dump_json()
        elif isinstance(data, dict):
            data = json.dumps(data, ensure_ascii=False)
        return format_sse_event(data_str=data, event=self.name)


def stream(events: AsyncGenerator[Event, None]) -> StreamingResponse:
    """The response. When the client leaves, the generator is cancelled where it waits, and so is what it waits for."""
    # Proxies hand on what they would else collect.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_with_pings(events), media_type="text/event-stream", headers=headers)


async def _with_pings(events: AsyncGenerator[Event, None]) -> AsyncIterator[bytes]:
    # The generator runs in one task from end to end: its timeouts and context are that task's.
    queue = asyncio.Queue[bytes | None](maxsize=16)

    async def produce() -> None:
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    await queue.put(event.encode())
        finally:
            if not (task := asyncio.current_task()) or not task.cancelling():
                await queue.put(None)

    producer = asyncio.create_task(produce())
    try:
        while True:
            try:
                async with asyncio.timeout(PING_SECONDS):
                    chunk = await queue.get()
            except TimeoutError:
                yield KEEPALIVE_COMMENT
                continue
            if chunk is None:
                await producer
                return
            yield chunk
    finally:
        producer.cancel()
