"""The open snapshot of a collection, swapped in place when `current` moves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ragrack.snapshot import Snapshot, SnapshotDir
from ragrack.store import SnapshotVectorStore


class IndexUnavailableError(Exception):
    """No snapshot is open; the message says why and what mends it. A 503, not a 500."""


@dataclass(frozen=True)
class OpenSnapshot:
    snapshot: Snapshot
    store: SnapshotVectorStore


class IndexHandle:
    """Make it after the fork. Nothing raises for a bad or missing snapshot but `use`: a worker starts unready and says why."""

    def __init__(
        self, directory: SnapshotDir, *, threads: int = 2, warm: Callable[[SnapshotVectorStore], None] | None = None
    ) -> None:
        raise NotImplementedError

    @property
    def snapshot_id(self) -> str | None:
        """The one that answers now."""
        raise NotImplementedError

    @property
    def problem(self) -> str | None:
        """Why what `current` points at is not what answers; None when all is well."""
        raise NotImplementedError

    @contextlib.contextmanager
    def use(self) -> Iterator[OpenSnapshot]:
        """The open snapshot, which stays open until the block ends whatever `current` does. Raises IndexUnavailableError."""
        raise NotImplementedError
        yield

    def poll(self) -> bool:
        """Follows `current`: opens, warms, swaps. True when it swapped. Blocking."""
        raise NotImplementedError

    async def watch(self, interval: float = 1.0) -> None:
        """Polls every `interval` seconds in a thread until cancelled."""
        raise NotImplementedError

    def close(self) -> None:
        """After the last query has ended, the store is closed."""
        raise NotImplementedError
