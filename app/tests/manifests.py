"""A manifest of a snapshot that a test writes by hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ragrack.snapshot import FileEntry, Manifest, SnapshotDir, file_sha256


def entries(path: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    return {name: FileEntry(file_sha256(path / name), (path / name).stat().st_size) for name in names}


def manifest(directory: SnapshotDir, number: int, files: dict[str, FileEntry], **changes: Any) -> Manifest:
    """Of the snapshot of that number: later ones have later ids and other content."""
    values: dict[str, Any] = {
        "id": f"20261124T0000{number:02}Z-{number:08x}",
        "collection": directory.collection,
        "fingerprint": directory.fingerprint,
        "built_with": {},
        "content": str(number),
        "created": "20261124T000000Z",
        "parent": None,
        "documents": 1,
        "nodes": 1,
        "dimensions": 3,
        "engine": "flat",
        "files": files,
        "golden": None,
    }
    return Manifest(**values | changes)
