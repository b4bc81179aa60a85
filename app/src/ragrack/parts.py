"""The parts of LlamaIndex that the settings name: embedding model, tokenizer, node parser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_index.core.node_parser import NodeParser, SentenceSplitter, TokenTextSplitter
from llama_index.core.schema import Document
from tokenizers import Tokenizer

from ragrack.embedding import MiniLMEmbedding
from ragrack.fingerprint import ModelError
from ragrack.remote import RemoteEmbedding
from ragrack.sentences import split_sentences
from ragrack.settings import Settings

Embedding = MiniLMEmbedding | RemoteEmbedding
Tokens = Callable[[str], list[int]]


def open_embedding(settings: Settings, threads: int, keep: int = 0) -> Embedding:
    """Open it after a fork, and close it. Raises ModelError. One behind an API is not asked before it is needed."""
    if settings.embed_provider == "minilm":
        return MiniLMEmbedding.load(settings.embed_model_dir, threads, keep)
    return RemoteEmbedding.of(settings)


def tokenizer(settings: Settings, embedding: Embedding) -> Tokens:
    """What counts the LLM's tokens: its own tokenizer where the settings name one; else the embedding model's, which
    splits finer than most. Raises ModelError.
    """
    if settings.tokenizer is None:
        return embedding.tokens
    try:
        own = Tokenizer.from_file(str(settings.tokenizer))
    except Exception as error:  # the library raises whatever its native code gives it
        raise ModelError(f"RAGRACK_TOKENIZER={settings.tokenizer} cannot be loaded: {error}") from error
    own.no_padding()
    own.no_truncation()

    def tokens(text: str) -> list[int]:
        ids: list[int] = own.encode(text, add_special_tokens=False).ids
        return ids

    return tokens


def node_parser(
    settings: Settings, tokens: Tokens, id_func: Callable[[int, Document], str] | None = None
) -> NodeParser:
    """Counts by `tokens`, the embedding model's: a node must fit into that model."""
    common: dict[str, Any] = {
        "chunk_size": settings.chunk_size,
        "chunk_overlap": settings.chunk_overlap,
        "tokenizer": tokens,
        "id_func": id_func,
    }
    if settings.node_parser == "token":
        return TokenTextSplitter(**common)
    return SentenceSplitter(**common, paragraph_separator="\n\n", chunking_tokenizer_fn=split_sentences)
