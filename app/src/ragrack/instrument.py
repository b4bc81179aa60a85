"""LlamaIndex's spans and events, on its own dispatcher, as metrics, traces and, where switched on, logged content.

Nothing is kept: of an open span its stage and its start, and of one that has ended nothing. LlamaIndex swallows what
a handler raises; here it is counted and logged first.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections.abc import Iterator
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMCompletionEndEvent
from llama_index.core.instrumentation.events.retrieval import RetrievalStartEvent
from llama_index.core.instrumentation.events.synthesis import SynthesizeEndEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index_instrumentation import root_dispatcher
from llama_index_instrumentation.base import BaseEvent
from llama_index_instrumentation.event_handlers import BaseEventHandler
from llama_index_instrumentation.span import BaseSpan
from llama_index_instrumentation.span_handlers import BaseSpanHandler
from pydantic import PrivateAttr

from ragrack import metrics, tracing

log = logging.getLogger(__name__)

STAGES: tuple[tuple[type, str], ...] = (
    (BaseEmbedding, "embed"),
    (QueryFusionRetriever, "fusion"),
    (BaseRetriever, "retrieve"),
    (BaseNodePostprocessor, "rerank"),
    (BaseSynthesizer, "synthesize"),
)


class OpenSpan(BaseSpan):
    """`stage` is None for a span that is not one, or is inside another of its stage."""

    stage: str | None = None
    outer: frozenset[str] = frozenset()
    started: float = 0.0


class SpanHandler(BaseSpanHandler[OpenSpan]):
    @classmethod
    def class_name(cls) -> str:
        return "RagrackSpanHandler"

    def new_span(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        parent_span_id: str | None = None,
        tags: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> OpenSpan | None:
        with _reported("span"):
            parent = self.open_spans.get(parent_span_id or "")
            outer = frozenset[str]() if parent is None else parent.outer | ({parent.stage} if parent.stage else set())
            stage = next((name for kind, name in STAGES if isinstance(instance, kind)), None)
            tracing.enter(id_, parent_span_id, tags or {})
            return OpenSpan.model_construct(
                id_=id_, stage=None if stage in outer else stage, outer=outer, started=time.perf_counter()
            )
        return None

    def prepare_to_exit_span(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        result: Any | None = None,
        **kwargs: Any,
    ) -> OpenSpan | None:
        span = self.open_spans.get(id_)
        with _reported("span"):
            if span is not None and span.stage is not None:
                metrics.STAGE_SECONDS.labels(span.stage).observe(time.perf_counter() - span.started)
        with _reported("span"):
            tracing.leave(id_)
        return span

    def prepare_to_drop_span(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        err: BaseException | None = None,
        **kwargs: Any,
    ) -> OpenSpan | None:
        span = self.open_spans.get(id_)
        with _reported("span"):
            if span is not None and span.stage is not None:
                metrics.STAGE_ERRORS.labels(span.stage).inc()
        with _reported("span"):
            tracing.leave(id_, err)
        return span


class EventHandler(BaseEventHandler):
    _log_content: bool = PrivateAttr(default=False)

    @classmethod
    def logging_content(cls, log_content: bool) -> EventHandler:
        handler = cls()
        handler._log_content = log_content
        return handler

    @classmethod
    def class_name(cls) -> str:
        return "RagrackEventHandler"

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        with _reported("event"):
            if isinstance(event, (LLMChatEndEvent, LLMCompletionEndEvent)) and event.response is not None:
                for kind in ("prompt", "completion"):
                    if tokens := event.response.additional_kwargs.get(f"{kind}_tokens"):
                        metrics.LLM_TOKENS.labels(kind).inc(tokens)
            if self._log_content:
                _log_content(event)


@contextlib.contextmanager
def instrumented(log_content: bool) -> Iterator[SpanHandler]:
    """LlamaIndex's root dispatcher has our handlers until the block ends."""
    spans, events = SpanHandler(), EventHandler.logging_content(log_content)
    root_dispatcher.add_span_handler(spans)
    root_dispatcher.add_event_handler(events)
    try:
        yield spans
    finally:
        # By identity: pydantic's models are equal where their fields are.
        root_dispatcher.span_handlers = [each for each in root_dispatcher.span_handlers if each is not spans]
        root_dispatcher.event_handlers = [each for each in root_dispatcher.event_handlers if each is not events]


def _log_content(event: BaseEvent) -> None:
    fields: dict[str, Any]
    if isinstance(event, RetrievalStartEvent):
        query = event.str_or_query_bundle
        fields = {"question": query if isinstance(query, str) else query.query_str}
    elif isinstance(event, LLMChatEndEvent):
        fields = {"prompt": [str(message) for message in event.messages], "completion": str(event.response)}
    elif isinstance(event, SynthesizeEndEvent):
        fields = {"answer": str(event.response)}
    else:
        return
    log.info("content", extra={"fields": fields})


@contextlib.contextmanager
def _reported(handler: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        metrics.HANDLER_ERRORS.labels(handler, type(error).__name__).inc()
        log.exception("the %s handler failed", handler)
