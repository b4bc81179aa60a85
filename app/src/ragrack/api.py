"""The service over HTTP. `create_app` is what gunicorn calls in each worker, after the fork."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from starlette.middleware.body_limit import RequestBodyLimitMiddleware

from ragrack import deadline, hooks, problems, tokens
from ragrack.admission import Admission
from ragrack.auth import Authenticator
from ragrack.context import RequestContext
from ragrack.health import Readiness
from ragrack.routes import ask, documents, openai, page, status
from ragrack.service import running
from ragrack.settings import Problem, Settings, SettingsError, load, variable

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 1024

_TIMEOUT = {
    "name": deadline.HEADER,
    "in": "header",
    "description": "Seconds that the client waits; the service's own limit where it is shorter.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
    "example": 10,
}


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        description = super().openapi()
        description["components"]["schemas"] |= problems.schemas()
        for operations in description["paths"].values():
            for operation in operations.values():
                if str(HTTPStatus.GATEWAY_TIMEOUT.value) in operation["responses"]:
                    operation["parameters"] = [*operation.get("parameters", ()), _TIMEOUT]
        return description


def create_app(settings: Settings | None = None) -> FastAPI:
    """Settings come from the environment unless given. Raises SettingsError before anything is opened."""
    settings = settings or load()
    try:
        hooks.load(settings.hooks)
    except hooks.HooksError as error:
        raise SettingsError([Problem(variable("hooks"), error.problem, error.mend)]) from error

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with tokens.running(settings) as verifier, running(settings) as service:
            app.state.service = service
            app.state.tokens = verifier
            app.state.readiness = Readiness(
                settings.release, [*service.checks(), *(verifier.checks() if verifier else ())]
            )
            report = await app.state.readiness.report()
            log.info("started %s", "ready" if report.ready else "unready")
            yield

    app = _App(
        title="ragrack",
        description="Answers questions from a collection of documents, with their sources.",
        version=importlib.metadata.version("ragrack"),
        lifespan=lifespan,
        # Their pages load scripts from a CDN; the description itself is at /openapi.json.
        docs_url=None,
        redoc_url=None,
    )
    app.state.settings = settings
    app.state.authenticator = Authenticator(settings.api_keys_file, settings.gate_key_file)
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY_BYTES)
    app.add_middleware(
        Admission, in_flight=settings.max_in_flight, queue=settings.max_queue, timeout=settings.request_timeout
    )
    app.add_middleware(RequestContext, max_body_bytes=functools.partial(_max_body_bytes, settings))
    problems.install(app)
    for router in (ask.router, openai.router, status.router, page.router):
        app.include_router(router)
    app.include_router(documents.router, max_body_size=settings.document_max_bytes)
    return app


def _max_body_bytes(settings: Settings, path: str) -> int:
    """What a request to the path may declare; the routes themselves bound what comes."""
    if path.startswith("/documents/"):
        return settings.document_max_bytes
    return ask.MAX_CHAT_BYTES if path.startswith(problems.OPENAI_PREFIX) or path == "/chat" else MAX_BODY_BYTES
