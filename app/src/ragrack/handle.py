"""The open snapshot of a collection, swapped in place when `current` moves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ragrack import pull
from ragrack.catalog import Snapshot, Snapshots
from ragrack.readonly import SnapshotStore
from ragrack.snapshot import SnapshotDir, SnapshotError, UnavailableError

log = logging.getLogger(__name__)


class IndexUnavailableError(Exception):
    """No snapshot is open; the message says why and what mends it. A 503, not a 500."""


@dataclass(eq=False)
class OpenSnapshot:
    """A snapshot and its store; `users` and `retired` are the handle's."""

    snapshot: Snapshot
    signature: object
    """As it was when the snapshot was found to be what its manifest says."""
    store: SnapshotStore
    users: int = field(default=0, repr=False)
    retired: bool = field(default=False, repr=False)


class IndexHandle:
    """What a worker answers from. Make it after the fork.

    Only `use` raises for a missing or bad snapshot: a worker starts unready, says why, and follows `current` on.
    A bad one is never opened; the one that is open goes on answering.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        *,
        threads: int = 2,
        warm: Callable[[SnapshotStore], None] | None = None,
        pulled: bool = False,
    ) -> None:
        """`pulled`: snapshots come from another host, so what hinders that is worth telling."""
        self._snapshots = snapshots
        self._threads = threads
        self._warm = warm
        self._pulled = pulled
        self._lock = threading.Lock()
        self._polling = threading.Lock()
        self._open: OpenSnapshot | None = None
        self._problem: str | None = None
        self._unavailable = False
        self._pull_problem: str | None = None
        self._checked: tuple[object, str | None] | None = None
        self._closed = False
        self.poll()

    @property
    def snapshot(self) -> Snapshot | None:
        """The one that answers now."""
        return self._open.snapshot if self._open else None

    @property
    def snapshot_id(self) -> str | None:
        """The id of the one that answers now."""
        return self._open.snapshot.id if self._open else None

    @property
    def problem(self) -> str | None:
        """Why what `current` points at is not what answers; None when all is well."""
        return self._problem

    @property
    def unavailable(self) -> bool:
        """Whether what keeps the snapshots does not answer, so that the one that is open does not either."""
        return self._unavailable

    @property
    def pull_problem(self) -> str | None:
        """Why the last pull of this host failed; None where it did not, or where this host ingests."""
        return self._pull_problem

    @contextlib.contextmanager
    def use(self) -> Iterator[OpenSnapshot]:
        """The open snapshot. It stays open until the block ends, whatever `current` does.

        Raises IndexUnavailableError.
        """
        with self._lock:
            opened = self._open
            if opened is None:
                raise IndexUnavailableError(self._problem or "the index is closed")
            opened.users += 1
        try:
            yield opened
        finally:
            self._leave(opened)

    def poll(self) -> bool:
        """Follows `current`: opens, warms, swaps. True when it swapped. Blocks while it opens. Never raises."""
        with self._polling:
            if self._closed:
                return False
            try:
                here = self._snapshots
                last = pull.last(here) if self._pulled and isinstance(here, SnapshotDir) else None
                self._pull_problem = last.problem if last else None
                fresh = self._newer()
            except (SnapshotError, OSError) as error:
                self._problem = str(error)
                self._unavailable = isinstance(error, UnavailableError)
                return False
            except Exception as error:
                log.exception("the index of %s cannot be followed", self._snapshots.collection)
                self._problem = f"failed with {type(error).__name__}"
                return False
            self._problem = None
            self._unavailable = False
            if fresh is None:
                return False
            self._swap(fresh)
            return True

    async def watch(self, interval: float = 1.0) -> None:
        """Polls every `interval` seconds, in a thread, until cancelled."""
        while True:
            await asyncio.sleep(interval)
            await asyncio.to_thread(self.poll)

    def close(self) -> None:
        """No new query is let in; the store is closed when the last one has ended."""
        with self._polling:
            self._closed = True
            self._swap(None)

    def _newer(self) -> OpenSnapshot | None:
        """What `current` points at, verified, opened and warm; None where that is open. Raises SnapshotError."""
        snapshot = self._snapshots.current()
        if snapshot is None:
            raise SnapshotError(
                f"collection {self._snapshots.collection} has no index with fingerprint "
                f"{self._snapshots.fingerprint}: run `ragrack ingest --collection {self._snapshots.collection}`"
            )
        signature = snapshot.signature()
        if self._open and self._open.snapshot.id == snapshot.id and self._open.signature == signature:
            return None
        if self._checked is None or self._checked[0] != signature:
            # Read once: it is asked for again in a second.
            self._checked = signature, self._damage(snapshot)
        if self._checked[1] is not None:
            raise SnapshotError(self._checked[1])
        return OpenSnapshot(snapshot, signature, self._open_warm(snapshot))

    def _damage(self, snapshot: Snapshot) -> str | None:
        try:
            self._snapshots.trust(snapshot)
        except SnapshotError as error:
            return str(error)
        return None

    def _open_warm(self, snapshot: Snapshot) -> SnapshotStore:
        store = self._snapshots.open(snapshot.id, self._threads)
        try:
            if len(store) != snapshot.manifest.nodes or store.dimensions != snapshot.manifest.dimensions:
                raise SnapshotError(f"snapshot {snapshot.id}: its files are not those of its manifest")
            if self._warm is not None:
                self._warm(store)
        except BaseException:
            store.close()
            raise
        return store

    def _swap(self, fresh: OpenSnapshot | None) -> None:
        with self._lock:
            old, self._open = self._open, fresh
            if old is None:
                return
            old.retired = True
            unused = old.users == 0
        if unused:
            old.store.close()

    def _leave(self, opened: OpenSnapshot) -> None:
        with self._lock:
            opened.users -= 1
            unused = opened.retired and opened.users == 0
        if unused:
            opened.store.close()
