"""Snapshots from another host: by the real rsync and the real rrsync, with a script in place of ssh between them."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from ragrack import cli, integrity
from ragrack.fingerprint import Fingerprint
from ragrack.lock import building
from ragrack.pull import DamagedError, NotNowError, PullError, last, pull
from ragrack.settings import load
from ragrack.snapshot import Snapshot, SnapshotDir

from .manifests import entries, manifest

MB = 1_000_000
SSH = """#!PYTHON
# ssh -F CONFIG -l USER HOST COMMAND...: runs what sshd runs for the key that a host pulls with.
import os, pathlib, subprocess, sys
os.set_blocking(1, True)
here, arguments = pathlib.Path("HERE"), sys.argv[1:]
while arguments[0].startswith("-"):
    del arguments[:2]
if (here / "unreachable").exists():
    sys.exit("ssh: connect to host ingest: No route to host")
room = int((here / "cut").read_text()) if (here / "cut").exists() else 10**12
environ = os.environ | {"SSH_ORIGINAL_COMMAND": " ".join(arguments[1:]), "SSH_CONNECTION": "198.18.0.4 1 198.18.0.3 22"}
process = subprocess.Popen(["rrsync", "-ro", here / "source"], stdout=subprocess.PIPE, env=environ)
with (here / "traffic").open("ab", 0) as traffic:
    while room and (data := os.read(process.stdout.fileno(), min(room, 65536))):
        traffic.write(data)
        os.write(1, data)
        room -= len(data)
if not room:
    process.kill()
sys.exit(process.wait())
"""


class Hosts:
    """The source's snapshots and ours, and the way between them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environ = {
            "RAGRACK_COLLECTIONS": "manual",
            "RAGRACK_INDEX_DIR": str(root / "ours"),
            "RAGRACK_INDEX_SOURCE": "ragrack-pull@ingest:",
            "RAGRACK_EMBED_PROVIDER": "openai_like",
            "RAGRACK_EMBED_BASE_URL": "http://127.0.0.1:1/v1",
            "RAGRACK_EMBED_MODEL": "none",
            "RAGRACK_EMBED_DIMENSIONS": "3",
        }
        self.settings = load(self.environ, on_host=False)
        fingerprint = Fingerprint.of(self.settings).digest
        self.source = SnapshotDir(root / "source", "manual", fingerprint)
        self.ours = SnapshotDir(root / "ours", "manual", fingerprint)
        self.told: list[tuple[str, str]] = []

    def make(self, number: int, **files: bytes) -> Snapshot:
        """A snapshot at the source, live there."""
        with self.source.new() as new:
            for name, data in files.items():
                (new / name).write_bytes(data)
            snapshot = self.source.publish(new, manifest(self.source, number, entries(new, files)))
        self.source.flip(snapshot.id, "ingest")
        return snapshot

    def pull(self, wait: float = 0) -> Snapshot:
        def progress(stage: str, done: int, total: int, note: str = "") -> None:
            self.told.append((stage, note))

        return pull(self.settings, "manual", progress, wait)

    def traffic(self) -> int:
        """Bytes that the source has sent since this was last asked."""
        file = self.root / "traffic"
        size = file.stat().st_size if file.exists() else 0
        file.unlink(missing_ok=True)
        return size

    def cut_after(self, size: int | None) -> None:
        cut = self.root / "cut"
        cut.unlink(missing_ok=True) if size is None else cut.write_text(str(size))

    def aside(self) -> list[str]:
        """What lies in the directory of snapshots beside whole ones."""
        whole = {snapshot.id for snapshot in self.ours.list()}
        return sorted(path.name for path in self.ours.snapshots.iterdir() if path.name not in whole)


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hosts:
    (tmp_path / "source").mkdir()
    ssh = tmp_path / "bin/ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH.replace("PYTHON", sys.executable).replace("HERE", str(tmp_path)))
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    return Hosts(tmp_path)


def noise(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def overwrite(file: Path, data: bytes, *, same_time: bool = False) -> None:
    """What a broken disk or a stray hand does: other bytes in the same file."""
    status = file.stat()
    file.chmod(0o644)
    file.write_bytes(data)
    if same_time:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_what_is_live_there_becomes_live_here_byte_for_byte(hosts: Hosts) -> None:
    made = hosts.make(1, vectors=noise(1, MB), nodes=noise(2, 1000))
    pulled = hosts.pull()
    assert pulled.manifest == made.manifest
    assert hosts.ours.current_id() == made.id
    hosts.ours.verify(made.id)
    assert {(pulled.path / name).stat().st_mode & 0o777 for name in ("vectors", "nodes")} == {0o444}
    assert [(entry["to"], entry["why"]) for entry in hosts.ours.history()] == [(made.id, "pull")]
    assert hosts.aside() == []
    assert integrity.is_noted(hosts.ours, pulled)


def test_what_is_here_already_does_not_travel_again(hosts: Hosts) -> None:
    made = hosts.make(1, vectors=noise(1, MB))
    hosts.pull()
    hosts.traffic()
    hosts.told.clear()
    assert hosts.pull().id == made.id
    assert hosts.traffic() < 1000
    assert hosts.told == [("done", "")]


def test_only_what_changed_travels(hosts: Hosts) -> None:
    data, same = noise(1, 4 * MB), noise(2, MB)
    first = hosts.make(1, vectors=data, nodes=same)
    hosts.pull()
    hosts.traffic()
    second = hosts.make(2, vectors=data[:MB] + b"a new node" + data[MB:], nodes=b"")
    # As a publisher does that finds a file unchanged.
    (second.path / "nodes").unlink()
    os.link(first.path / "nodes", second.path / "nodes")
    entry = first.manifest.files["nodes"]
    manifest = json.loads((second.path / "manifest.json").read_text())
    manifest["files"]["nodes"] = {"sha256": entry.sha256, "bytes": entry.bytes}
    (second.path / "manifest.json").write_text(json.dumps(manifest))
    pulled = hosts.pull()
    assert hosts.traffic() < 100_000
    hosts.ours.verify(second.id)
    assert (pulled.path / "nodes").samefile(hosts.ours.get(first.id).path / "nodes")


@pytest.mark.parametrize("left", ["by rsync", "by a killed rsync"])
def test_a_cut_is_continued_where_it_was(hosts: Hosts, left: str) -> None:
    first = hosts.make(1, vectors=noise(1, 1000))
    hosts.pull()
    second = hosts.make(2, vectors=noise(2, 8 * MB))
    hosts.traffic()
    hosts.cut_after(5 * MB)
    with pytest.raises(NotNowError, match="cannot be copied from"):
        hosts.pull()
    assert hosts.ours.current_id() == first.id
    assert hosts.aside() == [f".pull-{second.id}"]
    ended = last(hosts.ours)
    assert ended is not None
    assert ended.snapshot == second.id
    assert "cannot be copied from" in (ended.problem or "")
    if left == "by a killed rsync":
        partial = hosts.ours.snapshots / f".pull-{second.id}/vectors"
        partial.rename(partial.with_name(".vectors.x7Q2ab"))
    hosts.traffic()
    hosts.cut_after(None)
    assert hosts.pull().id == second.id
    assert hosts.traffic() < 4 * MB
    hosts.ours.verify(second.id)
    assert hosts.aside() == []
    ended = last(hosts.ours)
    assert ended is not None
    assert ended.problem is None


def test_after_a_cut_too_only_what_changed_travels(hosts: Hosts) -> None:
    data = noise(1, 8 * MB)
    hosts.make(1, vectors=data)
    hosts.pull()
    second = hosts.make(2, vectors=noise(2, 2 * MB) + data)
    hosts.cut_after(MB)
    with pytest.raises(NotNowError):
        hosts.pull()
    hosts.traffic()
    hosts.cut_after(None)
    hosts.pull()
    assert hosts.traffic() < 2 * MB
    hosts.ours.verify(second.id)


def test_what_a_cut_left_of_an_older_one_goes(hosts: Hosts) -> None:
    hosts.make(1, vectors=noise(1, 4 * MB))
    hosts.cut_after(MB)
    with pytest.raises(NotNowError):
        hosts.pull()
    hosts.cut_after(None)
    second = hosts.make(2, vectors=noise(2, 1000))
    assert hosts.pull().id == second.id
    assert hosts.aside() == []


def test_damage_at_the_source_is_refused_and_not_fetched_every_minute(hosts: Hosts) -> None:
    first = hosts.make(1, vectors=noise(1, MB))
    hosts.pull()
    second = hosts.make(2, vectors=noise(2, MB))
    overwrite(second.path / "vectors", noise(3, MB))
    with pytest.raises(DamagedError, match=f"{second.id} of ragrack-pull@ingest: vectors is not what was written"):
        hosts.pull()
    assert hosts.ours.current_id() == first.id
    assert hosts.aside() == []
    ended = last(hosts.ours)
    assert ended is not None
    assert (ended.snapshot, ended.damaged) == (second.id, True)
    hosts.traffic()
    with pytest.raises(PullError, match=r"vectors is not what was written; it is fetched again after \d\d:\d\d UTC"):
        hosts.pull()
    assert hosts.traffic() < 1000
    overwrite(second.path / "vectors", noise(2, MB))
    outcome = hosts.ours.root / "pull.json"
    outcome.write_text(json.dumps(json.loads(outcome.read_text()) | {"at": "20261124T000000Z"}))
    assert hosts.pull().id == second.id


def test_damage_here_that_rsync_takes_for_the_same_does_not_spread(hosts: Hosts) -> None:
    first = hosts.make(1, vectors=noise(1, MB), nodes=noise(2, MB))
    overwrite(hosts.pull().path / "vectors", noise(3, MB), same_time=True)
    second = hosts.make(2, vectors=noise(1, MB), nodes=noise(4, MB))
    os.utime(second.path / "vectors", ns=(0, (first.path / "vectors").stat().st_mtime_ns))
    hosts.pull()
    hosts.ours.verify(second.id)


@pytest.mark.parametrize("damage", ["bytes", "cut short", "gone", "manifest"])
def test_damage_here_is_mended(hosts: Hosts, damage: str) -> None:
    made = hosts.make(1, vectors=noise(1, MB))
    pulled = hosts.pull()
    match damage:
        case "bytes":
            overwrite(pulled.path / "vectors", noise(2, MB))
        case "cut short":
            overwrite(pulled.path / "vectors", noise(1, 1000))
        case "gone":
            (pulled.path / "vectors").unlink()
        case "manifest":
            (pulled.path / "manifest.json").write_text("{")
    assert hosts.pull().id == made.id
    hosts.ours.verify(made.id)
    assert hosts.aside() == []


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"id": "20261124T000009Z-00000009"}, "its manifest is that of 20261124T000009Z-00000009"),
        ({"collection": "other"}, "of other/"),
        ({"fingerprint": "f" * 16}, "manual/ffffffffffffffff"),
        ({"files": {}}, "names files that no snapshot has: none"),
        ({"files": {"../../x": {"sha256": "", "bytes": 1}}}, r"no snapshot has: '../../x'"),
        ({"files": {"-x": {"sha256": "", "bytes": 1}}}, r"no snapshot has: '-x'"),
        ({"files": {"manifest.json": {"sha256": "", "bytes": 1}}}, r"no snapshot has: 'manifest.json'"),
        ({"files": 7}, "is damaged"),
    ],
)
def test_a_manifest_that_lies_is_refused(hosts: Hosts, lie: dict[str, object], words: str) -> None:
    first = hosts.make(1, vectors=b"1")
    hosts.pull()
    file = hosts.make(2, vectors=b"2").path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | lie))
    with pytest.raises(DamagedError, match=words):
        hosts.pull()
    assert hosts.ours.current_id() == first.id
    assert hosts.aside() == []


@pytest.mark.parametrize("kind", ["link", "pipe", "directory", "larger"])
def test_nothing_but_plain_files_of_their_size_come_in(hosts: Hosts, kind: str) -> None:
    made = hosts.make(1, vectors=noise(1, 1000))
    file = made.path / "vectors"
    file.unlink()
    match kind:
        case "link":
            secret = hosts.root / "source/secret"
            secret.write_bytes(noise(1, 1000))
            file.symlink_to(secret)
        case "pipe":
            os.mkfifo(file)
        case "directory":
            file.mkdir()
        case "larger":
            file.write_bytes(noise(1, MB))
    with pytest.raises(PullError):
        hosts.pull()
    assert hosts.ours.current_id() is None
    assert hosts.aside() == []
    assert hosts.traffic() < 5000


@pytest.mark.parametrize("target", ["../../../../etc", "snapshots/..", "snapshots/nonsense", "/etc/passwd"])
def test_a_current_that_leads_elsewhere_is_refused(hosts: Hosts, target: str) -> None:
    hosts.make(1, vectors=b"1")
    hosts.source.link.unlink()
    hosts.source.link.symlink_to(target)
    with pytest.raises(PullError):
        hosts.pull()
    assert hosts.ours.current_id() is None


def test_a_source_that_has_none_yet_is_waited_for(hosts: Hosts) -> None:
    with pytest.raises(NotNowError, match=rf"no snapshot of manual with fingerprint {hosts.ours.fingerprint} yet"):
        hosts.pull()
    later = threading.Timer(0.5, lambda: hosts.make(1, vectors=b"1"))
    later.start()
    assert hosts.pull(wait=60).manifest.content == "1"
    later.join()


def test_a_source_that_is_down_changes_nothing(hosts: Hosts) -> None:
    first = hosts.make(1, vectors=b"1")
    hosts.pull()
    (hosts.root / "unreachable").touch()
    with pytest.raises(NotNowError, match="No route to host"):
        hosts.pull()
    assert hosts.ours.current_id() == first.id
    ended = last(hosts.ours)
    assert ended is not None
    with pytest.raises(NotNowError):
        hosts.pull()
    assert last(hosts.ours) == ended, "it tells since when"


def test_a_rollback_at_the_source_is_followed_without_fetching(hosts: Hosts) -> None:
    first = hosts.make(1, vectors=noise(1, MB))
    hosts.pull()
    hosts.make(2, vectors=noise(2, MB))
    hosts.pull()
    hosts.traffic()
    hosts.source.flip(first.id, "rollback")
    hosts.pull()
    assert hosts.ours.current_id() == first.id
    assert hosts.traffic() < 1000
    assert hosts.ours.previous_id() is None, "not what the source went back from"


def test_an_ingest_and_a_pull_keep_out_of_each_other_s_way(hosts: Hosts) -> None:
    hosts.make(1, vectors=b"1")
    with building(hosts.ours.index_dir, "manual"), pytest.raises(NotNowError, match=f"process {os.getpid()}"):
        hosts.pull()
    hosts.pull()


def test_a_full_disk_is_told_before_anything_is_fetched(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts.make(1, vectors=noise(1, 4 * MB))
    usage = shutil.disk_usage(hosts.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=66 * MB))
    with pytest.raises(PullError, match=r"needs 4 MB and some more below .*, which has 66 MB free: free some"):
        hosts.pull()
    assert hosts.traffic() < 5000


def test_what_is_held_here_stays_until_it_is_let_go(hosts: Hosts) -> None:
    first = hosts.make(1, vectors=b"1")
    hosts.pull()
    hosts.ours.hold("a bad answer")
    second = hosts.make(2, vectors=b"2")
    assert hosts.pull().id == second.id
    assert hosts.ours.current_id() == first.id
    assert "a bad answer" in hosts.told[-1][1]
    hosts.traffic()
    hosts.pull()
    assert hosts.traffic() < 1000
    hosts.ours.resume()
    assert hosts.ours.current_id() == second.id


def test_old_ones_are_pruned_and_what_dead_pulls_left(hosts: Hosts) -> None:
    made = [hosts.make(number, vectors=b"%d" % number) for number in range(1, 9)]
    for snapshot in made:
        hosts.source.flip(snapshot.id, "test")
        hosts.pull()
    assert [snapshot.id for snapshot in hosts.ours.list()] == [snapshot.id for snapshot in made[-5:]]
    noted = sorted(path.stem for path in (hosts.ours.root / "verified").iterdir())
    assert made[-1].id in noted
    assert len(noted) <= 6


def test_the_command_says_how_it_went(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in hosts.environ.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["index", "pull", "--missing"]) == 1
    assert "yet" in capsys.readouterr().err
    made = hosts.make(1, vectors=b"1")
    assert cli.main(["index", "pull", "--missing", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["snapshot"] == made.id
    assert cli.main(["index", "pull", "--missing"]) == 0
    assert "every collection has a snapshot" in capsys.readouterr().err
    assert cli.main(["index", "pull", "--collection", "other"]) == 1
    monkeypatch.delenv("RAGRACK_INDEX_SOURCE")
    assert cli.main(["index", "pull"]) == 1
    assert "RAGRACK_INDEX_SOURCE is not set" in capsys.readouterr().err
