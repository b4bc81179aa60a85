"""The vectors of a snapshot in a collection of a Qdrant server, through LlamaIndex's store for it.

A point is a row: its id is the row's number as a UUID, and all that is known of it there is whose it is. Which rows a
filter leaves is not the server's to decide: it is told the tenant, or the rows, and what it finds beside them is not
taken. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import functools
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

import numpy as np
from llama_index.core.schema import BaseNode, TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters, VectorStoreQuery
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import QdrantClient
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
from qdrant_client.http.models import KeywordIndexParams, KeywordIndexType

from ragrack.snapshot import SnapshotError, UnavailableError
from ragrack.tenants import TENANT
from ragrack.vectors import Selection, by_score
from ragrack.writer import embedding_of

if TYPE_CHECKING:
    from ragrack.settings import Settings

WRITE_SECONDS = 60
NAMED = 1_000
"""Rows that a query names one by one rather than ask for more than it needs and drop the others."""
MORE = 4
"""Times as many are asked for then."""
NAMED_AT_MOST = 10_000
"""Rows that one request names: some 400 kB."""
BATCH = 256
"""Points in one request of a build."""
GONE = 404
EXACT = {"exact": True}
"""Compare with each of the rows named."""


class QdrantUnavailableError(UnavailableError):
    """Qdrant did not answer; the message says where it was looked for and what it said, and holds no secret."""


@dataclass(frozen=True)
class Server:
    """Where Qdrant is. A connection is made when it is first asked: after a fork."""

    url: str
    port: int
    api_key: str | None = field(repr=False)
    timeout: int

    @classmethod
    def of(cls, settings: Settings) -> Server:
        url, key = settings.qdrant_url, settings.qdrant_api_key
        if url is None or url.port is None:
            raise SnapshotError("RAGRACK_QDRANT_URL is not set: it says where Qdrant is")
        return cls(str(url).rstrip("/"), url.port, key.get_secret_value() if key else None, settings.qdrant_timeout)

    def __str__(self) -> str:
        return f"Qdrant at {self.url}"

    @functools.cached_property
    def reading(self) -> QdrantClient:
        return self._client(self.timeout)

    @functools.cached_property
    def writing(self) -> QdrantClient:
        return self._client(WRITE_SECONDS)

    def count(self, name: str) -> int:
        """Points in the collection. Raises SnapshotError where it is gone."""
        with self.in_words(name):
            return int(self.reading.count(name, exact=True).count)

    def drop(self, name: str) -> None:
        """The collection, if it is there."""
        with self.in_words(name):
            self.writing.delete_collection(name)

    @contextlib.contextmanager
    def in_words(self, name: str) -> Iterator[None]:
        """What the client raises in the block, as QdrantUnavailableError or SnapshotError."""
        try:
            yield
        except ResponseHandlingException as error:
            source = error.source
            raise self._unavailable(str(source) or type(source).__name__) from error
        except ResourceExhaustedResponse as error:
            raise self._unavailable("it has too much to do") from error
        except UnexpectedResponse as error:
            if error.status_code == GONE:
                raise SnapshotError(f"{self}: there is no collection {name}: its vectors are gone") from error
            said = (error.content or b"")[:200].decode(errors="replace")
            raise self._unavailable(f"{error.status_code} {said}") from error

    def _unavailable(self, reason: str) -> QdrantUnavailableError:
        return QdrantUnavailableError(f"{self} cannot be used: {' '.join(reason.split())}")

    def _client(self, timeout: int) -> QdrantClient:
        # The certificates that the host trusts, not those that a wheel brings.
        trusted: dict[str, Any] = {"verify": ssl.create_default_context()}
        return QdrantClient(
            url=self.url,
            port=self.port,
            headers={"api-key": self.api_key} if self.api_key else None,
            timeout=timeout,
            check_compatibility=False,
            **trusted,
        )


class QdrantVectors:
    """Of a snapshot that is there."""

    def __init__(self, server: Server, name: str, rows: int, dimensions: int) -> None:
        """Raises SnapshotError where the collection is gone or has not `rows` points."""
        self._server = server
        self._name = name
        self._rows = rows
        self._dimensions = dimensions
        check(server, name, rows)
        with server.in_words(name):
            self._store = QdrantVectorStore(name, client=server.reading)

    def __str__(self) -> str:
        return f"collection {self._name} of {self._server}"

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def dimensions(self) -> int:
        return self._dimensions

    def start_thread(self) -> None:
        """Nothing is a thread's own."""

    def close(self) -> None:
        """The connections are the server's."""

    def nearest(self, vector: Any, k: int, chosen: Selection | None) -> list[tuple[int, float]]:
        k = min(k, self._rows if chosen is None else chosen.count)
        if k <= 0:
            return []
        if chosen is None:
            return self._ask(vector, k)
        allowed = np.unpackbits(chosen.mask, count=self._rows, bitorder="little")
        if chosen.count > NAMED:
            more = self._ask(vector, MORE * k, tenant=chosen.tenant)
            found = [(row, cosine) for row, cosine in more if allowed[row]]
            if len(found) >= k:
                return found[:k]
        rows = np.flatnonzero(allowed).tolist()
        parts = [rows[start : start + NAMED_AT_MOST] for start in range(0, len(rows), NAMED_AT_MOST)]
        found = [scored for part in parts for scored in self._ask(vector, min(k, len(part)), part)]
        return sorted((scored for scored in found if allowed[scored[0]]), key=by_score)[:k]

    def cosines(self, vector: Any, rows: Sequence[int]) -> list[float]:
        found = dict(self._ask(vector, len(rows), rows))
        if missing := set(rows) - found.keys():
            raise SnapshotError(f"{self} has lost {len(missing)} of its vectors")
        return [found[row] for row in rows]

    def read(self, rows: Sequence[int]) -> Any:
        with self._server.in_words(self._name):
            nodes = self._store.get_nodes(node_ids=[_id(row) for row in rows])
        found = {UUID(node.node_id).int: node.embedding for node in nodes}
        return np.array([found[row] for row in rows], dtype=np.float32)

    def _ask(
        self, vector: Any, k: int, rows: Sequence[int] | None = None, tenant: str | None = None
    ) -> list[tuple[int, float]]:
        query = VectorStoreQuery(
            query_embedding=vector[0].tolist(),
            similarity_top_k=k,
            node_ids=None if rows is None else [_id(row) for row in rows],
            filters=None if tenant is None else MetadataFilters(filters=[MetadataFilter(key=TENANT, value=tenant)]),
        )
        with self._server.in_words(self._name):
            result = self._store.query(query, search_params=None if rows is None else EXACT)
        scored = zip(result.ids or [], result.similarities or [], strict=True)
        found = [(UUID(point).int, cosine) for point, cosine in scored]
        return [(row, cosine) for row, cosine in found if row < self._rows]


class Writer:
    """Fills a collection that is not there yet, in requests of a few points."""

    def __init__(self, server: Server, name: str, dimensions: int) -> None:
        self._server = server
        self._name = name
        self._dimensions = dimensions
        self._points: list[BaseNode] = []
        whose = KeywordIndexParams(type=KeywordIndexType.KEYWORD, is_tenant=True)
        indexes: list[Any] = [{"field_name": TENANT, "field_schema": whose}]
        with server.in_words(name):
            self._store = QdrantVectorStore(
                name, client=server.writing, batch_size=BATCH, index_doc_id=False, payload_indexes=indexes
            )

    def take(self, row: int, node: BaseNode) -> None:
        """Raises ValueError for a node without an embedding of the snapshot's dimensions."""
        whose = node.metadata.get(TENANT)
        self._points.append(
            TextNode(
                id_=_id(row),
                metadata={TENANT: whose} if isinstance(whose, str) else {},
                embedding=embedding_of(node, self._dimensions),
            )
        )
        if len(self._points) == BATCH:
            self._send()

    def finish(self, rows: int) -> None:
        self._send()
        check(self._server, self._name, rows)

    def _send(self) -> None:
        with self._server.in_words(self._name):
            self._store.add(self._points)
        self._points = []


def check(server: Server, name: str, rows: int) -> None:
    """Raises SnapshotError where the collection is gone or has not so many points."""
    found = server.count(name)
    if found != rows:
        raise SnapshotError(f"{server}: collection {name} has {found} vectors, the snapshot has {rows} nodes")


def _id(row: int) -> str:
    return str(UUID(int=row))
