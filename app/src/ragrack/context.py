"""What surrounds every request: its id and its trace, one line in the log, its metrics, and a problem instead of a
traceback.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
import uuid
from collections.abc import Callable

from opentelemetry import trace
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ragrack import metrics, problems, tracing
from ragrack.admission import CLIENT_CLOSED_REQUEST
from ragrack.logging import binding, request_id
from ragrack.problems import INTERNAL, TOO_LARGE

log = logging.getLogger(__name__)

HEADER = "X-Request-ID"
QUIET_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
# A label of a metric is no place for whatever a client may send.
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_ACCEPTED = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestContext:
    """ASGI middleware, outermost of ours: takes the caller's X-Request-ID or makes one, and sends it back."""

    def __init__(self, app: ASGIApp, max_body_bytes: Callable[[str], int]) -> None:
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
        problems.openai_shape.set(scope["path"].startswith(problems.OPENAI_PREFIX))
        started = time.perf_counter()
        status = 0
        stack = contextlib.ExitStack()
        span = stack.enter_context(tracing.server_span(headers))
        trace_id = tracing.trace_id(span)
        bound = stack.enter_context(binding(**({"trace_id": trace_id} if trace_id else {})))
        metrics.IN_FLIGHT.inc()
        counted = False

        def count() -> None:
            nonlocal counted
            if not counted:
                counted = True
                _count(scope, status, time.perf_counter() - started, span)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = current
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                # Before it leaves: whoever has the whole answer finds it counted, whichever worker is asked.
                count()
            await send(message)

        try:
            if int(headers.get("content-length", 0)) > self._max_body_bytes(scope["path"]):
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
            state = scope.get("state", {})
            if state.get("disconnected"):
                status = CLIENT_CLOSED_REQUEST
            count()
            seconds = time.perf_counter() - started
            quiet = scope["path"] in QUIET_PATHS and status < 400
            bound["tenant"] = state.get("tenant")
            fields = {
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "ms": round(seconds * 1000, 3),
                "identity": state.get("identity"),
            }
            log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})
            stack.close()
            request_id.reset(token)


def _count(scope: Scope, status: int, seconds: float, span: trace.Span) -> None:
    route = getattr(scope.get("route"), "path", "none")
    method = scope["method"] if scope["method"] in METHODS else "other"
    metrics.IN_FLIGHT.dec()
    metrics.REQUESTS.labels(route, method, str(status)).inc()
    metrics.REQUEST_SECONDS.labels(route).observe(seconds)
    if span.is_recording():
        span.update_name(f"{method} {route}")
        span.set_attributes(
            {"http.request.method": method, "http.route": route, "http.response.status_code": status}
            | {"ragrack.request_id": request_id.get() or ""}
        )
        if status >= 500:
            span.set_status(trace.StatusCode.ERROR)
