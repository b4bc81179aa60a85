"""Documents to a live snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TextIO

from ragrack.snapshot import Snapshot

if TYPE_CHECKING:
    from ragrack.settings import Settings


class IngestError(Exception):
    """Nothing was changed; the message says why and what mends it."""


class Progress(Protocol):
    """Told of each batch, and of each document that was skipped (`note`)."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


def progress_to(stream: TextIO, as_json: bool) -> Progress:
    """A bar on a terminal, else (or with as_json) JSON lines."""
    raise NotImplementedError


def ingest(settings: Settings, collection: str, progress: Progress) -> Snapshot:
    """Raises IngestError (refused, no documents, golden questions failed)."""
    raise NotImplementedError
