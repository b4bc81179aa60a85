"""How long the request at hand may still take: its client's wish, never more than the service's own limit."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from contextvars import ContextVar

HEADER = "X-Request-Timeout"
# Kept back for the answer that is given when an upstream takes too long.
RESERVE_SECONDS = 0.5

_until: ContextVar[float | None] = ContextVar("deadline", default=None)


def wished(value: str | None) -> float | None:
    """Seconds out of the header; None where it is absent. Raises ValueError, in words for the client."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"{HEADER}: give the seconds that you wait, a number above 0.")
    return seconds


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """The block, and what it awaits, has `seconds`."""
    token = _until.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _until.reset(token)


def remaining() -> float:
    """Seconds, at least 0; infinite where no request is at hand."""
    until = _until.get()
    return math.inf if until is None else max(0.0, until - time.monotonic())


def for_upstream(at_most: float) -> float:
    """Seconds that a call to an upstream may take; 0 means that there is no time to make it.

    Some is kept back of a request's time, a fifth where that is little: its client gets an answer all the same.
    """
    left = remaining()
    return min(at_most, left - min(RESERVE_SECONDS, left / 5))
