"""The LLMs of the settings: a client of each over a bounded way to its server, and all of them as one."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import httpx
from llama_index.core.llms import LLM
from pydantic import AnyHttpUrl, SecretStr

from ragrack.balanced import Balanced
from ragrack.fallback import FallbackLLM
from ragrack.settings import Settings
from ragrack.upstream import Policy, Upstream


@dataclass(frozen=True)
class LLMs:
    """`llm` is None where none is configured; `http` is the first one's client."""

    llm: LLM | None
    http: httpx.AsyncClient | None


@contextlib.asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[LLMs]:
    """Closed when the block ends. Of one event loop: enter it after the fork."""
    llms: dict[str, LLM] = {}
    clients: list[httpx.AsyncClient] = []
    async with contextlib.AsyncExitStack() as stack:
        for name, at in (("llm", _first(settings)), ("llm_fallback", _second(settings))):
            if at is not None:
                transport = _transport(name, at, settings)
                client = await stack.enter_async_context(_client(at, transport, settings))
                clients.append(client)
                ollama = at.provider == "ollama"
                llms[name] = _ollama(at, transport, settings) if ollama else _openai_like(at, client, settings)
        yield LLMs(
            llm=FallbackLLM.over(llms, settings.llm_timeout) if llms else None, http=clients[0] if clients else None
        )


@dataclass(frozen=True)
class _Endpoint:
    provider: str
    url: str
    model: str
    key: str
    also_at: tuple[str, ...] = ()


def _first(settings: Settings) -> _Endpoint | None:
    at = _endpoint(settings.llm_provider, settings.llm_base_url, settings.llm_model, settings.llm_api_key)
    return at and replace(at, also_at=tuple(map(str, settings.llm_also_at)))


def _second(settings: Settings) -> _Endpoint | None:
    provider, url = settings.llm_fallback_provider, settings.llm_fallback_base_url
    return _endpoint(provider, url, settings.llm_fallback_model, settings.llm_fallback_api_key)


def _endpoint(provider: str, url: AnyHttpUrl | None, model: str | None, key: SecretStr | None) -> _Endpoint | None:
    if url is None or model is None:
        return None
    # The client insists on a key; servers that ask for none ignore it.
    return _Endpoint(provider, str(url).rstrip("/"), model, key.get_secret_value() if key else "none")


def _transport(name: str, at: _Endpoint, settings: Settings) -> httpx.AsyncBaseTransport:
    policy = Policy.of(settings, settings.llm_timeout)
    return Balanced(name, [at.url, *at.also_at], policy) if at.also_at else Upstream(name, policy)


def _client(at: _Endpoint, transport: httpx.AsyncBaseTransport, settings: Settings) -> httpx.AsyncClient:
    """Readiness asks it for `models`, which Ollama has too."""
    return httpx.AsyncClient(
        base_url=at.url + ("/v1/" if at.provider == "ollama" else "/"),
        timeout=settings.llm_timeout,
        headers={"Authorization": f"Bearer {at.key}"},
        transport=transport,
    )


def _openai_like(at: _Endpoint, client: httpx.AsyncClient, settings: Settings) -> LLM:
    # Importing OpenAI's client takes half a second, which services without an LLM need not wait for.
    from llama_index.llms.openai_like import OpenAILike

    llm: LLM = OpenAILike(
        model=at.model,
        api_base=at.url,
        api_key=at.key,
        is_chat_model=True,
        context_window=settings.context_window,
        max_tokens=settings.num_output,
        timeout=settings.llm_timeout,
        # Tried again by the transport, which knows how much time there is.
        max_retries=0,
        # For the metrics' tokens; left out where nothing is streamed.
        additional_kwargs={"stream_options": {"include_usage": True}},
        async_http_client=client,
    )
    return llm


def _ollama(at: _Endpoint, transport: httpx.AsyncBaseTransport, settings: Settings) -> LLM:
    from llama_index.llms.ollama import Ollama
    from ollama import AsyncClient

    # Without a key of its own it would take one out of the environment.
    headers = {"Authorization": f"Bearer {at.key}"}
    client = AsyncClient(
        at.url, transport=transport, timeout=settings.llm_timeout, headers=headers, follow_redirects=False
    )
    llm: LLM = Ollama(
        model=at.model,
        base_url=at.url,
        async_client=client,
        context_window=settings.context_window,
        request_timeout=settings.llm_timeout,
        additional_kwargs={"num_predict": settings.num_output},
    )
    return llm
