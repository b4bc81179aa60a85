"""From a file's content to its text: which kinds of documents are read, and what a reader gives.

The readers lie beside this file and are imported by the process that reads (`ragrack.reader_process`), each when the
first document of its kind comes: neither the service nor the ingest loads a parser.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ragrack.settings import Settings

Unit = Literal["page", "slide", "sheet"]
HEAD_BYTES = 8192
"""Of a file, from its beginning: enough to tell whether it can be what its name says."""


class RefusedError(Exception):
    """The document is not taken; the message says why and, where there is one, the mend."""


class LimitError(RefusedError):
    """It is larger than a setting allows: another value of the setting may let it in."""


@dataclass(frozen=True)
class Limits:
    """What one document may cost, each the setting of the same name."""

    document_max_pages: int
    document_max_characters: int
    document_read_seconds: int
    document_read_mib: int

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


class Extracted:
    """What is read of one document: its title, and the label and text of each page, slide or sheet in `parts`; where
    `unit` is None there is one part, without a label.
    """

    def __init__(self, limits: Limits, unit: Unit | None = None, count: int = 1) -> None:
        """`count`: of the pages to come. Raises LimitError where they are more than a document may have."""
        if count > limits.document_max_pages:
            most = limits.document_max_pages
            raise LimitError(f"has more than {most} {unit}s: split it, or raise RAGRACK_DOCUMENT_MAX_PAGES")
        self.title = ""
        self.unit = unit
        self.parts: list[tuple[str | int, str]] = []
        self._room = limits.document_max_characters
        self._most = limits.document_max_characters

    def add(self, text: str, label: str | int = "") -> None:
        """Raises LimitError where it is more text than a document may have."""
        text = tidy(text)
        self._room -= len(text)
        if self._room < 0:
            problem = f"has more than {self._most} characters: split it, or raise RAGRACK_DOCUMENT_MAX_CHARACTERS"
            raise LimitError(problem)
        self.parts.append((label, text))

    @property
    def first_line(self) -> str:
        return next((text for _, text in self.parts if text), "").split("\n", 1)[0]


@dataclass(frozen=True)
class Kind:
    """`reader` is `module:function` in this package. `signature`: found near the beginning of each such file; a kind
    without one is text.
    """

    name: str
    reader: str
    signature: bytes | None = None

    def fits(self, head: bytes) -> bool:
        """Whether a file that begins with `head` (HEAD_BYTES, or all of it) can be of this kind."""
        if self.signature is None:
            return b"\0" not in head
        # A PDF may begin later.
        return self.signature in head[:1024] if self.signature == b"%PDF-" else head.startswith(self.signature)

    def misfit(self, head: bytes) -> str:
        """What to say of a file that does not fit."""
        if self.signature is None:
            return "is binary, whatever its name says"
        if head.startswith(b"\xd0\xcf\x11\xe0"):
            return "is encrypted or of an older Office: save it anew, without a password"
        return f"is not {self.name}, whatever its name says"


_HTML = Kind("an HTML page", "markup:html")
_MARKDOWN = Kind("Markdown", "plain:markdown")
_ZIP = b"PK\x03\x04"
KINDS = {
    ".html": _HTML,
    ".htm": _HTML,
    ".xhtml": _HTML,
    ".md": _MARKDOWN,
    ".markdown": _MARKDOWN,
    ".txt": Kind("text", "plain:text"),
    ".pdf": Kind("a PDF", "pdf:pdf", b"%PDF-"),
    ".docx": Kind("a Word document", "office:docx", _ZIP),
    ".pptx": Kind("a PowerPoint presentation", "office:pptx", _ZIP),
    ".xlsx": Kind("an Excel workbook", "sheets:workbook", _ZIP),
    ".odt": Kind("an OpenDocument text", "office:odt", _ZIP),
    ".odp": Kind("an OpenDocument presentation", "office:odp", _ZIP),
    ".ods": Kind("an OpenDocument spreadsheet", "sheets:workbook", _ZIP),
}
"""By the end of a file's name, in lower case: the one list of what is read."""

# Half of a surrogate pair cannot be encoded, and PostgreSQL keeps no NUL.
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")


def tidy(text: str) -> str:
    """Without blanks at the ends of lines and without more than one empty line in a row."""
    lines = [line.rstrip() for line in _NO_TEXT.sub("", text).replace("\xa0", " ").splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
