"""Files to documents: HTML, Markdown and plain text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llama_index.core.schema import Document


class DocumentError(Exception):
    """A file that cannot be read as a document; the message says why."""


def find_documents(root: Path) -> Iterator[Path]:
    """The readable kinds of files below root, in a fixed order."""
    raise NotImplementedError


def read_document(root: Path, path: Path) -> Document:
    """Metadata: `document` (the path below root) and `title`. Raises DocumentError."""
    raise NotImplementedError
