"""The parts of LlamaIndex that the settings name, each behind a server on a real socket where it is one; and that no
request changes any of LlamaIndex's globals.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import llama_index.core
import pytest
from llama_index.core import Settings as LlamaSettings
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.node_parser import SentenceSplitter, TokenTextSplitter
from llama_index.core.prompts.default_prompts import DEFAULT_TEXT_QA_PROMPT
from ragrack.api import create_app
from ragrack.embedding import MiniLMEmbedding
from ragrack.ingest import IngestError, ingest
from ragrack.llama import WindowHelper, globals_sealed
from ragrack.parts import node_parser, open_embedding, tokenizer
from ragrack.remote import EmbeddingUnavailableError, RemoteEmbedding
from ragrack.settings import Settings

from .conftest import running_app
from .faulty import Call, faulty_upstream, status

QUESTION = "How far can the light be seen?"


class EmbeddingServer:
    """The embedding model of the release behind an OpenAI-like API; its vectors are made twice as long."""

    def __init__(self, model: MiniLMEmbedding) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.broken = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(asked)
                server.keys.append(self.headers["Authorization"])
                texts = asked["input"] if isinstance(asked["input"], list) else [asked["input"]]
                data = [
                    {"object": "embedding", "index": n, "embedding": [2 * x for x in model.get_text_embedding(text)]}
                    for n, text in enumerate(texts)
                ]
                usage = {"prompt_tokens": 1, "total_tokens": 1}
                body = json.dumps({"object": "list", "model": "m", "data": data, "usage": usage}).encode()
                self.send_response(server.broken or 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the base class
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(embedding: MiniLMEmbedding) -> Iterator[EmbeddingServer]:
    server = EmbeddingServer(embedding)
    yield server
    server.stop()


def changed(settings: Settings, **changes: Any) -> Settings:
    return Settings.model_validate(settings.model_dump() | changes)


def behind(settings: Settings, server: EmbeddingServer, **changes: Any) -> Settings:
    at = {"embed_provider": "openai_like", "embed_base_url": server.url, "embed_model": "m", "embed_dimensions": 384}
    return changed(settings, **at, embed_api_key="swordfish", **changes)


async def test_a_collection_is_embedded_and_asked_by_a_model_behind_an_api(
    settings: Settings, server: EmbeddingServer
) -> None:
    remote = behind(settings, server)
    snapshot = ingest(remote, "island", lambda *_a, **_m: None)
    assert snapshot.manifest.built_with["embedding"] == "m"
    async with running_app(create_app(remote)) as client:
        answer = (await client.post("/query", json={"query": QUESTION})).json()
    assert answer["sources"][0]["document"] == "lighthouse.md"
    # Of unit vectors, though the server's are not.
    assert 0.3 < answer["sources"][0]["score"] <= 1.001
    assert set(server.keys) == {"Bearer swordfish"}
    assert all("dimensions" not in request for request in server.requests)


async def test_where_that_model_is_down_questions_are_answered_503_and_an_ingest_says_so(
    settings: Settings, server: EmbeddingServer
) -> None:
    remote = behind(settings, server)
    ingest(remote, "island", lambda *_a, **_m: None)
    server.broken = 500
    (settings.documents_dir / "island/new.md").write_text("# New\n\nThe harbour has a new crane.\n")
    with pytest.raises(IngestError, match="embedding model cannot be asked"):
        ingest(remote, "island", lambda *_a, **_m: None)
    async with running_app(create_app(remote)) as client:
        answer = await client.post("/query", json={"query": QUESTION})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        checks = {check["name"]: check for check in (await client.get("/readyz")).json()["checks"]}
        assert not checks["embedding"]["ok"]
        server.broken = 0
        assert (await client.post("/query", json={"query": QUESTION})).status_code == 200


async def test_that_model_is_asked_again_and_left_alone_while_it_is_down(
    settings: Settings, server: EmbeddingServer
) -> None:
    remote = behind(settings, server, llm_retries=1, llm_breaker_failures=4)
    ingest(remote, "island", lambda *_a, **_m: None)
    async with running_app(create_app(remote)) as client:
        server.broken, before = 503, len(server.requests)
        for _ in range(4):
            assert (await client.post("/query", json={"query": QUESTION})).status_code == 503
        assert len(server.requests) == before + 4
        page = (await client.get("/metrics")).text
    assert 'ragrack_upstream_attempts_total{outcome="breaker open",upstream="embedding"}' in page


def test_vectors_of_another_length_are_refused(settings: Settings, server: EmbeddingServer) -> None:
    embedding = open_embedding(changed(behind(settings, server), embed_dimensions=768), 1)
    with pytest.raises(EmbeddingUnavailableError, match=r"384 dimensions.*RAGRACK_EMBED_DIMENSIONS=768"):
        embedding.get_text_embedding("text")
    embedding.close()


def test_tokens_are_counted_without_a_download(settings: Settings, server: EmbeddingServer) -> None:
    embedding = open_embedding(behind(settings, server), 1)
    assert isinstance(embedding, RemoteEmbedding)
    assert len(embedding.tokens("The lamp is lit. <|endoftext|>")) > 5
    assert server.requests == []
    own = tokenizer(changed(settings, tokenizer=settings.embed_model_dir / "tokenizer.json"), embedding)
    assert own("lamp") != embedding.tokens("lamp")
    embedding.close()


def test_the_globals_are_what_the_settings_say(settings: Settings, embedding: MiniLMEmbedding) -> None:
    before = dict(vars(LlamaSettings)), llama_index.core.global_tokenizer
    said = changed(settings, chunk_size=100, chunk_overlap=10, context_window=4000, num_output=77, node_parser="token")

    def words(text: str) -> list[int]:
        return [0] * len(text.split())

    with globals_sealed(said, embedding.tokens, words):
        assert isinstance(LlamaSettings.node_parser, TokenTextSplitter)
        assert LlamaSettings.text_splitter is LlamaSettings.node_parser
        assert LlamaSettings.transformations == [LlamaSettings.node_parser]
        assert (LlamaSettings.chunk_size, LlamaSettings.chunk_overlap) == (100, 10)
        assert (LlamaSettings.context_window, LlamaSettings.num_output) == (4000, 77)
        assert LlamaSettings.tokenizer is words
    assert (dict(vars(LlamaSettings)), llama_index.core.global_tokenizer) == before
    assert isinstance(node_parser(settings, embedding.tokens), SentenceSplitter)


@pytest.mark.parametrize("window", [2048, 400])
def test_text_goes_to_the_llm_packed_as_llama_index_packs_it(embedding: MiniLMEmbedding, window: int) -> None:
    parts: dict[str, Any] = {"context_window": window, "num_output": 64, "chunk_size_limit": None}
    parts["tokenizer"] = embedding.tokens
    prompt = DEFAULT_TEXT_QA_PROMPT.partial_format(query_str="What is there?")
    nodes = [f" Page {number}: {'a well and a harbour, ' * 20}\n" for number in range(4)]
    packed = WindowHelper(**parts).repack(prompt, nodes)
    assert packed == PromptHelper(**parts).repack(prompt, nodes)
    assert (len(packed) == 1) == (window == 2048)


async def test_no_request_changes_a_global(settings: Settings) -> None:
    """Not one of LlamaIndex's, nor of ours: whatever is asked, and also where the LLM fails."""
    async with faulty_upstream() as llm:
        llm_there = changed(settings, llm_base_url=llm.url, llm_model="m", ingests=True)
        async with running_app(create_app(llm_there)) as client:
            await ask_everything(client)
            before = state()
            await ask_everything(client)
            assert state() == before


async def ask_everything(client: Any) -> None:
    question = {"query": QUESTION}
    messages = [{"role": "user", "content": QUESTION}]
    for path in ("/", "/healthz", "/readyz", "/version", "/openapi.json", "/v1/models", "/documents/island/ferry.html"):
        await client.get(path)
    for answer in ("extractive", "generate"):
        for stream in (False, True):
            await client.post("/query", json=question | {"answer": answer, "stream": stream})
            await client.post("/chat", json={"messages": messages, "answer": answer, "stream": stream})
    for stream in (False, True):
        await client.post("/v1/chat/completions", json={"model": "island", "messages": messages, "stream": stream})
    await client.post("/v1/embeddings", json={"model": "all-minilm-l6-v2", "input": QUESTION})
    await client.post("/retrieve", json=question | {"top_k": 1})
    await client.post("/query", json={"query": ""})
    await client.post("/query", json=question | {"collection": "empty"})


def state() -> dict[str, Any]:
    """LlamaIndex's globals, as they are and what is in them."""
    settings = vars(LlamaSettings)
    parts = {name: (id(part), repr(getattr(part, "__dict__", part))) for name, part in settings.items()}
    module = {name: id(value) for name, value in vars(llama_index.core).items() if name.startswith("global_")}
    return {"class": type(LlamaSettings).__name__, "settings": parts, "module": module}


async def test_hooks_change_what_is_retrieved(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "hooks.py"
    path.write_text(
        "class OnlyFerry:\n"
        "    async def apostprocess_nodes(self, nodes, query_bundle):\n"
        "        return [node for node in nodes if 'ferry' in node.node.metadata['document']]\n"
        "def node_postprocessors():\n"
        "    return [OnlyFerry()]\n"
    )
    async with running_app(create_app(changed(settings, hooks=str(path)))) as client:
        sources = (await client.post("/query", json={"query": "the ferry to Skarholm"})).json()["sources"]
    assert {source["document"] for source in sources} == {"ferry.html"}


OLLAMA = [
    {
        "model": "m",
        "created_at": "2026-01-01T00:00:00Z",
        "message": {"role": "assistant", "content": "Nineteen "},
        "done": False,
    },
    {
        "model": "m",
        "created_at": "2026-01-01T00:00:00Z",
        "message": {"role": "assistant", "content": "miles."},
        "done": False,
    },
    {"model": "m", "created_at": "2026-01-01T00:00:00Z", "message": {"role": "assistant", "content": ""}, "done": True},
]


@pytest.mark.parametrize("role", ["llm", "llm_fallback"])
async def test_an_ollama_server_answers_first_or_second(settings: Settings, role: str) -> None:
    async def chat(call: Call) -> None:
        if call.body["stream"]:
            body = b"".join(json.dumps(part).encode() + b"\n" for part in OLLAMA)
            await call.head(200, Content_Type="application/x-ndjson", Content_Length=str(len(body)))
        else:
            whole = OLLAMA[0] | {"message": {"role": "assistant", "content": "Nineteen miles."}, "done": True}
            body = json.dumps(whole).encode()
            await call.head(200, Content_Type="application/json", Content_Length=str(len(body)))
        await call.send(body)

    async with faulty_upstream() as ollama, faulty_upstream() as down:
        ollama.default, down.default = chat, status(400)
        root = ollama.url.removesuffix("/v1")
        at = {f"{role}_provider": "ollama", f"{role}_base_url": root, f"{role}_model": "m"}
        first = {"llm_base_url": down.url, "llm_model": "m"} if role == "llm_fallback" else {}
        async with running_app(
            create_app(changed(settings, **first, **at, num_output=77, answer="generate"))
        ) as client:
            answer = (await client.post("/query", json={"query": QUESTION})).json()
            assert (answer["answer"], answer["response"]) == ("generate", "Nineteen miles.")
            streamed = await client.post("/query", json={"query": QUESTION, "stream": True})
            assert "Nineteen " in streamed.text
            checks = {check["name"]: check for check in (await client.get("/readyz")).json()["checks"]}
            assert checks["llm"]["ok"]
    options = ollama.calls[0].body["options"]
    assert (options["num_ctx"], options["num_predict"]) == (2048, 77)


def vllm(delta: dict[str, object], finish: str | None = None, **more: object) -> bytes:
    """An event as vLLM sends it: with fields of its own, and no usage before the last."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, "token_ids": None}
    choice |= {"stop_reason": None} if finish else {}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "Qwen/Qwen3-8B"}
    return b"data: " + json.dumps(chunk | {"choices": [choice], "prompt_token_ids": None} | more).encode() + b"\n\n"


async def test_a_vllm_server_answers(settings: Settings) -> None:
    usage = {"prompt_tokens": 30, "total_tokens": 33, "completion_tokens": 3, "prompt_tokens_details": None}
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "Nineteen miles.",
        "refusal": None,
        "annotations": None,
        "audio": None,
    }
    message |= {"function_call": None, "tool_calls": [], "reasoning_content": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    whole = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "Qwen/Qwen3-8B"}
    whole |= {"choices": [choice], "usage": usage, "service_tier": None, "system_fingerprint": None}
    whole |= {"prompt_logprobs": None, "kv_transfer_params": None}
    events = [
        vllm({"role": "assistant", "content": ""}),
        vllm({"content": "Nineteen "}),
        vllm({"content": "miles.", "reasoning_content": None}),
        vllm({"content": ""}, "stop"),
        vllm({}, choices=[], usage=usage),
        b"data: [DONE]\n\n",
    ]

    async def chat(call: Call) -> None:
        streams = call.body.get("stream", False)
        body = b"".join(events) if streams else json.dumps(whole).encode()
        kind = "text/event-stream; charset=utf-8" if streams else "application/json"
        await call.head(200, Content_Type=kind, Content_Length=str(len(body)))
        await call.send(body)

    async with faulty_upstream() as server:
        server.default = chat
        at = {"llm_base_url": server.url, "llm_model": "Qwen/Qwen3-8B", "answer": "generate"}
        async with running_app(create_app(changed(settings, **at))) as client:
            answer = (await client.post("/query", json={"query": QUESTION})).json()
            streamed = (await client.post("/query", json={"query": QUESTION, "stream": True})).text
    assert (answer["answer"], answer["response"], answer["degraded"]) == ("generate", "Nineteen miles.", False)
    assert "Nineteen " in streamed
    assert "error" not in streamed
    assert {call.body["model"] for call in server.calls} == {"Qwen/Qwen3-8B"}
