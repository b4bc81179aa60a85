"""A host that is lost comes back from its backup on a bare machine: its answers, what that took, what was lost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import failures
import fleet
import pytest

SOURCE, OTHER = fleet.ingesting(), fleet.pulling()
DOCUMENTS = "/var/lib/ragrack/documents/postgres"
REPOSITORY = "/srv/restic"
FACT = "The lighthouse of Skarholm was painted green in the spring of 1931."
QUESTION = "When was the lighthouse of Skarholm painted green?"
METRICS = "/var/lib/ragrack-metrics/backup.prom"


def add(name: str, text: str) -> None:
    """A document that no control node has."""
    SOURCE.run(f"echo '{text}' > {DOCUMENTS}/{name} && systemctl start ragrack-ingest@postgres")


def answers() -> dict[str, list[str]]:
    """The sources of every golden question, and of one about a document that no control node has."""
    asked = [*(entry["question"] for entry in fleet.questions()), QUESTION]
    return {question: [source["document"] for source in SOURCE.ask(question)["sources"]] for question in asked}


def credentials() -> dict[str, str]:
    """Those of the release that is live, as this host opens them."""
    live = "/opt/ragrack/current/credentials"
    opened = f"systemd-creds decrypt --name=credentials_$name {live}/$name -"
    names = SOURCE.run(f"ls {live}").split()
    return {name: SOURCE.run(f"name={name}; {opened}") for name in names}


@pytest.fixture(scope="module")
def backups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an inventory says where backups go to another host by sftp."""
    key, known_host = fleet.let_in(OTHER, tmp_path_factory.mktemp("backup"))
    return {
        "backup_repository": f"sftp:root@{OTHER.address}:{REPOSITORY}",
        "backup_password": "a-password-of-the-tests",
        "backup_ssh_key": key,
        "backup_ssh_known_host": known_host,
        "backup_check_share": "100%",
        "backup_restore_sure": True,
    }


def test_a_backup_is_made_and_the_repository_is_well(backups: dict[str, Any]) -> None:
    for expected in (True, False):
        played = fleet.play("site", "--tags", "backup", "--limit", SOURCE.name, variables=backups)
        assert played.status == 0, played.output
        assert (played.changed > 0) is expected, played.output
        assert backups["backup_password"] not in played.output
    add("lighthouse.md", FACT)
    SOURCE.run("systemctl start ragrack-backup ragrack-backup-check")
    told = SOURCE.run(f"grep -v '^#' {METRICS}").splitlines()
    assert all(float(line.split()[-1]) > time.time() - 600 for line in told), told
    assert SOURCE.run(f"grep -rlF {backups['backup_password']} /etc /var/lib /run || true") == ""
    for unit in ("ragrack-backup", "ragrack-backup-check"):
        SOURCE.run(f"systemd-analyze security --no-pager --threshold=25 {unit}")


@pytest.mark.parametrize(
    ("arguments", "asked", "said"),
    [
        ([], {}, "A backup is of one host"),
        (["--limit", SOURCE.name], {"backup_restore": "0123abcd"}, "0123abcd is no backup of"),
        (["--limit", SOURCE.name], {"backup_restore_from": "nobody"}, "latest is no backup of nobody"),
    ],
)
def test_what_cannot_be_restored_is_refused(
    backups: dict[str, Any], arguments: list[str], asked: dict[str, Any], said: str
) -> None:
    before = SOURCE.run("ls -l --time-style=full-iso /var/lib/ragrack/*")
    played = fleet.play("restore", *arguments, variables=backups | asked)
    assert played.status != 0
    assert said in " ".join(played.output.split()), played.output
    assert "Nothing was changed" in played.output
    assert SOURCE.run("ls -l --time-style=full-iso /var/lib/ragrack/*") == before


def test_a_lost_host_comes_back(backups: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    before, sealed = answers(), credentials()
    assert sealed
    assert "lighthouse.md" in before[QUESTION]
    SOURCE.run(f"echo 'Written after the backup.' >{DOCUMENTS}/late.md")
    begun = time.monotonic()
    fleet.renew(SOURCE)
    made = time.monotonic()
    for playbook, *arguments in (["site"], ["restore", "--limit", SOURCE.name], ["deploy"]):
        played = fleet.play(playbook, *arguments, variables=backups)
        assert played.status == 0, played.output
    ended = time.monotonic()
    assert answers() == before
    # The key that had sealed them then is gone with the host.
    assert json.loads(SOURCE.run("ragrack-backup credentials")) == sealed
    lost = [name for name in ("lighthouse.md", "late.md") if SOURCE.shell.run(f"test -e {DOCUMENTS}/{name}").rc != 0]
    failures.tell(
        "the host that ingests is lost",
        requests="those sent to it, as it is its own edge; the other answers on",
        until=f"a new one has its backup: {(ended - made) / 60:.1f} min from a bare machine",
        lost="documents that were added there after the last backup",
        test="`recovery/tests/test_backup.py::test_a_lost_host_comes_back`",
    )
    with capsys.disabled():
        print(
            f"\na host lost: {(ended - made) / 60:.1f} minutes from a bare machine to the same answers to"
            f" {len(before)} questions ({(made - begun) / 60:.1f} to make that machine); lost: {', '.join(lost)},"
            " written after the backup"
        )
    assert lost == ["late.md"]
    fleet.until("one index", lambda: OTHER.snapshot() == SOURCE.snapshot() is not None, 120)


def test_a_damaged_repository_is_found(backups: dict[str, Any]) -> None:
    SOURCE.run("systemctl start ragrack-backup-check")
    well = SOURCE.run(f"grep '^ragrack_backup_check' {METRICS}")
    pack = OTHER.run(f"find {REPOSITORY}/data -type f -size +1k | sort | head -n 1")
    OTHER.run(f"chmod u+w {pack} && printf damage | dd of={pack} bs=1 seek=100 conv=notrunc status=none")
    assert SOURCE.shell.run("systemctl start ragrack-backup-check").rc != 0
    assert Path(pack).name[:8] in SOURCE.run("journalctl --no-pager -o cat -u ragrack-backup-check | tail -n 20")
    assert SOURCE.run(f"grep '^ragrack_backup_check' {METRICS}") == well, "how old that is, is what alarms"
    SOURCE.run("systemctl disable --now ragrack-backup.timer ragrack-backup-check.timer; systemctl reset-failed")
    SOURCE.run(f"rm {DOCUMENTS}/lighthouse.md && systemctl start ragrack-ingest@postgres")
