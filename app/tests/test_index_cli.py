"""`ragrack index ...` as an operator types it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ragrack.cli import main
from ragrack.embedded import EmbeddedSnapshots
from ragrack.fingerprint import Fingerprint
from ragrack.settings import Settings
from ragrack.snapshot import SnapshotDir

from .manifests import entries, manifest

NOBODY = 65534


def publish(directory: SnapshotDir, *numbers: int) -> Sequence[str]:
    """Makes each live in turn; their ids."""
    ids = []
    for number in numbers:
        with directory.new() as new:
            (new / "file").write_text(str(number))
            snapshot = directory.publish(new, manifest(directory, number, entries(new, ["file"])))
        directory.offer(snapshot.id, "ingest")
        ids.append(snapshot.id)
    return ids


@pytest.fixture
def environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A unit's variables, for two collections."""
    variables = {
        "RAGRACK_COLLECTIONS": "manual,notes",
        "RAGRACK_INDEX_DIR": str(settings.index_dir),
        "RAGRACK_EMBED_MODEL_DIR": str(settings.embed_model_dir),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield variables


@pytest.fixture
def manual(settings: Settings, environment: dict[str, str]) -> SnapshotDir:
    return SnapshotDir(settings.index_dir, "manual", Fingerprint.of(settings).digest)


@pytest.fixture
def notes(settings: Settings, environment: dict[str, str]) -> SnapshotDir:
    return SnapshotDir(settings.index_dir, "notes", Fingerprint.of(settings).digest)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What the command prints as JSON. It must succeed."""
    status = main(["index", *arguments, "--json"])
    output = capsys.readouterr()
    assert status == 0, output.err
    return json.loads(output.out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["index", *arguments]) == 1
    return capsys.readouterr().err


def test_back_to_what_served_before_and_held(manual: SnapshotDir, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = publish(manual, 1, 2)
    [row] = told(capsys, "rollback", "--collection", "manual", "--why", "it knows nothing of limits")
    assert (row["from"], row["to"], row["held"]["why"]) == (second, first, "it knows nothing of limits")
    assert manual.current_id() == first
    [third] = publish(manual, 3)
    assert manual.current_id() == first, "what an ingest builds waits"
    listed = {row["snapshot"]: row for row in told(capsys, "list")}
    assert listed[first]["current"]
    assert listed[first]["held"]["next"] == third
    assert listed[third]["held"] is None
    [row] = told(capsys, "resume", "--collection", "manual")
    assert (row["from"], row["to"], row["held"]) == (first, third, None)
    assert manual.current_id() == third


def test_words_say_what_happened(manual: SnapshotDir, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = publish(manual, 1, 2)
    assert main(["index", "rollback", "--collection", "manual", "--why", "bad answers"]) == 0
    words = capsys.readouterr().out
    assert f"manual: {second} -> {first}; held since " in words
    assert "(bad answers); `ragrack index resume` lets go" in words
    assert main(["index", "list"]) == 0
    marked = [line for line in capsys.readouterr().out.splitlines() if line.startswith("*")]
    assert [first in line and "bad answers" in line for line in marked] == [True]


def test_all_collections_or_none(manual: SnapshotDir, notes: SnapshotDir, capsys: pytest.CaptureFixture[str]) -> None:
    _, second = publish(manual, 1, 2)
    [only] = publish(notes, 7)
    error = refused(capsys, "rollback")
    assert f"notes: no whole snapshot served before the live one; there are: {only}" in error
    assert manual.current_id() == second
    assert manual.held() is None
    publish(notes, 8)
    assert [row["collection"] for row in told(capsys, "rollback")] == ["manual", "notes"]


def test_a_dry_run_changes_nothing(manual: SnapshotDir, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = publish(manual, 1, 2)
    [row] = told(capsys, "rollback", "--collection", "manual", "--dry-run")
    assert (row["from"], row["to"]) == (second, first)
    assert manual.current_id() == second
    assert manual.held() is None


def test_one_that_rotted_is_passed_over(manual: SnapshotDir, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, _ = publish(manual, 1, 2, 3)
    file = manual.snapshots / second / "file"
    file.chmod(0o644)
    file.write_text("X")
    assert "file is not what was written" in refused(capsys, "rollback", "--to", second)
    [row] = told(capsys, "rollback", "--collection", "manual")
    assert row["to"] == first


def test_a_named_one_is_found_in_its_collection(
    manual: SnapshotDir, notes: SnapshotDir, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(manual, 1, 2)
    _, eighth = publish(notes, 7, 8)
    [row] = told(capsys, "rollback", "--to", eighth)
    assert (row["collection"], row["from"], row["to"]) == ("notes", eighth, eighth)
    assert notes.held() is not None, "to what is live already: it is held there"


@pytest.mark.parametrize("verb", ["rollback", "resume"])
@pytest.mark.parametrize("name", ["20261124T000099Z-ffffffff", "..", "nonsense"])
def test_an_unknown_one_is_refused_with_those_there_are(
    manual: SnapshotDir, capsys: pytest.CaptureFixture[str], verb: str, name: str
) -> None:
    first, second = publish(manual, 1, 2)
    error = refused(capsys, verb, "--to", name)
    assert f"manual {first}, manual {second}" in error
    assert manual.current_id() == second


def test_pruning_keeps_as_many_as_told(manual: SnapshotDir, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third, _ = publish(manual, 1, 2, 3, 4)
    would = told(capsys, "prune", "--keep", "1", "--dry-run")
    assert [row["snapshot"] for row in would["snapshots"]] == [first, second]
    assert len(manual.list()) == 4
    assert told(capsys, "prune", "--keep", "1") == would
    assert manual.list()[0].id == third, "where a rollback goes"


@pytest.mark.parametrize("keep", ["0", "-1", "many"])
def test_pruning_never_takes_all(keep: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["index", "prune", f"--keep={keep}"])
    assert "is no number of 1 or more" in capsys.readouterr().err


def release(releases: Path, name: str, settings: Settings, **variables: object) -> None:
    """A release as far as `prune` asks it: its settings, its model, its own command line."""
    directory = releases / name
    (directory / "venv/bin").mkdir(parents=True)
    (directory / "models").mkdir()
    (directory / "models/all-minilm-l6-v2").symlink_to(settings.embed_model_dir)
    (directory / "app.env").write_text(
        "".join(f'RAGRACK_{key.upper()}="{value}"\n' for key, value in variables.items())
    )
    (directory / "venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (directory / "venv/bin/python").chmod(0o755)


def test_an_index_goes_with_the_last_release_that_opens_it(settings: Settings, tmp_path: Path) -> None:
    from ragrack.needed import unneeded

    releases = tmp_path / "releases"
    release(releases, "one", settings, collections="manual")
    release(releases, "two", settings, collections="manual", chunk_size=64, chunk_overlap=8)
    small = Settings.model_validate(settings.model_dump() | {"chunk_size": 64, "chunk_overlap": 8})
    for made in (settings, small):
        for collection in ("manual", "notes"):
            publish(SnapshotDir(settings.index_dir, collection, Fingerprint.of(made).digest), 1)
    found, notes = unneeded(EmbeddedSnapshots.all(settings.index_dir), releases)
    assert {directory.collection for directory in found} == {"notes"}
    assert notes == []
    shutil.rmtree(releases / "two")
    found, _ = unneeded(EmbeddedSnapshots.all(settings.index_dir), releases)
    assert ("manual", Fingerprint.of(small).digest) in {(d.collection, d.fingerprint) for d in found}
    assert ("manual", Fingerprint.of(settings).digest) not in {(d.collection, d.fingerprint) for d in found}


def break_python(releases: Path) -> None:
    (releases / "one/venv/bin/python").unlink()


def break_settings(releases: Path) -> None:
    (releases / "one/app.env").unlink()


def break_model(releases: Path) -> None:
    (releases / "one/models/all-minilm-l6-v2").unlink()


def remove_all(releases: Path) -> None:
    shutil.rmtree(releases / "one")


@pytest.mark.parametrize("harm", [break_python, break_settings, break_model, remove_all])
def test_where_it_cannot_be_told_every_index_stays(settings: Settings, tmp_path: Path, harm: Any) -> None:
    from ragrack.needed import unneeded

    releases = tmp_path / "releases"
    release(releases, "one", settings, collections="manual")
    publish(SnapshotDir(settings.index_dir, "manual", "f" * 16), 1)
    assert len(unneeded(EmbeddedSnapshots.all(settings.index_dir), releases)[0]) == 1
    harm(releases)
    found, [note] = unneeded(EmbeddedSnapshots.all(settings.index_dir), releases)
    assert found == []
    assert note.startswith("indexes of other fingerprints stay: ")
    assert unneeded(EmbeddedSnapshots.all(settings.index_dir), None)[0] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root acts as others")
def test_what_root_does_stays_the_services_to_change(settings: Settings, environment: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        index_dir = Path(name) / "indexes"
        directory = SnapshotDir(index_dir, "manual", Fingerprint.of(settings).digest)
        first, _ = publish(directory, 1, 2)
        (directory.root / "history.jsonl").unlink()
        for path in (index_dir, *index_dir.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        for arguments in (["rollback", "--to", first], ["resume", "--collection", "manual"], ["prune"]):
            subprocess.run(
                [sys.executable, "-m", "ragrack", "index", *arguments],
                env={**os.environ, **environment, "RAGRACK_INDEX_DIR": str(index_dir)},
                check=True,
                capture_output=True,
            )
        assert (directory.root / "history.jsonl").exists()
        assert {path.lstat().st_uid for path in index_dir.rglob("*")} == {NOBODY}
