"""Embeddings of a model behind an OpenAI-compatible API: vLLM, TEI, llama.cpp, Ollama, OpenAI and others."""

from __future__ import annotations

import importlib.resources
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from pydantic import PrivateAttr

from ragrack.problems import ProblemError
from ragrack.upstream import Policy, Upstream

if TYPE_CHECKING:
    from ragrack.settings import Settings

BATCH = 32


class EmbeddingUnavailableError(ProblemError):
    """The API does not answer, or not with vectors of the right length. A 503 where a request waits for it."""

    def __init__(self, reason: str) -> None:
        detail = "The embedding model cannot be asked now; GET /readyz says why."
        super().__init__(HTTPStatus.SERVICE_UNAVAILABLE, detail, headers={"Retry-After": "2"})
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class RemoteEmbedding(BaseEmbedding):
    """Asked for by LlamaIndex's OpenAILikeEmbedding; made unit vectors, as the store compares by inner product."""

    _model: Any = PrivateAttr()
    _async_model: Any = PrivateAttr()
    _dimensions: int = PrivateAttr()
    _encoding: Any = PrivateAttr()
    _clients: list[Any] = PrivateAttr()

    @classmethod
    def of(cls, settings: Settings) -> RemoteEmbedding:
        """Of one event loop. Asks nothing yet."""
        # Importing OpenAI's client takes half a second, which services without it need not wait for.
        import httpx
        from llama_index.embeddings.openai_like import OpenAILikeEmbedding

        # LlamaIndex takes a transformation's identity from its name: another model must not have this one's.
        embedding = cls(model_name=settings.embed_model or "", embed_batch_size=BATCH)
        transport = Upstream("embedding", Policy.of(settings, settings.embed_timeout))
        sync_client, async_client = httpx.Client(), httpx.AsyncClient(transport=transport)
        embedding._clients = [sync_client, async_client]
        common: dict[str, Any] = {
            "model_name": settings.embed_model or "",
            "api_base": str(settings.embed_base_url).rstrip("/"),
            # The client insists on a key; servers that ask for none ignore it.
            "api_key": settings.embed_api_key.get_secret_value() if settings.embed_api_key else "none",
            "timeout": settings.embed_timeout,
            "embed_batch_size": BATCH,
        }
        # An ingest has all the time of OpenAI's client; a request's repetitions are its transport's, which knows how
        # much there is.
        embedding._model = OpenAILikeEmbedding(**common, max_retries=settings.llm_retries, http_client=sync_client)
        embedding._async_model = OpenAILikeEmbedding(**common, max_retries=0, async_http_client=async_client)
        embedding._dimensions = settings.embed_dimensions or 0
        embedding._encoding = _tiktoken()
        return embedding

    @classmethod
    def class_name(cls) -> str:
        return "RemoteEmbedding"

    def tokens(self, text: str) -> list[int]:
        """As OpenAI's models count them: no other tokenizer is known, and most others come within a quarter of it."""
        ids: list[int] = self._encoding.encode(text, disallowed_special=())
        return ids

    def close(self) -> None:
        """The connections of an event loop are closed in it, or with the process."""
        self._clients[0].close()

    async def aclose(self) -> None:
        self.close()
        await self._clients[1].aclose()

    def _unit(self, vector: list[float]) -> list[float]:
        if len(vector) != self._dimensions:
            raise EmbeddingUnavailableError(
                f"the embedding model's vectors have {len(vector)} dimensions, "
                f"but RAGRACK_EMBED_DIMENSIONS={self._dimensions}"
            )
        length = math.sqrt(sum(number * number for number in vector))
        return [number / length for number in vector] if length else vector

    def _get_query_embedding(self, query: str) -> list[float]:
        with _told():
            return self._unit(self._model.get_query_embedding(query))

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        with _told():
            return [self._unit(vector) for vector in self._model.get_text_embedding_batch(texts)]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        with _told():
            return self._unit(await self._async_model.aget_query_embedding(query))

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._aget_text_embeddings([text]))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        with _told():
            return [self._unit(vector) for vector in await self._async_model.aget_text_embedding_batch(texts)]


@contextmanager
def _told() -> Iterator[None]:
    import openai

    try:
        yield
    except (openai.OpenAIError, ValueError, TypeError, KeyError, IndexError) as error:
        raise EmbeddingUnavailableError(f"the embedding model cannot be asked ({type(error).__name__})") from error


def _tiktoken() -> Any:
    """The encoding that LlamaIndex brings along, so that nothing is downloaded."""
    import tiktoken

    name = "TIKTOKEN_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = str(importlib.resources.files("llama_index.core") / "_static/tiktoken_cache")
    try:
        return tiktoken.get_encoding("cl100k_base")
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
