"""A host that does not ingest pulls snapshots by itself, with a key that can do nothing else; never a damaged one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import fleet
import httpx
import pytest

SOURCE, PULLING = fleet.ingesting(), fleet.pulling()
UNIT = "ragrack-index-pull@postgres.service"
PULL = "/etc/ragrack/pull"
# Of the release's own code, as the service's user: a snapshot that holds what another one does, and a file more.
MAKE = """
import dataclasses, os, secrets, shutil
from pathlib import Path
from ragrack.snapshot import FileEntry, SnapshotDir, file_sha256, timestamp
indexes = Path("/var/lib/ragrack/indexes")
live = max(indexes.glob("postgres/*/current"), key=lambda link: link.lstat().st_mtime)
directory = SnapshotDir(indexes, "postgres", live.parent.name)
current = next(snapshot for snapshot in directory.list() if "padding" not in snapshot.manifest.files)
with directory.new() as new:
    for name in current.manifest.files:
        shutil.copy2(current.path / name, new / name)
    (new / "padding").write_bytes(os.urandom(SIZE))
    files = current.manifest.files | {"padding": FileEntry(file_sha256(new / "padding"), SIZE)}
    made = f"{timestamp()}-{secrets.token_hex(4)}"
    directory.publish(new, dataclasses.replace(current.manifest, id=made, parent=None, files=files))
if DAMAGED:
    file = directory.snapshots / made / "nodes.sqlite"
    file.chmod(0o644)
    with file.open("r+b") as damaged:
        damaged.seek(file.stat().st_size // 2)
        damaged.write(b"damage")
directory.flip(made, "test")
print(made)
"""


def make(size: int = 1, *, damaged: bool = False) -> str:
    """A new snapshot, live on the host that ingests. Its id."""
    code = MAKE.replace("SIZE", str(size)).replace("DAMAGED", str(damaged))
    return SOURCE.run(f"cd /; runuser -u ragrack -- /opt/ragrack/current/venv/bin/python -I -c '{code}'")


def pull() -> bool:
    return bool(PULLING.shell.run(f"systemctl start {UNIT}").rc == 0)


def said() -> str:
    return PULLING.run(f"journalctl --no-pager -o cat -n 15 -u {UNIT}")


def check() -> dict[str, object]:
    checks = PULLING.readiness()["checks"]
    found: dict[str, object] = next(one for one in checks if one["name"] == "snapshot:postgres")
    return found


def until(holds: Callable[[], bool], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if holds():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, f"{said()}\n{PULLING.journal()}"
        time.sleep(0.5)


def as_key(command: str) -> str:
    """The command with the key that the unit is handed. Its status 255 is 1, as ours is that of an ssh, too."""
    key = f"mkdir -p /run/key && cp {PULL}/id_ed25519 /run/key/ssh_key && export CREDENTIALS_DIRECTORY=/run/key"
    return f"{key}; timeout 30 {command}; status=$?; [ $status -ne 255 ] || exit 1; exit $status"


@pytest.fixture(autouse=True, scope="module")
def _left_as_it_was() -> Iterator[None]:
    before = level()
    yield
    where = "/var/lib/ragrack/indexes/postgres/*/snapshots"
    SOURCE.run(f"cd {where} && cd .. && ln -sfn snapshots/{before} current.new && mv -T current.new current")
    SOURCE.run(f"for s in {where}/*; do [ ! -e $s/padding ] || rm -r $s; done")
    assert pull(), said()
    until(lambda: PULLING.snapshot() == before)


def test_it_serves_the_very_snapshot_that_was_built_elsewhere() -> None:
    assert pull(), said()
    level()
    PULLING.run("/opt/ragrack/current/venv/bin/ragrack index verify --collection postgres")
    assert PULLING.shell.run("systemctl cat 'ragrack-ingest@postgres.timer'").rc != 0
    assert PULLING.run("ls /var/lib/ragrack/documents") == "", "documents are where they are ingested"


def test_a_new_document_reaches_its_answers_by_itself() -> None:
    document = "/var/lib/ragrack/documents/postgres/lighthouse.md"
    SOURCE.run(f"echo 'The lighthouse of Skarholm was painted green in the spring of 1931.' > {document}")
    try:
        SOURCE.run("systemctl start ragrack-ingest@postgres")

        def answered() -> bool:
            answer = PULLING.ask("When was the lighthouse of Skarholm painted green?")
            return "lighthouse.md" in [source["document"] for source in answer["sources"]]

        until(answered)
    finally:
        SOURCE.run(f"rm {document} && systemctl start ragrack-ingest@postgres")


@pytest.mark.parametrize(
    "command",
    [
        "ssh -F CONFIG TO id",
        "ssh -F CONFIG TO",
        "ssh -F CONFIG -s TO sftp",
        "ssh -F CONFIG -o ClearAllForwardings=no -W 127.0.0.1:22 TO",
        "ssh -F CONFIG -o ClearAllForwardings=no -o ExitOnForwardFailure=yes -N -R 9999:127.0.0.1:22 TO",
        "rsync -e 'ssh -F CONFIG' /etc/hostname TO:postgres/",
        "rsync -e 'ssh -F CONFIG' --remove-source-files -r TO:postgres/ /run/key/got",
        "rsync -e 'ssh -F CONFIG' TO:/etc/passwd /run/key/got",
        "rsync -e 'ssh -F CONFIG' -r TO:../documents/ /run/key/got",
        "rsync -e 'ssh -F CONFIG' TO:/etc/ragrack/api-keys.json /run/key/got",
    ],
)
def test_its_key_can_do_nothing_but_read_indexes(command: str) -> None:
    to = PULLING.run("sed -n 's/^RAGRACK_INDEX_SOURCE=\"\\(.*\\):\"/\\1/p' /etc/ragrack/host.env")
    PULLING.run(as_key(f"rsync -e 'ssh -F {PULL}/ssh_config' {to}:postgres/ > /dev/null"))
    tried = command.replace("CONFIG", f"{PULL}/ssh_config").replace("TO", to)
    refused = PULLING.shell.run(as_key(f"{tried} < /dev/null"))
    assert refused.rc not in (0, 124), refused.stdout
    assert "uid=" not in refused.stdout
    assert PULLING.shell.run("test -e /run/key/got").rc != 0


def test_the_account_behind_the_key_may_read_indexes_alone() -> None:
    may = "runuser -u ragrack-pull -- test -r"
    SOURCE.run(f"{may} /var/lib/ragrack/indexes/postgres")
    for path in ("/var/lib/ragrack/documents", "/etc/ragrack/host.env", "/etc/ragrack/api-keys.json"):
        assert SOURCE.shell.run(f"{may} {path}").rc != 0, path
    assert SOURCE.shell.run("runuser -u ragrack-pull -- touch /var/lib/ragrack/indexes/probe").rc != 0


def test_only_root_can_change_who_gets_in_and_read_the_key() -> None:
    assert SOURCE.run("stat -c '%U %a' /var/lib/ragrack-pull/.ssh/authorized_keys") == "root 640"
    assert PULLING.run(f"stat -c '%U %a' {PULL}/id_ed25519") == "root 600"
    assert PULLING.shell.run(f"runuser -u ragrack -- cat {PULL}/id_ed25519").rc != 0


def test_another_host_in_its_place_is_not_pulled_from() -> None:
    known = f"{PULL}/known_hosts"
    PULLING.run(f"cp {known} /run/ && rm -f /run/other && ssh-keygen -q -t ed25519 -N '' -f /run/other")
    PULLING.run(f"echo ragrack-ingest $(cut -d' ' -f1,2 /run/other.pub) > {known}")
    try:
        assert not pull()
    finally:
        PULLING.run(f"cp /run/known_hosts {known}")
    assert "Host key verification failed" in said()
    assert pull(), said()


def test_the_unit_that_pulls_reaches_its_source_and_nothing_else() -> None:
    print(PULLING.run(f"systemd-analyze security --no-pager {UNIT} | tail -n 1"))
    PULLING.run(f"systemd-analyze security --no-pager --threshold=25 {UNIT}")
    assert set(PULLING.run(f"systemctl show -P IPAddressDeny {UNIT}").split()) == {"::/0", "0.0.0.0/0"}
    assert PULLING.run(f"systemctl show -P IPAddressAllow {UNIT}").split() == [f"{SOURCE.address}/32"]


def level() -> str:
    """The snapshot that every worker of both answers from: they follow a pull a moment after it."""

    def same() -> bool:
        live = SOURCE.snapshot()
        return live is not None and PULLING.snapshot() == live

    until(same)
    return str(PULLING.snapshot())


def test_a_cut_in_the_middle_is_continued() -> None:
    before, size = level(), 400_000_000
    made = make(size)
    PULLING.run(f"systemctl start --no-block {UNIT}")
    aside = f"/var/lib/ragrack/indexes/postgres/*/snapshots/.pull-{made}"
    half = f"until [ $(du -sm {aside} | cut -f1) -gt 100 ]; do sleep 0.05; done"
    PULLING.run(f"timeout 120 bash -c '{half}' && pkill -9 -x rsync")
    ended = f"while [ $(systemctl show -P ActiveState {UNIT}) = activating ]; do sleep 0.1; done"
    PULLING.run(f"timeout 60 bash -c '{ended}'")
    assert PULLING.snapshot() == before
    traffic = "cat /sys/class/net/host0/statistics/rx_bytes"
    began = int(PULLING.run(traffic))
    assert pull(), said()
    assert int(PULLING.run(traffic)) - began < size - 80_000_000
    until(lambda: PULLING.snapshot() == made)
    assert PULLING.shell.run(f"ls -d {aside}").rc != 0


def test_what_is_damaged_at_its_source_is_refused_and_the_old_one_answers() -> None:
    before = level()
    made = make(damaged=True)
    assert not pull()
    assert f"{made} of " in said()
    assert "nodes.sqlite is not what was written" in said()

    def told() -> bool:
        return "nodes.sqlite is not what was written" in str(check()["reason"])

    until(told, 30)
    assert PULLING.readiness()["ready"]
    assert PULLING.snapshot() == before
    assert PULLING.ask("What does VACUUM do?")["response"]
    mended = make()
    assert pull(), said()
    until(lambda: PULLING.snapshot() == mended)
    until(lambda: check()["ok"] is True, 30)


def test_a_host_that_was_down_catches_up_when_it_boots() -> None:
    fleet.machine("stop", PULLING.name)
    try:
        made = make()
    finally:
        fleet.machine("start", PULLING.name)
    until(lambda: PULLING.snapshot() == made)


def test_an_ingesting_host_that_is_down_hurts_nobody() -> None:
    before = level()
    fleet.machine("stop", SOURCE.name)
    try:
        assert not pull()
        until(lambda: check()["ok"] is False, 30)
        assert PULLING.readiness()["ready"]
        assert PULLING.snapshot() == before
        assert PULLING.ask("What does VACUUM do?")["response"]
    finally:
        fleet.machine("start", SOURCE.name)
    until(lambda: SOURCE.snapshot() is not None)
    until(lambda: check()["ok"] is True)
