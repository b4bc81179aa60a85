"""Several LLMs as one: the first that answers. A later one is asked only while nothing of an answer is out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.llms import LLM
from pydantic import PrivateAttr

from ragrack import deadline, metrics

log = logging.getLogger(__name__)


class LLMFailedError(Exception):
    """None of them answered; `__cause__` is what the last one did."""


class FallbackLLM(LLM):
    """Over the LLMs by name, in the order in which they are asked. Asynchronous, as the service is."""

    _llms: dict[str, LLM] = PrivateAttr()
    _timeout: float = PrivateAttr()

    @classmethod
    def over(cls, llms: dict[str, LLM], timeout: float) -> FallbackLLM:
        """`timeout`: seconds that each has for a whole answer, or for the first token of a stream."""
        llm = cls()
        llm._llms = dict(llms)
        llm._timeout = timeout
        return llm

    @classmethod
    def class_name(cls) -> str:
        return "FallbackLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """The first one's."""
        return next(iter(self._llms.values())).metadata

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Raises LLMFailedError."""
        cause: Exception | None = None
        for name, llm in self._llms.items():
            with _Attempt(name) as attempt:
                started = time.perf_counter()
                async with asyncio.timeout(deadline.for_upstream(self._timeout)):
                    response = await llm.achat(messages, **kwargs)
                if not (
                    (response.message.content or "").strip() or response.message.additional_kwargs.get("tool_calls")
                ):
                    raise ValueError("the LLM's answer is empty")
                metrics.LLM_SECONDS.labels(name).observe(time.perf_counter() - started)
                return response
            cause = attempt.error
        raise LLMFailedError from cause

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Raises LLMFailedError before the first token; after it, whatever ends the stream."""
        cause: Exception | None = None
        for name, llm in self._llms.items():
            with _Attempt(name) as attempt:
                started = time.perf_counter()
                async with asyncio.timeout(deadline.for_upstream(self._timeout)):
                    stream = await llm.astream_chat(messages, **kwargs)
                    first = await _first_token(stream)
                metrics.LLM_FIRST_TOKEN_SECONDS.labels(name).observe(time.perf_counter() - started)
                return _rest(name, first, stream, started)
            cause = attempt.error
        raise LLMFailedError from cause

    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        raise NotImplementedError("the service's LLMs chat")

    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        raise NotImplementedError("the service's LLMs chat")

    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        raise NotImplementedError("the service's LLMs are asynchronous: use achat")

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        raise NotImplementedError("the service's LLMs are asynchronous: use astream_chat")

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        raise NotImplementedError("the service's LLMs chat")

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        raise NotImplementedError("the service's LLMs chat")


class _Attempt(contextlib.AbstractContextManager["_Attempt"]):
    """Swallows what an LLM raises, having counted it, so that the next can be asked."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.error: Exception | None = None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self.error = error
        metrics.LLM_ERRORS.labels(self._name, type(error).__name__).inc()
        log.warning("the LLM %s failed", self._name, extra={"fields": {"error": type(error).__name__}})
        return True


async def _first_token(stream: ChatResponseAsyncGen) -> ChatResponse:
    """Leaves out what only opens a stream."""
    try:
        async for response in stream:
            if response.delta or response.message.additional_kwargs.get("tool_calls"):
                return response
    except BaseException:
        await _close(stream)
        raise
    raise ValueError("the LLM's answer is empty")


async def _rest(
    name: str, first: ChatResponse, stream: ChatResponseAsyncGen, started: float
) -> AsyncGenerator[ChatResponse, None]:
    try:
        yield first
        async for response in stream:
            yield response
    except Exception as error:
        metrics.LLM_ERRORS.labels(name, type(error).__name__).inc()
        raise
    else:
        metrics.LLM_SECONDS.labels(name).observe(time.perf_counter() - started)
    finally:
        await _close(stream)


async def _close(stream: ChatResponseAsyncGen) -> None:
    if isinstance(stream, AsyncGenerator):
        await stream.aclose()
