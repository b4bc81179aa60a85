"""A circuit breaker: after failures in a row an upstream is left alone for a while, then tried with one call.

Each worker has its own, and learns for itself; how many have it open is a metric.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from ragrack import metrics

State = Literal["closed", "open", "half_open"]
STATES: tuple[State, ...] = ("closed", "open", "half_open")


class BreakerOpenError(Exception):
    """The upstream is left alone; `retry_after` seconds from now it will be tried."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the circuit breaker is open")
        self.retry_after = retry_after


class Breaker:
    """Of one event loop. Each `enter` is followed by one of `succeeded`, `failed` and `abandoned`."""

    def __init__(
        self, upstream: str, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`failures` in a row open it, for `seconds`."""
        self._upstream = upstream
        self._limit = failures
        self._seconds = seconds
        self._clock = clock
        self._failures = 0
        self._until = 0.0
        self._probing = False
        self._state: State = "closed"
        self._become("closed")

    @property
    def state(self) -> State:
        return self._state

    def enter(self) -> None:
        """Raises BreakerOpenError where no call may be made."""
        if self._state == "open" and self._clock() >= self._until:
            self._become("half_open")
        if self._state == "open" or self._probing:
            raise BreakerOpenError(max(0.0, self._until - self._clock()) or self._seconds)
        self._probing = self._state == "half_open"

    def succeeded(self) -> None:
        self._failures, self._probing = 0, False
        self._become("closed")

    def failed(self) -> None:
        self._failures += 1
        if self._state == "half_open" or self._failures >= self._limit:
            self._until = self._clock() + self._seconds
            self._become("open")
        self._probing = False

    def abandoned(self) -> None:
        """The call ended for a reason that says nothing of the upstream; another may probe."""
        self._probing = False

    def _become(self, state: State) -> None:
        self._state = state
        for each in STATES:
            metrics.BREAKER.labels(self._upstream, each).set(each == state)
