"""Whether a snapshot's files are what its manifest says, read once on a host and not in each of its workers.

Who publishes a snapshot has read every byte of it and notes which files those were: inode, size, time of the last
write, and a hash of both ends, for a disk that loses bytes changes no time, and FAISS takes a damaged head for sizes
and may ask for all of the memory. Files that are still those need no second reading, whatever their size; others are
read whole.

    <index_dir>/<collection>/<fingerprint>/verified/<id>.json
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from ragrack.snapshot import Manifest, Snapshot, SnapshotDir, SnapshotError, file_sha256, write_file

END_BYTES = 64 * 1024


def note(directory: SnapshotDir, snapshot: Snapshot) -> None:
    """For who has compared every byte of it with the manifest. Notes of snapshots that are gone go, too."""
    notes = _note(directory, snapshot.id).parent
    notes.mkdir(exist_ok=True)
    for old in notes.glob("*.json"):
        if not (directory.snapshots / old.stem).is_dir():
            old.unlink(missing_ok=True)
    write_file(_note(directory, snapshot.id), json.dumps(_glance(snapshot)).encode())


def is_noted(directory: SnapshotDir, snapshot: Snapshot) -> bool:
    """Whether its files look like those that were compared. Reads little of them."""
    with contextlib.suppress(OSError, ValueError):
        return bool(json.loads(_note(directory, snapshot.id).read_bytes()) == _glance(snapshot))
    return False


def _glance(snapshot: Snapshot) -> Mapping[str, Mapping[str, object]]:
    return {
        "files": snapshot.signature(),
        "ends": {name: _ends(snapshot.path / name) for name in snapshot.manifest.files},
    }


def _ends(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(END_BYTES)
        file.seek(max(file.seek(0, os.SEEK_END) - END_BYTES, 0))
        return hashlib.sha256(head + file.read(END_BYTES)).hexdigest()


def check(directory: SnapshotDir, snapshot: Snapshot) -> None:
    """Looks at its files, and reads those that nobody noted. Raises SnapshotError, which names all that differ."""
    snapshot.check()
    if is_noted(directory, snapshot):
        return
    wrong = damage(snapshot.path, snapshot.manifest)
    if wrong:
        raise SnapshotError(f"snapshot {snapshot.id}: {'; '.join(wrong.values())}")


def damage(path: Path, manifest: Manifest) -> Mapping[str, str]:
    """By name, what is wrong with a file of the snapshot at `path`. Reads every byte."""
    wrong = {}
    for name, entry in manifest.files.items():
        try:
            if file_sha256(path / name) != entry.sha256:
                wrong[name] = f"{name} is not what was written"
        except OSError as error:
            wrong[name] = f"{name} cannot be read ({error.strerror})"
    return wrong


def _note(directory: SnapshotDir, snapshot_id: str) -> Path:
    return directory.root / "verified" / f"{snapshot_id}.json"
