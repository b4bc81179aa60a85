"""What the service tells of itself: metrics, traces, log lines; and that telling costs no memory."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import logging.config
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from llama_index.core.llms import ChatMessage
from llama_index_instrumentation import root_dispatcher
from llama_index_instrumentation.dispatcher import instrument_tags
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client import REGISTRY
from ragrack import llms, metrics
from ragrack.context import RequestContext
from ragrack.embedding import MiniLMEmbedding
from ragrack.instrument import SpanHandler
from ragrack.logging import config
from ragrack.settings import Settings
from starlette.types import Message, Receive, Scope, Send

from . import faulty
from .conftest import Running
from .faulty import Faulty, faulty_upstream, hangs, status, stream
from .test_trouble import generating

REPO = Path(__file__).parents[3]
QUESTION = "How far can the light of the lighthouse be seen?"
NOWHERE = "Which enzyme splits lactose in the gut?"
TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"


@pytest.fixture
async def upstream() -> AsyncIterator[Faulty]:
    async with faulty_upstream() as upstream:
        yield upstream


class Collector:
    """A real OTLP endpoint: takes what is posted to /v1/traces."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []
        self.raw = b""
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
                length = next(int(line.partition(":")[2]) for line in head if line.startswith("content-length"))
                raw = await reader.readexactly(length)
                assert head[0].startswith("post /v1/traces ")
                self.raw += raw
                for group in ExportTraceServiceRequest.FromString(raw).resource_spans:
                    self.resources.append({each.key: each.value.string_value for each in group.resource.attributes})
                    self.spans += [span for scope in group.scope_spans for span in scope.spans]
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
        writer.close()


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    collector = Collector()
    server = await asyncio.start_server(collector.serve, "127.0.0.1", 0)
    collector.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield collector
    server.close()


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def handler() -> SpanHandler:
    return next(each for each in root_dispatcher.span_handlers if isinstance(each, SpanHandler))


async def ask(client: httpx.AsyncClient, question: str = QUESTION, **headers: str) -> httpx.Response:
    return await client.post("/query", json={"query": question}, headers=headers)


async def test_a_query_is_counted_by_route_stage_and_answer(settings: Settings, run: Running, upstream: Faulty) -> None:
    names = {
        **{f"stage {stage}": ("ragrack_stage_seconds_count", {"stage": stage}) for stage in ("embed", "retrieve")},
        "synthesize": ("ragrack_stage_seconds_count", {"stage": "synthesize"}),
        "requests": ("ragrack_requests_total", {"route": "/query", "method": "POST", "status": "200"}),
        "request time": ("ragrack_request_seconds_count", {"route": "/query"}),
        "queue": ("ragrack_queue_seconds_count", {"queue": "requests"}),
        "llm queue": ("ragrack_queue_seconds_count", {"queue": "llm"}),
        "llm": ("ragrack_llm_seconds_count", {"llm": "llm"}),
        "answers": ("ragrack_answers_total", {"mode": "generate", "degraded": "false"}),
        "attempts": ("ragrack_upstream_attempts_total", {"upstream": "llm", "outcome": "200"}),
        "prompt": ("ragrack_llm_tokens_total", {"kind": "prompt"}),
        "completion": ("ragrack_llm_tokens_total", {"kind": "completion"}),
    }
    async with run(generating(settings, upstream)) as client:
        before = {name: value(metric, **labels) for name, (metric, labels) in names.items()}
        await ask(client)
        after = {name: value(metric, **labels) for name, (metric, labels) in names.items()}
        page = await client.get("/metrics")
    grown = {name: after[name] - before[name] for name in names}
    assert grown == dict.fromkeys(names, 1.0) | {"prompt": 30.0, "completion": 3.0}
    assert page.headers["content-type"].startswith("text/plain")
    assert 'ragrack_snapshot_created_timestamp_seconds{collection="island"}' in page.text
    assert 'ragrack_breaker_workers{state="closed",upstream="llm"} 1.0' in page.text


async def test_a_request_is_counted_before_the_last_of_its_answer_leaves() -> None:
    def counted() -> tuple[float, float]:
        answered = value("ragrack_requests_total", route="none", method="GET", status="200")
        return value("ragrack_requests_in_flight"), answered

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})

    seen: list[tuple[float, float]] = []

    async def send(message: Message) -> None:
        seen.append(counted())

    async def receive() -> Message:
        raise AssertionError("nothing is read of it")

    idle, before = counted()
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    await RequestContext(app, lambda _: 0)(scope, receive, send)
    during, after = (idle + 1, before), (idle, before + 1)
    assert seen == [during, during, after]
    assert counted() == after, "once"


async def test_a_paths_text_is_no_label(client: httpx.AsyncClient) -> None:
    await client.get("/platypus/7")
    await client.request("PLATYPUS", "/query")
    page = (await client.get("/metrics")).text
    assert "platypus" not in page.lower()
    assert 'route="none"' in page


async def test_a_streams_first_token_and_tokens_are_counted(settings: Settings, upstream: Faulty, run: Running) -> None:
    upstream.default = stream("Nine", "teen")

    def counted() -> tuple[float, float]:
        firsts = value("ragrack_llm_first_token_seconds_count", llm="llm")
        return firsts, value("ragrack_llm_tokens_total", kind="completion")

    configured = generating(settings, upstream)
    async with run(configured), llms.opened(configured) as models:
        assert models.llm is not None
        before = counted()
        parts = [part.delta async for part in await models.llm.astream_chat([ChatMessage(content="?")])]
        after = counted()
    assert "".join(part or "" for part in parts) == "Nineteen"
    assert (after[0] - before[0], after[1] - before[1]) == (1.0, 2.0)
    assert upstream.calls[0].body["stream_options"] == {"include_usage": True}


async def test_a_trace_goes_from_the_caller_through_llamaindex_to_the_llm(
    settings: Settings, run: Running, upstream: Faulty, collector: Collector, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.config.dictConfig(config(settings))
    async with run(generating(settings, upstream, otlp_endpoint=collector.url)) as client:
        with instrument_tags({"experiment": "seven"}):
            await ask(client, traceparent=f"00-{TRACE}-{CALLER}-01")
        upstream.default = status(500)
        await ask(client, traceparent=f"00-{TRACE[::-1]}-{CALLER}-01")
    spans = {span.span_id: span for span in collector.spans if span.trace_id.hex() == TRACE}
    names = {span.name for span in spans.values()}
    assert {"POST /query", "VectorIndexRetriever.aretrieve", "OpenAILike.achat"} <= names
    server = next(span for span in spans.values() if span.name == "POST /query")
    assert server.parent_span_id.hex() == CALLER
    for span in spans.values():
        assert span is server or span.parent_span_id in spans, f"{span.name} hangs in the air"
    asked = upstream.calls[0].headers["traceparent"].split("-")
    assert asked[1] == TRACE
    assert spans[bytes.fromhex(asked[2])].name == "OpenAILike.achat"
    retrieval = next(span for span in spans.values() if span.name == "VectorIndexRetriever.aretrieve")
    assert {each.key: each.value.string_value for each in retrieval.attributes} == {
        "openinference.span.kind": "RETRIEVER",
        "llama_index.tag.experiment": "seven",
    }
    failed = [span for span in collector.spans if span.name == "OpenAILike.achat" and span.trace_id.hex() != TRACE]
    assert {span.status.message for span in failed} == {"InternalServerError"}
    assert collector.resources[0]["ragrack.release"] == settings.release
    for never in (b"lighthouse", b"nautical", b"Nineteen"):
        assert never not in collector.raw
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    line = next(each for each in lines if each.get("path") == "/query")
    assert line["trace_id"] == TRACE
    assert line["snapshot"]


async def test_without_an_endpoint_the_callers_trace_goes_on(
    settings: Settings, run: Running, upstream: Faulty
) -> None:
    async with run(generating(settings, upstream)) as client:
        await ask(client, traceparent=f"00-{TRACE}-{CALLER}-01")
        await ask(client)
        await ask(client, traceparent="garbage")
    assert upstream.calls[0].headers["traceparent"] == f"00-{TRACE}-{CALLER}-01"
    assert "traceparent" not in upstream.calls[1].headers | upstream.calls[2].headers


async def test_a_collector_that_is_down_costs_no_request(settings: Settings, run: Running) -> None:
    configured = Settings.model_validate(settings.model_dump() | {"otlp_endpoint": "http://127.0.0.1:9"})
    async with run(configured) as client:
        assert (await ask(client)).status_code == 200


@pytest.mark.parametrize("switched_on", [False, True])
async def test_content_is_logged_only_where_it_is_switched_on(
    settings: Settings, run: Running, upstream: Faulty, capsys: pytest.CaptureFixture[str], switched_on: bool
) -> None:
    logging.config.dictConfig(config(settings))
    async with run(generating(settings, upstream, log_content=switched_on)) as client:
        sent = await ask(client)
    text = capsys.readouterr().out
    assert (QUESTION in text) is switched_on
    assert ("Nineteen miles." in text) is switched_on
    assert ("nautical" in text) is switched_on
    contents = [each for each in map(json.loads, text.splitlines()) if each["message"] == "content"]
    assert bool(contents) is switched_on
    assert {each["request_id"] for each in contents} <= {sent.headers["X-Request-ID"]}


@pytest.mark.parametrize(("broken", "name"), [("STAGE_SECONDS", "span"), ("LLM_TOKENS", "event")])
async def test_a_handler_that_fails_is_counted_and_breaks_nothing(
    settings: Settings, run: Running, upstream: Faulty, monkeypatch: pytest.MonkeyPatch, broken: str, name: str
) -> None:
    labels = {"handler": name, "error": "AttributeError"}
    async with run(generating(settings, upstream)) as client:
        before = value("ragrack_instrumentation_errors_total", **labels)
        monkeypatch.setattr(metrics, broken, None)
        assert (await ask(client)).json()["response"] == "Nineteen miles."
        assert value("ragrack_instrumentation_errors_total", **labels) > before
        assert handler().open_spans == {}


async def test_ten_thousand_queries_with_errors_and_cancels_leave_nothing(
    settings: Settings, run: Running, upstream: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is judged by Python's live blocks from one part to the next, so what is cached once counts not."""
    embed = MiniLMEmbedding._aget_query_embedding

    async def sometimes(self: MiniLMEmbedding, query: str) -> list[float]:
        if query.startswith("fail"):
            raise RuntimeError(query)
        if query.startswith("stick"):
            await asyncio.Event().wait()
        return await embed(self, query)

    monkeypatch.setattr(MiniLMEmbedding, "_aget_query_embedding", sometimes)
    configured = generating(
        settings, upstream, max_queue=1000, llm_breaker_failures=1000, llm_timeout=0.2, answer="extractive"
    )

    async def batch(client: httpx.AsyncClient, size: int) -> None:
        async def one(number: int) -> None:
            question, mode = NOWHERE, "extractive"
            if number % 50 == 0:
                question = "fail"
            elif number % 50 == 1:
                question = "stick"
            elif number % 100 == 2:
                question, mode = QUESTION, "generate"
                upstream.default = (status(500), hangs, faulty.drops, status(200, b"{"))[number // 100 % 4]
            call = client.post("/query", json={"query": question, "answer": mode, "top_k": 1})
            if question == "stick":
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(call, 0.01)
            else:
                response = await call
                assert response.status_code == (500 if question == "fail" else 200)

        for start in range(0, size, 25):
            await asyncio.gather(*(one(start + offset) for offset in range(25)))

    async with run(configured) as client:
        for level in ("ragrack.context", "ragrack.fallback", "ragrack.service"):
            monkeypatch.setattr(logging.getLogger(level), "disabled", True)
        await batch(client, 1000)
        held = []
        for _ in range(3):
            await batch(client, 3000)
            gc.collect()
            held.append(sys.getallocatedblocks())
            upstream.calls.clear()
        assert handler().open_spans == {}
        assert handler().completed_spans == handler().dropped_spans == []
    # One span kept for each query would be several blocks each.
    assert held[2] - held[1] < 3000, held


def test_the_page_of_metrics_names_all_of_them() -> None:
    text = (REPO / "docs/metrics.md").read_text(encoding="utf-8")
    assert metrics.table() in text, "write what `python -m ragrack.metrics` prints into docs/metrics.md"
