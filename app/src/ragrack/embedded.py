"""Snapshots in directories of this host, with what it takes to write and to open one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ragrack import integrity
from ragrack.snapshot import Manifest, Snapshot, SnapshotDir

if TYPE_CHECKING:
    from llama_index.core.schema import BaseNode

    from ragrack import catalog
    from ragrack.readonly import Written
    from ragrack.store import SnapshotVectorStore


class EmbeddedSnapshots(SnapshotDir):
    """The store's own modules are imported when a snapshot is opened or written: listing them needs none."""

    def __str__(self) -> str:
        return str(self.root)

    def trust(self, snapshot: catalog.Snapshot) -> None:
        integrity.check(self, self.get(snapshot.id))

    def note(self, snapshot: catalog.Snapshot) -> None:
        integrity.note(self, self.get(snapshot.id))

    def open(self, snapshot_id: str, threads: int = 2) -> SnapshotVectorStore:
        from ragrack.store import SnapshotVectorStore

        return SnapshotVectorStore.open(self.get(snapshot_id).path, threads)

    @contextlib.contextmanager
    def draft(self) -> Iterator[DirectoryDraft]:
        with self.new() as path:
            yield DirectoryDraft(self, path)


@dataclass(frozen=True)
class DirectoryDraft:
    directory: EmbeddedSnapshots
    path: Path

    def ids(self) -> Sequence[str]:
        return self.directory.ids()

    def update(self, parent: catalog.Snapshot, nodes: catalog.Nodes) -> Written | None:
        from ragrack.writer import update_snapshot_files

        return update_snapshot_files(self.directory.get(parent.id).path, nodes, self.path)

    def write(self, nodes: Iterable[BaseNode], count: int, dimensions: int) -> Written:
        from ragrack.writer import write_snapshot_files

        return write_snapshot_files(nodes, count, dimensions, self.path)

    def open(self) -> SnapshotVectorStore:
        from ragrack.store import SnapshotVectorStore

        return SnapshotVectorStore.open(self.path)

    def publish(self, manifest: Manifest) -> Snapshot:
        snapshot = self.directory.publish(self.path, manifest)
        integrity.note(self.directory, snapshot)
        return snapshot
