"""A real index of a few documents, made once, and the app over it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from ragrack.api import create_app
from ragrack.auth import ApiKey, add_key, hash_key
from ragrack.ingest import ingest
from ragrack.settings import Settings

KEY = "rr_the-key-of-the-tests"

DOCUMENTS = {
    "lighthouse.md": """# The lighthouse of Skarholm

The lighthouse of Skarholm was built in 1862 from red granite. Its lamp burns whale oil no longer: since 1931 it has an
electric light of 1000 watts. The light can be seen from a distance of 19 nautical miles. The keeper climbs 212 steps to
reach the lamp room. Visitors may come in summer only, when the ferry runs twice a day.
""",
    "bakery.md": """# The bakery

The bakery in Mill Lane opens at six in the morning. Its rye bread rests for eighteen hours before it is baked. The
oven is heated with beech wood. On Sundays the bakery sells cinnamon rolls, which are gone by nine o'clock.
""",
    "ferry.html": """<html><head><title>The ferry</title></head><body><h1>The ferry</h1>
<p>The ferry to Skarholm leaves from pier four. A ticket costs twelve crowns, and children travel free of charge. In a
storm with winds above twenty metres per second the ferry stays in the harbour. Bicycles must be left on the
lower deck.</p>
</body></html>
""",
}


def _settings(root: Path, model_dir: Path) -> Settings:
    return Settings(
        collections=("island", "empty"),
        index_dir=root / "indexes",
        documents_dir=root / "documents",
        golden_dir=root / "golden",
        embed_model_dir=model_dir,
        api_keys_file=root / "api-keys.json",
        runtime_dir=root / "run",
        release="0.1.0-0123456789ab",
    )


@pytest.fixture(scope="session")
def island(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """The directory of a service with the collection `island`; treat it as read-only."""
    root = tmp_path_factory.mktemp("island")
    documents = root / "documents" / "island"
    documents.mkdir(parents=True)
    for name, text in DOCUMENTS.items():
        (documents / name).write_text(text, encoding="utf-8")
    (root / "golden").mkdir()
    (root / "run").mkdir()
    add_key(root / "api-keys.json", ApiKey(name="tests", sha256=hash_key(KEY)))
    ingest(_settings(root, model_dir), "island", lambda *_args, **_more: None)
    return root


@pytest.fixture
def settings(island: Path, tmp_path: Path, model_dir: Path) -> Settings:
    """Of a service of its own over a copy of that index."""
    shutil.copytree(island, tmp_path / "service", symlinks=True)
    return _settings(tmp_path / "service", model_dir)


Running = Callable[[Settings], contextlib.AbstractAsyncContextManager[httpx.AsyncClient]]


@contextlib.asynccontextmanager
async def running_app(app: FastAPI, key: str | None = KEY) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service", headers=headers) as client:
            yield client


@pytest.fixture
def run() -> Running:
    """`async with run(settings) as client`: the app, started, and a client with a valid key."""
    return lambda settings: running_app(create_app(settings))


@pytest.fixture
async def client(settings: Settings, run: Running) -> AsyncIterator[httpx.AsyncClient]:
    async with run(settings) as client:
        yield client
