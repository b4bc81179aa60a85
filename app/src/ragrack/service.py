"""A question's way: embed it, retrieve nodes from the live snapshot, and answer by their sentences or by the LLM.

Retriever, optimizer and synthesizer are LlamaIndex's, made for each request; what is shared is the embedding model,
the open snapshots and the LLM's client. All of it is opened after the fork, in the worker that uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import httpx
from llama_index.core import Settings as LlamaSettings
from llama_index.core import VectorStoreIndex
from llama_index.core.indices.vector_store import VectorIndexRetriever
from llama_index.core.llms import LLM, MockLLM
from llama_index.core.postprocessor import SentenceEmbeddingOptimizer, SimilarityPostprocessor
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.response_synthesizers.context_only import ContextOnly
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.vector_stores.types import BasePydanticVectorStore
from pydantic import AnyHttpUrl, SecretStr

from ragrack import logging as logging_context
from ragrack import metrics, tracing
from ragrack.embedding import MiniLMEmbedding
from ragrack.fallback import FallbackLLM
from ragrack.fingerprint import Fingerprint, ModelError
from ragrack.handle import IndexHandle, IndexUnavailableError
from ragrack.health import Check
from ragrack.instrument import instrumented
from ragrack.llama import GlobalFallbackError, globals_sealed
from ragrack.sentences import split_sentences
from ragrack.settings import Settings
from ragrack.snapshot import SnapshotDir
from ragrack.upstream import Policy, Upstream, retry_after

log = logging.getLogger(__name__)

AnswerMode = Literal["extractive", "generate"]

I_DONT_KNOW = "I don't know: nothing in the documents is close enough to this question."
# The best nodes hold the answer, and each one embedded sentence by sentence costs a worker some 10 ms.
EXTRACT_NODES = 3
EXTRACT_SHARE = 0.25
POOL_THREADS = 4
# What the synthesizer gives when the LLM's answer was no JSON, or not of its form: it keeps such errors to itself.
LLAMAINDEX_EMPTY = "Empty Response"


class NotReadyError(Exception):
    """The service cannot answer now: no snapshot of the collection is open, or the embedding model is not."""


class LLMUnavailableError(Exception):
    """The LLM failed, and the settings want no other answer. `retry_after`: seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the LLM failed")
        self.retry_after = retry_after


class NoLLMError(Exception):
    """A generated answer was asked for, and no LLM is configured."""


@dataclass(frozen=True)
class Source:
    """A retrieved node. `start` and `end` are offsets of characters in the document's text; score is a cosine."""

    document: str
    title: str | None
    score: float
    start: int | None
    end: int | None
    text: str


@dataclass
class Answer:
    response: str
    sources: list[Source]
    mode: AnswerMode
    degraded: bool = False
    timings_ms: dict[str, float] = field(default_factory=dict)


class QueryService:
    """Make it with `running`."""

    def __init__(
        self,
        settings: Settings,
        embedding: MiniLMEmbedding | None,
        fingerprint: str | None,
        handles: Mapping[str, IndexHandle],
        llm: LLM | None,
        llm_http: httpx.AsyncClient | None,
    ) -> None:
        self._settings = settings
        self._embedding = embedding
        self.fingerprint = fingerprint
        self._handles = handles
        self._llm = llm
        self._llm_http = llm_http
        self._indexes: dict[str, tuple[BasePydanticVectorStore, VectorStoreIndex]] = {}

    @property
    def snapshots(self) -> dict[str, str | None]:
        """By collection, the id of the snapshot that answers."""
        return {
            name: self._handles[name].snapshot_id if name in self._handles else None
            for name in self._settings.collections
        }

    async def query(self, question: str, collection: str, top_k: int, mode: AnswerMode) -> Answer:
        """Raises NotReadyError, NoLLMError, LLMUnavailableError. `collection` is one of the settings'."""
        if mode == "generate" and self._llm is None:
            raise NoLLMError
        if self._embedding is None:
            raise NotReadyError
        clock = _Clock()
        bundle = QueryBundle(question, embedding=await self._embedding.aget_query_embedding(question))
        clock.lap("embed")
        nodes = await self._retrieve(bundle, collection, top_k)
        clock.lap("retrieve")
        answer = Answer(I_DONT_KNOW, [_source(node) for node in nodes], mode)
        if nodes:
            await self._answer(answer, bundle, nodes)
        metrics.ANSWERS.labels(answer.mode, str(answer.degraded).lower()).inc()
        clock.lap("answer")
        answer.timings_ms = clock.laps()
        return answer

    async def _retrieve(self, bundle: QueryBundle, collection: str, top_k: int) -> list[NodeWithScore]:
        try:
            with self._handles[collection].use() as opened:
                logging_context.bind(snapshot=opened.snapshot.id)
                index = self._index(collection, opened.store)
                retriever = VectorIndexRetriever(index, similarity_top_k=top_k, embed_model=self._embedding)
                nodes = await retriever.aretrieve(bundle)
        except IndexUnavailableError as error:
            raise NotReadyError from error
        # Synchronous on purpose: its async twin goes through a thread for a comparison of five numbers.
        return SimilarityPostprocessor(similarity_cutoff=self._settings.similarity_cutoff).postprocess_nodes(nodes)

    def _index(self, collection: str, store: BasePydanticVectorStore) -> VectorStoreIndex:
        known = self._indexes.get(collection)
        if known is None or known[0] is not store:
            known = store, VectorStoreIndex.from_vector_store(store, embed_model=self._embedding)
            self._indexes[collection] = known
        return known[1]

    async def _answer(self, answer: Answer, bundle: QueryBundle, nodes: list[NodeWithScore]) -> None:
        if answer.mode == "generate":
            try:
                answer.response = await self._generate(bundle, nodes)
            except GlobalFallbackError:
                raise
            except Exception as error:
                # Whatever the LLM or the way to it did, the passages are there and worth giving.
                log.warning("no LLM answered", extra={"fields": {"error": type(error).__name__}})
                if not self._settings.degrade:
                    raise LLMUnavailableError(retry_after(error)) from error
                answer.degraded = True
            else:
                return
        answer.mode = "extractive"
        answer.response = await self._extract(bundle, nodes)

    async def _extract(self, bundle: QueryBundle, nodes: list[NodeWithScore]) -> str:
        """The sentences of the best nodes that are nearest to the question, with the number of their source."""
        # Nodes of the text alone: the optimizer rewrites what it is given, and would take metadata for sentences.
        passages = [NodeWithScore(node=TextNode(text=n.text), score=n.score) for n in nodes[:EXTRACT_NODES]]
        optimizer = SentenceEmbeddingOptimizer(
            embed_model=self._embedding,
            percentile_cutoff=EXTRACT_SHARE,
            tokenizer_fn=_sentences,
            context_before=0,
            context_after=0,
        )
        passages = await optimizer.apostprocess_nodes(passages, bundle)
        for number, passage in enumerate(passages, start=1):
            passage.node.set_content(f"{passage.text} [{number}]")
        # This synthesizer asks no LLM but wants one; LlamaIndex's inert one keeps it from the global.
        response = await ContextOnly(llm=MockLLM()).asynthesize(bundle, passages)
        return str(response)

    async def _generate(self, bundle: QueryBundle, nodes: list[NodeWithScore]) -> str:
        synthesizer = get_response_synthesizer(
            llm=self._llm,
            prompt_helper=LlamaSettings.prompt_helper,
            chat_prompt_helper=LlamaSettings.chat_prompt_helper,
            response_mode=ResponseMode.COMPACT,
        )
        text = str(await synthesizer.asynthesize(bundle, nodes)).strip()
        if text in ("", LLAMAINDEX_EMPTY):
            raise ValueError("the LLM's answer is empty")
        return text

    def checks(self) -> list[Check]:
        """For /readyz. The LLM is not required: without it the answers are extractive, and say so."""
        checks = [
            Check("embedding", self._embedding_problem),
            *(Check(f"index:{name}", _IndexProbe(self._handles.get(name))) for name in self._settings.collections),
        ]
        if self._settings.answer == "generate":
            checks.append(Check("llm", self._llm_problem, required=False))
        return checks

    async def _embedding_problem(self) -> str | None:
        if self._embedding is None:
            return "the embedding model could not be loaded; the log says why; deploy the release again"
        await self._embedding.aget_query_embedding("ready?")
        return None

    async def _llm_problem(self) -> str | None:
        if self._llm_http is None:
            return "no LLM is configured: set RAGRACK_LLM_BASE_URL and RAGRACK_LLM_MODEL"
        try:
            response = await self._llm_http.get("models")
        except httpx.HTTPError as error:
            return f"the LLM's server cannot be reached ({type(error).__name__})"
        return None if response.is_success else f"the LLM's server answers /models with {response.status_code}"


@dataclass(frozen=True)
class _IndexProbe:
    handle: IndexHandle | None

    async def __call__(self) -> str | None:
        if self.handle is None:
            return "it cannot be looked for without the embedding model"
        # A snapshot that answers is enough, even while a newer one that `current` points at cannot be opened.
        return None if self.handle.snapshot_id is not None else self.handle.problem


class _Clock:
    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name], self._last = now - self._last, now

    def laps(self) -> dict[str, float]:
        return {name: round(s * 1000, 3) for name, s in (self._laps | {"total": self._last - self._start}).items()}


def _sentences(text: str) -> list[str]:
    """Those worth quoting: without line breaks, and without the fragments that headings and tables leave."""
    sentences = [" ".join(sentence.split()) for sentence in split_sentences(text)]
    return [sentence for sentence in sentences if sentence.count(" ") >= 3] or sentences


def _source(scored: NodeWithScore) -> Source:
    node = scored.node
    return Source(
        document=str(node.metadata.get("document", "")),
        title=node.metadata.get("title"),
        score=round(scored.score or 0.0, 4),
        start=getattr(node, "start_char_idx", None),
        end=getattr(node, "end_char_idx", None),
        text=scored.text,
    )


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[QueryService]:
    """The service, open until the block ends. Never raises for data: it starts unready, says why, and mends itself."""
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(tracing.exporting(settings))
        stack.enter_context(instrumented(settings.log_content))
        pool = stack.enter_context(ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="ragrack"))
        asyncio.get_running_loop().set_default_executor(pool)
        embedding = fingerprint = None
        handles: dict[str, IndexHandle] = {}
        try:
            fingerprint = Fingerprint.of(settings).digest
            embedding = await asyncio.to_thread(MiniLMEmbedding.load, settings.embed_model_dir, settings.embed_threads)
        except ModelError as error:
            log.error("the embedding model cannot be loaded: %s", error)
        else:
            stack.callback(embedding.close)
            stack.enter_context(globals_sealed(settings, embedding.tokens))
            for name in settings.collections:
                handle = IndexHandle(SnapshotDir(settings.index_dir, name, fingerprint))
                stack.callback(handle.close)
                await asyncio.to_thread(handle.poll)
                handles[name] = handle
                await stack.enter_async_context(_background(handle.watch()))
        llms, clients = {}, []
        for name, at in (("llm", _Endpoint.first(settings)), ("llm_fallback", _Endpoint.second(settings))):
            if at is not None:
                clients.append(await stack.enter_async_context(_llm_client(name, at, settings)))
                llms[name] = _llm(at, clients[-1], settings)
        llm = FallbackLLM.over(llms, settings.llm_timeout) if llms else None
        llm_http = clients[0] if clients else None
        await stack.enter_async_context(_background(_tell_ages(handles)))
        yield QueryService(settings, embedding, fingerprint, handles, llm, llm_http)


@contextlib.asynccontextmanager
async def _background(work: Coroutine[object, object, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _tell_ages(handles: Mapping[str, IndexHandle]) -> None:
    while True:
        for name, handle in handles.items():
            if handle.snapshot is not None:
                created = datetime.fromisoformat(handle.snapshot.manifest.created)
                metrics.SNAPSHOT_CREATED.labels(name).set(created.timestamp())
        await asyncio.sleep(1)


@dataclass(frozen=True)
class _Endpoint:
    """Where an LLM is asked. The client insists on a key; servers that ask for none ignore it."""

    url: str
    model: str
    key: str

    @classmethod
    def first(cls, settings: Settings) -> _Endpoint | None:
        return cls._of(settings.llm_base_url, settings.llm_model, settings.llm_api_key)

    @classmethod
    def second(cls, settings: Settings) -> _Endpoint | None:
        return cls._of(settings.llm_fallback_base_url, settings.llm_fallback_model, settings.llm_fallback_api_key)

    @classmethod
    def _of(cls, url: AnyHttpUrl | None, model: str | None, key: SecretStr | None) -> _Endpoint | None:
        if url is None or model is None:
            return None
        return cls(str(url).rstrip("/"), model, key.get_secret_value() if key else "none")


def _llm_client(name: str, at: _Endpoint, settings: Settings) -> httpx.AsyncClient:
    policy = Policy(
        timeout=settings.llm_timeout,
        in_flight=settings.llm_in_flight,
        queue=settings.llm_queue,
        retries=settings.llm_retries,
        breaker_failures=settings.llm_breaker_failures,
        breaker_seconds=settings.llm_breaker_seconds,
    )
    return httpx.AsyncClient(
        base_url=at.url + "/",
        timeout=settings.llm_timeout,
        headers={"Authorization": f"Bearer {at.key}"},
        transport=Upstream(name, policy),
    )


def _llm(at: _Endpoint, client: httpx.AsyncClient, settings: Settings) -> LLM:
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
        # The metrics' tokens; it is left out where nothing is streamed.
        additional_kwargs={"stream_options": {"include_usage": True}},
        async_http_client=client,
    )
    return llm
