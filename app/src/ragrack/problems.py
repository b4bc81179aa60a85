"""Errors as RFC 9457 problem details, each with the request's id. What a client reads is written here or by the
code that raises; the text of an exception never reaches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from ragrack.logging import request_id

MEDIA_TYPE = "application/problem+json"


class FieldProblem(BaseModel):
    field: str
    problem: str


class ProblemDetails(BaseModel):
    """The body of every error."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    request_id: str | None = None
    errors: list[FieldProblem] | None = None


class OpenAIError(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    request_id: str | None = None


class OpenAIErrorResponse(BaseModel):
    """The body of every error below /v1/."""

    error: OpenAIError


OPENAI_PREFIX = "/v1/"
openai_shape: ContextVar[bool] = ContextVar("openai_shape", default=False)
"""Whether the request at hand is one of OpenAI's API."""
_OPENAI_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
}


class ProblemError(Exception):
    """Raise it to answer with a problem; `detail` is for the client's eyes."""

    def __init__(
        self,
        status: HTTPStatus,
        detail: str,
        errors: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = [FieldProblem(field=field, problem=problem) for field, problem in errors]
        self.headers = dict(headers or {})

    def details(self) -> ProblemDetails:
        return ProblemDetails(
            title=self.status.phrase,
            status=self.status,
            detail=self.detail,
            request_id=request_id.get(),
            errors=self.errors or None,
        )

    def openai_error(self) -> dict[str, Any]:
        """As OpenAI's clients expect it."""
        status = HTTPStatus.BAD_REQUEST if self.status == HTTPStatus.UNPROCESSABLE_ENTITY else self.status
        error = OpenAIError(
            message=self.detail,
            type=_OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
            param=self.errors[0].field if self.errors else None,
            code="model_not_found" if any(e.field == "model" for e in self.errors) else None,
            request_id=request_id.get(),
        )
        return OpenAIErrorResponse(error=error).model_dump()

    def response(self) -> JSONResponse:
        if openai_shape.get():
            status = HTTPStatus.BAD_REQUEST if self.status == HTTPStatus.UNPROCESSABLE_ENTITY else self.status
            return JSONResponse(self.openai_error(), status, headers=self.headers)
        return JSONResponse(
            self.details().model_dump(exclude_none=True), self.status, headers=self.headers, media_type=MEDIA_TYPE
        )


TOO_LARGE = ProblemError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The request's body is larger than this service reads.")
INTERNAL = ProblemError(
    HTTPStatus.INTERNAL_SERVER_ERROR, "The service failed on this request; its log has more under the request id."
)


def responses(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """For a route's OpenAPI: these statuses answer with problem details."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}}
    return {int(status): {"description": status.phrase, "content": content} for status in statuses}


def openai_responses(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """As `responses`, for routes of OpenAI's API."""
    return {int(status): {"description": status.phrase, "model": OpenAIErrorResponse} for status in statuses}


def schemas() -> dict[str, Any]:
    """For the OpenAPI's components: what `responses` refers to."""
    _, definitions = models_json_schema(
        [(ProblemDetails, "serialization")], ref_template="#/components/schemas/{model}"
    )
    return dict(definitions["$defs"])


def install(app: FastAPI) -> None:
    """Makes problem details of everything that the app raises on purpose, and of what FastAPI and Starlette raise."""

    @app.exception_handler(ProblemError)
    async def raised(_: Request, error: ProblemError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        errors = [
            (".".join(str(part) for part in problem["loc"] if part != "body") or "body", problem["msg"])
            for problem in error.errors()
        ]
        detail = "; ".join(f"{field}: {problem}" for field, problem in errors)
        return ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, detail, errors).response()

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        status = HTTPStatus(error.status_code)
        return ProblemError(status, status.description or status.phrase, headers=error.headers).response()
