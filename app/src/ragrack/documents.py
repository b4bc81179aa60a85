"""The documents of a collection as files: read, written and removed by path, never outside of the collection's folder.

A document is what `ragrack.files` would find: no hidden name, an ending that has a reader, content that fits it.
Writing puts the file in place whole or not at all; the next ingest finds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
import unicodedata
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from ragrack.extract import HEAD_BYTES, KINDS

MAX_PARTS = 16
MAX_NAME_BYTES = 200
# Of a file that is being written: hidden, so that no ingest takes it for a document.
ASIDE = ".upload-"


class DocumentPathError(ValueError):
    """The path cannot be a document's; the message says why, for the client's eyes."""


class TooLargeError(Exception):
    """More bytes came than are allowed."""


class MisfitError(Exception):
    """What came is not of the kind that its path's ending says; the message says so, as the readers do."""


class InTheWayError(Exception):
    """A part of the path is a file, or the path is a folder."""


@dataclass(frozen=True)
class Stored:
    """`sha256` as hex; `created`: there was none before."""

    bytes: int
    sha256: str
    created: bool


def check_path(path: str) -> str:
    """The path, if it can be a document's. Raises DocumentPathError. Looks at no file."""
    parts = path.split("/")
    if len(parts) > MAX_PARTS:
        raise DocumentPathError(f"has more than {MAX_PARTS} parts")
    for part in parts:
        if not part or part.startswith("."):
            raise DocumentPathError("has a part that is empty or begins with a dot")
        if part != part.strip() or re.search(r"[\\\x00-\x1f\x7f]", part) or not part.isprintable():
            raise DocumentPathError("has a blank at an end of a part, a backslash or a control character")
        if unicodedata.normalize("NFC", part) != part:
            raise DocumentPathError("is not in Unicode's normal form C")
        if len(part.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
            raise DocumentPathError(f"has a part of more than {MAX_NAME_BYTES} bytes")
    if Path(path).suffix.lower() not in KINDS:
        raise DocumentPathError(f"must end in one of {', '.join(KINDS)}")
    return path


class Documents:
    """Of one collection. Links are not followed: below `root`, every part must be a folder and the last a file."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, path: str) -> bytes:
        """Raises DocumentPathError, FileNotFoundError, InTheWayError."""
        *folders, name = check_path(path).split("/")
        with self._folder(folders) as folder:
            if not stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                raise InTheWayError
            with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder), "rb") as file:
                return file.read()

    async def write(self, path: str, chunks: AsyncIterator[bytes], max_bytes: int) -> Stored:
        """Raises DocumentPathError, TooLargeError, MisfitError, InTheWayError; then nothing has changed."""
        *folders, name = check_path(path).split("/")
        aside = f"{ASIDE}{secrets.token_hex(8)}"
        self._root.mkdir(parents=True, exist_ok=True)
        with self._folder(folders, make=True) as folder:
            digest, size, head = hashlib.sha256(), 0, b""
            kind = KINDS[Path(name).suffix.lower()]
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            try:
                with os.fdopen(os.open(aside, flags, 0o640, dir_fd=folder), "wb") as file:
                    async for chunk in chunks:
                        size += len(chunk)
                        head += chunk[: HEAD_BYTES - len(head)]
                        if size > max_bytes:
                            raise TooLargeError
                        digest.update(chunk)
                        file.write(chunk)
                    if not kind.fits(head):
                        raise MisfitError(kind.misfit(head))
                    file.flush()
                    await asyncio.to_thread(os.fsync, file.fileno())
                created = not _exists(name, folder)
                try:
                    os.replace(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
                except IsADirectoryError as error:
                    raise InTheWayError from error
                await asyncio.to_thread(os.fsync, folder)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(aside, dir_fd=folder)
                raise
        return Stored(size, digest.hexdigest(), created)

    def remove(self, path: str) -> None:
        """Folders that are left empty stay. Raises DocumentPathError, FileNotFoundError, InTheWayError."""
        *folders, name = check_path(path).split("/")
        with self._folder(folders) as folder:
            try:
                os.unlink(name, dir_fd=folder)
            except IsADirectoryError as error:
                raise InTheWayError from error
            os.fsync(folder)

    @contextlib.contextmanager
    def _folder(self, names: list[str], *, make: bool = False) -> Iterator[int]:
        """A descriptor of the folder: what is done by it is done there, wherever its name leads meanwhile."""
        # Links above it are the host's own business.
        current = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name in names:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, 0o750, dir_fd=current)
                try:
                    below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=current)
                except OSError as error:
                    if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                        raise
                    raise InTheWayError from error
                os.close(current)
                current = below
            yield current
        finally:
            os.close(current)


def _exists(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
