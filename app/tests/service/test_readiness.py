"""A service without its data starts, says what it lacks, and mends itself; liveness asks nothing."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from ragrack.api import create_app
from ragrack.fingerprint import Fingerprint
from ragrack.health import Check, Readiness
from ragrack.ingest import ingest
from ragrack.settings import Settings
from ragrack.snapshot import SnapshotDir

from .conftest import Running, running_app


def check(report: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(check for check in report["checks"] if check["name"] == name)
    return found


async def until(client: httpx.AsyncClient, path: str, holds: Callable[[httpx.Response], bool]) -> httpx.Response:
    async with asyncio.timeout(30):
        while True:
            response = await client.get(path)
            if holds(response):
                return response
            await asyncio.sleep(0.05)


async def until_ready(client: httpx.AsyncClient) -> httpx.Response:
    return await until(client, "/readyz", lambda response: response.status_code == 200)


async def test_each_collection_is_named_and_the_missing_one_makes_it_unready(client: httpx.AsyncClient) -> None:
    response = await client.get("/readyz")
    report = response.json()
    assert response.status_code == 503
    assert report["ready"] is False
    assert check(report, "embedding")["ok"]
    assert check(report, "index:island")["ok"]
    empty = check(report, "index:empty")
    assert not empty["ok"]
    assert "ragrack ingest --collection empty" in empty["reason"]
    assert report["reasons"] == [f"index:empty: {empty['reason']}"]
    assert all(result["ms"] >= 0 for result in report["checks"])


async def test_what_is_there_is_answered_meanwhile_and_what_is_not_is_a_503(client: httpx.AsyncClient) -> None:
    assert (await client.post("/query", json={"query": "ferry", "collection": "island"})).status_code == 200
    response = await client.post("/query", json={"query": "ferry", "collection": "empty"})
    assert response.status_code == 503
    assert response.headers["content-type"] == "application/problem+json"
    assert "Retry-After" in response.headers


async def test_it_becomes_ready_when_the_index_appears(client: httpx.AsyncClient, settings: Settings) -> None:
    assert (await client.get("/readyz")).status_code == 503
    shutil.copytree(settings.documents_dir / "island", settings.documents_dir / "empty")
    await asyncio.to_thread(ingest, settings, "empty", lambda *_args, **_more: None)
    assert (await until_ready(client)).json()["reasons"] == []
    answer = await client.post("/query", json={"query": "When does the bakery open?", "collection": "empty"})
    assert answer.json()["sources"][0]["document"] == "bakery.md"


async def test_queries_go_on_while_a_new_snapshot_takes_over(client: httpx.AsyncClient, settings: Settings) -> None:
    async def snapshot() -> str:
        return str((await client.get("/version")).json()["snapshots"]["island"])

    before = await snapshot()
    (settings.documents_dir / "island" / "museum.md").write_text(
        "# The museum\n\nThe museum shows forty ship models.\n"
    )
    building = asyncio.create_task(asyncio.to_thread(ingest, settings, "island", lambda *_args, **_more: None))
    statuses = set()
    async with asyncio.timeout(60):
        while await snapshot() == before:
            statuses.add((await client.post("/query", json={"query": "ferry", "collection": "island"})).status_code)
        await building
    answer = await client.post("/query", json={"query": "How many ship models does the museum show?"})
    assert statuses == {200}
    assert "forty" in answer.json()["response"]


async def test_a_damaged_snapshot_is_told_while_the_one_before_answers(
    client: httpx.AsyncClient, settings: Settings
) -> None:
    directory = SnapshotDir(settings.index_dir, "island", Fingerprint.of(settings).digest)
    before = directory.current()
    assert before is not None
    damaged = directory.snapshots / "20991231T000000Z-00000000"
    shutil.copytree(before.path, damaged)
    vectors = damaged / "vectors.faiss"
    data = vectors.read_bytes()
    vectors.chmod(0o644)
    vectors.write_bytes(data[:100] + bytes(100) + data[200:])
    directory.flip(damaged.name, "test")
    response = await until(client, "/readyz", lambda r: not check(r.json(), "snapshot:island")["ok"])
    found = check(response.json(), "snapshot:island")
    assert not found["required"]
    assert found["reason"].startswith(f"{before.id} goes on answering")
    assert "vectors.faiss is not what was written" in found["reason"]
    assert check(response.json(), "index:island")["ok"]
    assert (await client.get("/version")).json()["snapshots"]["island"] == before.id
    assert (await client.post("/query", json={"query": "ferry", "collection": "island"})).status_code == 200
    gauge = 'ragrack_snapshot_problem{collection="island",kind="live"} 1.0'
    await until(client, "/metrics", lambda r: gauge in r.text)
    vectors.write_bytes(data)
    await until(client, "/version", lambda r: r.json()["snapshots"]["island"] == damaged.name)


async def test_a_pull_that_failed_is_told_and_hinders_nothing(settings: Settings, run: Running) -> None:
    directory = SnapshotDir(settings.index_dir, "island", Fingerprint.of(settings).digest)
    outcome = {"at": "20261124T000000Z", "snapshot": None, "problem": "ingest: no route to host"}
    (directory.root / "pull.json").write_text(json.dumps(outcome))
    pulling = settings.model_copy(update={"index_source": "ragrack-pull@ingest:", "collections": ("island",)})
    async with run(pulling) as client:
        report = (await client.get("/readyz")).json()
    assert (report["ready"], report["degraded"]) == (True, True)
    assert "no route to host" in check(report, "snapshot:island")["reason"]


async def test_without_its_embedding_model_it_starts_and_says_so(
    settings: Settings, run: Running, tmp_path: Path
) -> None:
    async with run(settings.model_copy(update={"embed_model_dir": tmp_path / "nowhere"})) as client:
        assert (await client.get("/healthz")).json() == {"status": "ok", "release": settings.release}
        report = (await client.get("/readyz")).json()
        query = await client.post("/query", json={"query": "ferry"})
    assert not check(report, "embedding")["ok"]
    assert not check(report, "index:island")["ok"]
    assert query.status_code == 503


async def test_health_and_readiness_need_no_key(settings: Settings) -> None:
    async with running_app(create_app(settings), key=None) as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503


async def test_a_check_asked_by_many_at_once_is_run_once() -> None:
    runs = 0

    async def probe() -> None:
        nonlocal runs
        runs += 1
        await asyncio.sleep(0)

    readiness = Readiness("r", [Check("a", probe)])
    await asyncio.gather(*(readiness.report() for _ in range(50)))
    assert runs == 1


async def test_a_check_that_raises_or_hangs_is_a_reason_and_shows_no_secret(monkeypatch: Any) -> None:
    monkeypatch.setattr("ragrack.health.CHECK_TIMEOUT_SECONDS", 0.01)

    async def raises() -> None:
        raise RuntimeError("swordfish")

    async def hangs() -> None:
        await asyncio.Event().wait()

    report = await Readiness("r", [Check("raises", raises), Check("hangs", hangs, required=False)]).report()
    assert not report.ready
    assert report.degraded
    assert report.reasons == ["raises: failed with RuntimeError", "hangs: no answer in 0.01 s"]
