"""An OpenAI-like server on a real socket that does to each call what the test wants: refuses, drops, babbles, hangs."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

Behaviour = Callable[["Call"], Awaitable[None]]


class Call:
    def __init__(
        self, headers: dict[str, str], body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.headers = headers
        self.body = body
        self.left = asyncio.Event()
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def head(self, status: int, **headers: str) -> None:
        lines = [f"HTTP/1.1 {status} X", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
        await self.send(("\r\n".join(lines) + "\r\n\r\n").encode())

    async def until_left(self) -> None:
        await self._reader.read()
        self.left.set()


def status(code: int, body: bytes = b"{}", **headers: str) -> Behaviour:
    async def behave(call: Call) -> None:
        await call.head(code, Content_Type="application/json", Content_Length=str(len(body)), **headers)
        await call.send(body)

    return behave


def completion(text: str = "Nineteen miles.") -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 30, "completion_tokens": 3, "total_tokens": 33},
        }
    ).encode()


def answer(text: str = "Nineteen miles.") -> Behaviour:
    return status(200, completion(text))


def stream(*tokens: str, ends: bool = True) -> Behaviour:
    """Its role first, then the tokens, then usage and [DONE], or the connection is dropped."""

    def event(delta: dict[str, str]) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
        return _chunk(f"data: {json.dumps(chunk)}\n\n".encode())

    usage = {"prompt_tokens": 30, "completion_tokens": len(tokens), "total_tokens": 30 + len(tokens)}
    last = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [], "usage": usage}

    async def behave(call: Call) -> None:
        await call.head(200, Content_Type="text/event-stream", Transfer_Encoding="chunked")
        await call.send(event({"role": "assistant", "content": ""}))
        for token in tokens:
            await call.send(event({"content": token}))
        if ends:
            await call.send(_chunk(f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n".encode()) + b"0\r\n\r\n")

    return behave


async def opens_a_stream_and_drops(call: Call) -> None:
    await call.head(200, Content_Type="text/event-stream", Transfer_Encoding="chunked")


async def drops(_: Call) -> None:
    pass


async def drops_in_the_middle(call: Call) -> None:
    whole = completion()
    await call.head(200, Content_Type="application/json", Content_Length=str(len(whole)))
    await call.send(whole[:40])


async def hangs(call: Call) -> None:
    await call.until_left()


async def streams_one_token_and_hangs(call: Call) -> None:
    await stream("Nineteen", ends=False)(call)
    await call.until_left()


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


class Faulty:
    """`script` is what becomes of the next calls; after it, `default`."""

    def __init__(self) -> None:
        self.script: deque[Behaviour] = deque()
        self.default: Behaviour = answer()
        self.calls: list[Call] = []
        self._called = asyncio.Condition()
        self.url = ""

    async def called(self, times: int = 1) -> None:
        async with self._called:
            await self._called.wait_for(lambda: len(self.calls) >= times)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
            raw = await reader.readexactly(int(headers.get("content-length", 0)))
            if head[0].startswith("GET"):
                await status(200, b'{"object": "list", "data": []}')(Call(headers, {}, reader, writer))
            else:
                call = Call(headers, json.loads(raw), reader, writer)
                self.calls.append(call)
                async with self._called:
                    self._called.notify_all()
                await (self.script.popleft() if self.script else self.default)(call)
        writer.close()


@contextlib.asynccontextmanager
async def faulty_upstream() -> AsyncIterator[Faulty]:
    upstream = Faulty()
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    upstream.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield upstream
    finally:
        server.close()
