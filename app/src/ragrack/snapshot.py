"""Snapshots of an index on disk: immutable directories, one of which the link `current` points at.

    <index_dir>/<collection>/<fingerprint>/snapshots/<id>/   files + manifest.json
    <index_dir>/<collection>/<fingerprint>/current           -> snapshots/<id>
    <index_dir>/<collection>/<fingerprint>/history.jsonl     one line for each time that `current` moved
    <index_dir>/<collection>/<fingerprint>/hold.json         while `current` is held where it is

What served before the live one is the history's to say; nothing here looks at the time of a file.

Needs nothing but the standard library, so that the command line stays quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import filecmp
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

MANIFEST = "manifest.json"
TIMESTAMP = "%Y%m%dT%H%M%SZ"
SNAPSHOT_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")


class SnapshotError(Exception):
    """A snapshot is missing, damaged, or was built with something else."""


class UnavailableError(SnapshotError):
    """What keeps the snapshots does not answer now; that says nothing about them."""


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
            return cls.parse(json.loads((path / MANIFEST).read_text()))
        except FileNotFoundError as error:
            raise SnapshotError(f"{path} has no {MANIFEST}: it is not a whole snapshot") from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise SnapshotError(f"{path / MANIFEST} is damaged: {error}") from error

    @classmethod
    def parse(cls, raw: Any) -> Self:
        """Out of its JSON. Raises TypeError, KeyError or AttributeError where that is damaged."""
        return cls(**raw | {"files": {name: FileEntry(**entry) for name, entry in raw["files"].items()}})

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

    def signature(self) -> Mapping[str, Sequence[int]]:
        """By file, the manifest too, its inode, size in bytes and time of the last write in nanoseconds.

        Raises SnapshotError where one cannot be looked at.
        """
        found = {}
        for name in (MANIFEST, *self.manifest.files):
            try:
                status = (self.path / name).stat()
            except OSError as error:
                raise SnapshotError(f"snapshot {self.id}: {name} cannot be read ({error.strerror})") from error
            found[name] = [status.st_ino, status.st_size, status.st_mtime_ns]
        return found

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


@dataclass(frozen=True)
class Hold:
    """Since `at`, nothing moves `current` on by itself; `next` is what would have, last."""

    at: str
    why: str
    next: str | None = None

    def words(self) -> str:
        return f"held since {self.at or 'an unknown time'} ({self.why}); `ragrack index resume` lets go"


def served(history: Iterable[Mapping[str, Any]], current: str | None) -> Sequence[str]:
    """The snapshots that were live and not rolled back from, oldest first, the live one last; ids may repeat.

    Going on adds one, going back takes away all that came after. A flip is noted before it is done, so one that never
    happened (the host died in between) shows in where the next one, or `current`, starts from; the link is right where
    the history is not.
    """
    flips = [entry for entry in history if entry.get("to")]
    stack: list[str] = [flips[0]["from"]] if flips and flips[0].get("from") else []
    for flip, following in zip_longest(flips, flips[1:]):
        then = following.get("from") if following else current
        if then == flip.get("from"):
            continue
        stack = _back_to(flip["to"], stack) if flip.get("back") else [*stack, flip["to"]]
        if then is not None and then != flip["to"]:
            stack = _back_to(then, stack)
    return stack or ([current] if current else [])


def _back_to(snapshot_id: str, stack: list[str]) -> list[str]:
    """The stack down to the last time that the snapshot was live, or with it on top where it never was."""
    for depth in range(len(stack), 0, -1):
        if stack[depth - 1] == snapshot_id:
            return stack[:depth]
    return [*stack, snapshot_id]


class SnapshotDir:
    """The snapshots of one collection that were built with one fingerprint.

    What changes `current`, the hold or the history waits for another process of this host that is at it.
    """

    def __init__(self, index_dir: Path, collection: str, fingerprint: str) -> None:
        self.index_dir = index_dir
        self.collection = collection
        self.fingerprint = fingerprint
        self.root = index_dir / collection / fingerprint
        self.snapshots = self.root / "snapshots"
        self.link = self.root / "current"
        self._hold = self.root / "hold.json"

    @classmethod
    def all(cls, index_dir: Path) -> Sequence[Self]:
        """Of every collection and fingerprint that has any, by name."""
        return [
            cls(index_dir, path.parent.parent.name, path.parent.name)
            for path in sorted(index_dir.glob("*/*/snapshots"))
            if path.is_dir() and not path.parent.name.startswith(".")
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
            there = ", ".join(self.ids()) or "none"
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
        for snapshot_id in self.ids():
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
        with contextlib.ExitStack() as stack:
            with self._changing():
                path = Path(tempfile.mkdtemp(prefix=".new-", dir=self.snapshots))
                # Tells `prune` that this one is still being written, for as long as the process lives.
                stack.enter_context(_flock(path, fcntl.LOCK_EX))
            path.chmod(0o755)
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)

    def publish(self, new: Path, manifest: Manifest) -> Snapshot:
        """Makes what was written in `new` a snapshot: fsync, manifest, rename. It isn't live before `flip`.

        A file that is byte for byte the parent's becomes another name of that file. What has changed in part is the
        writer's to share: it starts from a copy of the parent's, which costs no blocks where the file system can.
        """
        self._share_with_parent(new, manifest)
        for name in manifest.files:
            (new / name).chmod(0o444)
            fsync(new / name)
        manifest.write(new)
        fsync(new)
        path = self.snapshots / manifest.id
        new.rename(path)
        fsync(self.snapshots)
        return Snapshot(path, manifest)

    def flip(self, snapshot_id: str, why: str, *, back: bool = False) -> None:
        """Makes it the live one, by one rename, and notes that in the history. Raises SnapshotError.

        `back`: this is a rollback, so what came after that snapshot is not what a later one goes back to.
        """
        self.get(snapshot_id)
        with self._changing():
            self._flip(snapshot_id, why, back=back)

    def offer(self, snapshot_id: str, why: str, *, back: bool = False) -> bool:
        """As `flip`, unless `current` is held; then `resume` goes there. Returns whether it is live."""
        self.get(snapshot_id)
        with self._changing():
            hold = self.held()
            if hold is None:
                self._flip(snapshot_id, why, back=back)
                return True
            self._write_hold(dataclasses.replace(hold, next=snapshot_id))
            return self.current_id() == snapshot_id

    def hold(self, why: str) -> None:
        """Keeps `current` where it is until `resume`. Raises SnapshotError where nothing is live."""
        if self.current_id() is None:
            raise SnapshotError(f"{self.collection} has no live snapshot to hold")
        with self._changing():
            held = self.held()
            self._write_hold(Hold(timestamp(), why, held.next if held else None))

    def resume(self, to: str | None = None) -> None:
        """Lets `current` go and moves it to `to`; by default to what came last, or to the newest whole one.

        Raises SnapshotError; the hold stays then.
        """
        if self.held() is None and to is None:
            return
        with self._changing():
            target = to or self._awaited()
            if target is not None:
                self._flip(target, "resume")
            self._hold.unlink(missing_ok=True)
            fsync(self.root)

    def held(self) -> Hold | None:
        """None where `current` follows what comes. A file that cannot be read holds: somebody put it there."""
        try:
            raw = json.loads(self._hold.read_bytes())
            return Hold(str(raw["at"]), str(raw["why"]), raw.get("next"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            return Hold("", f"{self._hold} cannot be read ({error})")

    def ways_back(self) -> Sequence[str]:
        """What served before the live one and is whole, the last first: where a rollback can go."""
        current = self.current_id()
        before = dict.fromkeys(reversed(served(self.history(), current)))
        return [snapshot_id for snapshot_id in before if snapshot_id != current and self._whole(snapshot_id)]

    def previous_id(self) -> str | None:
        """Where a rollback goes; None where there is nothing to go back to."""
        return next(iter(self.ways_back()), None)

    def history(self) -> Sequence[dict[str, Any]]:
        """`{at, from, to, why}` for each flip, oldest first, with `back: true` where it was a rollback."""
        try:
            lines = (self.root / "history.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        entries = []
        for line in lines:
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict):
                    entries.append(entry)
        return entries

    def prunable(self, keep: int) -> Sequence[str]:
        """All but the newest `keep`, the live one, where a rollback goes, and where `resume` goes.

        Damaged ones do not count as kept, but go only with their age.
        """
        held = self.held()
        ids = self.ids()
        whole = [snapshot_id for snapshot_id in ids if self._whole(snapshot_id)]
        stay = {self.current_id(), self.previous_id(), held and held.next, *whole[-keep:]}
        return [snapshot_id for snapshot_id in ids[:-keep] if snapshot_id not in stay]

    def prune(self, keep: int) -> Sequence[str]:
        """Removes what `prunable(keep)` names, and what dead runs left. Returns the ids removed; `keep` is 1 or more.

        A process that has a removed snapshot open keeps reading it until it closes it.
        """
        if not self.root.is_dir():
            return []
        with self._changing():
            for left in self.snapshots.glob(".new-*"):
                with contextlib.suppress(BlockingIOError), _flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(left, ignore_errors=True)
            for left in (*self.root.glob(".current-*"), *self.root.glob(".hold.json.*")):
                left.unlink()
            removed = self.prunable(keep)
            for snapshot_id in removed:
                # The manifest goes first: a half-removed snapshot must not look whole.
                (self.snapshots / snapshot_id / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(self.snapshots / snapshot_id)
            return removed

    def discard(self) -> None:
        """Removes all of it, history and staging area included: gone by one rename before its files go."""
        gone = self.root.with_name(f".gone-{self.fingerprint}")
        shutil.rmtree(gone, ignore_errors=True)
        self.root.rename(gone)
        shutil.rmtree(gone)

    def _awaited(self) -> str | None:
        hold = self.held()
        candidates = [*self.ids(), *([hold.next] if hold and hold.next else [])]
        return next((snapshot_id for snapshot_id in reversed(candidates) if self._whole(snapshot_id)), None)

    def _whole(self, snapshot_id: str) -> bool:
        try:
            self.get(snapshot_id).check()
        except SnapshotError:
            return False
        return True

    def _flip(self, snapshot_id: str, why: str, *, back: bool = False) -> None:
        self.get(snapshot_id).check()
        before = self.current_id()
        if before == snapshot_id:
            return
        self._note(
            {"at": timestamp(), "from": before, "to": snapshot_id, "why": why} | ({"back": True} if back else {})
        )
        aside = self.root / f".current-{os.getpid()}"
        aside.unlink(missing_ok=True)
        aside.symlink_to(Path("snapshots") / snapshot_id)
        aside.replace(self.link)
        fsync(self.root)

    def _share_with_parent(self, new: Path, manifest: Manifest) -> None:
        if manifest.parent is None:
            return
        with contextlib.suppress(SnapshotError, OSError):
            parent = self.get(manifest.parent)
            for name, entry in manifest.files.items():
                # The bytes are compared, not the hashes: what rots under the parent must not become the child's.
                if parent.manifest.files.get(name) == entry and filecmp.cmp(
                    parent.path / name, new / name, shallow=False
                ):
                    shared = new / f".{name}"
                    shared.hardlink_to(parent.path / name)
                    shared.replace(new / name)

    def _write_hold(self, hold: Hold) -> None:
        write_file(self._hold, (json.dumps(dataclasses.asdict(hold)) + "\n").encode())

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with _flock(self.root, fcntl.LOCK_EX):
            yield

    def ids(self) -> Sequence[str]:
        """Of all that are there, damaged ones too, oldest first."""
        if not self.snapshots.is_dir():
            return []
        return sorted(path.name for path in self.snapshots.iterdir() if SNAPSHOT_ID.fullmatch(path.name))

    def _note(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, sort_keys=True) + "\n"
        descriptor = os.open(self.root / "history.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = "\n" + line  # after a line that a crash cut off
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _flock(directory: Path, operation: int) -> Iterator[None]:
    """The kernel lets go of it when the process dies, however it does. Raises BlockingIOError with LOCK_NB."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        os.close(descriptor)


def timestamp() -> str:
    """Now, in UTC, as it sorts in a file name: 20261124T231501Z."""
    return datetime.now(UTC).strftime(TIMESTAMP)


def timestamp_after(ids: Sequence[str]) -> str:
    """Now, or a second after the newest of these where the clock is not past it: ids sort as they were made."""
    now = timestamp()
    newest = max((snapshot_id.partition("-")[0] for snapshot_id in ids), default="")
    if now > newest:
        return now
    return (datetime.fromisoformat(newest) + timedelta(seconds=1)).strftime(TIMESTAMP)


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
