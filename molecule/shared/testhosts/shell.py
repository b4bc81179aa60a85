"""Commands, files and locks: what the rest of the package says to the operating system."""

import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class HostsError(Exception):
    """What went wrong and how to mend it, for the user to read."""


class UnsuitableMachineError(HostsError):
    """This machine cannot run test hosts at all."""


def run(*command: str, stdin: str | None = None) -> str:
    """Run a command and return what it printed; its own words are the error if it fails."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()[-20:]
        raise HostsError("\n  ".join([f"{' '.join(command)}: exit {done.returncode}", *said]))
    return done.stdout


def succeeds(*command: str) -> bool:
    """Whether a command exits with 0; what it prints is dropped."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace a file as a whole: nobody ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as aside:
        aside.write(text)
        aside.flush()
        os.fsync(aside.fileno())
    Path(aside.name).chmod(mode)
    Path(aside.name).replace(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file that exists only while somebody holds or awaits it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # The holder before us unlinked the file: then ours is no longer the one that others lock.
            if not _is_at(path, file.fileno()):
                continue
            try:
                yield
            finally:
                path.unlink()
            return


def _is_at(path: Path, fd: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False
