"""What a host knows about its releases: their directories, the `current` link and the history.

The link says what is live; the history says how it came to be. Nothing here looks at the time of a file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

Event = dict[str, Any]

STAGING = ".staging-"
TRASH = ".trash-"
# What systemd takes as the name of an instance, and short enough that <root>/releases/<id>/run/gunicorn.sock stays
# below the 107 bytes of a Unix socket's address.
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class StateError(Exception):
    """A refusal, in words for whoever typed the command. `log` holds the last lines of the unit that failed."""

    def __init__(self, message: str, log: list[str] | None = None, **facts: Any) -> None:
        super().__init__(message)
        self.log = log or []
        self.facts = facts

    def words(self) -> str:
        """The message, and below it what the unit said last."""
        said = ["last lines of its log:", *(f"  {line}" for line in self.log)] if self.log else []
        return "\n".join([str(self), *said])


def now() -> str:
    """The time in UTC as in 2026-11-24T10:00:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def fsync_dir(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace a file as a whole: write aside, fsync, rename."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(fd, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    fsync_dir(path.parent)


@contextlib.contextmanager
def exclusively(directory: Path, wait: float = 60) -> Iterator[None]:
    """Hold a directory against other processes of this host; the hold ends with the process, however that ends."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    deadline = time.monotonic() + wait
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StateError(
                        f"another process on this host has been changing {directory} for {wait:g} s, perhaps what is "
                        "left of a run that was killed; try again when it has ended"
                    ) from None
                time.sleep(0.1)
        yield
    finally:
        os.close(fd)


class History:
    """An append-only log, one JSON object a line. A last line that a crash cut off is dropped by the next append."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Event]:
        """All events, oldest first.

        Raises StateError for a line in the middle that is not an object of JSON: what "previous" means depends on it.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        events: list[Event] = []
        for number, line in enumerate(whole_lines(data).splitlines(), 1):
            event = as_event(line)
            if event is None:
                raise StateError(f"{self.path} line {number} is not an object of JSON; repair or remove that line")
            events.append(event)
        return events

    def append(self, event: Mapping[str, Any]) -> None:
        """Add one event, durably; `time` is filled in."""
        line = json.dumps({"time": now(), **event}, ensure_ascii=False).encode() + b"\n"
        fd = self._exclusively()
        try:
            self._repair(fd)
            os.write(fd, line)
            os.fsync(fd)
        finally:
            os.close(fd)
        fsync_dir(self.path.parent)

    def shorten(self, above: int, to: int) -> bool:
        """Keep the last `to` events once there are more than `above`, and the last 100 that say what is a way back."""
        if len(self.read()) <= above:
            return False
        fd = self._exclusively()
        try:
            events = self.read()
            ways_back = [event for event in events[:-to] if event.get("event") in ("live", "bad")][-100:]
            kept = [*ways_back, *events[-to:]]
            write_atomically(self.path, "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in kept))
        finally:
            os.close(fd)
        return True

    def _exclusively(self) -> int:
        """The open file, which no other process writes to or replaces until it is closed."""
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            fcntl.flock(fd, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), self.path.stat()):
                    return fd
            os.close(fd)

    def _repair(self, fd: int) -> None:
        data = self.path.read_bytes()
        good = whole_lines(data)
        if data == good:
            return
        os.ftruncate(fd, min(len(data), len(good)))
        if len(good) > len(data):  # only the line's end was lost
            os.write(fd, b"\n")


def whole_lines(data: bytes) -> bytes:
    """The log without a last line that was cut off; one that lacks nothing but its end is completed."""
    if not data or data.endswith(b"\n"):
        return data
    head, _, tail = data.rpartition(b"\n")
    if as_event(tail) is not None:
        return data + b"\n"
    return head + b"\n" if head else b""


def as_event(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def live_stack(history: Iterable[Event], current: str | None) -> list[str]:
    """The releases that went live and were not rolled back from, the live one last.

    A deploy pushes. A rollback pops down to its target, or pushes one that is not there. A flip is written to the
    history before it happens, so one that never happened (the host died in between) shows in what came next: the next
    flip, or `current`, starts where that one started. The link also wins over the history if somebody moved it by hand.
    """
    flips = [event for event in history if event.get("event") == "live"]
    stack: list[str] = [flips[0]["from"]] if flips and flips[0]["from"] else []
    for flip, following in zip_longest(flips, flips[1:]):
        then = following["from"] if following else current
        if then == flip["from"]:
            continue
        stack = _rolled_back(stack, flip["to"]) if flip["how"] == "rollback" else [*stack, flip["to"]]
        if then is not None and then != flip["to"]:
            stack = _rolled_back(stack, then)
    if current is not None and not stack:
        stack = [current]
    return stack


def _rolled_back(stack: list[str], target: str) -> list[str]:
    for depth in range(len(stack) - 1, -1, -1):
        if stack[depth] == target:
            return stack[: depth + 1]
    return [*stack, target]


@dataclass(frozen=True)
class Release:
    """One directory below `releases`, as its release.json describes it."""

    id: str
    version: str
    artifact: str
    python: str
    env: str
    created: str


class Releases:
    """The releases of one host below `root` (/opt/ragrack)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.dir = root / "releases"
        self.link = root / "current"
        self.gates = root / ".gates"
        self.history = History(root / "history.jsonl")

    def path(self, release: str) -> Path:
        return self.dir / release

    def current(self) -> str | None:
        """The id that `current` points at, or None on a host that has none yet."""
        try:
            target = self.link.readlink()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"{self.link} is not a link ({error.strerror}); move it away, then deploy") from error
        return target.name

    def all(self) -> dict[str, Release]:
        """The complete releases by id. What is being built or removed is not among them."""
        found: dict[str, Release] = {}
        if not self.dir.is_dir():
            return found
        for path in sorted(self.dir.iterdir()):
            if path.name.startswith("."):
                continue
            try:
                facts = json.loads((path / "release.json").read_text())
            except (FileNotFoundError, NotADirectoryError, ValueError):
                continue
            found[path.name] = Release(
                path.name, *(str(facts.get(key, "")) for key in ("version", "artifact", "python", "env", "created"))
            )
        return found

    def bad(self) -> dict[str, str]:
        """Releases marked bad, with the reason. One that went live after its mark is no longer bad."""
        marks: dict[str, str] = {}
        for event in self.history.read():
            if event.get("event") == "bad":
                marks[event["release"]] = event["reason"]
            elif event.get("event") == "live":
                marks.pop(event["to"], None)
        return marks

    def previous(self) -> str | None:
        """The rollback target: the nearest in the stack that is there, not live and not bad."""
        current = self.current()
        there, bad = self.all(), self.bad()
        for release in reversed(live_stack(self.history.read(), current)):
            if release != current and release in there and release not in bad:
                return release
        return None

    def described(self) -> str:
        """The releases of this host in one line, for messages."""
        current, previous, bad = self.current(), self.previous(), self.bad()
        words = []
        for release in self.all():
            notes = []
            if release == current:
                notes.append("live")
            if release == previous:
                notes.append("previous")
            if release in bad:
                notes.append(f"bad: {bad[release]}")
            words.append(f"{release} ({', '.join(notes)})" if notes else release)
        return ", ".join(words) or "none"

    def require(self, release: str) -> Release:
        """The release of that id. Raises StateError that names those there are."""
        there = self.all()
        if release not in there:
            raise StateError(f"there is no release {release} on this host; there are: {self.described()}")
        return there[release]

    def resolve(self, target: str) -> str:
        """The id of a rollback target: `previous` or an id. Raises StateError that says what there is instead."""
        if target == "previous":
            previous = self.previous()
            if previous is None:
                raise StateError(f"there is nothing to roll back to; the releases of this host are: {self.described()}")
            return previous
        self.require(target)
        bad = self.bad()
        if target in bad and target != self.current():
            raise StateError(
                f"release {target} is marked bad: {bad[target]}; choose another of: {self.described()}; "
                "or deploy it again, which asks it the golden questions again"
            )
        return target

    def flip(self, release: str, *, how: str, who: str, what: str, run: str | None) -> float:
        """Point `current` at a release by one rename, after writing it to the history. Returns milliseconds."""
        self.history.append(
            {"event": "live", "how": how, "from": self.current(), "to": release, "who": who, "what": what, "run": run}
        )
        aside = self.root / f".current-{os.getpid()}"
        aside.unlink(missing_ok=True)
        began = time.perf_counter()
        aside.symlink_to(Path("releases") / release)
        aside.replace(self.link)
        fsync_dir(self.root)
        return (time.perf_counter() - began) * 1000

    def mark_bad(self, release: str, reason: str, *, who: str, run: str | None) -> bool:
        """Mark a release bad and forget that it passed its gate. False if it had that very mark."""
        self.forget_gate(release)
        if self.bad().get(release) == reason:
            return False
        self.history.append({"event": "bad", "release": release, "reason": reason, "who": who, "run": run})
        return True

    def remember_gate(self, release: str, invocation: str) -> None:
        """Note that a release answered in this life, which systemd's invocation id names."""
        self.gates.mkdir(mode=0o755, exist_ok=True)
        write_atomically(self.gates / release, invocation + "\n")

    def gated_in(self, release: str) -> str | None:
        """The life of a release in which it passed its gate last."""
        try:
            return (self.gates / release).read_text().strip()
        except FileNotFoundError:
            return None

    def forget_gate(self, release: str) -> None:
        (self.gates / release).unlink(missing_ok=True)

    def prunable(self, keep: int, protect: set[str], run: str | None) -> list[str]:
        """The releases to remove so that `keep` good ones stay, the live one and the rollback target among them.

        Bad releases and those that never went live do not count and go, but nothing in `protect` does (running, or in
        the making), nor what this run staged.
        """
        there, bad, current = self.all(), self.bad(), self.current()
        went_live: dict[str, int] = {}
        for number, event in enumerate(self.history.read()):
            if event.get("event") == "live":
                went_live[event["to"]] = number
            elif event.get("event") == "staged" and run is not None and event.get("run") == run:
                protect = protect | {event["release"]}
        held = {release for release in (current, self.previous()) if release is not None}
        good = [release for release in there if release not in bad and (release in went_live or release in held)]
        good.sort(key=lambda release: (release in held, went_live.get(release, -1)), reverse=True)
        stays = held | protect | set(good[:keep])
        return [release for release in there if release not in stays]

    def leftovers(self) -> list[Path]:
        """What a run that died left half built or half removed."""
        if not self.dir.is_dir():
            return []
        return sorted(path for path in self.dir.iterdir() if path.name.startswith((STAGING, TRASH)))

    def remove(self, release: str) -> None:
        """Remove a release. It is gone by one rename before its files go, so that none is ever half there."""
        trash = self.dir / f"{TRASH}{release}"
        shutil.rmtree(trash, ignore_errors=True)
        self.path(release).rename(trash)
        fsync_dir(self.dir)
        self.forget_gate(release)
        shutil.rmtree(trash)
