"""Whatever the OpenAPI allows, and much that it does not, is answered: never with a 500, always as it says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from ragrack.auth import ROLES, ApiKey, add_key, hash_key
from ragrack.settings import Settings
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from .conftest import Running

EXAMPLES = 25
KEY = "rr_the-key-of-who-may-do-all"
Asked = tuple[dict[str, Any], Callable[[Any], httpx.Response]]


@pytest.fixture
def asked(settings: Settings, run: Running) -> Iterator[Asked]:
    """The OpenAPI of a running service, and what sends it a case."""
    add_key(settings.api_keys_file, ApiKey(name="all", sha256=hash_key(KEY), roles=tuple(ROLES)))
    own = Settings(**(dict(settings) | {"ingests": True, "document_max_bytes": 10_000}))
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        client = runner.run(stack.enter_async_context(run(own)))

        def send(case: Any) -> httpx.Response:
            wanted = case.as_transport_kwargs(base_url="http://service")
            content = wanted.pop("data", None)
            wanted.pop("cookies", None)
            headers = {k: v for k, v in wanted.pop("headers").items() if k.lower() != "authorization"}
            headers["Authorization"] = f"Bearer {KEY}"
            return runner.run(client.request(content=content, headers=headers, **wanted))

        yield runner.run(client.get("/openapi.json")).json(), send
        runner.run(stack.aclose())


def _with_what_is_there(description: dict[str, Any]) -> dict[str, Any]:
    """The description with the names of this service's collection and models: guesses would all be 404s."""
    schemas = description["components"]["schemas"]
    schemas["CompletionRequest"]["properties"]["model"]["enum"] = ["island"]
    schemas["EmbeddingsRequest"]["properties"]["model"]["enum"] = ["all-minilm-l6-v2"]
    schemas["Message"]["properties"] |= {
        "role": {"enum": ["user"]},
        "content": {"type": "string", "pattern": "^[A-Za-z ]*[a-z]$"},
    }
    # Groups within groups overflow the generator's stack; test_ask.py nests them itself.
    schemas["Filters"]["properties"]["filters"]["items"] = {"$ref": "#/components/schemas/Condition"}
    named = {"collection": ["island"], "path": ["lighthouse.md", "a/b.html", "../a.md"], "model": ["island", "gpt"]}
    for path in description["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "path":
                    parameter["schema"]["enum"] = named[parameter["name"]]
    return description


def test_no_request_is_answered_with_a_500(asked: Asked) -> None:
    description, send = asked
    schema = schemathesis.openapi.from_dict(_with_what_is_there(description))
    statuses: dict[str, set[int]] = {}
    for result in schema.get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()
        label = f"{operation.method.upper()} {operation.path}"
        statuses[label] = _try(operation, label, send)
    assert {"POST /query", "POST /chat", "POST /v1/chat/completions", "DELETE /documents/{collection}/{path}"} <= set(
        statuses
    )
    # What else there is: the collection `empty` has no snapshot, and random bytes are seldom a text.
    otherwise = {"GET /readyz": 503, "PUT /documents/{collection}/{path}": 415}
    for label, answered in statuses.items():
        assert answered & {200, 201, 204, otherwise.get(label)}, f"{label} never did what it is for"
    for label in ("POST /query", "POST /retrieve", "POST /chat", "POST /v1/embeddings"):
        assert statuses[label] & {400, 422}, f"{label} was never sent anything wrong"


def _try(operation: Any, label: str, send: Callable[[Any], httpx.Response]) -> set[int]:
    """The statuses that it answered with."""
    answered: set[int] = set()
    documented = operation.definition.raw["responses"]
    takes_something = operation.body or operation.path_parameters or operation.query
    modes = [GenerationMode.POSITIVE, *([GenerationMode.NEGATIVE] if takes_something else [])]

    def one(case: Any) -> None:
        try:
            response = send(case)
        except (httpx.InvalidURL, httpx.LocalProtocolError, UnicodeEncodeError):
            return  # no client can send it
        answered.add(response.status_code)
        said = f"{label} answered {response.status_code}: {response.text[:300]}"
        # 504: its X-Request-Timeout left no time.
        assert response.status_code < 500 or response.status_code in (503, 504), said
        # A path that is cut short by what was put into it is another one, or none.
        assert response.status_code in (404, 405) or str(response.status_code) in documented, said
        if response.status_code >= 400 and response.status_code != 503:
            assert response.headers["content-type"] in ("application/problem+json", "application/json"), said

    for mode in modes:
        cases = operation.as_strategy(generation_mode=mode)
        bounded = hypothesis_settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        bounded(given(case=cases)(one))()
    return answered
