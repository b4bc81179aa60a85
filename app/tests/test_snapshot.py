from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from ragrack.snapshot import Snapshot, SnapshotDir, SnapshotError, served, timestamp, timestamp_after

from .manifests import entries, manifest


@pytest.fixture
def directory(tmp_path: Path) -> SnapshotDir:
    return SnapshotDir(tmp_path, "manual", "0123456789abcdef")


def publish(directory: SnapshotDir, number: int, data: bytes = b"data", parent: str | None = None) -> Snapshot:
    with directory.new() as new:
        (new / "file").write_bytes(data)
        return directory.publish(new, manifest(directory, number, entries(new, ["file"]), parent=parent))


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


def test_an_entry_after_a_half_written_line_is_not_lost(directory: SnapshotDir) -> None:
    first, second = publish(directory, 1), publish(directory, 2)
    directory.flip(first.id, "ingest")
    with (directory.root / "history.jsonl").open("a") as file:
        file.write('{"at": "2026')
    directory.flip(second.id, "ingest")
    assert [entry["to"] for entry in directory.history()] == [first.id, second.id]


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


def live(directory: SnapshotDir, *numbers: int) -> Sequence[str]:
    """Publishes them and makes each live in turn; their ids."""
    snapshots = [publish(directory, number) for number in numbers]
    for snapshot in snapshots:
        directory.flip(snapshot.id, "ingest")
    return [snapshot.id for snapshot in snapshots]


def test_there_is_nothing_before_the_first(directory: SnapshotDir) -> None:
    assert directory.previous_id() is None
    live(directory, 1)
    assert directory.previous_id() is None


def test_before_is_what_served_before_not_what_is_older_or_newer(directory: SnapshotDir) -> None:
    first, second, third = live(directory, 1, 2, 3)
    assert directory.previous_id() == second
    directory.flip(first, "the same documents as then")
    assert directory.previous_id() == third


def test_a_rollback_of_a_rollback_goes_further_back_never_forward(directory: SnapshotDir) -> None:
    first, second, third = live(directory, 1, 2, 3)
    directory.flip(second, "bad answers", back=True)
    assert directory.previous_id() == first
    directory.flip(first, "bad answers", back=True)
    assert directory.previous_id() is None
    directory.flip(third, "resume")
    assert directory.previous_id() == first


def test_removed_and_damaged_ones_are_passed_over(directory: SnapshotDir) -> None:
    first, second, third, _ = live(directory, 1, 2, 3, 4)
    file = directory.snapshots / third / "file"
    file.chmod(0o644)
    file.write_bytes(b"cut")
    directory.snapshots.joinpath(second).rename(directory.root / "moved")
    assert directory.previous_id() == first


def test_a_flip_that_was_noted_but_never_happened_is_none(directory: SnapshotDir) -> None:
    first, second, third = live(directory, 1, 2, 3)
    directory.link.unlink()
    directory.link.symlink_to(Path("snapshots") / second)
    assert directory.previous_id() == first
    directory.flip(third, "ingest")
    assert directory.previous_id() == second


def test_a_link_that_somebody_moved_by_hand_is_right(directory: SnapshotDir) -> None:
    first, second = live(directory, 1, 2)
    third = publish(directory, 3).id
    directory.link.unlink()
    directory.link.symlink_to(Path("snapshots") / third)
    assert directory.previous_id() == second
    assert served([], first) == [first]


def test_while_held_nothing_new_goes_live(directory: SnapshotDir) -> None:
    first, second = live(directory, 1, 2)
    directory.hold("bad answers")
    directory.flip(first, "bad answers", back=True)
    third = publish(directory, 3).id
    assert directory.offer(third, "ingest") is False
    assert directory.current_id() == first
    hold = directory.held()
    assert hold is not None
    assert (hold.why, hold.next) == ("bad answers", third)
    directory.resume()
    assert directory.held() is None
    assert directory.current_id() == third
    assert directory.previous_id() == first
    assert directory.offer(second, "ingest") is True
    assert directory.current_id() == second


def test_letting_go_moves_on_to_the_newest_whole_one(directory: SnapshotDir) -> None:
    first, second, third = live(directory, 1, 2, 3)
    directory.hold("bad answers")
    directory.flip(first, "bad answers", back=True)
    (directory.snapshots / third / "manifest.json").unlink()
    directory.resume()
    assert directory.current_id() == second


def test_letting_go_prefers_what_came_last_to_what_is_newest(directory: SnapshotDir) -> None:
    first, second, _ = live(directory, 1, 2, 3)
    directory.hold("bad answers")
    directory.flip(first, "bad answers", back=True)
    directory.offer(second, "the documents are those of then")
    directory.resume()
    assert directory.current_id() == second


def test_letting_go_of_what_is_not_held_changes_nothing(directory: SnapshotDir) -> None:
    first, _second = live(directory, 1, 2)
    directory.flip(first, "rollback", back=True)
    directory.resume()
    assert directory.current_id() == first


def test_a_hold_that_cannot_be_read_holds(directory: SnapshotDir) -> None:
    first, second = live(directory, 1, 2)
    directory.flip(first, "rollback", back=True)
    (directory.root / "hold.json").write_text("somebody wrote this by hand")
    assert directory.offer(second, "ingest") is False
    hold = directory.held()
    assert hold is not None
    assert "cannot be read" in hold.why


def test_nothing_can_be_held_where_nothing_is_live(directory: SnapshotDir) -> None:
    publish(directory, 1)
    with pytest.raises(SnapshotError, match="no live snapshot"):
        directory.hold("why not")


def test_pruning_keeps_the_way_back_and_the_way_on(directory: SnapshotDir) -> None:
    first, second, third, fourth, fifth, sixth = live(directory, *range(1, 7))
    directory.hold("bad answers")
    directory.flip(second, "bad answers", back=True)
    directory.offer(third, "ingest")
    assert directory.prunable(1) == [fourth, fifth]
    assert directory.prune(1) == [fourth, fifth]
    assert [found.id for found in directory.list()] == [first, second, third, sixth]


def test_pruning_counts_only_whole_ones_as_kept(directory: SnapshotDir) -> None:
    ids = live(directory, 1, 2, 3, 4)
    directory.flip(ids[0], "rollback", back=True)
    (directory.snapshots / ids[3] / "manifest.json").unlink()
    assert list(directory.prune(1)) == [ids[1]]
    assert sorted(path.name for path in directory.snapshots.iterdir()) == [ids[0], ids[2], ids[3]]


def test_pruning_leaves_what_is_being_written(directory: SnapshotDir) -> None:
    with directory.new() as new:
        (new / "file").write_text("half")
        directory.prune(1)
        assert (new / "file").exists()


def test_a_file_that_is_the_parents_is_not_stored_twice(directory: SnapshotDir) -> None:
    first = publish(directory, 1, b"the same")
    second = publish(directory, 2, b"the same", parent=first.id)
    third = publish(directory, 3, b"another", parent=second.id)
    assert (second.path / "file").stat().st_ino == (first.path / "file").stat().st_ino
    assert (third.path / "file").stat().st_ino != (first.path / "file").stat().st_ino
    directory.verify(second.id)


def test_a_parents_damage_is_not_inherited(directory: SnapshotDir) -> None:
    first = publish(directory, 1, b"the same")
    (first.path / "file").chmod(0o644)
    (first.path / "file").write_bytes(b"the sane")
    second = publish(directory, 2, b"the same", parent=first.id)
    directory.verify(second.id)


def test_all_of_a_fingerprint_goes_at_once(directory: SnapshotDir) -> None:
    live(directory, 1, 2)
    directory.discard()
    assert list(directory.root.parent.iterdir()) == []


def test_a_process_that_dies_lets_others_in(directory: SnapshotDir) -> None:
    [first] = live(directory, 1)
    code = (
        "import sys, time; from pathlib import Path; from ragrack.snapshot import SnapshotDir\n"
        "d = SnapshotDir(Path(sys.argv[1]), 'manual', '0123456789abcdef')\n"
        "with d.new() as new, d._changing():\n"
        "    print(new.name, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, directory.index_dir], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    left = directory.snapshots / process.stdout.readline().strip()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert left.is_dir()
    directory.prune(1)
    assert not left.exists()
    directory.hold("the dead one's lock is gone")
    assert [path.name for path in directory.snapshots.iterdir()] == [first]


def test_ids_sort_as_they_were_made_whatever_the_clock_says() -> None:
    before = timestamp()
    assert before <= timestamp_after([]) <= timestamp()
    assert timestamp_after(["20261124T235959Z-ffffffff", "20991231T235959Z-00000000"]) == "21000101T000000Z"
