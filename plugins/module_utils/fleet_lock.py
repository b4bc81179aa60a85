"""Who may change a fleet now: one file on a host, made and taken over atomically."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .release_state import History, StateError, exclusively, fsync_dir, now, write_atomically


@dataclass(frozen=True)
class Holder:
    """A run that holds the lock.

    `controller`, `machine`, `boot`, `pid` and `pid_started` are for the control node, which tells by them if it lives.
    """

    run: str
    owner: str
    controller: str
    machine: str
    boot: str
    pid: int
    pid_started: str
    why: str
    since: str = ""

    def words(self) -> str:
        """As in: locked by ann on control1 since 2026-11-24T10:00:00Z (4 min): deploy 0.2.0."""
        return f"locked by {self.owner} on {self.controller} since {self.since} ({age(self.since)}): {self.why}"


def age(since: str) -> str:
    try:
        seconds = int((datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds())
    except (ValueError, TypeError):
        return "age unknown"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


class FleetLock:
    """The lock file `<root>/lock.json` of one host."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "lock.json"

    def holder(self) -> Holder | None:
        """Who holds the lock. Raises StateError for a file that no lock module wrote."""
        try:
            facts: dict[str, Any] = json.loads(self.path.read_text())
            return Holder(**{field.name: facts[field.name] for field in fields(Holder)})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise StateError(
                f"{self.path} is not a lock ({type(error).__name__}: {error}); look at it, then remove it"
            ) from error

    def acquire(self, wanted: Holder, takeover_of: str | None = None) -> tuple[bool, Holder]:
        """Take the lock if it is free, ours, or held by exactly the run `takeover_of`.

        Returns whether it was taken now, and who holds it after: somebody else, if it was not to be had.
        """
        self.root.mkdir(mode=0o755, parents=True, exist_ok=True)
        with exclusively(self.root):
            held = self.holder()
            if held is not None and held.run != takeover_of:
                return False, held
            if held is not None and held.run == wanted.run:
                return False, held
            mine = Holder(**{**asdict(wanted), "since": now()})
            text = json.dumps(asdict(mine)) + "\n"
            if held is None:
                self._create(text)
            else:
                History(self.root / "history.jsonl").append(
                    {"event": "lock_taken_over", "who": mine.owner, "run": mine.run, "from": asdict(held)}
                )
                write_atomically(self.path, text)
            return True, mine

    def _create(self, text: str) -> None:
        aside = self.root / f".lock.json.{os.getpid()}"
        write_atomically(aside, text)
        try:
            os.link(aside, self.path)
        except FileExistsError:
            raise StateError(f"{self.path} appeared while it was being made; try again") from None
        finally:
            aside.unlink()
        fsync_dir(self.root)

    def release(self, run: str, *, force: bool = False) -> tuple[bool, Holder | None]:
        """Give up the lock of `run`, with `force` that of anybody. Returns whether one went, and whose it was."""
        if not self.root.is_dir():
            return False, None
        with exclusively(self.root):
            held = self.holder()
            if held is None or (held.run != run and not force):
                return False, held
            if held.run != run:
                History(self.root / "history.jsonl").append({"event": "lock_broken", "run": run, "from": asdict(held)})
            self.path.unlink()
            fsync_dir(self.root)
            return True, held
