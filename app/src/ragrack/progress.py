"""How far an ingest or a pull is: a bar on a terminal, JSON lines in the journal."""

from __future__ import annotations

import json
import time
from typing import Protocol, TextIO


class Progress(Protocol):
    """Told of each batch; `note` is for a person's eyes: a document that was skipped, the golden questions' result."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


def progress_to(stream: TextIO, as_json: bool) -> Progress:
    """A bar on a terminal; else, or with as_json, JSON lines: at most one a second, and every note."""
    return _Bar(stream) if stream.isatty() and not as_json else _JsonLines(stream)


class _JsonLines:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stage = ""
        self._last = 0.0

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if note or stage != self._stage or done == total or now - self._last >= 1:
            line = {"stage": stage, "done": done, "total": total} | ({"note": note} if note else {})
            print(json.dumps(line, ensure_ascii=False), file=self._stream, flush=True)
            self._stage, self._last = stage, now


class _Bar:
    WIDTH = 30

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._stage = ""
        self._start = 0.0

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stream.write("\n" if self._stage else "")
            self._stage, self._start = stage, now
        if note:
            self._stream.write(f"\r\x1b[K{note}\n")
        filled = self.WIDTH * done // total if total else self.WIDTH
        bar = "#" * filled + "." * (self.WIDTH - filled)
        self._stream.write(f"\r\x1b[K{stage:<6} [{bar}] {done}/{total} {now - self._start:.0f} s")
        self._stream.write("\n" if stage == "done" else "")
        self._stream.flush()
