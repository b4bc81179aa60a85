"""LlamaIndex's globals: written once at start, then sealed.

`Settings` is shared by the whole process, holds no lock, and where a part is not handed over explicitly it falls back
to OpenAI. So every part of ours is handed over explicitly, and a fall-back raises instead of calling a stranger's API.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import llama_index.core
from llama_index.core import Settings as LlamaSettings
from llama_index.core.callbacks import CallbackManager, CBEventType
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.indices.prompt_helper import DEFAULT_PADDING, ChatPromptHelper, PromptHelper
from llama_index.core.llms import LLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.settings import _Settings

from ragrack.parts import node_parser
from ragrack.settings import Settings

# What a chat template may add to the text of its messages: roles, and the marks between them.
MESSAGE_TOKENS = 32


class GlobalFallbackError(RuntimeError):
    """Something took an llm or embed_model from LlamaIndex's globals, or wrote to them."""


class _NoCallbacks(CallbackManager):
    """Without handlers there is nobody to tell: LlamaIndex's own still notes each request's events in itself."""

    def on_event_start(
        self,
        event_type: CBEventType,
        payload: dict[str, Any] | None = None,
        event_id: str | None = None,
        parent_id: str | None = None,
        **kwargs: Any,
    ) -> str:
        return event_id or ""

    def on_event_end(
        self,
        event_type: CBEventType,
        payload: dict[str, Any] | None = None,
        event_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        pass

    def start_trace(self, trace_id: str | None = None) -> None:
        pass

    def end_trace(self, trace_id: str | None = None, trace_map: dict[str, list[str]] | None = None) -> None:
        pass


class WindowHelper(PromptHelper):
    """Leaves text that fits the LLM's window as it is. LlamaIndex's own first works out how it would be split, with
    an event loop in a thread of its own each time: several milliseconds of every generated answer.
    """

    def repack(
        self,
        prompt: BasePromptTemplate,
        text_chunks: Sequence[str],
        padding: int = DEFAULT_PADDING,
        llm: LLM | None = None,
        tools: list[Any] | None = None,
    ) -> list[str]:
        text = "\n\n".join(chunk.strip() for chunk in text_chunks if chunk.strip())
        missing = dict.fromkeys(set(prompt.template_vars) - prompt.kwargs.keys(), "")
        whole = prompt.format(llm=llm, **missing) + text
        room = self.context_window - self.num_output - padding - MESSAGE_TOKENS
        if text and not tools and self._token_counter.get_string_tokens(whole) <= room:
            return [text]
        packed: list[str] = super().repack(prompt, text_chunks, padding=padding, llm=llm, tools=tools)
        return packed


class _Sealed(_Settings):
    """The same object: nothing of it can be changed, and what would reach for OpenAI cannot be read."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("llm", "embed_model"):
            raise GlobalFallbackError(f"a part was made without `{name}`; hand it over instead of Settings.{name}")
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise GlobalFallbackError(f"Settings.{name} was written after the start; hand the value over instead")


@contextlib.contextmanager
def globals_sealed(
    settings: Settings,
    tokens: Callable[[str], list[int]],
    llm_tokens: Callable[[str], list[int]] | None = None,
    handlers: Sequence[BaseCallbackHandler] = (),
) -> Iterator[None]:
    """Writes LlamaIndex's `Settings` from ours, and seals them until the block ends.

    `tokens` counts what the embedding model reads, `llm_tokens` what the LLM does.
    """
    before = dict(vars(LlamaSettings)), llama_index.core.global_tokenizer
    embedding_tokens, tokens = tokens, llm_tokens or tokens

    LlamaSettings.tokenizer = tokens
    LlamaSettings.callback_manager = CallbackManager(list(handlers)) if handlers else _NoCallbacks()
    LlamaSettings.node_parser = node_parser(settings, embedding_tokens)
    LlamaSettings.transformations = [LlamaSettings.node_parser]
    LlamaSettings.prompt_helper = WindowHelper(
        context_window=settings.context_window, num_output=settings.num_output, chunk_size_limit=None, tokenizer=tokens
    )
    LlamaSettings.chat_prompt_helper = ChatPromptHelper(settings.context_window, settings.num_output, tokenizer=tokens)
    LlamaSettings.__class__ = _Sealed
    try:
        yield
    finally:
        object.__setattr__(LlamaSettings, "__class__", _Settings)
        vars(LlamaSettings).update(before[0])
        llama_index.core.global_tokenizer = before[1]
