"""The vectors of a snapshot by the numbers of their rows, wherever they are; and a set of rows that may be found."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

SPANS = 4

Mask = np.ndarray[Any, np.dtype[np.uint8]]
"""A bit for each row, the first in the lowest bit of the first byte, as FAISS reads them."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows that may be found."""

    mask: Mask
    tenant: str | None = None
    """Whose all of them are, where that is known."""

    @functools.cached_property
    def count(self) -> int:
        return int(np.bitwise_count(self.mask).sum())

    @functools.cached_property
    def spans(self) -> Sequence[range]:
        """A few runs of rows that hold all of these and, where these lie together as a tenant's do, little else."""
        rows = np.flatnonzero(np.unpackbits(self.mask, bitorder="little"))
        if not len(rows):
            return []
        gaps = np.diff(rows)
        widest = np.argpartition(gaps, -SPANS + 1)[-SPANS + 1 :] if len(gaps) >= SPANS else np.arange(len(gaps))
        cuts = np.sort(widest[gaps[widest] > 1])
        firsts, lasts = [rows[0], *rows[cuts + 1]], [*rows[cuts], rows[-1]]
        return [range(int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True)]

    def around(self, span: range) -> tuple[int, Mask]:
        """A first row, a multiple of eight, and the mask from there on that has all of the span."""
        first = span.start // 8
        return first * 8, self.mask[first : -(-span.stop // 8)]


class Vectors(Protocol):
    """All are asked from a few threads, and raise SnapshotError where they cannot answer."""

    def __str__(self) -> str:
        """What they are, for a message."""

    @property
    def rows(self) -> int: ...

    @property
    def dimensions(self) -> int: ...

    def start_thread(self) -> None:
        """In each thread that is going to ask, before it does."""

    def nearest(self, vector: Any, k: int, chosen: Selection | None) -> list[tuple[int, float]]:
        """Rows with cosines, best first; of those chosen, all by default. `vector`: an array of one row."""

    def cosines(self, vector: Any, rows: Sequence[int]) -> list[float]: ...

    def read(self, rows: Sequence[int]) -> Any:
        """The vectors of the rows, as exact as they are kept."""

    def close(self) -> None: ...


def by_score(scored: tuple[int, float]) -> tuple[float, int]:
    """The better one first, of two alike the first row."""
    return -scored[1], scored[0]
