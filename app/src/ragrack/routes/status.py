"""The service about itself: alive, ready, which release and snapshots, its metrics."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from ragrack import metrics, problems
from ragrack.access import REFUSALS, Caller
from ragrack.health import Readiness, ReadinessReport
from ragrack.routes.common import Configured, Service

router = APIRouter()


class VersionResponse(BaseModel):
    version: str
    release: str
    fingerprint: str | None = Field(description="What snapshots must be built with for this release to open them.")
    snapshots: dict[str, str | None] = Field(description="By collection, the snapshot that answers.")


class HealthResponse(BaseModel):
    status: Literal["ok"] = "ok"
    release: str


@router.get("/healthz")
async def healthz(settings: Configured) -> HealthResponse:
    """Is the process alive? It looks at nothing else."""
    return HealthResponse(release=settings.release)


@router.get("/readyz", responses={int(HTTPStatus.SERVICE_UNAVAILABLE): {"model": ReadinessReport}})
async def readyz(request: Request, response: Response) -> ReadinessReport:
    """Can it answer? Each thing that takes part is named, with the reason where it cannot."""
    readiness: Readiness = request.app.state.readiness
    report = await readiness.report()
    if not report.ready:
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
    return report


@router.get("/metrics", response_class=Response, responses={200: {"content": {metrics.CONTENT_TYPE: {}}}})
async def metrics_page() -> Response:
    """For Prometheus, of all workers. No key: only who may read the release's socket reaches it, and the edge
    refuses it."""
    return Response(await asyncio.to_thread(metrics.render), media_type=metrics.CONTENT_TYPE)


@router.get("/version", responses=problems.responses(*REFUSALS))
async def version(_: Caller, request: Request, service: Service, settings: Configured) -> VersionResponse:
    """Which release answers, from which snapshots."""
    return VersionResponse(
        version=request.app.version,
        release=settings.release,
        fingerprint=service.fingerprint,
        snapshots=service.snapshots,
    )
