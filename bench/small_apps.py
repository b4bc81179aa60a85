"""`echo`: the floor of ASGI, nginx and the load tool together. `llm`: an OpenAI-like server of a fixed delay, whose
streams have `TOKENS` tokens.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]

TOKENS = 100
MESSAGE = {"role": "assistant", "content": "An answer."}
COMPLETION = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": MESSAGE}],
}


def _event(choices: list[dict[str, Any]], **more: Any) -> bytes:
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices, **more}
    return f"data: {json.dumps(chunk)}\n\n".encode()


TOKEN = _event([{"index": 0, "delta": {"content": "word "}, "finish_reason": None}])
LAST = _event([], usage={"prompt_tokens": 30, "completion_tokens": TOKENS, "total_tokens": 30 + TOKENS})


async def _stream(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for _ in range(TOKENS):
        await send({"type": "http.response.body", "body": TOKEN, "more_body": True})
        # So that each goes out by itself, as a model makes them.
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": LAST + b"data: [DONE]\n\n"})


async def _send(send: Send, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _read(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


async def echo(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await _send(send, await _read(receive))


async def llm(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        asked = json.loads(await _read(receive) or b"{}")
        await asyncio.sleep(float(os.environ["BENCH_LLM_SECONDS"]))
        if asked.get("stream"):
            await _stream(send)
        else:
            await _send(send, json.dumps(COMPLETION).encode())
