"""The vectors of a snapshot in a file that FAISS maps: a graph, or each for itself where they are few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np

from ragrack.snapshot import SnapshotError
from ragrack.vectors import Selection, by_score

# Its stubs know neither its Python constructors nor all of its classes.
faiss: Any = _faiss

VECTORS = "vectors.faiss"

HNSW_EF_SEARCH = 96
"""Nodes that a walk keeps in sight, up to so many rows; beyond, more are needed to find as much of the nearest."""
EF_ROWS = 100_000
EF_GROWTH = 0.43
ROWS_A_STEP = 64
"""Vectors that are compared in the time that the graph takes for one step of efSearch."""


class FaissVectors:
    """Opening takes the same time at any size."""

    def __init__(self, path: Path) -> None:
        """The file in the directory of a snapshot, memory-mapped and read-only. Raises SnapshotError."""
        try:
            self._index = faiss.read_index(str(path / VECTORS), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            raise SnapshotError(f"{path} cannot be opened: {error}") from error
        self._steps = ef_search(self.rows)

    def __str__(self) -> str:
        return VECTORS

    @property
    def rows(self) -> int:
        return int(self._index.ntotal)

    @property
    def dimensions(self) -> int:
        return int(self._index.d)

    def start_thread(self) -> None:
        # For this thread alone: a second one would spin beside it for nothing.
        faiss.omp_set_num_threads(1)

    def close(self) -> None:
        self._index = None

    def read(self, rows: Sequence[int]) -> Any:
        return self._index.reconstruct_batch(np.asarray(rows, dtype=np.int64))

    def cosines(self, vector: Any, rows: Sequence[int]) -> list[float]:
        found: list[float] = (self.read(rows) @ vector[0]).tolist()
        return found

    def nearest(self, vector: Any, k: int, chosen: Selection | None) -> list[tuple[int, float]]:
        count = self.rows if chosen is None else chosen.count
        k = min(k, count)
        if k <= 0:
            return []
        selector = {} if chosen is None else {"sel": faiss.IDSelectorBitmap(chosen.mask)}
        if not isinstance(self._index, faiss.IndexHNSW):
            return _scored(*self._index.search(vector, k, params=faiss.SearchParameters(**selector)))
        # A walk along the graph must see as many more rows as are not allowed.
        steps = max(self._steps, 2 * k) * self.rows // count
        if chosen is not None and count < steps * ROWS_A_STEP:
            found = [scored for span in chosen.spans for scored in self._compare(vector, k, chosen, span)]
            return sorted(found, key=by_score)[:k]
        return _scored(*self._index.search(vector, k, params=faiss.SearchParametersHNSW(efSearch=steps, **selector)))

    def _compare(self, vector: Any, k: int, chosen: Selection, span: range) -> list[tuple[int, float]]:
        """With each of the rows chosen in the span: FAISS would look whether any row of all is chosen."""
        graph = faiss.downcast_index(self._index.storage)
        codes = faiss.rev_swig_ptr(graph.codes.data(), self.rows * graph.code_size).reshape(-1, graph.code_size)
        part = faiss.IndexScalarQuantizer(graph.d, graph.sq.qtype, graph.metric_type)
        part.sq, part.is_trained = graph.sq, True
        first, mask = chosen.around(span)
        here = codes[first : span.stop]
        part.codes = faiss.MaybeOwnedVectorUInt8.create_view(faiss.swig_ptr(here), here.size, graph.codes.owner)
        part.ntotal = len(here)
        selector = faiss.IDSelectorBitmap(mask)
        found = _scored(*part.search(vector, min(k, len(here)), params=faiss.SearchParameters(sel=selector)))
        return [(first + row, score) for row, score in found]


def ef_search(rows: int) -> int:
    """What finds 98 % of the ten nearest; measured at a hundred thousand rows and at a million."""
    return round(HNSW_EF_SEARCH * math.pow(max(1.0, rows / EF_ROWS), EF_GROWTH))


def _scored(similarities: Any, rows: Any) -> list[tuple[int, float]]:
    found = rows[0] >= 0
    return list(zip(rows[0][found].tolist(), similarities[0][found].tolist(), strict=True))
