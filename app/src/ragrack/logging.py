"""Log lines as JSON, one a line on stdout, each with the request's id: what journald and every collector reads.

No line holds a prompt, a document's text or a key, but for the lines `content` that RAGRACK_LOG_CONTENT asks for. An
exception is logged as its type and the places it passed through, never as its message: messages quote what they choked
on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ragrack.settings import Settings

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
_bound: ContextVar[dict[str, Any] | None] = ContextVar("bound", default=None)


@contextlib.contextmanager
def binding(**fields: Any) -> Iterator[dict[str, Any]]:
    """Every log line of the block, and of what it awaits, has these fields and those that are bound on the way."""
    bound = dict(fields)
    token = _bound.set(bound)
    try:
        yield bound
    finally:
        _bound.reset(token)


def bind(**fields: Any) -> None:
    """Adds fields to the request's at hand; without one, nothing happens."""
    if (bound := _bound.get()) is not None:
        bound.update(fields)


class JsonFormatter(logging.Formatter):
    """`{time, level, logger, message, release, request_id?, trace_id?, tenant?, snapshot?, error?, at?, ...}`.

    More by `extra={"fields": {...}}` for a line, by `bind` for a request.
    """

    def __init__(self, release: str) -> None:
        super().__init__()
        self._release = release

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "release": self._release,
        }
        if (current := request_id.get()) is not None:
            entry["request_id"] = current
        entry |= _bound.get() or {}
        if record.exc_info and record.exc_info[0] is not None:
            kind, _, trace = record.exc_info
            entry["error"] = kind.__qualname__
            entry["at"] = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(trace)]
        entry |= getattr(record, "fields", {})
        return json.dumps(entry, ensure_ascii=False, default=str)


def config(settings: Settings) -> dict[str, Any]:
    """For logging.config.dictConfig. Other libraries stay at warnings: at debug they write prompts and documents."""
    stdout = {"handlers": ["stdout"], "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter, "release": settings.release}},
        "handlers": {"stdout": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "json"}},
        "root": {"level": "WARNING", "handlers": ["stdout"]},
        "loggers": {
            # Its warnings quote what it choked on.
            "llama_index": {"level": "ERROR"},
            "ragrack": {"level": settings.log_level.upper(), **stdout},
            "gunicorn.error": {"level": "INFO", **stdout},
            "gunicorn.access": {"level": "WARNING", "handlers": [], "propagate": False},
        },
    }
