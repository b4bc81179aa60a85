"""One run at a time that writes the snapshots of a collection: an ingest or a pull."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ragrack.snapshot import timestamp


class BusyError(Exception):
    """Another run is at it; the message names it."""


@contextlib.contextmanager
def building(index_dir: Path, collection: str) -> Iterator[None]:
    """The kernel lets go of it when the process dies, however it does. Raises BusyError."""
    path = index_dir / collection / ".ingest.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise BusyError(
                f"another ingest or pull of this collection is running "
                f"({file.read().strip() or 'it has just begun'}): wait for it, or stop it"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} since {timestamp()}")
        file.flush()
        yield
        file.truncate(0)
