"""The files of a collection: which are documents, and what is in them. Whoever laid them there is not trusted."""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ragrack.extract import KINDS

NO_FILE = "is a pipe, a socket or a device, no file"


class DocumentError(Exception):
    """A file that cannot be read as a document; the message names it and says why.

    `again`: the machine may be to blame, so the same content is worth another try.
    """

    def __init__(self, name: str, problem: str, *, again: bool = False) -> None:
        super().__init__(f"{name}: {problem}")
        self.again = again


@dataclass
class Found:
    """What lies below a folder. `problems`: of files that are no documents, though they are called so, by name.
    `others`: how many files of no readable kind there are, by the end of their names.
    """

    documents: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)


def find_documents(root: Path) -> Found:
    """By their paths below root, in a fixed order; hidden ones are not looked at and links not followed."""
    found = Found()

    def unreadable(error: OSError) -> None:
        name = shown(Path(error.filename).relative_to(root).as_posix())
        found.problems[name] = f"{name}: cannot be read ({error.strerror})"

    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for file in [*links, *(file for file in files if not file.startswith("."))]:
            path = Path(folder, file)
            if path.suffix.lower() not in KINDS and file not in links:
                found.others[shown(path.suffix.lower())] += 1
                continue
            name = path.relative_to(root).as_posix()
            problem = "its name is not printable UTF-8: rename it" if name != shown(name) else _no_file(path)
            if problem is None:
                found.documents.append(name)
            else:
                found.problems[shown(name)] = f"{shown(name)}: {problem}"
    found.documents.sort(key=lambda name: PurePosixPath(name).parts)
    return found


def shown(name: str) -> str:
    """With escapes for what is no text, or would do something to a terminal."""
    return name if name.isprintable() else ascii(name)[1:-1]


def _no_file(path: Path) -> str | None:
    """Why it is none."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if stat.S_ISLNK(mode):
        return "is a link, and links are not followed: put what it leads to in its place"
    return None if stat.S_ISREG(mode) else NO_FILE


def read_file(root: Path, name: str, max_bytes: int) -> bytes:
    """The content of the file at `name` below root. Raises DocumentError: not readable, no file or too large."""
    try:
        # A pipe that took its place since must not block it.
        with os.fdopen(os.open(root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DocumentError(name, NO_FILE, again=True)
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise DocumentError(name, f"cannot be read ({error.strerror})", again=True) from error
    if len(data) > max_bytes:
        problem = f"is larger than {max_bytes} bytes: split it, or raise RAGRACK_DOCUMENT_MAX_BYTES"
        raise DocumentError(name, problem, again=True)
    return data
