"""Documents over the API: written whole or not at all, and nothing outside of the collection's folder."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ragrack.auth import ApiKey, add_key, hash_key
from ragrack.documents import DocumentPathError, Documents, InTheWayError, MisfitError, TooLargeError, check_path
from ragrack.ingest import ingest
from ragrack.settings import Settings

from .. import samples
from .conftest import KEY, Running

WRITER = "rr_the-key-of-who-writes"


@pytest.fixture
async def writer(settings: Settings, run: Running) -> AsyncIterator[httpx.AsyncClient]:
    add_key(settings.api_keys_file, ApiKey(name="writer", sha256=hash_key(WRITER), roles=("reader", "ingester")))
    own = Settings(**(dict(settings) | {"ingests": True, "document_max_bytes": 100_000}))
    async with run(own) as client:
        client.headers["Authorization"] = f"Bearer {WRITER}"
        yield client


async def test_a_document_is_written_read_replaced_and_removed(writer: httpx.AsyncClient, settings: Settings) -> None:
    path = "/documents/island/towns/Skär gård.md"
    first = await writer.put(path, content=b"# Towns\n\nThe town of Varholm has a clock tower.")
    assert first.status_code == 201
    assert first.json()["document"] == "towns/Skär gård.md"
    assert first.json()["bytes"] == len((settings.documents_dir / "island/towns/Skär gård.md").read_bytes())
    assert (await writer.put(path, content=b"# Towns")).status_code == 200
    read = await writer.get(path)
    assert read.content == b"# Towns"
    assert read.headers["content-disposition"] == "attachment"
    assert (await writer.delete(path)).status_code == 204
    for gone in (await writer.get(path), await writer.delete(path)):
        assert gone.status_code == 404
        assert gone.headers["content-type"] == "application/problem+json"


async def test_a_source_of_a_document_with_pages_names_the_page(writer: httpx.AsyncClient, settings: Settings) -> None:
    pages = ["The mill of Varholm grinds barley.", "The forge of Varholm opens on Mondays only."]
    assert (await writer.put("/documents/island/works.pdf", content=samples.pdf(pages))).status_code == 201
    ingest(settings, "island", lambda *_args, **_more: None)
    for _ in range(100):
        body = {"query": "On which day does the forge open?"}
        source = (await writer.post("/query", json=body)).json()["sources"][0]
        if source["document"] == "works.pdf":
            break
        await asyncio.sleep(0.1)
    assert (source["page"], source["slide"], source["sheet"]) == (2, None, None)
    assert source["text"] == pages[1]


async def test_what_is_written_is_what_the_next_ingest_finds(writer: httpx.AsyncClient, settings: Settings) -> None:
    text = b"# The mill\n\nThe mill of Varholm grinds barley on Thursdays only."
    await writer.put("/documents/island/mill.md", content=text)
    ingest(settings, "island", lambda *_args, **_more: None)
    for _ in range(100):
        nodes = (await writer.post("/retrieve", json={"query": "When does the mill grind barley?"})).json()["nodes"]
        if nodes and nodes[0]["document"] == "mill.md":
            break
        await asyncio.sleep(0.1)
    else:
        pytest.fail("the new document is not found")


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("island/notes.exe", b"x", 422),
        ("island/notes", b"x", 422),
        ("island/.hidden.md", b"x", 422),
        ("island/%2e%2e/%2e%2e/api-keys.md", b"x", 422),
        ("island/a/%2e%2e/b.md", b"x", 422),
        ("island//b.md", b"x", 422),
        ("island/a%00.md", b"x", 422),
        ("island/a%5cb.md", b"x", 422),
        ("nowhere/a.md", b"x", 422),
        ("island/a.md", b"a\0b", 415),
        ("island/a.pdf", b"<p>no PDF</p>", 415),
        ("island/a.docx", b"%PDF-1.7", 415),
        ("island/a.md", b"x" * 100_001, 413),
        ("island/lighthouse.md/a.md", b"x", 409),
    ],
)
async def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    writer: httpx.AsyncClient, settings: Settings, path: str, content: bytes, status: int
) -> None:
    def tree() -> dict[Path, int]:
        return {p: p.stat().st_size for p in settings.documents_dir.parent.rglob("*") if p.is_file()}

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(content), 4096):
            yield content[start : start + 4096]

    before = tree()
    for body in (content, chunks()):
        response = await writer.put(f"/documents/{path}", content=body)
        assert response.status_code == status
        assert response.headers["content-type"] == "application/problem+json"
    assert tree() == before


async def test_a_host_that_does_not_ingest_says_so(client: httpx.AsyncClient) -> None:
    response = await client.get("/documents/island/lighthouse.md")
    assert response.status_code == 421
    assert response.headers["content-type"] == "application/problem+json"


async def test_only_an_ingester_writes(writer: httpx.AsyncClient) -> None:
    reader = {"Authorization": f"Bearer {KEY}"}
    assert (await writer.get("/documents/island/lighthouse.md", headers=reader)).status_code == 200
    assert (await writer.put("/documents/island/a.md", content=b"x", headers=reader)).status_code == 403
    assert (await writer.delete("/documents/island/lighthouse.md", headers=reader)).status_code == 403


PARTS = ["..", ".", "", "a", "link", "linked.md", "~", "\0", "a.md"]


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def once(data: bytes) -> AsyncIterator[bytes]:
    yield data


@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.text(max_size=60) | st.lists(st.sampled_from(PARTS)).map("/".join))
@example("../outside/secret.md")
@example("link/secret.md")
@example("linked.md")
@example("/etc/passwd.md")
def test_no_path_leads_out_of_the_folder(tmp_path: Path, path: str) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    for folder in (outside, root):
        folder.mkdir(exist_ok=True)
    secret = outside / "secret.md"
    secret.write_bytes(b"secret")
    for link, target in ((root / "link", outside), (root / "linked.md", secret)):
        if not link.is_symlink():
            link.unlink(missing_ok=True)
            link.symlink_to(target)
    documents = Documents(root)
    refused = (DocumentPathError, InTheWayError, FileNotFoundError)
    for act in (
        lambda: asyncio.run(documents.write(path, once(b"mine"), 100)),
        lambda: documents.read(path),
        lambda: documents.remove(path),
    ):
        with contextlib.suppress(*refused):
            assert act() != b"secret"
    assert names(outside) == ["secret.md"]
    assert secret.read_bytes() == b"secret"
    assert set(names(tmp_path)) == {"outside", "root"}


async def test_a_write_that_fails_keeps_what_was_there(tmp_path: Path) -> None:
    async def breaks() -> AsyncIterator[bytes]:
        yield b"half"
        raise ConnectionError

    documents = Documents(tmp_path)
    await documents.write("a.md", once(b"whole"), 100)
    for chunks, kind in ((breaks(), ConnectionError), (once(b"x" * 101), TooLargeError), (once(b"\0"), MisfitError)):
        with pytest.raises(kind):
            await documents.write("a.md", chunks, 100)
    assert documents.read("a.md") == b"whole"
    assert names(tmp_path) == ["a.md"]
    assert check_path("towns/a.md") == "towns/a.md"
