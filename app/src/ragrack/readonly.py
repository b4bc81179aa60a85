"""What every vector store of a snapshot has in common: LlamaIndex's interface, answered in a few threads, read-only."""

from __future__ import annotations

import asyncio
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)

from ragrack.snapshot import FileEntry


@dataclass(frozen=True)
class Written:
    """What was written of a snapshot; `engine` says how its vectors are found."""

    engine: str
    nodes: int
    files: dict[str, FileEntry]


class ReadOnlyError(TypeError):
    """A snapshot never changes: `ragrack ingest` makes a new one."""


class SnapshotStore(BasePydanticVectorStore, ABC):
    """Dense, hybrid and text queries with MetadataFilters, sync and async.

    A hybrid query fuses the dense order with that of the words by reciprocal rank. The similarity that it gives for a
    node is the cosine in either order, so that a cut-off means the same in each mode:
    `query(..., similarity_cutoff=0.3)`.

    Filters mean what they mean in LlamaIndex's own store: a node without a key matches only `!=`, `nin`, `is_empty`.
    """

    stores_text: bool = True

    @property
    @abstractmethod
    def dimensions(self) -> int:
        """Of its vectors."""

    @abstractmethod
    def __len__(self) -> int:
        """Nodes."""

    @abstractmethod
    def close(self) -> None:
        """Waits for the queries that run, then lets go of what it holds. A closed store answers no more."""

    @abstractmethod
    def embedded_nodes(self) -> Iterator[BaseNode]:
        """All nodes, in the order of the snapshot, with their vectors as exact as they are kept."""

    @abstractmethod
    def _threads(self) -> Executor:
        """Where its queries run."""

    @abstractmethod
    def _query(self, query: VectorStoreQuery, similarity_cutoff: float | None = None) -> VectorStoreQueryResult: ...

    @abstractmethod
    def _get_nodes(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> list[BaseNode]: ...

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Nodes with cosine similarities, best first. Raises ValueError for a query that it cannot answer.

        Takes `similarity_cutoff`: nodes less similar are not candidates. (A text query has no cosines and gives the
        scores of its words, the higher the better.)
        """
        return self._threads().submit(self._query, query, **kwargs).result()

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        work = functools.partial(self._query, query, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads(), work)

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """The nodes with these ids and metadata, in the order of the snapshot; all where neither is given."""
        return self._threads().submit(self._get_nodes, node_ids, filters).result()

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        return await asyncio.get_running_loop().run_in_executor(self._threads(), self._get_nodes, node_ids, filters)

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        raise ReadOnlyError("a snapshot takes no new nodes: put the documents in place and run `ragrack ingest`")

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        raise ReadOnlyError("a snapshot loses no nodes: take the documents away and run `ragrack ingest`")
