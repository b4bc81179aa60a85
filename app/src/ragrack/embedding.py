"""Sentence embeddings in this process: all-MiniLM-L6-v2, 8 bit, by onnxruntime."""

from __future__ import annotations

from pathlib import Path

from llama_index.core.base.embeddings.base import BaseEmbedding
from tokenizers import Tokenizer


class MiniLMEmbedding(BaseEmbedding):
    """384 numbers of unit length for a text; what is past its first 256 tokens is not seen."""

    @classmethod
    def load(cls, model_dir: Path, threads: int = 1) -> MiniLMEmbedding:
        """`threads` texts are embedded at a time, each on one core."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's own; without the two special tokens a node must have at most 254."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the threads."""
        raise NotImplementedError
