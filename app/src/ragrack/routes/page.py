"""A page to ask from, of three files and nothing from elsewhere; it needs a key as every client does."""

from __future__ import annotations

import importlib.resources
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Response

router = APIRouter(include_in_schema=False)


def _always(response: Response) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return response

    return answer


_FOLDER = importlib.resources.files("ragrack") / "page"
for _path, _name, _kind in (
    ("/", "index.html", "text/html"),
    ("/page.css", "page.css", "text/css"),
    ("/page.js", "page.js", "text/javascript"),
):
    router.add_api_route(_path, _always(Response((_FOLDER / _name).read_bytes(), media_type=_kind)))
