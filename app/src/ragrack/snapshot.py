"""Snapshots of an index on disk: immutable directories, one of which the link `current` points at.

    <index_dir>/<collection>/<fingerprint>/snapshots/<id>/   files + manifest.json
    <index_dir>/<collection>/<fingerprint>/current           -> snapshots/<id>
    <index_dir>/<collection>/<fingerprint>/history.jsonl     one line for each time that `current` moved

Needs nothing but the standard library, so that the command line stays quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
SNAPSHOT_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")


class SnapshotError(Exception):
    """A snapshot is missing, damaged, or was built with something else."""


@dataclass(frozen=True)
class FileEntry:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a snapshot holds, and what it was built from and with. Written last, so a directory with one is whole."""

    id: str
    collection: str
    fingerprint: str
    """Digest of what it was built with; `built_with` has the parts."""
    built_with: dict[str, Any]
    content: str
    """SHA-256 over the nodes: the same documents, chunked the same way, give the same."""
    created: str
    parent: str | None
    documents: int
    nodes: int
    dimensions: int
    engine: str
    """`flat` or `hnsw`."""
    files: dict[str, FileEntry]
    golden: dict[str, Any] | None
    """`{questions, k, hit_rate, mrr}` as measured before it went live; None where the collection has no questions."""
    skipped: list[str] = dataclasses.field(default_factory=list)
    """Documents that could not be read."""

    @classmethod
    def read(cls, path: Path) -> Manifest:
        try:
            raw = json.loads((path / MANIFEST).read_text())
            raw["files"] = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
            return cls(**raw)
        except FileNotFoundError as error:
            raise SnapshotError(f"{path} has no {MANIFEST}: it is not a whole snapshot") from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise SnapshotError(f"{path / MANIFEST} is damaged: {error}") from error

    def write(self, path: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"
        write_file(path / MANIFEST, text.encode())


@dataclass(frozen=True)
class Snapshot:
    """A whole snapshot on disk."""

    path: Path
    manifest: Manifest

    @property
    def id(self) -> str:
        return self.path.name

    def check(self) -> None:
        """What can be seen without reading the data: every file is there and has its size. Takes no time.

        Raises SnapshotError.
        """
        for name, entry in self.manifest.files.items():
            try:
                size = (self.path / name).stat().st_size
            except OSError as error:
                raise SnapshotError(f"snapshot {self.id}: {name} cannot be read ({error.strerror})") from error
            if size != entry.bytes:
                raise SnapshotError(f"snapshot {self.id}: {name} has {size} bytes, its manifest says {entry.bytes}")


class SnapshotDir:
    """The snapshots of one collection that were built with one fingerprint."""

    def __init__(self, index_dir: Path, collection: str, fingerprint: str) -> None:
        self.index_dir = index_dir
        self.collection = collection
        self.fingerprint = fingerprint
        self.root = index_dir / collection / fingerprint
        self.snapshots = self.root / "snapshots"
        self.link = self.root / "current"

    @classmethod
    def all(cls, index_dir: Path) -> Sequence[SnapshotDir]:
        """Of every collection and fingerprint that has any, by name."""
        return [
            cls(index_dir, path.parent.parent.name, path.parent.name)
            for path in sorted(index_dir.glob("*/*/snapshots"))
            if path.is_dir()
        ]

    def current_id(self) -> str | None:
        try:
            return self.link.readlink().name
        except FileNotFoundError:
            return None

    def current(self) -> Snapshot | None:
        """The live one; None where none has been made. Raises SnapshotError when the live one is gone or damaged."""
        snapshot_id = self.current_id()
        return None if snapshot_id is None else self.get(snapshot_id)

    def get(self, snapshot_id: str) -> Snapshot:
        if not SNAPSHOT_ID.fullmatch(snapshot_id) or not (self.snapshots / snapshot_id).is_dir():
            there = ", ".join(self._ids()) or "none"
            raise SnapshotError(f"no snapshot {snapshot_id!r} of {self.collection}. Those there are: {there}")
        path = self.snapshots / snapshot_id
        manifest = Manifest.read(path)
        if manifest.fingerprint != self.fingerprint or manifest.collection != self.collection:
            raise SnapshotError(
                f"snapshot {snapshot_id} lies under {self.collection}/{self.fingerprint} but was built for "
                f"{manifest.collection}/{manifest.fingerprint}"
            )
        return Snapshot(path, manifest)

    def list(self) -> Sequence[Snapshot]:
        """The whole ones, oldest first; damaged ones are left out (`verify` says what is wrong with them)."""
        found = []
        for snapshot_id in self._ids():
            with contextlib.suppress(SnapshotError):
                found.append(self.get(snapshot_id))
        return found

    def verify(self, snapshot_id: str) -> None:
        """Reads every byte and compares it with the manifest. Raises SnapshotError, which names all that differ."""
        snapshot = self.get(snapshot_id)
        wrong = []
        for name, entry in snapshot.manifest.files.items():
            try:
                if file_sha256(snapshot.path / name) != entry.sha256:
                    wrong.append(f"{name} is not what was written")
            except OSError as error:
                wrong.append(f"{name} cannot be read ({error.strerror})")
        extra = {path.name for path in snapshot.path.iterdir()} - snapshot.manifest.files.keys() - {MANIFEST}
        wrong += [f"{name} does not belong there" for name in sorted(extra)]
        if wrong:
            raise SnapshotError(f"snapshot {snapshot_id}: {'; '.join(wrong)}")

    @contextlib.contextmanager
    def new(self) -> Iterator[Path]:
        """A directory to write a snapshot in, removed at the end unless `publish` has taken it."""
        self.snapshots.mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix=".new-", dir=self.snapshots))
        path.chmod(0o755)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def publish(self, new: Path, manifest: Manifest) -> Snapshot:
        """Makes what was written in `new` a snapshot: fsync, manifest, rename. It isn't live before `flip`."""
        for name in manifest.files:
            (new / name).chmod(0o444)
            fsync(new / name)
        manifest.write(new)
        fsync(new)
        path = self.snapshots / manifest.id
        new.rename(path)
        fsync(self.snapshots)
        return Snapshot(path, manifest)

    def flip(self, snapshot_id: str, why: str) -> None:
        """Makes it the live one, by one rename, and notes that in the history. Raises SnapshotError."""
        self.get(snapshot_id).check()
        before = self.current_id()
        if before == snapshot_id:
            return
        aside = self.root / f".current-{os.getpid()}"
        aside.unlink(missing_ok=True)
        aside.symlink_to(Path("snapshots") / snapshot_id)
        aside.replace(self.link)
        fsync(self.root)
        self._note({"at": timestamp(), "from": before, "to": snapshot_id, "why": why})

    def history(self) -> Sequence[dict[str, Any]]:
        """`{at, from, to, why}` for each flip, oldest first."""
        try:
            lines = (self.root / "history.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        entries = []
        for line in lines:
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
        return entries

    def prune(self, keep: int) -> Sequence[str]:
        """Removes all but the newest `keep` and the live one, and what dead runs left. Returns the ids removed.

        A process that has a removed snapshot open keeps reading it until it closes it.
        """
        for left in self.snapshots.glob(".new-*"):
            shutil.rmtree(left, ignore_errors=True)
        ids = self._ids()
        removed = [i for i in ids[: max(0, len(ids) - keep)] if i != self.current_id()]
        for snapshot_id in removed:
            # The manifest goes first: a half-removed snapshot must not look whole.
            (self.snapshots / snapshot_id / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self.snapshots / snapshot_id)
        return removed

    def _ids(self) -> Sequence[str]:
        if not self.snapshots.is_dir():
            return []
        return sorted(path.name for path in self.snapshots.iterdir() if SNAPSHOT_ID.fullmatch(path.name))

    def _note(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, sort_keys=True) + "\n"
        descriptor = os.open(self.root / "history.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def timestamp() -> str:
    """Now, in UTC, as it sorts in a file name: 20261124T231501Z."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """A file's or a directory's."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes, like: Path | None = None) -> None:
    """Whole or not at all: aside, fsync, rename. With the mode, and as far as one may the owner, of `like`."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        if like is not None:
            status = like.stat()
            with contextlib.suppress(PermissionError):
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
            os.fchmod(file.fileno(), status.st_mode & 0o777)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    fsync(path.parent)
