"""Sentence embeddings in this process: all-MiniLM-L6-v2, 8 bit, by onnxruntime. No torch."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import onnxruntime
from llama_index.core.base.embeddings.base import BaseEmbedding
from pydantic import PrivateAttr
from tokenizers import Tokenizer

from ragrack.fingerprint import ModelError, read_model_json

tenant: ContextVar[str | None] = ContextVar("tenant", default=None)
"""Whose request this is. A vector that one tenant's question left must not make another's faster: time tells, too."""


class _Kept:
    """The vectors asked for last, by tenant and text: 1.7 kB each, whatever the text's length."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._vectors: OrderedDict[bytes, np.ndarray[tuple[int], np.dtype[np.float32]]] = OrderedDict()

    def get(self, key: bytes) -> list[float] | None:
        with self._lock:
            vector = self._vectors.get(key)
            if vector is None:
                return None
            self._vectors.move_to_end(key)
        found: list[float] = vector.tolist()
        return found

    def put(self, key: bytes, vector: list[float]) -> None:
        if not self._most:
            return
        with self._lock:
            self._vectors[key] = np.array(vector, dtype=np.float32)
            while len(self._vectors) > self._most:
                self._vectors.popitem(last=False)


def _key(text: str) -> bytes:
    """Of this text for whom this context works; the pool's threads have no context of their own."""
    whose = json.dumps([tenant.get(), text]).encode()
    return hashlib.blake2b(whose, digest_size=16).digest()


class MiniLMEmbedding(BaseEmbedding):
    """384 numbers of unit length for a text; what is past its first 256 tokens is not seen.

    Each text is a run of its own on one core. That is faster than batches, which fit no cache, and a text's vector
    does not depend on its neighbours, as it does where they share the range of an 8-bit activation.
    """

    _session: onnxruntime.InferenceSession = PrivateAttr()
    _tokenizer: Tokenizer = PrivateAttr()
    _first: int = PrivateAttr()
    _last: int = PrivateAttr()
    _room: int = PrivateAttr()
    _pool: ThreadPoolExecutor = PrivateAttr()
    _kept: _Kept = PrivateAttr()

    @classmethod
    def load(cls, model_dir: Path, threads: int = 1, keep: int = 0) -> MiniLMEmbedding:
        """`threads` texts are embedded at a time, each on one core. Load it after a fork, never before.

        The vectors of the `keep` texts asked for last are kept: questions come again, and so do the sentences of the
        nodes that answer them. An ingest keeps none, as it embeds each text once.

        Raises ModelError when model_dir is not what `ragrack.build_minilm` writes.
        """
        model = read_model_json(model_dir)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        # An arena keeps the most that one text ever needed, for each thread.
        options.enable_cpu_mem_arena = False
        try:
            session = onnxruntime.InferenceSession(
                str(model_dir / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
            tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        except Exception as error:  # both libraries raise whatever their native code gives them
            raise ModelError(
                f"the embedding model in {model_dir} cannot be loaded: {error}. "
                "Build it again with `python -m ragrack.build_minilm`."
            ) from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # LlamaIndex takes a transformation's identity from its name: another model must not have this one's.
        embedding = cls(model_name=f"{model['name']}@{model['files']['model.onnx'][:12]}", embed_batch_size=256)
        embedding._session = session
        embedding._tokenizer = tokenizer
        embedding._first, embedding._last = tokenizer.encode("").ids
        embedding._room = model["max_tokens"] - 2
        embedding._pool = ThreadPoolExecutor(threads, thread_name_prefix="embed")
        embedding._kept = _Kept(keep)
        return embedding

    @classmethod
    def class_name(cls) -> str:
        return "MiniLMEmbedding"

    def tokens(self, text: str) -> list[int]:
        """All of the text's tokens, without the two that the model adds: what a SentenceSplitter counts by."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()

    def _remembered(self, text: str, key: bytes) -> list[float]:
        vector = self._kept.get(key)
        if vector is None:
            vector = self._embed(text)
            self._kept.put(key, vector)
        return vector

    def _embed(self, text: str) -> list[float]:
        ids = np.array([[self._first, *self.tokens(text)[: self._room], self._last]], dtype=np.int32)
        vector: list[float] = self._session.run(["embedding"], {"input_ids": ids})[0][0].tolist()
        return vector

    def _embed_all(self, texts: Sequence[str]) -> list[list[float]]:
        # The longest first: no core is left alone with one at the end.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        ordered = [texts[i] for i in order]
        vectors = dict(zip(order, self._pool.map(self._remembered, ordered, map(_key, ordered)), strict=True))
        return [vectors[i] for i in range(len(texts))]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._remembered(query, _key(query))

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._remembered(text, _key(text))

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embed_all(texts)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await self._in_pool(query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await self._in_pool(text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return list(await asyncio.gather(*(self._in_pool(text) for text in texts)))

    async def _in_pool(self, text: str) -> list[float]:
        # Here already, not in the pool: what is known need not wait behind what is not.
        key = _key(text)
        vector = self._kept.get(key)
        if vector is None:
            vector = await asyncio.get_running_loop().run_in_executor(self._pool, self._remembered, text, key)
        return vector
