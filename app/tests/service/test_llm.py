"""Generated answers, and what becomes of them when the LLM's server refuses, breaks, babbles or hangs.

The server is a real one on a real socket that misbehaves on demand; the bundled model is asked in the scenarios.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from ragrack.settings import Settings

from .conftest import Running

QUESTION = "How far can the light of the lighthouse be seen?"
COMPLETION = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Nineteen miles."}}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


class Upstream(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 200
        self.body = json.dumps(COMPLETION).encode()
        self.hangs = threading.Event()
        self.hangs.set()
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Upstream

    def do_GET(self) -> None:
        self._send(200, b'{"object": "list", "data": []}')

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.keys.append(self.headers["Authorization"])
        self.server.hangs.wait()
        self._send(self.server.status, self.server.body)

    def _send(self, status: int, body: bytes) -> None:
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.hangs.set()
        server.shutdown()


def with_llm(settings: Settings, url: str, **more: object) -> Settings:
    return Settings(**(dict(settings) | {"llm_base_url": url, "llm_model": "m", "answer": "generate"} | more))


async def test_the_llm_answers_from_the_retrieved_nodes(settings: Settings, run: Running, upstream: Upstream) -> None:
    async with run(with_llm(settings, upstream.url, llm_api_key="sk-swordfish")) as client:
        answer = (await client.post("/query", json={"query": QUESTION})).json()
    assert answer["response"] == "Nineteen miles."
    assert answer["answer"] == "generate"
    assert answer["degraded"] is False
    assert answer["sources"][0]["document"] == "lighthouse.md"
    prompt = json.dumps(upstream.asked[0]["messages"])
    assert "19 nautical miles" in prompt
    assert QUESTION in prompt
    assert upstream.asked[0]["max_tokens"] == settings.num_output
    assert upstream.keys == ["Bearer sk-swordfish"]


async def test_a_request_may_ask_for_sentences_instead(settings: Settings, run: Running, upstream: Upstream) -> None:
    async with run(with_llm(settings, upstream.url)) as client:
        answer = (await client.post("/query", json={"query": QUESTION, "answer": "extractive"})).json()
    assert answer["answer"] == "extractive"
    assert answer["degraded"] is False
    assert upstream.asked == []


async def test_nothing_retrieved_is_never_put_to_the_llm(settings: Settings, run: Running, upstream: Upstream) -> None:
    async with run(with_llm(settings, upstream.url)) as client:
        answer = (await client.post("/query", json={"query": "Which enzyme splits lactose in the gut?"})).json()
    assert answer["response"].startswith("I don't know")
    assert upstream.asked == []


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b"{}"),
        (429, b'{"error": {"message": "slow down"}}'),
        (401, b'{"error": {"message": "swordfish is no key"}}'),
        (200, b"<html>no json"),
        (200, b"{}"),
        (200, b'{"choices": []}'),
        (200, json.dumps(COMPLETION).replace("Nineteen miles.", " ").encode()),
    ],
)
async def test_when_the_llm_fails_the_sentences_are_given_and_it_is_said(
    settings: Settings, run: Running, upstream: Upstream, status: int, body: bytes
) -> None:
    upstream.status, upstream.body = status, body
    async with run(with_llm(settings, upstream.url)) as client:
        response = await client.post("/query", json={"query": QUESTION})
    assert response.status_code == 200
    answer = response.json()
    assert answer["degraded"] is True
    assert answer["answer"] == "extractive"
    assert "19 nautical miles" in answer["response"]
    assert "swordfish" not in response.text


async def test_an_llm_that_hangs_is_given_up_after_its_timeout(
    settings: Settings, run: Running, upstream: Upstream
) -> None:
    upstream.hangs.clear()
    async with run(with_llm(settings, upstream.url, llm_timeout=0.2)) as client:
        answer = (await client.post("/query", json={"query": QUESTION})).json()
    assert answer["degraded"] is True
    assert "19 nautical miles" in answer["response"]


async def test_readiness_names_the_llm_that_is_down_and_stays_ready(settings: Settings, run: Running) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        async with run(with_llm(settings, url, collections=("island",))) as client:
            response = await client.get("/readyz")
            answer = (await client.post("/query", json={"query": QUESTION})).json()
    report = response.json()
    assert response.status_code == 200
    assert report["ready"] is True
    assert report["degraded"] is True
    assert report["reasons"] == ["llm: the LLM's server cannot be reached (ConnectError)"]
    assert answer["degraded"] is True


async def test_readiness_finds_the_llm_that_is_up(settings: Settings, run: Running, upstream: Upstream) -> None:
    async with run(with_llm(settings, upstream.url, collections=("island",))) as client:
        report = (await client.get("/readyz")).json()
    assert [check["name"] for check in report["checks"]] == ["embedding", "index:island", "snapshot:island", "llm"]
    assert report["degraded"] is False
