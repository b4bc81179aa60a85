"""Where the snapshots of a collection are kept: in directories of this host, with their vectors there too or in Qdrant,
or in PostgreSQL for all hosts.

What serves, builds, lists and goes back knows only what is here. Nothing of PostgreSQL or Qdrant is imported unless the
settings name it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from ragrack.snapshot import SnapshotError

if TYPE_CHECKING:
    from llama_index.core.schema import BaseNode

    from ragrack.readonly import SnapshotStore, Written
    from ragrack.settings import Settings
    from ragrack.snapshot import Hold, Manifest


class Snapshot(Protocol):
    """A whole snapshot."""

    @property
    def id(self) -> str: ...

    @property
    def manifest(self) -> Manifest: ...

    def check(self) -> None:
        """What can be seen without reading the data. Takes no time. Raises SnapshotError."""

    def signature(self) -> object:
        """Equal to the one before as long as nobody has touched it. Raises SnapshotError."""


class Nodes(Protocol):
    """What a snapshot is to hold, as the staging area has it."""

    def digests(self) -> Iterator[tuple[str, bytes]]:
        """Id and digest of each node, by id."""

    def some(self, node_ids: Sequence[str]) -> Iterator[BaseNode]:
        """The nodes with these ids, with their embeddings."""


class Draft(Protocol):
    """A snapshot that is being built. Nobody else sees it."""

    def ids(self) -> Sequence[str]:
        """Of all snapshots that were published before this one, oldest first; none is missing, as from a replica."""

    def update(self, parent: Snapshot, nodes: Nodes) -> Written | None:
        """The parent, which is whole, with what has changed since; None where all is better written anew."""

    def write(self, nodes: Iterable[BaseNode], count: int, dimensions: int) -> Written:
        """`count` nodes with their embeddings, in the order given. Raises ValueError, OSError, SnapshotError."""

    def open(self) -> SnapshotStore:
        """To ask what was written, before it is published."""

    def publish(self, manifest: Manifest) -> Snapshot:
        """Makes it a whole snapshot, on disk for good. It isn't live before `flip` or `offer`."""


class Snapshots(Protocol):
    """The snapshots of one collection that were built with one fingerprint, and which of them is live.

    What cannot be done raises SnapshotError, in words for an operator.
    """

    collection: str
    fingerprint: str

    def __str__(self) -> str:
        """Where they are, for a message."""

    def ids(self) -> Sequence[str]:
        """Of all that are there, damaged ones too, oldest first."""

    def current_id(self) -> str | None: ...

    def current(self) -> Snapshot | None: ...

    def get(self, snapshot_id: str) -> Snapshot: ...

    def list(self) -> Sequence[Snapshot]: ...

    def verify(self, snapshot_id: str) -> None: ...

    def trust(self, snapshot: Snapshot) -> None:
        """Before it is opened: raises SnapshotError where it is damaged. Reads it only if nobody has before."""

    def note(self, snapshot: Snapshot) -> None:
        """For who has verified it, so that `trust` need not."""

    def open(self, snapshot_id: str, threads: int = 2) -> SnapshotStore:
        """To answer from. Open it after a fork, never before."""

    def draft(self) -> AbstractContextManager[Draft]:
        """A new snapshot; gone at the end of the block unless it was published."""

    def flip(self, snapshot_id: str, why: str, *, back: bool = False) -> None: ...

    def offer(self, snapshot_id: str, why: str, *, back: bool = False) -> bool: ...

    def hold(self, why: str) -> None: ...

    def resume(self, to: str | None = None) -> None: ...

    def held(self) -> Hold | None: ...

    def ways_back(self) -> Sequence[str]: ...

    def previous_id(self) -> str | None: ...

    def history(self) -> Sequence[dict[str, Any]]: ...

    def prunable(self, keep: int) -> Sequence[str]: ...

    def prune(self, keep: int) -> Sequence[str]: ...

    def discard(self) -> None: ...


def snapshots(settings: Settings, collection: str, fingerprint: str, kept_in: str | None = None) -> Snapshots:
    """Those of a collection in the settings' store, or in the one that `kept_in` names."""
    kept_in = kept_in or settings.vector_store
    if kept_in == "postgres":
        from ragrack.postgres_client import database
        from ragrack.postgres_snapshots import PostgresSnapshots

        return PostgresSnapshots(database(settings), collection, fingerprint)
    if kept_in == "qdrant":
        return _in_qdrant(settings)(collection, fingerprint)
    from ragrack.embedded import EmbeddedSnapshots

    return EmbeddedSnapshots(settings.index_dir, collection, fingerprint)


def every(settings: Settings) -> Sequence[Snapshots]:
    """Of every collection and fingerprint in the settings' store, by name."""
    if settings.vector_store == "postgres":
        from ragrack.postgres_client import database
        from ragrack.postgres_snapshots import PostgresSnapshots

        return PostgresSnapshots.every(database(settings))
    from ragrack.embedded import EmbeddedSnapshots

    there = EmbeddedSnapshots.all(settings.index_dir)
    if settings.qdrant_url is None:
        return there
    # Those that have none of their vectors there too: which they are, their manifests say.
    made = _in_qdrant(settings)
    return [made(one.collection, one.fingerprint) for one in there]


def _in_qdrant(settings: Settings) -> Callable[[str, str], Snapshots]:
    try:
        from ragrack.qdrant_snapshots import QdrantSnapshots
        from ragrack.qdrant_vectors import Server
    except ModuleNotFoundError as error:
        raise SnapshotError(
            "RAGRACK_QDRANT_URL needs the extra `qdrant`, which is not installed: install `ragrack[qdrant]`"
        ) from error
    return functools.partial(QdrantSnapshots, Server.of(settings), settings.index_dir)
