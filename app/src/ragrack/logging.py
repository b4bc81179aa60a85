"""Log lines as JSON, one a line on stdout, each with the request's id: what journald and every collector reads.

No line holds a prompt, a document's text or a key. An exception is logged as its type and the places it passed
through, never as its message: messages quote what they choked on.
"""

from __future__ import annotations

import json
import logging
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ragrack.settings import Settings

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


class JsonFormatter(logging.Formatter):
    """`{time, level, logger, message, release, request_id?, error?, at?, ...}`; more by `extra={"fields": {...}}`."""

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
