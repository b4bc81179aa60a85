"""Markdown and plain text."""

from __future__ import annotations

import re

from ragrack.extract import Extracted, Limits, tidy


def markdown(content: bytes, limits: Limits) -> Extracted:
    text = tidy(_decode(content))
    # A front matter is about the page, not of it.
    text = re.sub(r"\A---\n.*?\n---\n", "", text, count=1, flags=re.DOTALL)
    extracted = Extracted(limits)
    extracted.add(text)
    heading = re.search(r"^#\s+(.+)$|^(.+)\n=+$", text, flags=re.MULTILINE)
    extracted.title = (heading[1] or heading[2]).rstrip("# ") if heading else ""
    return extracted


def text(content: bytes, limits: Limits) -> Extracted:
    extracted = Extracted(limits)
    extracted.add(_decode(content))
    extracted.title = extracted.first_line
    return extracted


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")
