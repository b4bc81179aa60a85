"""A bounded number at a time, and a bounded number waiting: the rest is turned away while that is still cheap."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from ragrack import metrics


class FullError(Exception):
    """No place came free, in the queue or in time."""


class Slots:
    """One event loop's. `size` hold a slot, `queue` wait for one, first come first served."""

    def __init__(self, name: str, size: int, queue: int) -> None:
        self._name = name
        self._queue = queue
        self._free = asyncio.Semaphore(size)
        self._waiting = 0
        self._held = 0

    @property
    def load(self) -> int:
        """How many hold a slot or wait for one."""
        return self._held + self._waiting

    async def acquire(self, patience: float) -> None:
        """Waits for at most `patience` seconds. Raises FullError."""
        started = time.perf_counter()
        if self._free.locked():
            if self._waiting >= self._queue:
                metrics.SHED.labels(self._name, "queue full").inc()
                raise FullError
            self._waiting += 1
            try:
                async with asyncio.timeout(patience):
                    await self._free.acquire()
            except TimeoutError as error:
                metrics.SHED.labels(self._name, "waited too long").inc()
                raise FullError from error
            finally:
                self._waiting -= 1
        else:
            await self._free.acquire()
        self._held += 1
        metrics.QUEUE_SECONDS.labels(self._name).observe(time.perf_counter() - started)

    def release(self) -> None:
        self._held -= 1
        self._free.release()

    @contextlib.asynccontextmanager
    async def taken(self, patience: float) -> AsyncIterator[None]:
        await self.acquire(patience)
        try:
            yield
        finally:
            self.release()
