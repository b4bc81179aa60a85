from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path

import pytest
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery
from ragrack.handle import IndexHandle, IndexUnavailableError
from ragrack.snapshot import Manifest, Snapshot, SnapshotDir
from ragrack.store import SnapshotVectorStore, write_snapshot_files

VECTOR = [1.0, 0.0, 0.0]


@pytest.fixture
def directory(tmp_path: Path) -> SnapshotDir:
    return SnapshotDir(tmp_path, "manual", "0123456789abcdef")


def publish(directory: SnapshotDir, number: int) -> Snapshot:
    """A snapshot of three nodes whose text is the snapshot's number."""
    with directory.new() as new:
        nodes = [TextNode(id_=f"{number}-{i}", text=str(number), embedding=VECTOR) for i in range(3)]
        written = write_snapshot_files(nodes, 3, 3, new)
        manifest = Manifest(
            id=f"20261124T0000{number:02}Z-{number:08x}",
            collection=directory.collection,
            fingerprint=directory.fingerprint,
            built_with={},
            content=str(number),
            created="20261124T000000Z",
            parent=None,
            documents=1,
            nodes=3,
            dimensions=3,
            engine=written.engine,
            files=written.files,
            golden=None,
        )
        return directory.publish(new, manifest)


def ask(store: SnapshotVectorStore) -> set[str]:
    result = store.query(VectorStoreQuery(query_embedding=VECTOR, similarity_top_k=3))
    return {node.get_content() for node in result.nodes or []}


def open_files(directory: SnapshotDir) -> set[str]:
    """Names of the snapshots that this process has mapped or open."""
    names = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            names.add(str(fd.readlink()))
    return {
        Path(name).relative_to(directory.snapshots).parts[0]
        for name in names
        if Path(name).is_relative_to(directory.snapshots)
    }


def test_without_a_snapshot_it_says_so_and_waits_for_one(directory: SnapshotDir) -> None:
    handle = IndexHandle(directory)
    assert handle.snapshot_id is None
    with pytest.raises(IndexUnavailableError, match="ragrack ingest --collection manual"), handle.use():
        pass
    first = publish(directory, 1)
    directory.flip(first.id, "ingest")
    assert handle.poll()
    assert handle.snapshot_id == first.id
    assert handle.problem is None
    assert not handle.poll()
    handle.close()


def test_the_old_one_is_closed_when_its_last_user_has_gone(directory: SnapshotDir) -> None:
    first, second = publish(directory, 1), publish(directory, 2)
    directory.flip(first.id, "ingest")
    handle = IndexHandle(directory)
    with handle.use() as old:
        directory.flip(second.id, "ingest")
        assert handle.poll()
        with handle.use() as new:
            assert (ask(old.store), ask(new.store)) == ({"1"}, {"2"})
        assert open_files(directory) == {first.id, second.id}
    assert open_files(directory) == {second.id}
    with handle.use() as last:
        handle.close()
        assert ask(last.store) == {"2"}
    assert open_files(directory) == set()
    with pytest.raises(IndexUnavailableError), handle.use():
        pass
    assert not handle.poll()


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "manifest", "dangling"])
def test_a_bad_snapshot_is_never_swapped_in(directory: SnapshotDir, damage: str) -> None:
    first, second = publish(directory, 1), publish(directory, 2)
    directory.flip(first.id, "ingest")
    handle = IndexHandle(directory)
    directory.flip(second.id, "ingest")
    file = second.path / "nodes.sqlite"
    file.chmod(0o644)
    match damage:
        case "missing":
            file.unlink()
        case "truncated":
            file.write_bytes(file.read_bytes()[:100])
        case "garbage":
            file.write_bytes(b"x" * file.stat().st_size)
        case "manifest":
            (second.path / "manifest.json").write_text("{}")
        case "dangling":
            second.path.rename(directory.root / "moved")
    assert not handle.poll()
    assert handle.snapshot_id == first.id
    assert handle.problem is not None
    with handle.use() as opened:
        assert ask(opened.store) == {"1"}
    directory.flip(first.id, "rollback")
    handle.poll()
    assert handle.problem is None
    handle.close()


def test_it_is_warm_before_it_is_swapped_in(directory: SnapshotDir) -> None:
    directory.flip(publish(directory, 1).id, "ingest")
    seen: list[set[str]] = []
    handle = IndexHandle(directory, warm=lambda store: seen.append(ask(store)))
    assert seen == [{"1"}]
    handle.close()


async def test_watching_follows_current(directory: SnapshotDir) -> None:
    first, second = publish(directory, 1), publish(directory, 2)
    directory.flip(first.id, "ingest")
    loop, warmed = asyncio.get_running_loop(), asyncio.Event()

    def warm(store: SnapshotVectorStore) -> None:
        loop.call_soon_threadsafe(warmed.set)

    handle = IndexHandle(directory, warm=warm)
    await warmed.wait()
    warmed.clear()
    watcher = asyncio.create_task(handle.watch(interval=0.01))
    directory.flip(second.id, "ingest")
    async with asyncio.timeout(30):
        await warmed.wait()
        # It is warmed before it is swapped in: this one waits for the poll that does.
        await asyncio.to_thread(handle.poll)
    assert handle.snapshot_id == second.id
    watcher.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watcher
    handle.close()


def test_queries_go_on_over_many_flips_each_from_one_snapshot(directory: SnapshotDir) -> None:
    ids = [publish(directory, number).id for number in (1, 2)]
    directory.flip(ids[0], "ingest")
    handle = IndexHandle(directory)
    stop = threading.Event()
    answers: list[tuple[str, set[str]]] = []
    failures: list[BaseException] = []

    def load() -> None:
        while not stop.is_set():
            try:
                with handle.use() as opened:
                    answers.append((opened.snapshot.manifest.content, ask(opened.store)))
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    swaps = 0
    for number in range(200):
        directory.flip(ids[(number + 1) % 2], "test")
        swaps += handle.poll()
    stop.set()
    for thread in threads:
        thread.join()
    assert swaps == 200
    assert failures == []
    assert {content for content, _ in answers} == {"1", "2"}
    assert all(found == {content} for content, found in answers)
    assert len(open_files(directory)) == 1
    handle.close()
    assert open_files(directory) == set()
