from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery
from ragrack import integrity
from ragrack.embedded import EmbeddedSnapshots
from ragrack.handle import IndexHandle, IndexUnavailableError
from ragrack.readonly import SnapshotStore
from ragrack.snapshot import Snapshot
from ragrack.store import SnapshotVectorStore
from ragrack.writer import write_snapshot_files

from .manifests import manifest

VECTOR = [1.0, 0.0, 0.0]


@pytest.fixture
def directory(tmp_path: Path) -> EmbeddedSnapshots:
    return EmbeddedSnapshots(tmp_path, "manual", "0123456789abcdef")


def publish(directory: EmbeddedSnapshots, number: int) -> Snapshot:
    """A snapshot of three nodes whose text is the snapshot's number."""
    with directory.new() as new:
        nodes = [TextNode(id_=f"{number}-{i}", text=str(number), embedding=VECTOR) for i in range(3)]
        written = write_snapshot_files(nodes, 3, 3, new)
        about = manifest(directory, number, written.files, nodes=3, engine=written.engine)
        snapshot = directory.publish(new, about)
        integrity.note(directory, snapshot)
        return snapshot


def ask(store: SnapshotStore) -> set[str]:
    result = store.query(VectorStoreQuery(query_embedding=VECTOR, similarity_top_k=3))
    return {node.get_content() for node in result.nodes or []}


def open_files(directory: EmbeddedSnapshots) -> set[str]:
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


def test_without_a_snapshot_it_says_so_and_waits_for_one(directory: EmbeddedSnapshots) -> None:
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


def test_the_old_one_is_closed_when_its_last_user_has_gone(directory: EmbeddedSnapshots) -> None:
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


def overwrite(file: Path, data: bytes, *, same_time: bool = False) -> None:
    """What a broken disk or a stray hand does: other bytes in the same file."""
    status = file.stat()
    file.chmod(0o644)
    file.write_bytes(data)
    if same_time:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def flipped(data: bytes, where: int) -> bytes:
    return data[:where] + bytes([data[where] ^ 0xFF]) + data[where + 1 :]


def damage(directory: EmbeddedSnapshots, snapshot: Snapshot, kind: str) -> None:
    vectors, nodes, manifest = (snapshot.path / name for name in ("vectors.faiss", "nodes.sqlite", "manifest.json"))
    match kind:
        case "vectors cut short":
            overwrite(vectors, vectors.read_bytes()[:-7])
        case "vectors empty":
            overwrite(vectors, b"")
        case "a byte of the vectors":
            overwrite(vectors, flipped(vectors.read_bytes(), vectors.stat().st_size // 2))
        case "a byte of the vectors, unseen":
            overwrite(vectors, flipped(vectors.read_bytes(), 9), same_time=True)
        case "a byte of the nodes":
            overwrite(nodes, flipped(nodes.read_bytes(), nodes.stat().st_size // 2))
        case "other bytes in the nodes":
            overwrite(nodes, b"x" * nodes.stat().st_size)
        case "another snapshot's vectors":
            data = vectors.read_bytes()
            overwrite(vectors, data[:-4] + b"\0\0\x80\x3f")
        case "no vectors":
            vectors.unlink()
        case "no nodes":
            nodes.unlink()
        case "no manifest":
            manifest.unlink()
        case "an empty manifest":
            manifest.write_text("")
        case "a manifest of nothing":
            manifest.write_text("{}")
        case "a manifest of other sizes":
            manifest.write_text(manifest.read_text().replace('"bytes": ', '"bytes": 1'))
        case "of another fingerprint":
            manifest.write_text(manifest.read_text().replace(directory.fingerprint, "f" * 16))
        case "of another collection":
            manifest.write_text(manifest.read_text().replace(directory.collection, "other"))
        case "half copied":
            for file in list(snapshot.path.iterdir())[1:]:
                file.unlink()
        case "an empty directory":
            for file in list(snapshot.path.iterdir()):
                file.unlink()
        case "a file in its place":
            snapshot.path.rename(directory.root / "moved")
            snapshot.path.write_bytes(b"")
        case "dangling":
            snapshot.path.rename(directory.root / "moved")
        case "no current":
            directory.link.unlink()
        case "current is a directory":
            directory.link.unlink()
            directory.link.mkdir()
        case "current leads elsewhere":
            directory.link.unlink()
            directory.link.symlink_to("/etc")


KINDS = [
    "vectors cut short",
    "vectors empty",
    "a byte of the vectors",
    "a byte of the vectors, unseen",
    "a byte of the nodes",
    "other bytes in the nodes",
    "another snapshot's vectors",
    "no vectors",
    "no nodes",
    "no manifest",
    "an empty manifest",
    "a manifest of nothing",
    "a manifest of other sizes",
    "of another fingerprint",
    "of another collection",
    "half copied",
    "an empty directory",
    "a file in its place",
    "dangling",
    "no current",
    "current is a directory",
    "current leads elsewhere",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_snapshot_is_never_opened(
    directory: EmbeddedSnapshots, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    first, second = publish(directory, 1), publish(directory, 2)
    directory.flip(first.id, "ingest")
    handle = IndexHandle(directory)
    directory.flip(second.id, "ingest")
    damage(directory, second, kind)
    with monkeypatch.context() as patch:
        # FAISS takes a damaged head for sizes: it may ask for all of the memory, and the kernel ends the worker.
        patch.setattr(SnapshotVectorStore, "open", lambda *_: pytest.fail("it was opened"))
        assert not handle.poll()
        problem = handle.problem
        assert problem
        assert not handle.poll()
        assert handle.problem == problem
        assert IndexHandle(directory).problem == problem, "a worker that starts says the same"
    assert handle.snapshot_id == first.id
    with handle.use() as opened:
        assert ask(opened.store) == {"1"}
    if kind == "current is a directory":
        directory.link.rmdir()
    directory.flip(first.id, "rollback")
    handle.poll()
    assert handle.problem is None
    handle.close()


@pytest.mark.parametrize("noted", [True, False])
def test_what_was_damaged_and_is_mended_is_opened(directory: EmbeddedSnapshots, noted: bool) -> None:
    snapshot = publish(directory, 1)
    if not noted:
        shutil.rmtree(directory.root / "verified")
    directory.flip(snapshot.id, "ingest")
    vectors = snapshot.path / "vectors.faiss"
    data = vectors.read_bytes()
    overwrite(vectors, flipped(data, 70))
    handle = IndexHandle(directory)
    assert "vectors.faiss is not what was written" in (handle.problem or "")
    overwrite(vectors, data)
    assert handle.poll()
    assert handle.problem is None
    handle.close()


def test_what_answers_is_told_to_be_damaged_and_replaced_when_it_is_mended(directory: EmbeddedSnapshots) -> None:
    snapshot = publish(directory, 1)
    directory.flip(snapshot.id, "ingest")
    handle = IndexHandle(directory)
    aside = directory.root / "aside"
    shutil.copytree(snapshot.path, aside)
    vectors = snapshot.path / "vectors.faiss"
    overwrite(vectors, flipped(vectors.read_bytes(), 70))
    assert not handle.poll()
    assert "vectors.faiss is not what was written" in (handle.problem or "")
    shutil.rmtree(snapshot.path)
    aside.rename(snapshot.path)
    assert handle.poll(), "the same id, but other files"
    assert handle.problem is None
    handle.close()


def test_a_verified_snapshot_is_not_read_again_by_each_worker(
    directory: EmbeddedSnapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = publish(directory, 1)
    directory.flip(snapshot.id, "ingest")
    monkeypatch.setattr(integrity, "damage", lambda *_: pytest.fail("it was read"))
    assert IndexHandle(directory).snapshot_id == snapshot.id


def test_whatever_happens_it_goes_on_following(directory: EmbeddedSnapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = publish(directory, 1), publish(directory, 2)
    directory.flip(first.id, "ingest")
    handle = IndexHandle(directory)
    directory.flip(second.id, "ingest")
    with monkeypatch.context() as patch:
        patch.setattr(SnapshotVectorStore, "open", _out_of_memory)
        assert not handle.poll()
        assert handle.problem == "failed with MemoryError"
    assert handle.poll()
    assert handle.snapshot_id == second.id
    handle.close()


def _out_of_memory(*_: object) -> None:
    raise MemoryError


def test_a_failed_pull_is_told_while_the_old_one_answers(directory: EmbeddedSnapshots) -> None:
    snapshot = publish(directory, 1)
    directory.flip(snapshot.id, "pull")
    (directory.root / "pull.json").write_text('{"at": "20261124T000000Z", "snapshot": null, "problem": "no route"}')
    handle = IndexHandle(directory, pulled=True)
    assert (handle.snapshot_id, handle.problem, handle.pull_problem) == (snapshot.id, None, "no route")
    assert IndexHandle(directory).pull_problem is None, "a host that ingests has none"


def test_it_is_warm_before_it_is_swapped_in(directory: EmbeddedSnapshots) -> None:
    directory.flip(publish(directory, 1).id, "ingest")
    seen: list[set[str]] = []
    handle = IndexHandle(directory, warm=lambda store: seen.append(ask(store)))
    assert seen == [{"1"}]
    handle.close()


async def test_watching_follows_current(directory: EmbeddedSnapshots) -> None:
    first, second = publish(directory, 1), publish(directory, 2)
    directory.flip(first.id, "ingest")
    loop, warmed = asyncio.get_running_loop(), asyncio.Event()

    def warm(store: SnapshotStore) -> None:
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


def test_a_thousand_flips_under_load_lose_no_query_and_leave_nothing_behind(directory: EmbeddedSnapshots) -> None:
    ids = [publish(directory, number).id for number in (1, 2)]
    directory.flip(ids[0], "ingest")
    handle = IndexHandle(directory)
    stop = threading.Event()
    answers: Counter[tuple[str, frozenset[str]]] = Counter()
    failures: list[BaseException] = []

    def load() -> None:
        while not stop.is_set():
            try:
                with handle.use() as opened:
                    answers[opened.snapshot.manifest.content, frozenset(ask(opened.store))] += 1
            except BaseException as error:
                failures.append(error)

    def flip(times: int) -> int:
        swaps = 0
        for number in range(times):
            # As EmbeddedSnapshots.flip does, without its waits for the disk.
            aside = directory.root / "aside"
            aside.symlink_to(Path("snapshots") / ids[(number + 1) % 2])
            aside.replace(directory.link)
            swaps += handle.poll()
        return swaps

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    # What is cached and pooled once is no growth.
    assert flip(200) == 200
    before = used()
    assert flip(800) == 800
    stop.set()
    for thread in threads:
        thread.join()
    after = used()
    assert failures == []
    assert set(answers) == {("1", frozenset("1")), ("2", frozenset("2"))}
    # The load opens nothing itself, but a snapshot that its last query still holds may be counted.
    assert after.descriptors <= before.descriptors + 4
    assert after.resident <= before.resident + 8 * 1024 * 1024, "10 kB for each flip would be as much"
    assert len(open_files(directory)) == 1
    handle.close()
    assert open_files(directory) == set()


@dataclass(frozen=True)
class Used:
    descriptors: int
    resident: int
    """Bytes."""


def used() -> Used:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Used(len(list(Path("/proc/self/fd").iterdir())), pages * os.sysconf("SC_PAGE_SIZE"))
