"""What the log says of a request, and what it must never say."""

from __future__ import annotations

import json
import logging
import logging.config

import pytest
from ragrack.embedding import MiniLMEmbedding
from ragrack.logging import config
from ragrack.settings import Settings

from .conftest import KEY, Running

UNSPOKEN = "platypus"


async def test_a_request_is_one_line_without_question_document_or_key(
    settings: Settings, run: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.config.dictConfig(config(settings.model_copy(update={"log_level": "debug"})))
    async with run(settings) as client:
        sent = await client.post("/query", json={"query": f"Where does the {UNSPOKEN} bake bread?"})
        await client.post("/query", json={"query": UNSPOKEN, "top_k": 99})
        await client.post("/query", json={"query": "ferry"}, headers={"Authorization": f"Bearer {UNSPOKEN}"})
    text = capsys.readouterr().out
    lines = [json.loads(line) for line in text.splitlines()]
    mine = [line for line in lines if line.get("request_id") == sent.headers["X-Request-ID"]]
    assert len(mine) == 1
    line = mine[0]
    assert line["release"] == settings.release
    assert (line["method"], line["path"], line["status"], line["identity"]) == ("POST", "/query", 200, "tests")
    for never in (UNSPOKEN, KEY, "rye bread", "beech wood"):
        assert never not in text


async def test_an_exception_is_logged_by_its_type_and_place_only(
    settings: Settings, run: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logging.config.dictConfig(config(settings))

    async def broken(_: MiniLMEmbedding, query: str) -> list[float]:
        raise RuntimeError(f"cannot embed {query}")

    async with run(settings) as client:
        monkeypatch.setattr(MiniLMEmbedding, "_aget_query_embedding", broken)
        await client.post("/query", json={"query": UNSPOKEN})
    text = capsys.readouterr().out
    failure = next(line for line in map(json.loads, text.splitlines()) if line["message"] == "request failed")
    assert failure["error"] == "RuntimeError"
    assert "broken" in failure["at"][-1]
    assert UNSPOKEN not in text
