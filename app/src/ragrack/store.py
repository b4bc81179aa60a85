"""The vector store of a snapshot: FAISS, memory-mapped, and one SQLite file, both read-only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import BasePydanticVectorStore


class SnapshotVectorStore(BasePydanticVectorStore):
    """Sync and async queries with MetadataFilters; opening it takes the same time at any size."""

    stores_text: bool = True

    @classmethod
    def open(cls, path: Path, threads: int = 2) -> SnapshotVectorStore:
        """Open it after a fork, never before. Raises SnapshotError."""
        raise NotImplementedError

    def close(self) -> None:
        """Waits for the queries that run, then lets go of all files."""
        raise NotImplementedError


def write_snapshot_files(nodes: Iterable[BaseNode], out_dir: Path, dimensions: int) -> dict[str, object]:
    """`nodes` have their embeddings."""
    raise NotImplementedError
