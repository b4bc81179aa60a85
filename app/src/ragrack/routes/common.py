"""What routes share: the service, its settings, how a source looks, and refusals that several may answer with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Depends, Request
from pydantic import BaseModel, Field

from ragrack import problems
from ragrack.access import REFUSALS
from ragrack.problems import ProblemError
from ragrack.service import BrokenOffError, LLMUnavailableError, NoLLMError, NotReadyError, QueryService, Source
from ragrack.settings import Settings

MAX_QUERY_CHARACTERS = 4000


async def _service(request: Request) -> QueryService:
    service: QueryService = request.app.state.service
    return service


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


Service = Annotated[QueryService, Depends(_service)]
Configured = Annotated[Settings, Depends(_settings)]

ASKING: dict[int | str, dict[str, Any]] = problems.responses(
    HTTPStatus.BAD_REQUEST,
    *REFUSALS,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNPROCESSABLE_ENTITY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)
"""How a question may be refused."""


class Position(BaseModel):
    """Offsets of characters in the document's text; null where the reader gave none."""

    start: int | None
    end: int | None


class SourceModel(BaseModel):
    document: str
    title: str | None
    score: float = Field(
        description="Cosine similarity to the question. Where words count too, the order is not its own."
    )
    position: Position
    text: str
    page: int | None = Field(None, description="Of a PDF, from 1.")
    slide: int | None = Field(None, description="Of a presentation, from 1.")
    sheet: str | None = Field(None, description="Of a spreadsheet, by its name.")

    @classmethod
    def of(cls, source: Source) -> SourceModel:
        return cls(
            document=source.document,
            title=source.title,
            score=source.score,
            position=Position(start=source.start, end=source.end),
            text=source.text,
            page=source.page,
            slide=source.slide,
            sheet=source.sheet,
        )


def invalid(field: str, problem: str) -> ProblemError:
    return ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, f"{field}: {problem}", [(field, problem)])


def collection_of(name: str | None, settings: Settings) -> str:
    """The collection that a request names, or the default. Raises a 422."""
    if name is None:
        return settings.default_collection
    if name not in settings.collections:
        raise invalid("collection", f"There is no such collection. Those there are: {', '.join(settings.collections)}.")
    return name


@contextlib.contextmanager
def refusals(collection: str) -> Iterator[None]:
    """What the service cannot do now, as problems."""
    try:
        yield
    except NoLLMError as error:
        raise invalid("answer", 'This service has no LLM; leave it out or give "extractive".') from error
    except LLMUnavailableError as error:
        headers = {"Retry-After": str(error.retry_after)}
        detail = "The LLM does not answer now."
        raise ProblemError(HTTPStatus.SERVICE_UNAVAILABLE, detail, headers=headers) from error
    except BrokenOffError as error:
        detail = "The LLM broke off; what there is of the answer is not whole."
        raise ProblemError(HTTPStatus.BAD_GATEWAY, detail) from error
    except NotReadyError as error:
        detail = f"The collection {collection} cannot be asked now; GET /readyz says why."
        raise ProblemError(HTTPStatus.SERVICE_UNAVAILABLE, detail, headers={"Retry-After": "2"}) from error
