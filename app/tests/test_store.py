"""What the embedded store promises beside what every store must do (stores/test_conformance.py)."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery
from ragrack.faiss_vectors import VECTORS
from ragrack.snapshot import SnapshotError
from ragrack.store import NODES, SnapshotVectorStore
from ragrack.writer import FLAT_BELOW, write_snapshot_files

from .stores.suite import DIMENSIONS, METADATA, filters, found, node, unit


def write(path: Path, nodes: list[TextNode]) -> Path:
    path.mkdir()
    write_snapshot_files(nodes, len(nodes), DIMENSIONS, path)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("s") / "few", [node(i, metadata) for i, metadata in enumerate(METADATA)])


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    count = FLAT_BELOW + 1000
    nodes = [node(i, {"half": i % 2, "rare": i % 500, "rank": i}) for i in range(count)]
    return write(tmp_path_factory.mktemp("s") / "many", nodes)


def test_opening_reads_neither_vectors_nor_nodes(many: Path, path: Path) -> None:
    def read_by_opening(where: Path) -> int:
        def count() -> int:
            lines = Path("/proc/self/io").read_text().splitlines()
            return int(lines[0].split()[1])

        before = count()
        SnapshotVectorStore.open(where).close()
        return count() - before

    size = (many / VECTORS).stat().st_size + (many / NODES).stat().st_size
    assert size > 10 * ((path / VECTORS).stat().st_size + (path / NODES).stat().st_size)
    assert read_by_opening(many) - read_by_opening(path) < 64 * 1024


def test_closing_lets_go_of_every_file(many: Path) -> None:
    store = SnapshotVectorStore.open(many)
    store.query(VectorStoreQuery(query_embedding=unit(1), filters=filters(("half", "==", 1))))
    assert str(many) in Path("/proc/self/maps").read_text()
    store.close()
    assert str(many) not in Path("/proc/self/maps").read_text()
    links = {fd: fd.readlink() for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}
    assert [link for link in links.values() if many in link.parents] == []


def test_it_answers_when_its_files_have_been_removed(tmp_path: Path) -> None:
    where = write(tmp_path / "s", [node(i, metadata) for i, metadata in enumerate(METADATA)])
    store = SnapshotVectorStore.open(where, threads=3)
    for name in (VECTORS, NODES):
        (where / name).unlink()
    assert found(store, filters(("tenant", "==", "a"))) == {"n0", "n1"}
    store.close()


def _answer(where: Path) -> None:
    store = SnapshotVectorStore.open(where)
    assert found(store, filters(("tenant", "==", "a"))) == {"n0", "n1"}
    store.close()


def test_forked_processes_read_the_same_files(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_answer, args=(path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(600)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]


def test_processes_of_their_own_read_the_same_files(path: Path) -> None:
    script = f"""
from pathlib import Path
from ragrack.store import SnapshotVectorStore
print(sorted(node.node_id for node in SnapshotVectorStore.open(Path({str(path)!r})).get_nodes()))
"""
    workers = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {worker.communicate(timeout=600)[0] for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert len(answers) == 1


def test_missing_damaged_or_strange_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="cannot be opened"):
        SnapshotVectorStore.open(tmp_path)
    where = write(tmp_path / "s", [node(0, {})])
    other = write(tmp_path / "other", [node(0, {}), node(1, {})])
    (where / NODES).write_bytes((other / NODES).read_bytes())
    with pytest.raises(SnapshotError, match=r"has 1 vectors, nodes\.sqlite has 2 rows"):
        SnapshotVectorStore.open(where)
    (where / NODES).write_bytes(b"no database at all" * 100)
    with pytest.raises(SnapshotError, match="cannot be opened"):
        SnapshotVectorStore.open(where)
    (other / VECTORS).write_bytes((other / VECTORS).read_bytes()[:60])
    with pytest.raises(SnapshotError, match="cannot be opened"):
        SnapshotVectorStore.open(other)


def test_a_node_without_its_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="node x has no embedding of 16 dimensions"):
        write_snapshot_files([TextNode(id_="x", text="x")], 1, DIMENSIONS, tmp_path)
    with pytest.raises(ValueError, match="2 nodes were promised, 1 came"):
        write_snapshot_files([node(0, {})], 2, DIMENSIONS, tmp_path / "..")
