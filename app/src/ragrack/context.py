"""What surrounds every request: its id, one line in the log, and a problem instead of a traceback."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ragrack.logging import request_id
from ragrack.problems import INTERNAL, TOO_LARGE

log = logging.getLogger(__name__)

HEADER = "X-Request-ID"
QUIET_PATHS = frozenset({"/healthz", "/readyz"})
_ACCEPTED = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestContext:
    """ASGI middleware, outermost of ours: takes the caller's X-Request-ID or makes one, and sends it back."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(HEADER, "")
        current = given if _ACCEPTED.fullmatch(given) else uuid.uuid4().hex
        token = request_id.set(current)
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = current
            await send(message)

        try:
            if int(headers.get("content-length", 0)) > self._max_body_bytes:
                # Starlette's own answer to a declared length cannot be made a problem; bodies in chunks are left to it.
                await TOO_LARGE.response()(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("request failed")
            if status:
                # Half an answer is out: only a cut connection tells the client that it is not whole.
                raise
            await INTERNAL.response()(scope, receive, send_with_id)
        finally:
            quiet = scope["path"] in QUIET_PATHS and status < 400
            fields = {
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "ms": round((time.perf_counter() - started) * 1000, 3),
                "identity": scope.get("state", {}).get("identity"),
            }
            log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})
            request_id.reset(token)
