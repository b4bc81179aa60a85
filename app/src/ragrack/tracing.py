"""Traces by OpenTelemetry: W3C `traceparent` in and out always, spans exported where an endpoint is set."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
from collections.abc import AsyncIterator, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING

from llama_index_instrumentation.span import active_span_id
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from ragrack.settings import Settings

# OpenInference's kinds, by which a viewer of such traces sorts spans: by the first of these words in the method's name.
_KINDS = {
    "retrieve": "RETRIEVER",
    "embedding": "EMBEDDING",
    "chat": "LLM",
    "complete": "LLM",
    "postprocess": "RERANKER",
}

_propagator = TraceContextTextMapPropagator()
_tracer: trace.Tracer | None = None
# The open spans that are LlamaIndex's, by LlamaIndex's id.
_spans: dict[str, trace.Span] = {}


@contextlib.asynccontextmanager
async def exporting(settings: Settings) -> AsyncIterator[None]:
    """Until the block ends, spans go to the settings' endpoint, from a thread of this process: enter it after the fork.

    What cannot be sent is dropped; a request never waits for it.
    """
    if settings.otlp_endpoint is None:
        yield
        return
    # Half of these imports' time is the exporter's, which services without one need not wait for.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    global _tracer
    resource = Resource.create(
        {
            "service.name": "ragrack",
            "service.version": importlib.metadata.version("ragrack"),
            "ragrack.release": settings.release,
        }
    )
    provider = TracerProvider(
        resource=resource, sampler=ParentBasedTraceIdRatio(settings.otlp_sample_ratio), shutdown_on_exit=False
    )
    endpoint = str(settings.otlp_endpoint).rstrip("/") + "/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=5)))
    _tracer = provider.get_tracer("ragrack")
    try:
        yield
    finally:
        _tracer = None
        # It sends what is left, and waits for that.
        await asyncio.to_thread(provider.shutdown)


@contextlib.contextmanager
def server_span(headers: Mapping[str, str]) -> Iterator[trace.Span]:
    """The span of a request, child of the caller's `traceparent`; the caller's own where nothing is exported."""
    parent = _propagator.extract(headers, Context())
    if _tracer is None:
        span = trace.get_current_span(parent)
    else:
        span = _tracer.start_span("request", parent, trace.SpanKind.SERVER)
    try:
        with trace.use_span(span, record_exception=False, set_status_on_exception=False):
            yield span
    finally:
        span.end()


def trace_id(span: trace.Span) -> str | None:
    """32 hex, of a span that is part of a trace."""
    context = span.get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else None


def enter(id_: str, parent_id: str | None, tags: Mapping[str, object]) -> None:
    """A span of LlamaIndex's has begun."""
    if _tracer is None:
        return
    parent = _spans.get(parent_id or "")
    name = id_[: -len("-00000000-0000-0000-0000-000000000000")]
    method = name.rpartition(".")[2]
    kind = next((kind for word, kind in _KINDS.items() if word in method), "CHAIN")
    attributes = {"openinference.span.kind": kind} | {
        f"llama_index.tag.{key}": str(value) for key, value in tags.items()
    }
    _spans[id_] = _tracer.start_span(
        name, None if parent is None else trace.set_span_in_context(parent), attributes=attributes
    )


def leave(id_: str, error: BaseException | None = None) -> None:
    """It has ended; of an exception only the type is told, as messages quote what they choked on."""
    span = _spans.pop(id_, None)
    if span is None:
        return
    if error is not None:
        span.set_status(trace.StatusCode.ERROR, type(error).__name__)
    span.end()


def inject(headers: MutableMapping[str, str]) -> None:
    """`traceparent` of the innermost open span."""
    span = _spans.get(active_span_id.get() or "")
    _propagator.inject(headers, None if span is None else trace.set_span_in_context(span))
