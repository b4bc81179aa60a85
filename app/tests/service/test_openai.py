"""The OpenAI face, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from ragrack.settings import Settings

from .conftest import KEY, Running
from .test_ask import CHAT, OUTSIDE, QUESTION, StreamingLLM, llm, with_llm

__all__ = ["llm"]


def face(client: httpx.AsyncClient, key: str = KEY) -> openai.AsyncOpenAI:
    http = httpx.AsyncClient(transport=client._transport, base_url="http://service/v1")
    return openai.AsyncOpenAI(api_key=key, base_url="http://service/v1", http_client=http, max_retries=0)


@pytest.fixture
async def client_of_openai(client: httpx.AsyncClient) -> AsyncIterator[openai.AsyncOpenAI]:
    yield face(client)


async def test_a_collection_is_a_model_and_answers_with_its_sources(client_of_openai: openai.AsyncOpenAI) -> None:
    names = [model.id async for model in client_of_openai.models.list()]
    assert names == ["island", "empty", "all-minilm-l6-v2"]
    assert (await client_of_openai.models.retrieve("island")).owned_by == "ragrack"
    completion = await client_of_openai.chat.completions.create(
        model="island",
        messages=[{"role": "system", "content": "Talk like a pirate."}, {"role": "user", "content": QUESTION}],
        temperature=0.2,
    )
    assert "19 nautical miles" in (completion.choices[0].message.content or "")
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens > 20
    assert completion.model_extra
    assert completion.model_extra["sources"][0]["document"] == "lighthouse.md"
    assert completion.model_extra["degraded"] is False


async def test_a_stream_brings_its_sources_first_and_its_usage_if_asked(
    settings: Settings, run: Running, llm: StreamingLLM
) -> None:
    async with run(with_llm(settings, llm)) as client:
        stream = await face(client).chat.completions.create(
            model="island",
            messages=[{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    assert (chunks[0].model_extra or {})["sources"][0]["document"] == "lighthouse.md"
    text = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert [part for part in text if part] == ["Nine", "teen", " miles."]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens > 0


async def test_a_stream_that_breaks_off_raises_in_the_client(
    settings: Settings, run: Running, llm: StreamingLLM
) -> None:
    llm.fails_after = 1
    seen: list[str] = []
    async with run(with_llm(settings, llm)) as client:
        stream = await face(client).chat.completions.create(
            model="island", messages=[{"role": "user", "content": QUESTION}], stream=True
        )
        with pytest.raises(openai.APIError, match="broke off"):
            async for chunk in stream:
                seen += [chunk.choices[0].delta.content or ""]
    assert seen == ["", "Nine"]
    assert len(llm.asked) == 1


async def test_a_conversation_is_condensed(client_of_openai: openai.AsyncOpenAI) -> None:
    turns: Any = CHAT
    completion = await client_of_openai.chat.completions.create(model="island", messages=turns)
    assert "1862" in (completion.model_extra or {})["sources"][0]["text"]


async def test_nothing_found_is_not_answered_there_either(client_of_openai: openai.AsyncOpenAI) -> None:
    completion = await client_of_openai.chat.completions.create(
        model="island", messages=[{"role": "user", "content": OUTSIDE}]
    )
    assert (completion.choices[0].message.content or "").startswith("I don't know")
    assert (completion.model_extra or {})["sources"] == []


@pytest.mark.parametrize("ids", [[1, 2], [[1, 2], [3]]])
async def test_token_ids_of_another_model_are_refused_with_the_mend(
    client_of_openai: openai.AsyncOpenAI, ids: list[int] | list[list[int]]
) -> None:
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False") as refused:
        await client_of_openai.embeddings.create(model="all-minilm-l6-v2", input=ids)
    assert refused.value.param == "input"


async def test_embeddings_are_the_models_in_either_encoding(client_of_openai: openai.AsyncOpenAI) -> None:
    model = "all-minilm-l6-v2"
    # By default the client asks for base64 and decodes it.
    packed = await client_of_openai.embeddings.create(model=model, input=["a ferry", "a boat"])
    plain = await client_of_openai.embeddings.create(model=model, input="a ferry", encoding_format="float")
    assert len(packed.data) == 2
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert sum(x * x for x in plain.data[0].embedding) == pytest.approx(1, abs=1e-3)
    assert packed.usage.total_tokens > 0


ERRORS: list[tuple[type[openai.APIStatusError], str, dict[str, Any], str]] = [
    (openai.NotFoundError, "chat", {"model": "gpt-4", "messages": CHAT}, "model"),
    (openai.BadRequestError, "chat", {"model": "island", "messages": []}, "messages"),
    (openai.BadRequestError, "chat", {"model": "island", "messages": CHAT, "n": 2}, "n"),
    (openai.InternalServerError, "chat", {"model": "empty", "messages": CHAT}, ""),
    (openai.NotFoundError, "embeddings", {"model": "island", "input": "x"}, "model"),
    (openai.BadRequestError, "embeddings", {"model": "all-minilm-l6-v2", "input": "x", "dimensions": 7}, "dimensions"),
]


@pytest.mark.parametrize(("kind", "face_of", "body", "param"), ERRORS)
async def test_errors_are_what_the_client_knows(
    client_of_openai: openai.AsyncOpenAI, kind: type[openai.APIStatusError], face_of: str, body: Any, param: str
) -> None:
    resource = client_of_openai.chat.completions if face_of == "chat" else client_of_openai.embeddings
    with pytest.raises(kind) as raised:
        await resource.create(**body)
    error = raised.value
    assert isinstance(error.body, dict)
    assert error.body["message"]
    assert (error.param or "").startswith(param)
    assert error.body["request_id"] == error.response.headers["X-Request-ID"]


async def test_a_wrong_key_and_a_wrong_path_are_errors_of_that_form_too(client: httpx.AsyncClient) -> None:
    with pytest.raises(openai.AuthenticationError):
        await face(client, "wrong").chat.completions.create(
            model="island", messages=[{"role": "user", "content": QUESTION}]
        )
    response = await client.get("/v1/nowhere")
    assert response.status_code == 404
    assert response.json()["error"]["message"]
    too_large = await client.post("/v1/embeddings", content=b" " * 2_000_000)
    assert too_large.status_code == 413
    assert too_large.json()["error"]["type"] == "invalid_request_error"


async def test_leaving_a_stream_leaves_the_llm(settings: Settings, run: Running, llm: StreamingLLM) -> None:
    llm.waits_after = 1
    async with run(with_llm(settings, llm)) as client:
        body = {"model": "island", "messages": CHAT[:1], "stream": True}
        leaving = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await asyncio.wait_for(llm.waiting.wait(), 10)
        leaving.cancel()
        await asyncio.wait_for(llm.left.wait(), 10)
