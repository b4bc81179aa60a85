"""Records, owners, locks, and what the command line says to bad input."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from testhosts import runs
from testhosts.runs import Owner, Run
from testhosts.shell import HostsError, locked, write

HOSTS_PY = Path(__file__).parents[1] / "hosts.py"


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run on record, of which nothing else exists."""
    monkeypatch.setattr(runs, "REGISTRY", tmp_path / "registry")
    monkeypatch.setattr(runs, "RUNTIME", tmp_path / "runtime")
    hosts = {"web": "trixie", "old": "bookworm"}
    record = Run("demo", tmp_path / "a state", "198.18.7.0/24", Owner.of(os.getpid()), hosts)
    record.save()
    return record


def hosts_py(*arguments: str, path: str = os.environ["PATH"]) -> tuple[int, str]:
    command = [sys.executable, str(HOSTS_PY), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": path})
    return done.returncode, done.stderr


def test_a_record_is_read_back_as_it_was(known: Run) -> None:
    assert runs.all_runs() == [known]


def test_an_owner_is_a_process_not_a_number() -> None:
    me = Owner.of(os.getpid())
    assert me.alive()
    assert not Owner(me.pid, me.started + 1, me.boot).alive(), "a later process with the same pid"
    assert not Owner(me.pid, me.started, "another boot").alive()


def test_an_owner_that_died_is_dead_before_its_parent_collects_it() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        owner = Owner.of(child.pid)
        assert owner.alive()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not owner.alive()


def test_hosts_are_not_taken_from_a_living_owner(known: Run) -> None:
    with pytest.raises(HostsError, match=f"belongs to process {os.getpid()}"):
        runs._take_over(known.name, known.state, None, print)
    assert runs.all_runs() == [known]


@pytest.mark.parametrize(
    ("arguments", "owned"),
    [
        (["molecule", "test", "--all"], True),
        (["molecule", "converge", "-s", "test"], False),
        (["molecule", "test", "--destroy=never"], False),
        (["molecule", "test", "--destroy", "never"], False),
        (["pytest", "molecule/shared/test"], False),
    ],
)
def test_only_a_molecule_test_owns_its_hosts(arguments: list[str], owned: bool, tmp_path: Path) -> None:
    asks = "from testhosts.runs import molecule_test; print(molecule_test())"
    script = tmp_path / arguments[0]
    script.write_text(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {asks!r}], check=True)")
    run_by = [sys.executable, str(script), *arguments[1:]]
    environment = {**os.environ, "PYTHONPATH": str(HOSTS_PY.parent)}
    with subprocess.Popen(run_by, stdout=subprocess.PIPE, text=True, env=environment) as process:
        answer = process.communicate()[0].strip()
    assert answer == (str(process.pid) if owned else "None")


def test_ssh_pins_the_hosts_keys_and_paths_may_hold_blanks(known: Run) -> None:
    inventory = yaml.safe_load(runs.inventory(known))["all"]["hosts"]
    assert inventory["old"]["ansible_host"] == "198.18.7.11"
    arguments = inventory["web"]["ansible_ssh_common_args"]
    shell = f'for word in {arguments}; do printf "%s\\n" "$word"; done'
    words = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "StrictHostKeyChecking=yes" in words
    assert f'UserKnownHostsFile="{known.state}/known_hosts"' in words


def test_variables_are_written_beside_an_inventory_and_remembered(known: Run, tmp_path: Path) -> None:
    written = runs.write_host_vars(known, tmp_path / "host_vars")
    assert yaml.safe_load(written[0].read_text()) == known.host_vars("web")
    assert runs.all_runs()[0].files == sorted(map(str, written))


def test_find_tells_which_runs_there_are(known: Run) -> None:
    assert runs.find(host="web") == known
    with pytest.raises(HostsError, match=r"no run fits[^:]*:\n  --run demo --state .*a state: web, old"):
        runs.find(name="dmeo")
    with pytest.raises(HostsError, match="has no host wbe; it has web, old"):
        known.machine("wbe")


def test_a_lock_is_held_by_one_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    inside: list[int] = []
    most = 0

    def enter() -> None:
        nonlocal most
        for _ in range(20):
            with locked(path):
                inside.append(1)
                most = max(most, len(inside))
                time.sleep(0)
                inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert not path.exists()


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    write(path, "old")
    with path.open() as reader:
        write(path, "new and longer", 0o600)
        assert reader.read() == "old"
    assert path.read_text() == "new and longer"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("web", "the suite is one of bookworm, trixie, as in web=trixie"),
        ("web=sid", "the suite is one of"),
        ("Web_1=trixie", "begins with a letter"),
        (f"{'w' * 21}=trixie", "1 to 20 of a-z"),
    ],
)
def test_a_bad_host_is_refused_in_words(spec: str, message: str, tmp_path: Path) -> None:
    code, said = hosts_py("create", "--run=bad", f"--state={tmp_path}/bad", "--persistent", spec)
    assert (code, message in said) == (2, True), said
    assert not (tmp_path / "bad").exists()


def test_a_machine_that_lacks_something_is_told_the_mend(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a machine is asked for root first")
    code, said = hosts_py(
        "create", "--run=bad", f"--state={tmp_path}/bad", "--persistent", "h=trixie", path=str(tmp_path)
    )
    assert code == 2
    assert said.count("\n") == 1
    assert "apt-get install iproute2 mmdebstrap nftables openssh-client systemd-container tar" in said
    assert not (tmp_path / "bad").exists()


def test_an_owner_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    code, said = hosts_py("create", "--run=bad", f"--state={tmp_path}/bad", f"--owner={gone.pid}", "h=trixie")
    assert (code, "there is no such process" in said) == (1, True), said
