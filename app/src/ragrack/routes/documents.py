"""`/documents/{collection}/{path}`: the documents as files, on the host that ingests. The next ingest finds them."""

from __future__ import annotations

import errno
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from ragrack import problems
from ragrack.access import REFUSALS, Ingester, Reader
from ragrack.auth import Identity
from ragrack.documents import DocumentPathError, Documents, InTheWayError, MisfitError, TooLargeError, check_path
from ragrack.problems import TOO_LARGE, ProblemError
from ragrack.routes.common import Configured, collection_of, invalid
from ragrack.settings import Settings
from ragrack.tenants import may_touch

_ERRORS = problems.responses(
    *REFUSALS,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.CONFLICT,
    HTTPStatus.UNPROCESSABLE_ENTITY,
    HTTPStatus.MISDIRECTED_REQUEST,
)


class StoredDocument(BaseModel):
    document: str = Field(description="Its path in the collection, as sources name it.")
    bytes: int
    sha256: str


CollectionName = Annotated[str, Path(description="The collection.", examples=["postgres"])]
DocumentPath = Annotated[str, Path(description="The document's path in it.", examples=["sql-vacuum.html"])]


async def _ingesting(settings: Configured) -> None:
    if not settings.ingests:
        detail = "This host keeps no documents: ask the one that ingests."
        raise ProblemError(HTTPStatus.MISDIRECTED_REQUEST, detail)


router = APIRouter(prefix="/documents", dependencies=[Depends(_ingesting)])


@router.get(
    "/{collection}/{path:path}",
    response_class=Response,
    responses={**_ERRORS, 200: {"content": {"application/octet-stream": {}}, "description": "The file."}},
)
async def read(caller: Reader, collection: CollectionName, path: DocumentPath, settings: Configured) -> Response:
    """The document as it was written."""
    documents = _documents(caller, collection, path, settings)
    try:
        data = documents.read(path)
    except FileNotFoundError as error:
        raise _missing() from error
    except InTheWayError as error:
        raise _in_the_way() from error
    # To save, never to show: a page of someone else's would run in this origin.
    headers = {"Content-Disposition": "attachment", "X-Content-Type-Options": "nosniff"}
    return Response(data, media_type="application/octet-stream", headers=headers)


@router.put(
    "/{collection}/{path:path}",
    response_model=StoredDocument,
    responses={
        **_ERRORS,
        **problems.responses(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            HTTPStatus.INSUFFICIENT_STORAGE,
        ),
        201: {"model": StoredDocument, "description": "There was none before."},
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def write(
    caller: Ingester, collection: CollectionName, path: DocumentPath, request: Request, settings: Configured
) -> Response:
    """Puts a document in place, whole or not at all."""
    documents = _documents(caller, collection, path, settings)
    try:
        stored = await documents.write(path, request.stream(), settings.document_max_bytes)
    except TooLargeError as error:
        raise TOO_LARGE from error
    except MisfitError as error:
        raise ProblemError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"The body {error}.") from error
    except InTheWayError as error:
        raise _in_the_way() from error
    except PermissionError as error:
        raise _kept_elsewhere() from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ProblemError(HTTPStatus.INSUFFICIENT_STORAGE, "The host has no room for it.") from error
        raise
    body = StoredDocument(document=path, bytes=stored.bytes, sha256=stored.sha256)
    return JSONResponse(body.model_dump(), HTTPStatus.CREATED if stored.created else HTTPStatus.OK)


@router.delete("/{collection}/{path:path}", status_code=HTTPStatus.NO_CONTENT, responses=_ERRORS)
async def remove(caller: Ingester, collection: CollectionName, path: DocumentPath, settings: Configured) -> None:
    """Takes a document away; the next snapshot is without it."""
    documents = _documents(caller, collection, path, settings)
    try:
        documents.remove(path)
    except FileNotFoundError as error:
        raise _missing() from error
    except PermissionError as error:
        raise _kept_elsewhere() from error
    except InTheWayError as error:
        raise _in_the_way() from error


def _documents(caller: Identity, collection: str, path: str, settings: Settings) -> Documents:
    collection = collection_of(collection, settings)
    try:
        check_path(path)
    except DocumentPathError as error:
        raise invalid("path", str(error)) from error
    if not may_touch(caller, path):
        raise _missing()
    return Documents(settings.documents_dir / collection)


def _missing() -> ProblemError:
    return ProblemError(HTTPStatus.NOT_FOUND, "There is no such document.")


def _kept_elsewhere() -> ProblemError:
    detail = "The documents of this collection come from elsewhere and are not changed here."
    return ProblemError(HTTPStatus.CONFLICT, detail)


def _in_the_way() -> ProblemError:
    return ProblemError(HTTPStatus.CONFLICT, "A folder has this path, or a file the path of one of its folders.")
