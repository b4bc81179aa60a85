"""The index of a host, changed by the real command line of its live release."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from filter.ragrack_status import ragrack_status_table
from filter.ragrack_status_page import ragrack_status_page
from module_utils.fleet_lock import FleetLock, Holder
from module_utils.release_state import StateError
from modules import ragrack_index, ragrack_status
from ragrack.fingerprint import Fingerprint
from ragrack.settings import Settings
from ragrack.snapshot import FileEntry, Manifest, SnapshotDir, file_sha256
from testing.release_host import Place, play

RELEASE = "0.1.0-aaaaaaaaaaaa"
HOLDER = Holder("other", "ann", "control2", "", "", 1, "1", "deploy")


@pytest.fixture
def host(place: Place) -> Place:
    """A host with a live release, whose `ragrack` is the real one, and two collections."""
    release = place.release(RELEASE)
    (release / "venv/bin").mkdir(parents=True)
    (release / "venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (release / "venv/bin/python").chmod(0o755)
    model = release / "models/all-minilm-l6-v2"
    model.mkdir(parents=True)
    facts = {"name": "tiny", "dimensions": 3, "max_tokens": 256, "files": {"model.onnx": "0" * 64}}
    (model / "model.json").write_text(json.dumps(facts))
    (release / "app.env").write_text(
        f'RAGRACK_COLLECTIONS="manual,notes"\nRAGRACK_INDEX_DIR="{place.path / "indexes"}"\n'
        f'RAGRACK_EMBED_PROVIDER="openai_like"\nRAGRACK_EMBED_BASE_URL="http://127.0.0.1:9/v1"\n'
        f'RAGRACK_EMBED_MODEL="tiny"\nRAGRACK_EMBED_DIMENSIONS="3"\nRAGRACK_KEEP_SNAPSHOTS="1"\n'
        f'RAGRACK_API_KEYS_FILE="{place.path / "keys.json"}"\n'
    )
    (release / "release.json").write_text(json.dumps({"version": "0.1.0"}))
    (place.path / "keys.json").write_text('{"keys": []}')
    (place.root / "current").symlink_to(Path("releases") / RELEASE)
    return place


def directory(host: Place, collection: str) -> SnapshotDir:
    settings = Settings.model_validate(
        {
            "collections": collection,
            "embed_provider": "openai_like",
            "embed_model": "tiny",
            "embed_dimensions": 3,
            "embed_base_url": "http://127.0.0.1:9/v1",
        }
    )
    return SnapshotDir(host.path / "indexes", collection, Fingerprint.of(settings).digest)


def publish(where: SnapshotDir, *numbers: int) -> list[str]:
    """Makes each live in turn; their ids."""
    ids = []
    for number in numbers:
        with where.new() as new:
            (new / "file").write_text(str(number))
            manifest = Manifest(
                id=f"20261124T0000{number:02}Z-{number:08x}",
                collection=where.collection,
                fingerprint=where.fingerprint,
                built_with={},
                content=str(number),
                created="20261124T000000Z",
                parent=None,
                documents=1,
                nodes=1,
                dimensions=3,
                engine="flat",
                files={"file": FileEntry(file_sha256(new / "file"), len(str(number)))},
                golden=None,
            )
            where.publish(new, manifest)
        where.offer(manifest.id, "ingest")
        ids.append(manifest.id)
    return ids


def do(host: Place, state: str, *, check: bool = False, **params: Any) -> dict[str, Any]:
    return ragrack_index.run({"state": state, "root": str(host.root), **params}, check=check, diff=True)


def test_back_again_and_on(host: Place) -> None:
    first, second = publish(directory(host, "manual"), 1, 2)
    seventh, eighth = publish(directory(host, "notes"), 7, 8)
    found = do(host, "query", target="previous")
    assert found["targets"] == {"manual": first, "notes": seventh}
    assert [index["current"] for index in found["indexes"]] == [second, eighth]

    predicted = do(host, "rolled_back", targets=found["targets"], why="bad answers", check=True)
    assert directory(host, "manual").current_id() == second
    made = do(host, "rolled_back", targets=found["targets"], why="bad answers")
    assert (predicted["changed"], predicted["diff"]) == (made["changed"], made["diff"])
    assert made["diff"] == {
        "before": {"manual": second, "notes": eighth},
        "after": {"manual": first, "notes": seventh},
    }
    assert {move["held"]["why"] for move in made["moves"]} == {"bad answers"}
    assert do(host, "rolled_back", targets=found["targets"], why="bad answers")["changed"] is False

    assert do(host, "resumed", check=True)["changed"] is True
    assert directory(host, "manual").current_id() == first
    assert [move["to"] for move in do(host, "resumed")["moves"]] == [second, eighth]
    assert do(host, "resumed")["changed"] is False


def test_one_collection_of_two(host: Place) -> None:
    first, _ = publish(directory(host, "manual"), 1, 2)
    _, eighth = publish(directory(host, "notes"), 7, 8)
    found = do(host, "query", target="previous", collections=["manual"])
    do(host, "rolled_back", targets=found["targets"])
    assert directory(host, "manual").current_id() == first
    assert directory(host, "notes").current_id() == eighth
    assert directory(host, "notes").held() is None


def test_what_a_failed_run_moved_goes_back_to_what_it_was(host: Place) -> None:
    first, second, third = publish(directory(host, "manual"), 1, 2, 3)
    do(host, "rolled_back", targets={"manual": second})
    do(host, "resumed", targets={"manual": third})
    assert directory(host, "manual").current_id() == third
    assert directory(host, "manual").held() is None
    assert directory(host, "manual").previous_id() == second
    assert first in [snapshot.id for snapshot in directory(host, "manual").list()]


def test_nothing_is_moved_where_one_cannot_be(host: Place) -> None:
    first, second = publish(directory(host, "manual"), 1, 2)
    publish(directory(host, "notes"), 7)
    with pytest.raises(StateError, match="notes: no whole snapshot served before"):
        do(host, "query", target="previous")
    with pytest.raises(StateError, match=f"manual {first}, manual {second}"):
        do(host, "query", targets={"manual": "20261124T000099Z-ffffffff"})
    with pytest.raises(StateError, match="no snapshot"):
        do(host, "rolled_back", targets={"manual": first, "notes": "20261124T000099Z-ffffffff"})
    assert directory(host, "manual").current_id() == second
    assert directory(host, "manual").held() is None


def test_another_runs_lock_keeps_it_out(host: Place) -> None:
    first, second = publish(directory(host, "manual"), 1, 2)
    FleetLock(host.root).acquire(HOLDER)
    for state in ("rolled_back", "resumed", "pruned"):
        params: dict[str, Any] = {"targets": {"manual": first}} if state == "rolled_back" else {}
        with pytest.raises(StateError, match="locked by ann on control2"):
            do(host, state, **params)
    assert directory(host, "manual").current_id() == second
    assert do(host, "rolled_back", targets={"manual": first}, run="other")["changed"] is True


def test_pruning_removes_what_the_settings_do_not_keep(host: Place) -> None:
    first, second, third = publish(directory(host, "manual"), 1, 2, 3)
    stranger = SnapshotDir(host.path / "indexes", "manual", "f" * 16)
    publish(stranger, 9)
    predicted = do(host, "pruned", check=True)
    assert stranger.root.exists()
    made = do(host, "pruned")
    assert predicted == made
    assert [row["snapshot"] for row in made["removed"]["snapshots"]] == [first]
    assert {snapshot.id for snapshot in directory(host, "manual").list()} == {second, third}
    assert do(host, "pruned")["changed"] is False


def test_before_the_first_deploy(place: Place) -> None:
    assert do(place, "pruned")["changed"] is False
    assert do(place, "ingested", collections=["manual"], check=True)["changed"] is False
    for state in ("query", "rolled_back", "resumed"):
        with pytest.raises(StateError, match="no release is live on this host; run playbooks/deploy"):
            do(place, state, targets={"manual": "x"})


def ingestion(host: Place, *lines: dict[str, Any], status: int = 0) -> None:
    """What the unit of an ingestion prints, and how it ends."""
    printed = "".join(f"echo '{json.dumps(line)}'\n" for line in lines)
    (host.path / "ingest").write_text(f"#!/bin/sh\n{printed}exit {status}\n")
    (host.path / "ingest").chmod(0o755)


RESULT = {
    "collection": "manual",
    "from": "A",
    "snapshot": "B",
    "built": True,
    "live": True,
    "held": None,
    "documents": 5,
    "nodes": 17,
    "skipped": ["x.html: is binary"],
    "golden": {"hit_rate": 1, "mrr": 0.75},
}


def test_an_ingestion_ends_in_words(host: Place) -> None:
    ingestion(host, {"stage": "embed", "done": 1, "total": 2}, RESULT)
    made = do(host, "ingested", collections=["manual"])
    assert (made["finished"], made["changed"]) == (True, True)
    assert made["words"] == "manual: snapshot B, 5 documents, 17 nodes, 1 skipped, hit rate 1.000, MRR 0.750, live"


def test_an_ingestion_that_found_nothing_new_changed_nothing(host: Place) -> None:
    ingestion(host, RESULT | {"built": False, "from": "B"})
    assert do(host, "ingested", collections=["manual"])["changed"] is False


def test_an_ingestion_while_held_says_so(host: Place) -> None:
    ingestion(host, RESULT | {"live": False, "held": {"at": "20261124T000000Z", "why": "bad answers", "next": "B"}})
    words = do(host, "ingested", collections=["manual"])["words"]
    assert "not live, held since 20261124T000000Z (bad answers): -e index_resume=true lets go" in words


def test_an_ingestion_that_failed_shows_its_last_words(host: Place) -> None:
    ingestion(host, {"stage": "check", "done": 2, "total": 2, "note": "golden questions FAILED"}, status=1)
    with pytest.raises(StateError, match=r"manual was not ingested .*what served goes on serving") as failure:
        do(host, "ingested", collections=["manual"])
    assert "golden questions FAILED" in failure.value.log[-1]


def test_a_pull_tells_what_it_moved(host: Place) -> None:
    manual = directory(host, "manual")
    first, second = publish(manual, 1, 2)
    publish(directory(host, "notes"), 7)
    manual.flip(first, "test")
    root = manual.root
    (host.path / "ingest").write_text(
        f"#!/bin/sh\nln -sfn snapshots/{second} {root}/new; mv -T {root}/new {root}/current\n"
    )
    (host.path / "ingest").chmod(0o755)
    assert do(host, "pulled", collections=["manual"], check=True)["changed"] is False
    moved = do(host, "pulled", collections=["manual"])
    assert moved["changed"] is True
    assert [(row["from"], row["to"]) for row in moved["moves"]] == [(first, second)]
    assert do(host, "pulled", collections=["manual"])["changed"] is False


def test_a_pull_that_failed_shows_its_last_words(host: Place) -> None:
    publish(directory(host, "manual"), 1)
    ingestion(host, {"note": "no route to host"}, status=1)
    with pytest.raises(StateError, match=r"manual was not fetched: .*what served goes on serving") as failure:
        do(host, "pulled", collections=["manual"])
    assert "no route to host" in failure.value.log[-1]


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({"collections": ["nope"]}, "has no collection nope; it has manual, notes"),
        ({"collections": []}, "is not one collection"),
        ({"collections": ["manual"], "wait": 0}, "wait: 0 is not above 0"),
    ],
)
def test_bad_parameters_are_named(host: Place, params: dict[str, Any], complaint: str) -> None:
    with pytest.raises(StateError, match=complaint):
        do(host, "ingested", **params)


def test_as_ansible_runs_them(host: Place) -> None:
    first, second = publish(directory(host, "manual"), 1, 2)
    publish(directory(host, "notes"), 7, 8)
    root = {"root": str(host.root)}
    tasks: list[dict[str, Any]] = [
        {"ragrack_index": {**root, "state": "query", "target": "previous"}},
        {"ragrack_index": {**root, "state": "rolled_back", "targets": {"manual": first}, "why": "bad answers"}},
        {"ragrack_status": {**root, "run_dir": str(host.path / "run")}},
        {"ragrack_index": {**root, "state": "resumed", "collections": ["manual"]}},
    ]
    code, results = play(host.path, tasks, "--diff")
    assert code == 0, results
    assert [result["changed"] for result in results] == [False, True, False, True]
    assert results[1]["diff"]["after"]["manual"] == first
    assert results[2]["indexes"][0]["held"]["why"] == "bad answers"
    assert results[3]["moves"][0]["to"] == second


def test_status_of_a_host_that_serves_nothing(host: Place) -> None:
    first, second = publish(directory(host, "manual"), 1, 2)
    FleetLock(host.root).acquire(HOLDER)
    found = ragrack_status.status(
        host.root,
        host.path / "run",
        host.path / "drained.json",
        host.path / "left-out",
        host.path / "tls",
        host.path / "backup",
        5,
    )
    assert (found["release"], found["state"]) == (RELEASE, "not running")
    assert found["indexes"][0] == {
        "collection": "manual",
        "serves": None,
        "current": second,
        "previous": first,
        "held": None,
    }
    assert found["lock"].startswith("locked by ann on control2")
    assert any("gunicorn.sock" in problem for problem in found["problems"])


def test_status_of_a_bare_host(tmp_path: Path) -> None:
    found = ragrack_status.status(
        tmp_path / "opt",
        tmp_path / "run",
        tmp_path / "drained.json",
        tmp_path / "left-out",
        tmp_path / "tls",
        tmp_path / "backup",
        5,
    )
    assert (found["state"], found["indexes"], found["problems"]) == ("nothing deployed", [], [])
    assert found["drained"] is None


def test_status_of_an_edge_host_that_leaves_one_out(tmp_path: Path) -> None:
    (tmp_path / "left-out").mkdir()
    (tmp_path / "left-out" / "app3").write_text("could not be reached\n")
    found = ragrack_status.status(
        tmp_path / "opt",
        tmp_path / "run",
        tmp_path / "drained.json",
        tmp_path / "left-out",
        tmp_path / "tls",
        tmp_path / "backup",
        5,
    )
    assert found["left_out"] == {"app3": "could not be reached"}
    assert "edge1: sends nothing to app3 (could not be reached)" in ragrack_status_table({"edge1": found})


def test_status_of_a_drained_host(tmp_path: Path) -> None:
    drained = {"since": "2026-11-24T10:00:00Z", "who": "ann@control1", "why": "a new disk"}
    (tmp_path / "drained.json").write_text(json.dumps(drained))
    found = ragrack_status.status(
        tmp_path / "opt",
        tmp_path / "run",
        tmp_path / "drained.json",
        tmp_path / "left-out",
        tmp_path / "tls",
        tmp_path / "backup",
        5,
    )
    assert found["drained"] == drained
    assert "app1: since 2026-11-24T10:00:00Z by ann@control1 (a new disk)" in ragrack_status_table({"app1": found})
    (tmp_path / "drained.json").write_text("{")
    found = ragrack_status.status(
        tmp_path / "opt",
        tmp_path / "run",
        tmp_path / "drained.json",
        tmp_path / "left-out",
        tmp_path / "tls",
        tmp_path / "backup",
        5,
    )
    assert found["problems"] != []


def test_status_tells_what_is_due(tmp_path: Path) -> None:
    day = 86400
    history = [{"time": ago(400), "event": "audit", "what": "deploy", "who": "ann", "result": "ok"}]
    history += [
        {"time": ago(days), "event": "audit", "what": "rotate credentials", "who": "ann", "result": result}
        for days, result in ((200, "ok"), (1, "failed"))
    ]
    (tmp_path / "opt").mkdir()
    (tmp_path / "opt/history.jsonl").write_text("".join(json.dumps(one) + "\n" for one in history))
    backups = tmp_path / "backup.prom"
    backups.write_text(
        f"# HELP x\nragrack_backup_success_timestamp_seconds {time.time() - 3.5 * day:.0f}\n"
        "ragrack_backup_check_timestamp_seconds 0\n"
    )
    empty = tmp_path / "empty"
    found = ragrack_status.status(tmp_path / "opt", empty, empty, empty, empty, backups, 5)
    assert found["problems"] == []
    assert found["rotated"] == {"credentials": 200, "certificates": 400}
    assert found["backups"] == {"success": 3, "check": None}
    table = ragrack_status_table({"app1": found | {"certificates": {"fleet": 5, "default": 60}}})
    due = table[table.index("Due:") :].splitlines()[1:6]
    assert due == [
        "  the certificate of realm fleet ends in 5 days: playbooks/rotate_certificates.yml (on app1)",
        "  credentials are as they were 200 days ago: playbooks/rotate_credentials.yml (on app1)",
        "  certificates are as they were 400 days ago: playbooks/rotate_certificates.yml (on app1)",
        "  its last backup went well 3 days ago: journalctl -u 'ragrack-backup*' (on app1)",
        "  the last check of its backups never went well: journalctl -u 'ragrack-backup*' (on app1)",
    ]
    well = {"certificates": {"default": 60}, "rotated": {"credentials": 3}, "backups": {"success": 0, "check": 6}}
    assert "Due:" not in ragrack_status_table({"app1": found | well})


def ago(days: int) -> str:
    return datetime.fromtimestamp(time.time() - days * 86400 - 60, tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_status_is_one_table() -> None:
    audit = {
        "time": "2026-11-24T10:00:00Z",
        "what": "deploy",
        "from": None,
        "to": "A",
        "result": "ok",
        "seconds": 31.5,
        "who": "ann@control1",
        "run": "r1",
    }
    held = {"at": "20261124T000000Z", "why": "bad answers", "next": None}
    rows = [
        {"collection": "manual", "serves": "S1", "current": "S1", "previous": None, "held": held},
        {"collection": "notes", "serves": "S7", "current": "S8", "previous": "S7", "held": None},
    ]
    well: dict[str, Any] = {
        "release": "A",
        "previous": None,
        "state": "ready",
        "indexes": rows,
        "lock": None,
        "problems": [],
    }
    hosts: dict[str, dict[str, Any]] = {
        "app1": well | {"deploys": [audit], "certificates": {"default": 29, "fleet": 60}, "drift": ["app.env: FAILED"]},
        "app2": well | {"deploys": [audit | {"time": "2026-11-24T10:00:01Z"}], "lock": "locked by ann", "indexes": []},
        "app3": {"unreachable": True, "msg": "Failed to connect to the host via ssh: timed out"},
    }
    lines = ragrack_status_table(hosts).splitlines()
    columns = [line.index("COLLECTION") for line in lines[:1]]
    assert [line[columns[0] :].split()[:3] for line in lines[1:3]] == [["manual", "S1", "the"], ["notes", "S7", "S8"]]
    assert "since 20261124T000000Z (bad answers)" in lines[1]
    assert lines[4].startswith("app3")
    assert "unreachable: Failed to connect to the host via ssh: timed out" in lines[4]
    assert "  app2: locked by ann" in lines
    assert "  2026-11-24T10:00:00Z deploy: - -> A ok, 31.5 s, by ann@control1 on app1, app2" in lines
    assert "  app1: default 29 days, fleet 60 days" in lines
    assert "  app1: app.env: FAILED" in lines


def test_status_is_one_page_too() -> None:
    run = {"run": "r1", "who": "ann@control1", "what": "deploy <b>"}
    timeline = [
        run | {"event": "staged", "time": "2026-11-24T10:00:05Z", "release": "A"},
        run | {"event": "audit", "time": "2026-11-24T10:00:10Z", "result": "ok", "seconds": 10},
    ]
    died = [{"run": "r2", "who": "ben", "what": "deploy", "event": "staged", "time": "2026-11-24T11:00:00Z"}]
    page = ragrack_status_page({"app1": {"timeline": timeline}, "app2": {"timeline": died}, "app3": {}}, "T <&", "now")
    assert "T &lt;&amp;" in page
    assert "<b>deploy" not in page
    assert page.index("2026-11-24T11:00:00Z") < page.index("2026-11-24T10:00:05Z"), "the newest run first"
    assert 'left:46.0%" title="2026-11-24T10:00:05Z">staged<' in page
    assert "deploy: did not end" in page


def test_what_drifted_and_when_certificates_end(tmp_path: Path) -> None:
    release = tmp_path / "release"
    release.mkdir()
    (release / "app.env").write_text("A=1")
    sums = subprocess.run(["sha256sum", "app.env"], cwd=release, capture_output=True, text=True, check=True).stdout
    (release / "manifest.sha256").write_text(sums)
    assert ragrack_status.drift(release) == []
    (release / "app.env").write_text("A=2")
    assert ragrack_status.drift(release) == ["app.env: FAILED"]
    (release / "manifest.sha256").unlink()
    with pytest.raises(StateError, match="manifest"):
        ragrack_status.drift(release)
    realm = tmp_path / "tls/default"
    realm.mkdir(parents=True)
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(realm / "key.pem")]
    made = ["openssl", "req", "-x509", *key, "-subj", "/CN=x", "-days", "30", "-out", str(realm / "cert.pem")]
    subprocess.run(made, check=True, capture_output=True)
    (tmp_path / "tls/other").mkdir()
    (tmp_path / "tls/other/cert.pem").write_text("nonsense")
    paths = (tmp_path / name for name in ("opt", "run", "drained", "left-out", "tls"))
    root, run, drained, left_out, tls = paths
    found = ragrack_status.status(root, run, drained, left_out, tls, tmp_path / "backup", 5)
    assert found["certificates"] == {"default": 29}
    assert "other" in found["problems"][0]
