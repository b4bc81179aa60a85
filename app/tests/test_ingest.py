from __future__ import annotations

import fcntl
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.schema import MetadataMode
from ragrack.fingerprint import Fingerprint
from ragrack.ingest import IngestError, ingest
from ragrack.progress import progress_to
from ragrack.settings import Settings
from ragrack.snapshot import Snapshot, SnapshotDir
from ragrack.store import SnapshotVectorStore


class Told:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int, int]] = []
        self.notes: list[str] = []

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        self.lines.append((stage, done, total))
        if note:
            self.notes.append(note)


def run(settings: Settings) -> tuple[Snapshot, Told]:
    told = Told()
    snapshot = ingest(settings, "manual", told)
    assert isinstance(snapshot, Snapshot)
    return snapshot, told


def directory(settings: Settings) -> SnapshotDir:
    return SnapshotDir(settings.index_dir, "manual", Fingerprint.of(settings).digest)


def documents(settings: Settings) -> Path:
    return settings.documents_dir / "manual"


def texts(snapshot: Snapshot) -> dict[str, list[str]]:
    store = SnapshotVectorStore.open(snapshot.path)
    found: dict[str, list[str]] = {}
    for node in store.get_nodes():
        found.setdefault(str(node.metadata["document"]), []).append(node.get_content())
    store.close()
    return found


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the model is given, which it goes on to embed."""
    from ragrack.embedding import MiniLMEmbedding

    seen: list[str] = []
    original = MiniLMEmbedding._get_text_embeddings

    def spy(self: MiniLMEmbedding, given: list[str]) -> list[list[float]]:
        seen.extend(given)
        return original(self, given)

    monkeypatch.setattr(MiniLMEmbedding, "_get_text_embeddings", spy)
    return seen


def test_documents_become_a_verified_live_snapshot(settings: Settings) -> None:
    snapshot, told = run(settings)
    where = directory(settings)
    where.verify(snapshot.id)
    assert where.current_id() == snapshot.id
    manifest = snapshot.manifest
    assert (manifest.documents, manifest.collection, manifest.engine) == (5, "manual", "flat")
    assert manifest.golden is not None
    assert manifest.golden["hit_rate"] == 1
    assert set(texts(snapshot)) == {"backup.html", "indexes.html", "limits.txt", "tasks/passwords.md", "vacuum.html"}
    assert [entry["to"] for entry in where.history()] == [snapshot.id]
    assert told.lines[0][0] == "embed"
    assert told.lines[-1] == ("done", 1, 1)


def test_nodes_fit_the_model_and_are_named_by_document(settings: Settings, embedding: Any) -> None:
    (documents(settings) / "long.txt").write_text("A title\n\n" + "Some words make a sentence, again and again. " * 400)
    snapshot, _ = run(settings)
    store = SnapshotVectorStore.open(snapshot.path)
    nodes = [node for node in store.get_nodes() if node.metadata["document"] == "long.txt"]
    store.close()
    assert len(nodes) > 10
    assert [node.node_id for node in nodes] == [f"long.txt#{number}" for number in range(len(nodes))]
    assert all(node.ref_doc_id == "long.txt" for node in nodes)
    assert max(len(embedding.tokens(node.get_content(MetadataMode.EMBED))) for node in nodes) <= settings.chunk_size


def test_the_same_documents_again_change_nothing(settings: Settings, embedded: list[str]) -> None:
    first, _ = run(settings)
    embedded.clear()
    second, told = run(settings)
    assert second.id == first.id
    assert embedded == []
    assert len(directory(settings).history()) == 1
    assert "is still what the documents say" in told.notes[-1]


def test_only_what_has_changed_is_embedded(settings: Settings, embedded: list[str]) -> None:
    first, _ = run(settings)
    (documents(settings) / "limits.txt").write_text("Limits\n\nA table may have 2000 columns now.")
    (documents(settings) / "new.md").write_text("# New\n\nThis page is new.")
    (documents(settings) / "backup.html").unlink()
    golden = settings.golden_dir / "manual.yml"
    golden.write_text(golden.read_text().replace("min_hit_rate: 0.8", "min_hit_rate: 0.7"))
    embedded.clear()
    second, _ = run(settings)
    assert len(embedded) == 2
    assert second.manifest.parent == first.id
    after = texts(second)
    assert "backup.html" not in after
    assert "2000 columns" in after["limits.txt"][0]
    assert "new.md" in after
    assert texts(first).keys() - after.keys() == {"backup.html"}


def test_changed_markup_around_the_same_text_embeds_nothing(settings: Settings, embedded: list[str]) -> None:
    first, _ = run(settings)
    page = documents(settings) / "backup.html"
    page.write_text(page.read_text().replace("<body>", '<body class="new">'))
    embedded.clear()
    assert run(settings)[0].id == first.id
    assert embedded == []


def change(settings: Settings, text: str) -> None:
    (documents(settings) / "limits.txt").write_text(f"Limits\n\n{text}")


def test_documents_as_they_once_were_are_not_written_again(settings: Settings) -> None:
    before = (documents(settings) / "limits.txt").read_text()
    first, _ = run(settings)
    change(settings, "A table may have 2000 columns now.")
    second, _ = run(settings)
    (documents(settings) / "limits.txt").write_text(before)
    third, told = run(settings)
    assert third.id == first.id
    assert directory(settings).current_id() == first.id
    assert directory(settings).previous_id() == second.id
    assert "is live" in told.notes[-1]
    assert any("golden questions passed" in note for note in told.notes), "it is asked as a new one is"


def test_one_that_rotted_is_written_again(settings: Settings) -> None:
    before = (documents(settings) / "limits.txt").read_text()
    first, _ = run(settings)
    change(settings, "A table may have 2000 columns now.")
    run(settings)
    rotten = first.path / "nodes.sqlite"
    rotten.chmod(0o644)
    rotten.write_bytes(b"\0" * rotten.stat().st_size)
    (documents(settings) / "limits.txt").write_text(before)
    third, _ = run(settings)
    assert third.id != first.id
    directory(settings).verify(third.id)


def test_while_held_a_snapshot_is_built_and_waits(settings: Settings) -> None:
    first, _ = run(settings)
    directory(settings).hold("the manual is under review")
    change(settings, "A table may have 2000 columns now.")
    second, told = run(settings)
    assert second.id != first.id
    assert directory(settings).current_id() == first.id
    assert f"snapshot {second.id} was built and is not live: manual is held since" in told.notes[-1]
    assert "(the manual is under review); `ragrack index resume` lets go" in told.notes[-1]
    assert run(settings)[0].id == second.id, "and is not built twice"
    directory(settings).resume()
    assert directory(settings).current_id() == second.id


def test_as_many_snapshots_stay_as_the_settings_say(settings: Settings) -> None:
    few = Settings.model_validate(settings.model_dump() | {"keep_snapshots": 1})
    ids = []
    for number in range(4):
        change(settings, f"A table may have {number}000 columns now.")
        ids.append(run(few)[0].id)
    assert [snapshot.id for snapshot in directory(settings).list()] == ids[-2:], "the live one and the way back"


def test_other_chunking_is_another_index(settings: Settings) -> None:
    first, _ = run(settings)
    other = Settings.model_validate(settings.model_dump() | {"chunk_size": 64, "chunk_overlap": 8})
    second, _ = run(other)
    assert second.manifest.fingerprint != first.manifest.fingerprint
    assert second.manifest.nodes > first.manifest.nodes
    assert directory(settings).current_id() == first.id


def test_broken_documents_are_reported_and_skipped(settings: Settings) -> None:
    (documents(settings) / "binary.html").write_bytes(b"\0\1\2")
    (documents(settings) / "empty.md").touch()
    snapshot, told = run(settings)
    assert snapshot.manifest.documents == 5
    assert snapshot.manifest.skipped == ["binary.html: is binary, whatever its name says", "empty.md: holds no text"]
    assert [note for note in told.notes if note.startswith("skipped")] == [
        f"skipped {problem}" for problem in snapshot.manifest.skipped
    ]
    assert len([note for note in run(settings)[1].notes if note.startswith("skipped")]) == 2
    (documents(settings) / "empty.md").write_text("It holds text now.")
    assert run(settings)[0].manifest.skipped == ["binary.html: is binary, whatever its name says"]


def test_a_document_that_cannot_be_split_costs_no_other(settings: Settings) -> None:
    narrow = Settings.model_validate(settings.model_dump() | {"chunk_size": 32, "chunk_overlap": 0})
    (documents(settings) / "title.html").write_text(f"<title>{'xq zk ' * 30}</title><p>The title fills the node.</p>")
    snapshot, _ = run(narrow)
    assert snapshot.manifest.documents == 5
    assert len(snapshot.manifest.skipped) == 1
    assert snapshot.manifest.skipped[0].startswith("title.html: cannot be split into nodes (")


def test_failed_golden_questions_leave_the_live_snapshot(settings: Settings) -> None:
    first, _ = run(settings)
    for name in ("vacuum.html", "indexes.html"):
        (documents(settings) / name).unlink()
    with pytest.raises(IngestError, match=r"(?s)not taken: golden questions FAILED.*VACUUM FULL"):
        run(settings)
    assert [snapshot.id for snapshot in directory(settings).list()] == [first.id]
    assert directory(settings).current_id() == first.id


def test_a_bad_golden_file_is_found_before_anything_is_done(settings: Settings) -> None:
    (settings.golden_dir / "manual.yml").write_text("questions: []")
    with pytest.raises(IngestError, match=r"manual\.yml: questions"):
        run(settings)
    assert not settings.index_dir.exists()


def test_without_golden_questions_it_says_that_nothing_was_asked(settings: Settings) -> None:
    (settings.golden_dir / "manual.yml").unlink()
    snapshot, told = run(settings)
    assert snapshot.manifest.golden is None
    assert any("no golden questions" in note for note in told.notes)


def test_no_documents_never_empties_an_index(settings: Settings) -> None:
    first, _ = run(settings)
    documents(settings).rename(documents(settings).with_name("away"))
    with pytest.raises(IngestError, match="holds no documents"):
        run(settings)
    assert directory(settings).current_id() == first.id


def test_two_at_once_are_refused(settings: Settings) -> None:
    first, _ = run(settings)
    with (settings.index_dir / "manual/.ingest.lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write("process 4711 since 20261124T000000Z")
        held.flush()
        with pytest.raises(IngestError, match=r"another ingest or pull .*\(process 4711 since 20261124T000000Z\)"):
            run(settings)
    assert run(settings)[0].id == first.id


def test_a_damaged_live_snapshot_is_replaced(settings: Settings) -> None:
    first, _ = run(settings)
    file = first.path / "nodes.sqlite"
    file.chmod(0o644)
    file.write_bytes(b"damaged")
    (documents(settings) / "limits.txt").write_text("Limits\n\nA table may have 1600 columns at most.")
    second, _ = run(settings)
    assert second.id != first.id
    directory(settings).verify(second.id)


def test_damaged_staging_is_refused_with_the_mend(settings: Settings) -> None:
    run(settings)
    staging = directory(settings).root / "staging.sqlite"
    staging.write_bytes(b"no database" * 1000)
    with pytest.raises(IngestError, match=r"staging\.sqlite is damaged.*remove it"):
        run(settings)
    staging.unlink()
    run(settings)


def test_an_index_directory_that_cannot_be_written_is_named(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "indexes").write_text("a file where the directory should be")
    with pytest.raises(IngestError, match=f"cannot write below {settings.index_dir}"):
        run(settings)


def test_killed_at_any_point_it_can_be_run_again(settings: Settings) -> None:
    for number in range(4):
        page = f"Page {number}\n\n" + f"Sentence of page {number} that has some words in it. " * 60
        (documents(settings) / f"page{number}.txt").write_text(page)
    program = Path(__file__).with_name("kill_points.py")
    done = subprocess.run(
        [sys.executable, program, settings.model_dump_json()], capture_output=True, text=True, check=True
    )
    killed = [json.loads(line) for line in done.stdout.splitlines()]
    assert {run["point"] for run in killed} >= {"embed", "write", "check", "done", "fsync", "rename", "replace"}
    for run_ in killed:
        assert run_["damage"] is None, "whatever is live is whole"
        assert run_["reported"] <= run_["kept"], "no more than the batch that was at work is lost"
        assert run_["left"] == ["current", "history.jsonl", "snapshots", "staging.sqlite", "verified"]
        assert run_["snapshots"] == [run_["live"]]
    assert len({run["content"] for run in killed}) == 1, "all come to the same end"


def test_it_writes_only_below_the_index_directory(settings: Settings, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import sys, ragrack.ingest as i, ragrack.progress as p; from ragrack.settings import Settings\n"
        "i.ingest(Settings.model_validate_json(sys.argv[1]), 'manual', p.progress_to(sys.stdout, True))"
    )
    before = time.time_ns()
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home / "no-such-directory")}
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, settings.model_dump_json()],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
    )
    changed = [path for path in tmp_path.rglob("*") if path.lstat().st_mtime_ns > before]
    outside = [path for path in changed if not path.is_relative_to(settings.index_dir)]
    assert outside == []
    assert done.stderr == ""
    assert json.loads(done.stdout.splitlines()[-1])["stage"] == "done"


def test_progress_is_json_lines_in_a_journal() -> None:
    stream = io.StringIO()
    progress = progress_to(stream, as_json=False)
    progress("embed", 0, 3)
    for done in (1, 2, 3):
        progress("embed", done, 3)
    progress("done", 1, 1, "a note")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert lines[0] == {"stage": "embed", "done": 0, "total": 3}
    assert {"stage": "embed", "done": 3, "total": 3} in lines
    assert lines[-1] == {"stage": "done", "done": 1, "total": 1, "note": "a note"}


def test_progress_is_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = progress_to(stream, as_json=False)
    progress("embed", 1, 2)
    progress("embed", 2, 2, "skipped x: holds no text")
    progress("check", 0, 0)
    progress("done", 1, 1)
    shown = stream.getvalue()
    assert "embed  [###############...............] 1/2" in shown
    assert "skipped x: holds no text\n" in shown
    assert shown.endswith("\n")
    assert progress_to(Terminal(), as_json=True).__class__ is progress_to(io.StringIO(), as_json=False).__class__
