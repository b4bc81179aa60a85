"""Python's values as PostgreSQL can hold them: it has no NUL in a text, and JSON knows no infinity.

A text is escaped so that every one comes back as it went in, equal ones stay equal and the order stays the order.
"""

from __future__ import annotations

import math
import re
from typing import Any

_ESCAPED = {"\1\1": "\0", "\1\2": "\1"}
_BEYOND = 10**400
"""Stands for infinity: greater than every float."""


def encode(text: str) -> str:
    return text.replace("\1", "\1\2").replace("\0", "\1\1")


def decode(text: str) -> str:
    return re.sub("\1[\1\2]", lambda found: _ESCAPED[found.group()], text) if "\1" in text else text


def plain(value: Any) -> str | int | float | None:
    """What a filter compares: a text or a number; None for what is neither."""
    if isinstance(value, str):
        return encode(value)
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else plain(float(value))
    if not isinstance(value, float) or math.isnan(value):
        return None
    if math.isinf(value):
        return _BEYOND if value > 0 else -_BEYOND
    return value


def filterable(metadata: dict[str, Any]) -> dict[str, Any]:
    """Of a node's metadata what filters ask for, as JSON."""
    kept: dict[str, Any] = {}
    for key, value in metadata.items():
        if isinstance(value, list):
            kept[encode(key)] = [one for one in map(plain, value) if one is not None]
        elif (one := plain(value)) is not None:
            kept[encode(key)] = one
    return kept
