"""Snapshots whose vectors are in Qdrant: all else of them is files of this host, built, pulled and switched as such.

    <index_dir>/<collection>/<fingerprint>/snapshots/<id>/vectors.json   which collection of Qdrant has its vectors
    <index_dir>/<collection>/<fingerprint>/qdrant/<name>                 one that this host made there, and so may drop

A collection is made for each snapshot and never changed. It is noted before it is made, so that a build that dies
leaves nothing that nobody knows of; what is noted and no snapshot here names is dropped. A host that pulls notes none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ragrack.embedded import DirectoryDraft, EmbeddedSnapshots
from ragrack.qdrant_vectors import QdrantVectors, Server, Writer, check
from ragrack.snapshot import SnapshotError, UnavailableError, fsync, timestamp, write_file

if TYPE_CHECKING:
    from llama_index.core.schema import BaseNode

    from ragrack import catalog
    from ragrack.readonly import Written
    from ragrack.store import SnapshotVectorStore

ENGINE = "qdrant"
WHERE = "vectors.json"


@dataclass(frozen=True)
class Where:
    """The collection of Qdrant that has a snapshot's vectors."""

    name: str
    rows: int
    dimensions: int

    @classmethod
    def read(cls, path: Path) -> Self:
        """Out of the directory of a snapshot. Raises SnapshotError."""
        try:
            return cls(**json.loads((path / WHERE).read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise SnapshotError(f"{path / WHERE} cannot be read: {error}") from error

    def write(self, path: Path) -> None:
        write_file(path / WHERE, json.dumps(dataclasses.asdict(self)).encode())


class QdrantSnapshots(EmbeddedSnapshots):
    def __init__(self, server: Server, index_dir: Path, collection: str, fingerprint: str) -> None:
        super().__init__(index_dir, collection, fingerprint)
        self.server = server
        self.made = self.root / "qdrant"

    def __str__(self) -> str:
        return f"{self.root} and {self.server}"

    def verify(self, snapshot_id: str) -> None:
        """Its files byte by byte; of its vectors, that Qdrant has as many."""
        super().verify(snapshot_id)
        snapshot = self.get(snapshot_id)
        if snapshot.manifest.engine == ENGINE:
            where = Where.read(snapshot.path)
            check(self.server, where.name, where.rows)

    def open(self, snapshot_id: str, threads: int = 2) -> SnapshotVectorStore:
        return self.open_at(self.get(snapshot_id).path, threads)

    def open_at(self, path: Path, threads: int = 2) -> SnapshotVectorStore:
        from ragrack.store import SnapshotVectorStore

        where = Where.read(path)
        vectors = QdrantVectors(self.server, where.name, where.rows, where.dimensions)
        return SnapshotVectorStore.over(vectors, path, threads)

    @contextlib.contextmanager
    def draft(self) -> Iterator[_Draft]:
        try:
            with self.new() as path:
                yield _Draft(self, path)
        finally:
            self._sweep()

    def prune(self, keep: int) -> Sequence[str]:
        removed = super().prune(keep)
        self._sweep()
        return removed

    def discard(self) -> None:
        """Raises UnavailableError, and nothing of it is removed here, where Qdrant cannot be told."""
        for name in self._noted():
            self._drop(name)
        super().discard()

    def note_made(self, name: str) -> None:
        self.made.mkdir(exist_ok=True)
        (self.made / name).touch()
        fsync(self.made)

    def _noted(self) -> Sequence[str]:
        return sorted(file.name for file in self.made.iterdir()) if self.made.is_dir() else []

    def _drop(self, name: str) -> None:
        self.server.drop(name)
        (self.made / name).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Drops what no snapshot names, and no build that is still at it. What cannot be now is the next time."""
        noted = self._noted()
        try:
            # Builds are read before snapshots are looked for: one that becomes the other meanwhile is seen.
            named = self._named(".new-*") | self._named("*")
        except SnapshotError:
            return  # whose vectors are whose cannot be told
        with contextlib.suppress(UnavailableError):
            for name in noted:
                if name not in named:
                    self._drop(name)

    def _named(self, directories: str) -> set[str]:
        paths = self.snapshots.glob(f"{directories}/{WHERE}")
        return {Where.read(path.parent).name for path in paths if path.exists()}


@dataclass(frozen=True)
class _Draft(DirectoryDraft):
    directory: QdrantSnapshots

    def update(self, parent: catalog.Snapshot, nodes: catalog.Nodes) -> None:
        """A collection is filled anew in any case: it belongs to one snapshot."""

    def write(self, nodes: Iterable[BaseNode], count: int, dimensions: int) -> Written:
        from ragrack.readonly import Written
        from ragrack.store import NODES
        from ragrack.writer import entries, write_nodes

        whose = f"{self.directory.collection}-{self.directory.fingerprint}"
        where = Where(f"ragrack-{whose}-{timestamp()}-{secrets.token_hex(4)}", count, dimensions)
        where.write(self.path)
        self.directory.note_made(where.name)
        writer = Writer(self.directory.server, where.name, dimensions)
        write_nodes(nodes, count, self.path, writer.take)
        writer.finish(count)
        return Written(ENGINE, count, entries(self.path, WHERE, NODES))

    def open(self) -> SnapshotVectorStore:
        return self.directory.open_at(self.path)
