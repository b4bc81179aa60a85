"""The same service in the words of OpenAI's API, so that clients written for it ask ours unchanged.

A model is a collection. An answer is that of `/chat`: its sources come with it, in a field of their own (`sources`),
and in a stream with the first chunk. What steers a model's writing (temperature, tools, a system prompt...) is the
service's own to set, and is not looked at. Errors have OpenAI's form, by their path: see `ragrack.problems`.
"""

from __future__ import annotations

import base64
import logging
import struct
import time
import uuid
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from llama_index.core.base.llms.types import ChatMessage
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, StringConstraints, field_validator

from ragrack import problems, sse
from ragrack.access import Reader
from ragrack.filters import RequestFilters
from ragrack.problems import ProblemError
from ragrack.routes.ask import MAX_CHAT_BYTES, MAX_TURN_CHARACTERS, MAX_TURNS
from ragrack.routes.common import MAX_QUERY_CHARACTERS, Configured, Service, SourceModel, refusals
from ragrack.service import QueryService, Question, Streamed
from ragrack.settings import Settings

log = logging.getLogger(__name__)

MAX_INPUTS = 256
MAX_INPUT_CHARACTERS = 16_000
OWNER = "ragrack"

ERRORS = problems.openai_responses(
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)

router = APIRouter(prefix="/v1", tags=["OpenAI"])


class TextPart(BaseModel):
    type: Literal["text"]
    text: Annotated[StrictStr, StringConstraints(max_length=MAX_TURN_CHARACTERS)]


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: (
        Annotated[StrictStr, StringConstraints(max_length=MAX_TURN_CHARACTERS)]
        | Annotated[list[TextPart], Field(max_length=MAX_TURNS)]
        | None
    ) = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content).strip()
        return (self.content or "").strip()


class StreamOptions(BaseModel):
    include_usage: StrictBool = False


class CompletionRequest(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: StrictStr = Field(description="The collection to answer from.", examples=["postgres"])
    messages: list[Message] = Field(
        min_length=1,
        max_length=MAX_TURNS,
        description="The conversation; the user's last message is the question.",
        examples=[[{"role": "user", "content": "How do I make a partial index?"}]],
    )
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    top_k: Annotated[StrictInt, Field(ge=1, le=50)] | None = Field(None, description="Not OpenAI's: as at /query.")
    filters: RequestFilters | None = Field(None, description="Not OpenAI's: as at /query.")

    @field_validator("messages")
    @classmethod
    def _ends_with_a_question(cls, messages: list[Message]) -> list[Message]:
        if messages[-1].role != "user" or not messages[-1].text():
            raise ValueError("the last one must be the user's, with a text")
        if len(messages[-1].text()) > MAX_QUERY_CHARACTERS:
            raise ValueError(f"the last one has more than {MAX_QUERY_CHARACTERS} characters")
        return messages


class Usage(BaseModel):
    """Tokens as the embedding model counts them: those of the messages, and of the answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int = 0
    message: CompletionMessage
    finish_reason: Literal["stop"] = "stop"
    logprobs: None = None


class Completion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    sources: list[SourceModel] = Field(description="Not OpenAI's: what the answer was made from.")
    degraded: bool = Field(description="Not OpenAI's: the LLM was to answer and could not.")


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = OWNER


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


Input = Annotated[StrictStr, StringConstraints(min_length=1, max_length=MAX_INPUT_CHARACTERS)]


class EmbeddingsRequest(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: StrictStr = Field(description="The embedding model, as /v1/models names it.", examples=["all-minilm-l6-v2"])
    input: Input | Annotated[list[Input], Field(min_length=1, max_length=MAX_INPUTS)] = Field(
        description="A text or several.", examples=["How do I make a partial index?"]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: StrictInt | None = Field(None, description="If given, those that the model has.")

    @field_validator("input", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        # Clients that send ids take them from OpenAI's tokenizer: to this model they would mean other words.
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, int | list):
            raise ValueError("must be texts, not token ids (in LangChain: check_embedding_ctx_length=False)")
        return value


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


@router.get("/models", responses=ERRORS)
async def models(_: Reader, service: Service, settings: Configured) -> ModelList:
    """The collections, and the embedding model."""
    return ModelList(data=[Model(id=name) for name in _models(service, settings)])


@router.get("/models/{model}", responses=ERRORS)
async def model_by_name(_: Reader, model: str, service: Service, settings: Configured) -> Model:
    if model not in _models(service, settings):
        raise _no_model(model)
    return Model(id=model)


@router.post(
    "/chat/completions",
    response_model=Completion,
    responses={**ERRORS, 200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    max_body_size=MAX_CHAT_BYTES,
)
async def chat_completions(caller: Reader, body: CompletionRequest, service: Service, settings: Configured) -> Any:
    """Answers the last message from the collection that `model` names."""
    if body.model not in settings.collections:
        raise _no_model(body.model)
    turns = [
        ChatMessage(role=message.role, content=text)
        for message in body.messages
        if message.role in ("user", "assistant") and (text := message.text())
    ]
    asked = sum(service.tokens(turn.content or "") for turn in turns)
    with refusals(body.model):
        text, failed = await service.condense(turns, settings.answer)
        filters = body.filters.as_llama_index() if body.filters else None
        question = Question(text, caller, body.model, body.top_k or settings.top_k, filters)
        if body.stream:
            with_usage = asked if body.stream_options and body.stream_options.include_usage else None
            streamed = await service.stream(question, settings.answer)
            return sse.stream(_chunks(streamed, body.model, failed, service, with_usage))
        answer = await service.query(question, settings.answer)
    answered = service.tokens(answer.response)
    return Completion(
        id=_id(),
        created=int(time.time()),
        model=body.model,
        choices=[Choice(message=CompletionMessage(content=answer.response))],
        usage=Usage(prompt_tokens=asked, completion_tokens=answered, total_tokens=asked + answered),
        sources=[SourceModel.of(source) for source in answer.sources],
        degraded=answer.degraded or failed,
    )


@router.post("/embeddings", responses=ERRORS, max_body_size=MAX_CHAT_BYTES)
async def embeddings(_: Reader, body: EmbeddingsRequest, service: Service) -> Embeddings:
    """Vectors of unit length, by the model that the collections were embedded with."""
    if body.model != service.embedding_model:
        raise _no_model(body.model)
    texts = [body.input] if isinstance(body.input, str) else body.input
    with refusals(body.model):
        vectors = await service.embed(texts)
    if body.dimensions not in (None, len(vectors[0])):
        raise ProblemError(
            HTTPStatus.BAD_REQUEST,
            f"This model has {len(vectors[0])} dimensions, no others.",
            [("dimensions", f"must be {len(vectors[0])}")],
        )
    count = sum(service.tokens(text) for text in texts)
    return Embeddings(
        data=[
            Embedding(index=index, embedding=_base64(vector) if body.encoding_format == "base64" else vector)
            for index, vector in enumerate(vectors)
        ],
        model=body.model,
        usage=EmbeddingsUsage(prompt_tokens=count, total_tokens=count),
    )


def _models(service: QueryService, settings: Settings) -> list[str]:
    return [*settings.collections, *([service.embedding_model] if service.embedding_model else [])]


def _no_model(name: str) -> ProblemError:
    detail = f"There is no model {name!r} for this; GET /v1/models lists those there are."
    return ProblemError(HTTPStatus.NOT_FOUND, detail, [("model", "is not there")])


def _id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")


async def _chunks(
    streamed: Streamed, model: str, condensing_failed: bool, service: QueryService, with_usage: int | None
) -> AsyncGenerator[sse.Event, None]:
    answer = streamed.answer
    common = {"id": _id(), "object": "chat.completion.chunk", "created": int(time.time()), "model": model}

    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> sse.Event:
        choices = [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]
        return sse.Event(common | {"choices": choices} | more)

    sources = [SourceModel.of(source).model_dump() for source in answer.sources]
    yield chunk({"role": "assistant", "content": ""}, sources=sources)
    try:
        with refusals(model):
            async for token in streamed.tokens:
                yield chunk({"content": token})
    except ProblemError as problem:
        yield sse.Event(problem.openai_error())
        return
    except Exception:
        log.exception("a stream failed")
        yield sse.Event(problems.INTERNAL.openai_error())
        return
    finally:
        await streamed.tokens.aclose()
    yield chunk({}, "stop", degraded=answer.degraded or condensing_failed)
    if with_usage is not None:
        answered = service.tokens(answer.response)
        usage = Usage(prompt_tokens=with_usage, completion_tokens=answered, total_tokens=with_usage + answered)
        yield sse.Event(common | {"choices": [], "usage": usage.model_dump()})
    yield sse.Event("[DONE]")
