from __future__ import annotations

import json
from pathlib import Path

import pytest
from ragrack.snapshot import FileEntry, Manifest, Snapshot, SnapshotDir, SnapshotError, file_sha256


@pytest.fixture
def directory(tmp_path: Path) -> SnapshotDir:
    return SnapshotDir(tmp_path, "manual", "0123456789abcdef")


def publish(directory: SnapshotDir, number: int, data: bytes = b"data") -> Snapshot:
    with directory.new() as new:
        (new / "file").write_bytes(data)
        manifest = Manifest(
            id=f"20261124T0000{number:02}Z-{number:08x}",
            collection=directory.collection,
            fingerprint=directory.fingerprint,
            built_with={},
            content=str(number),
            created="20261124T000000Z",
            parent=None,
            documents=1,
            nodes=1,
            dimensions=3,
            engine="flat",
            files={"file": FileEntry(file_sha256(new / "file"), len(data))},
            golden=None,
        )
        return directory.publish(new, manifest)


def test_nothing_is_live_at_first(directory: SnapshotDir) -> None:
    assert directory.current() is None
    assert list(directory.list()) == []
    assert list(directory.history()) == []


def test_a_published_snapshot_is_whole_but_not_live(directory: SnapshotDir) -> None:
    snapshot = publish(directory, 1)
    assert [found.id for found in directory.list()] == [snapshot.id]
    assert directory.get(snapshot.id).manifest == snapshot.manifest
    assert directory.current() is None
    directory.verify(snapshot.id)


def test_flipping_moves_one_relative_link_and_is_noted(directory: SnapshotDir) -> None:
    first, second = publish(directory, 1), publish(directory, 2)
    directory.flip(first.id, "ingest")
    directory.flip(second.id, "ingest")
    directory.flip(second.id, "ingest")
    directory.flip(first.id, "rollback")
    assert directory.link.readlink() == Path("snapshots") / first.id
    current = directory.current()
    assert current is not None
    assert current.id == first.id
    moves = [(entry["from"], entry["to"], entry["why"]) for entry in directory.history()]
    assert moves == [(None, first.id, "ingest"), (first.id, second.id, "ingest"), (second.id, first.id, "rollback")]


def test_a_half_written_line_of_history_is_passed_over(directory: SnapshotDir) -> None:
    directory.flip(publish(directory, 1).id, "ingest")
    with (directory.root / "history.jsonl").open("a") as file:
        file.write('{"at": "2026')
    assert len(directory.history()) == 1


@pytest.mark.parametrize("name", ["nonsense", "../../etc", "20261124T000099Z-ffffffff", ""])
def test_an_unknown_snapshot_is_refused_with_those_there_are(directory: SnapshotDir, name: str) -> None:
    known = publish(directory, 1)
    with pytest.raises(SnapshotError, match=f"Those there are: {known.id}"):
        directory.flip(name, "rollback")
    assert directory.current() is None


def test_an_aborted_one_leaves_nothing(directory: SnapshotDir) -> None:
    with pytest.raises(RuntimeError), directory.new() as new:
        (new / "file").write_text("half")
        raise RuntimeError
    assert list(directory.snapshots.iterdir()) == []


def test_damage_is_found_and_named(directory: SnapshotDir) -> None:
    snapshot = publish(directory, 1)
    file = snapshot.path / "file"
    file.chmod(0o644)
    file.write_bytes(b"atad")
    snapshot.check()
    with pytest.raises(SnapshotError, match="file is not what was written"):
        directory.verify(snapshot.id)
    file.write_bytes(b"da")
    with pytest.raises(SnapshotError, match="file has 2 bytes, its manifest says 4"):
        directory.flip(snapshot.id, "rollback")
    file.unlink()
    (snapshot.path / "extra").touch()
    with pytest.raises(SnapshotError, match=r"file cannot be read.*extra does not belong there"):
        directory.verify(snapshot.id)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": 1}', '{"files": {"x": 3}}'])
def test_a_damaged_manifest_is_no_snapshot(directory: SnapshotDir, content: str) -> None:
    snapshot = publish(directory, 1)
    (snapshot.path / "manifest.json").write_text(content)
    assert list(directory.list()) == []
    with pytest.raises(SnapshotError, match="is damaged"):
        directory.get(snapshot.id)


def test_a_snapshot_without_manifest_is_not_whole(directory: SnapshotDir) -> None:
    snapshot = publish(directory, 1)
    (snapshot.path / "manifest.json").unlink()
    with pytest.raises(SnapshotError, match="not a whole snapshot"):
        directory.get(snapshot.id)


def test_one_built_with_something_else_is_refused(directory: SnapshotDir) -> None:
    snapshot = publish(directory, 1)
    manifest = json.loads((snapshot.path / "manifest.json").read_text())
    (snapshot.path / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "f" * 16}))
    with pytest.raises(SnapshotError, match=f"was built for manual/{'f' * 16}"):
        directory.flip(snapshot.id, "copied here")


def test_a_dangling_current_is_an_error_not_an_absence(directory: SnapshotDir) -> None:
    snapshot = publish(directory, 1)
    directory.flip(snapshot.id, "ingest")
    snapshot.path.rename(directory.root / "moved")
    with pytest.raises(SnapshotError, match="no snapshot"):
        directory.current()


def test_pruning_keeps_the_newest_and_the_live_one(directory: SnapshotDir) -> None:
    snapshots = [publish(directory, number) for number in range(1, 6)]
    directory.flip(snapshots[1].id, "rollback")
    (directory.snapshots / ".new-dead").mkdir()
    removed = directory.prune(2)
    assert list(removed) == [snapshots[0].id, snapshots[2].id]
    assert [found.id for found in directory.list()] == [snapshots[i].id for i in (1, 3, 4)]
    assert not (directory.snapshots / ".new-dead").exists()


def test_all_collections_and_fingerprints_are_listed(tmp_path: Path) -> None:
    for collection, fingerprint in [("b", "1" * 16), ("a", "2" * 16), ("a", "1" * 16)]:
        publish(SnapshotDir(tmp_path, collection, fingerprint), 1)
    found = [(directory.collection, directory.fingerprint) for directory in SnapshotDir.all(tmp_path)]
    assert found == [("a", "1" * 16), ("a", "2" * 16), ("b", "1" * 16)]


def test_its_files_cannot_be_written_to_by_accident(directory: SnapshotDir) -> None:
    assert (publish(directory, 1).path / "file").stat().st_mode & 0o222 == 0
