"""A question's way: embed it, retrieve nodes from the live snapshot, and answer by their sentences or by the LLM.

Retriever, optimizer and synthesizer are LlamaIndex's, made for each request; what is shared is the embedding model,
the open snapshots and the LLM's client. All of it is opened after the fork, in the worker that uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import httpx
from llama_index.core import Settings as LlamaSettings
from llama_index.core import VectorStoreIndex
from llama_index.core.base.llms.generic_utils import messages_to_history_str
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.base.response.schema import AsyncStreamingResponse
from llama_index.core.chat_engine.condense_question import DEFAULT_PROMPT as CONDENSE_PROMPT
from llama_index.core.indices.vector_store import VectorIndexRetriever
from llama_index.core.llms import LLM, MockLLM
from llama_index.core.postprocessor import SentenceEmbeddingOptimizer
from llama_index.core.response_synthesizers import BaseSynthesizer, ResponseMode, get_response_synthesizer
from llama_index.core.response_synthesizers.context_only import ContextOnly
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.vector_stores.types import BasePydanticVectorStore, MetadataFilters, VectorStoreQueryMode

from ragrack import catalog, hooks, llms, metrics, tracing
from ragrack import logging as logging_context
from ragrack.auth import Identity
from ragrack.fingerprint import Fingerprint, ModelError
from ragrack.handle import IndexHandle, IndexUnavailableError
from ragrack.health import Check
from ragrack.instrument import instrumented
from ragrack.llama import GlobalFallbackError, globals_sealed
from ragrack.pages import UNITS
from ragrack.parts import Embedding, open_embedding, tokenizer
from ragrack.sentences import split_sentences
from ragrack.settings import Settings
from ragrack.snapshot import SnapshotError
from ragrack.tenants import within
from ragrack.upstream import retry_after

log = logging.getLogger(__name__)

AnswerMode = Literal["extractive", "generate"]

I_DONT_KNOW = "I don't know: nothing in the documents is close enough to this question."
# The best nodes hold the answer, and each one embedded sentence by sentence costs a worker some 10 ms.
EXTRACT_NODES = 3
EXTRACT_SHARE = 0.25
POOL_THREADS = 4
# Some 8 MB in each worker: the sentences of a few hundred nodes, and the questions that led to them.
VECTORS_KEPT = 4096
MODES = {"hybrid": VectorStoreQueryMode.HYBRID, "dense": VectorStoreQueryMode.DEFAULT}
QUESTION_CHARACTERS = 4000
# Of the LLM's window, when it condenses a conversation: its template, and the question it follows up.
CONDENSE_TOKENS = 200
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


class BrokenOffError(Exception):
    """The LLM failed after its first token: what is out cannot be taken back, and asking again would say it twice."""


@dataclass(frozen=True)
class Question:
    """`filters` are the request's; what the identity may see comes on top. `collection` is one of the settings'."""

    text: str
    identity: Identity
    collection: str
    top_k: int
    filters: MetadataFilters | None = None


@dataclass(frozen=True)
class Source:
    """A retrieved node. `start` and `end` are offsets of characters in the document's text; score is a cosine."""

    document: str
    title: str | None
    score: float
    start: int | None
    end: int | None
    text: str
    node_id: str
    metadata: dict[str, Any]
    page: int | None = None
    slide: int | None = None
    sheet: str | None = None


@dataclass
class Answer:
    response: str
    sources: list[Source]
    mode: AnswerMode
    degraded: bool = False
    timings_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Streamed:
    """An answer on its way: its sources are known, and `tokens`, read to its end, completes it."""

    answer: Answer
    tokens: AsyncGenerator[str, None]


class QueryService:
    """Make it with `running`."""

    def __init__(
        self,
        settings: Settings,
        embedding: Embedding | None,
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

    async def retrieve(self, question: Question) -> Answer:
        """The sources, and no response. Raises NotReadyError."""
        clock = _Clock()
        _, nodes = await self._find(question, clock)
        return Answer("", [_source(node) for node in nodes], "extractive", timings_ms=clock.laps())

    async def query(self, question: Question, mode: AnswerMode) -> Answer:
        """Raises NotReadyError, NoLLMError, LLMUnavailableError."""
        self._need_llm(mode)
        clock = _Clock()
        bundle, nodes = await self._find(question, clock)
        answer = Answer(I_DONT_KNOW, [_source(node) for node in nodes], mode)
        if nodes:
            await self._answer(answer, bundle, nodes)
        self._done(answer, clock)
        return answer

    async def stream(self, question: Question, mode: AnswerMode) -> Streamed:
        """Raises as `query`; its tokens raise LLMUnavailableError, and BrokenOffError after the first."""
        self._need_llm(mode)
        clock = _Clock()
        bundle, nodes = await self._find(question, clock)
        answer = Answer("" if nodes else I_DONT_KNOW, [_source(node) for node in nodes], mode)
        return Streamed(answer, self._tokens(answer, bundle, nodes, clock))

    async def condense(self, turns: Sequence[ChatMessage], mode: AnswerMode) -> tuple[str, bool]:
        """The last turn as a question that needs no other, and whether the LLM was to make it so and could not.

        Where no LLM is asked, the user's turn before it is put in front. Raises NoLLMError, LLMUnavailableError.
        """
        self._need_llm(mode)
        *history, last = turns
        question = last.content or ""
        earlier = [turn.content or "" for turn in history if turn.role == MessageRole.USER]
        if not earlier:
            return question, False
        failed = False
        if mode == "generate" and self._llm is not None:
            told = messages_to_history_str(self._recent(history, question))
            try:
                text = (await self._llm.apredict(CONDENSE_PROMPT, chat_history=told, question=question)).strip()
                if text:
                    return text[:QUESTION_CHARACTERS], False
            except GlobalFallbackError:
                raise
            except Exception as error:
                log.warning("no LLM condensed", extra={"fields": {"error": type(error).__name__}})
                if not self._settings.degrade:
                    raise LLMUnavailableError(retry_after(error)) from error
            failed = True
        return f"{earlier[-1]} {question}"[-QUESTION_CHARACTERS:], failed

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One after the other, so that questions are embedded between them. Raises NotReadyError."""
        if self._embedding is None:
            raise NotReadyError
        return [await self._embedding.aget_text_embedding(text) for text in texts]

    def tokens(self, text: str) -> int:
        """As the embedding model counts them."""
        return len(self._embedding.tokens(text)) if self._embedding is not None else 0

    @property
    def embedding_model(self) -> str | None:
        """The name that clients know it by."""
        return self._embedding.model_name.split("@")[0] if self._embedding is not None else None

    def _need_llm(self, mode: AnswerMode) -> None:
        if mode == "generate" and self._llm is None:
            raise NoLLMError

    def _recent(self, history: Sequence[ChatMessage], question: str) -> list[ChatMessage]:
        """The last turns that the LLM's window has room for."""
        room = self._settings.context_window - self._settings.num_output - CONDENSE_TOKENS - self.tokens(question)
        recent: list[ChatMessage] = []
        for turn in reversed(history):
            room -= self.tokens(turn.content or "")
            if room < 0:
                break
            recent.insert(0, turn)
        return recent

    def _done(self, answer: Answer, clock: _Clock) -> None:
        metrics.ANSWERS.labels(answer.mode, str(answer.degraded).lower()).inc()
        clock.lap("answer")
        answer.timings_ms = clock.laps()

    async def _find(self, question: Question, clock: _Clock) -> tuple[QueryBundle, list[NodeWithScore]]:
        if self._embedding is None:
            raise NotReadyError
        embedding = await self._embedding.aget_query_embedding(question.text)
        bundle = QueryBundle(question.text, embedding=embedding)
        clock.lap("embed")
        try:
            with self._handles[question.collection].use() as opened:
                logging_context.bind(snapshot=opened.snapshot.id)
                index = self._index(question.collection, opened.store)
                nodes = await self._retriever(index, question).aretrieve(bundle)
                for postprocessor in hooks.load(self._settings.hooks).node_postprocessors:
                    nodes = await postprocessor.apostprocess_nodes(nodes, bundle)
        except IndexUnavailableError as error:
            raise NotReadyError from error
        except SnapshotError as error:
            log.error("the index of %s does not answer: %s", question.collection, error)
            raise NotReadyError from error
        clock.lap("retrieve")
        return bundle, nodes

    def _retriever(self, index: VectorStoreIndex, question: Question) -> VectorIndexRetriever:
        """The only place where one is made: no way to a node goes past what its asker may see."""
        return VectorIndexRetriever(
            index,
            similarity_top_k=question.top_k,
            vector_store_query_mode=MODES[self._settings.retrieval],
            filters=within(question.identity, question.filters),
            embed_model=self._embedding,
            # In the store, as there the cut comes before the fusion: what is cut off takes no other's place.
            vector_store_kwargs={"similarity_cutoff": self._settings.similarity_cutoff},
        )

    async def _tokens(
        self, answer: Answer, bundle: QueryBundle, nodes: list[NodeWithScore], clock: _Clock
    ) -> AsyncGenerator[str, None]:
        if nodes and answer.mode == "generate":
            try:
                async with contextlib.aclosing(self._generate_stream(bundle, nodes)) as generated:
                    async for token in generated:
                        answer.response += token
                        yield token
            except GlobalFallbackError:
                raise
            except Exception as error:
                if answer.response:
                    log.warning("the LLM broke off", extra={"fields": {"error": type(error).__name__}})
                    raise BrokenOffError from error
                self._degrade(answer, error)
        elif not nodes:
            yield answer.response
        if not answer.response:
            answer.mode = "extractive"
            answer.response = await self._extract(bundle, nodes)
            yield answer.response
        self._done(answer, clock)

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
                self._degrade(answer, error)
            else:
                return
        answer.mode = "extractive"
        answer.response = await self._extract(bundle, nodes)

    def _degrade(self, answer: Answer, error: Exception) -> None:
        """Whatever the LLM or the way to it did, the passages are there and worth giving. Raises LLMUnavailableError
        where the settings want no other answer.
        """
        log.warning("no LLM answered", extra={"fields": {"error": type(error).__name__}})
        if not self._settings.degrade:
            raise LLMUnavailableError(retry_after(error)) from error
        answer.degraded = True

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
        text = str(await self._synthesizer(streaming=False).asynthesize(bundle, nodes)).strip()
        if text in ("", LLAMAINDEX_EMPTY):
            raise ValueError("the LLM's answer is empty")
        return text

    async def _generate_stream(self, bundle: QueryBundle, nodes: list[NodeWithScore]) -> AsyncGenerator[str, None]:
        response = await self._synthesizer(streaming=True).asynthesize(bundle, nodes)
        # It gives a plain response when the LLM's stream could not be begun, and keeps the error to itself.
        if not isinstance(response, AsyncStreamingResponse):
            raise TypeError("the LLM's answer is no stream")
        something = False
        async for token in response.async_response_gen():
            if token:
                something = True
                yield token
        if not something:
            raise ValueError("the LLM's answer is empty")

    def _synthesizer(self, *, streaming: bool) -> BaseSynthesizer:
        return get_response_synthesizer(
            llm=self._llm,
            prompt_helper=LlamaSettings.prompt_helper,
            chat_prompt_helper=LlamaSettings.chat_prompt_helper,
            response_mode=ResponseMode.COMPACT,
            streaming=streaming,
        )

    def checks(self) -> list[Check]:
        """For /readyz. The LLM is not required: without it the answers are extractive, and say so."""
        checks = [
            Check("embedding", self._embedding_problem),
            *(Check(f"index:{name}", _IndexProbe(self._handles.get(name))) for name in self._settings.collections),
            *(
                Check(f"snapshot:{name}", _SnapshotProbe(handle), required=False)
                for name, handle in self._handles.items()
            ),
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
        answers = self.handle.snapshot_id is not None and not self.handle.unavailable
        return None if answers else self.handle.problem


@dataclass(frozen=True)
class _SnapshotProbe:
    """Of a collection that answers: whether what answers is what should."""

    handle: IndexHandle

    async def __call__(self) -> str | None:
        answering = self.handle.snapshot_id
        if answering is None:
            return None
        if self.handle.problem is not None:
            return f"{answering} goes on answering, as what is live cannot be opened: {self.handle.problem}"
        if self.handle.pull_problem is not None:
            return f"{answering} goes on answering, as nothing newer could be fetched: {self.handle.pull_problem}"
        return None


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
        node_id=node.node_id,
        metadata=node.metadata,
        **{unit: node.metadata.get(unit) for unit in UNITS},
    )


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[QueryService]:
    """The service, open until the block ends. Never raises for data: it starts unready, says why, and mends itself."""
    async with contextlib.AsyncExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="ragrack"))
        asyncio.get_running_loop().set_default_executor(pool)
        await stack.enter_async_context(tracing.exporting(settings))
        stack.enter_context(instrumented(settings.log_content))
        embedding = fingerprint = None
        handles: dict[str, IndexHandle] = {}
        site = hooks.load(settings.hooks)
        try:
            fingerprint = Fingerprint.of(settings).digest
            embedding = await asyncio.to_thread(open_embedding, settings, settings.embed_threads, VECTORS_KEPT)
            llm_tokens = await asyncio.to_thread(tokenizer, settings, embedding)
        except ModelError as error:
            embedding = None
            log.error("the embedding model cannot be loaded: %s", error)
        else:
            stack.callback(embedding.close)
            stack.enter_context(globals_sealed(settings, embedding.tokens, llm_tokens, site.callback_handlers))
            for name in settings.collections:
                snapshots = catalog.snapshots(settings, name, fingerprint)
                handle = IndexHandle(snapshots, pulled=settings.index_source is not None)
                stack.callback(handle.close)
                await asyncio.to_thread(handle.poll)
                handles[name] = handle
                await stack.enter_async_context(_background(handle.watch()))
        models = await stack.enter_async_context(llms.opened(settings))
        await stack.enter_async_context(_background(_tell_snapshots(handles)))
        yield QueryService(settings, embedding, fingerprint, handles, models.llm, models.http)


@contextlib.asynccontextmanager
async def _background(work: Coroutine[object, object, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _tell_snapshots(handles: Mapping[str, IndexHandle]) -> None:
    while True:
        for name, handle in handles.items():
            metrics.SNAPSHOT_PROBLEM.labels(name, "live").set(handle.problem is not None)
            metrics.SNAPSHOT_PROBLEM.labels(name, "pull").set(handle.pull_problem is not None)
            if handle.snapshot is not None:
                created = datetime.fromisoformat(handle.snapshot.manifest.created)
                metrics.SNAPSHOT_CREATED.labels(name).set(created.timestamp())
        await asyncio.sleep(1)
