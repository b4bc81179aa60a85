"""PDF, page by page."""

from __future__ import annotations

import re
from io import BytesIO

from pypdf import PasswordType, PdfReader

from ragrack.extract import Extracted, Limits, RefusedError

# What a font without a map of its letters gives.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def pdf(content: bytes, limits: Limits) -> Extracted:
    reader = PdfReader(BytesIO(content))
    # Many are encrypted only so that their owner alone may change them: those open without a password.
    if reader.is_encrypted and reader.decrypt("") == PasswordType.NOT_DECRYPTED:
        raise RefusedError("is encrypted: save it without a password")
    extracted = Extracted(limits, "page", len(reader.pages))
    for number, page in enumerate(reader.pages, start=1):
        extracted.add(_CONTROL.sub("", page.extract_text()), number)
    if not extracted.first_line:
        raise RefusedError("has no text, only pictures of pages: run OCR first, e.g. ocrmypdf")
    extracted.title = _named(reader.metadata.title if reader.metadata else None) or extracted.first_line
    return extracted


def _named(title: str | None) -> str:
    """The title, where it is none that a printer driver left: the name of a file, or nothing at all."""
    title = (title or "").strip()
    return "" if re.search(r"\.\w{2,4}$|^untitled$|^microsoft ", title, flags=re.IGNORECASE) else title
