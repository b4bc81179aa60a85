"""What only several workers under gunicorn show: metrics of all of them, and a client's leaving seen by each class."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from ragrack.settings import Settings

from .conftest import KEY
from .faulty import Faulty, faulty_upstream, hangs
from .test_gunicorn import COMMAND, environment

WORKERS = 2


@contextlib.contextmanager
def gunicorn(settings: Settings, log: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        env = environment(settings, RAGRACK_WORKERS=str(WORKERS), **more)
        process = subprocess.Popen(COMMAND, env=env, stdout=out, stderr=out, cwd=log.parent)
    try:
        _wait_for(log, '"started ready"', WORKERS, process)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)


def _wait_for(log: Path, text: str, times: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while log.read_text().count(text) < times:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def client(settings: Settings) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=str(settings.socket))
    headers = {"Authorization": f"Bearer {KEY}", "Connection": "close"}
    return httpx.Client(base_url="http://service", transport=transport, headers=headers, timeout=30)


def values(page: str, name: str) -> list[float]:
    return [float(each) for each in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", page, re.MULTILINE)]


def test_whichever_worker_is_asked_tells_of_all_and_the_next_run_counts_anew(
    settings: Settings, tmp_path: Path
) -> None:
    count = r'ragrack_requests_total\{method="POST",route="/query",status="200"\}'
    llm = {"RAGRACK_LLM_BASE_URL": "http://127.0.0.1:9/v1", "RAGRACK_LLM_MODEL": "m"}
    with gunicorn(settings, tmp_path / "one.log", **llm) as process, client(settings) as http:
        for _ in range(20):
            assert http.post("/query", json={"query": "When does the bakery open?"}).status_code == 200
        pages = [http.get("/metrics").text for _ in range(10)]
        for page in pages:
            assert values(page, count) == [20.0]
            assert values(page, r'ragrack_stage_seconds_count\{stage="retrieve"\}') == [20.0]
            assert values(page, r'ragrack_breaker_workers\{state="closed",upstream="llm"\}') == [WORKERS]
            assert values(page, "ragrack_requests_in_flight") == [1.0], "the one that asks"
        children = _children(process.pid)
        assert len(children) == WORKERS
        os.kill(children[0], signal.SIGKILL)
        _wait_for(tmp_path / "one.log", '"started ready"', WORKERS + 1, process)
        page = http.get("/metrics").text
        assert values(page, count) == [20.0], "what a dead worker counted stays"
        assert values(page, r'ragrack_breaker_workers\{state="closed",upstream="llm"\}') == [WORKERS]
    with gunicorn(settings, tmp_path / "two.log"), client(settings) as http:
        assert values(http.get("/metrics").text, count) == []


def test_workers_are_forked_with_all_modules_there(settings: Settings, tmp_path: Path) -> None:
    """OpenAI's client is the slowest of them to import."""
    log = tmp_path / "log"
    llm = {"RAGRACK_LLM_BASE_URL": "http://127.0.0.1:9/v1", "RAGRACK_LLM_MODEL": "m"}
    with gunicorn(settings, log, **llm) as process:
        loaded = [Path(f"/proc/{pid}/maps").read_text() for pid in (process.pid, *_children(process.pid))]
    assert all("pydantic_core" in maps and "faiss" in maps and "onnxruntime" in maps for maps in loaded)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
async def upstream() -> AsyncIterator[Faulty]:
    async with faulty_upstream() as upstream:
        yield upstream


@pytest.mark.parametrize("worker_class", ["uvicorn", "asgi"])
async def test_a_client_that_leaves_takes_its_llm_call_along(
    settings: Settings, tmp_path: Path, upstream: Faulty, worker_class: str
) -> None:
    upstream.default = hangs
    more = {
        "RAGRACK_ANSWER": "generate",
        "RAGRACK_LLM_BASE_URL": upstream.url,
        "RAGRACK_LLM_MODEL": "m",
        "RAGRACK_WORKER_CLASS": worker_class,
    }
    with contextlib.ExitStack() as stack:
        await asyncio.to_thread(stack.enter_context, gunicorn(settings, tmp_path / "log", **more))
        body = json.dumps({"query": "When does the bakery open?"}).encode()
        with socket.socket(socket.AF_UNIX) as leaving:
            leaving.connect(str(settings.socket))
            leaving.sendall(
                b"POST /query HTTP/1.1\r\nHost: service\r\nContent-Type: application/json\r\n"
                b"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s" % (KEY.encode(), len(body), body)
            )
            async with asyncio.timeout(20):
                await upstream.called()
        async with asyncio.timeout(20):
            await upstream.calls[0].left.wait()
        await asyncio.to_thread(stack.close)
