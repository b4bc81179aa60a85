"""LlamaIndex's globals: written once at start, then sealed.

`Settings` is shared by the whole process, holds no lock, and where a part is not handed over explicitly it falls back
to OpenAI. So every part of ours is handed over explicitly, and a fall-back raises instead of calling a stranger's API.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from llama_index.core import Settings as LlamaSettings
from llama_index.core.callbacks import CallbackManager
from llama_index.core.indices.prompt_helper import ChatPromptHelper, PromptHelper
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.settings import _Settings

from ragrack.sentences import split_sentences
from ragrack.settings import Settings


class GlobalFallbackError(RuntimeError):
    """Something took an llm or embed_model from LlamaIndex's globals, or wrote to them."""


class _Sealed(_Settings):
    """The same object: nothing of it can be changed, and what would reach for OpenAI cannot be read."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("llm", "embed_model"):
            raise GlobalFallbackError(f"a part was made without `{name}`; hand it over instead of Settings.{name}")
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise GlobalFallbackError(f"Settings.{name} was written after the start; hand the value over instead")


@contextlib.contextmanager
def globals_sealed(settings: Settings, tokens: Callable[[str], list[int]]) -> Iterator[None]:
    """Writes LlamaIndex's `Settings` from ours, and seals them until the block ends.

    The embedding model's tokenizer counts the LLM's tokens too: no other is on the host, and it splits finer than most.
    """
    before = dict(vars(LlamaSettings))

    LlamaSettings.tokenizer = tokens
    LlamaSettings.callback_manager = CallbackManager()
    LlamaSettings.node_parser = SentenceSplitter(
        chunk_size=settings.chunk_size,
        chunk_overlap=settings.chunk_overlap,
        tokenizer=tokens,
        chunking_tokenizer_fn=split_sentences,
    )
    LlamaSettings.transformations = [LlamaSettings.node_parser]
    LlamaSettings.prompt_helper = PromptHelper(settings.context_window, settings.num_output, tokenizer=tokens)
    LlamaSettings.chat_prompt_helper = ChatPromptHelper(settings.context_window, settings.num_output, tokenizer=tokens)
    LlamaSettings.__class__ = _Sealed
    try:
        yield
    finally:
        object.__setattr__(LlamaSettings, "__class__", _Settings)
        vars(LlamaSettings).update(before)
