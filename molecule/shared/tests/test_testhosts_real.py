"""Two runs side by side on this machine: made, killed, started, abandoned, destroyed; nothing of them is left."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from testhosts import runs
from testhosts.runs import Run
from testhosts.shell import UnsuitableMachineError, succeeds

HOSTS_PY = Path(__file__).parents[1] / "hosts.py"


def _unsuitable() -> str:
    try:
        runs.check_machine()
    except UnsuitableMachineError as error:
        return str(error)
    return ""


pytestmark = [pytest.mark.hosts, pytest.mark.skipif(bool(_unsuitable()), reason=_unsuitable())]


def hosts_py(*arguments: str) -> str:
    """Run the command line; returns what it told, and its error fails the test."""
    done = subprocess.run([sys.executable, str(HOSTS_PY), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


def traces(run: Run) -> list[str]:
    """List what there is of a run on this machine."""
    found = [str(path) for path in (run.record, run.state, run.sockets) if path.exists()]
    found += [machine.name for machine in run.machines if machine.pid() is not None]
    found += [str(machine.cgroup) for machine in run.machines if machine.cgroup.exists()]
    found += [str(link) for link in Path("/sys/class/net").glob(run.network.bridge)]
    found += [name.name for m in run.machines for name in Path("/sys/class/net").glob(f"vb-{m.unit}")]
    found += [run.network.table] if succeeds("nft", "list", "table", "ip", run.network.table) else []
    mounts = Path("/proc/self/mountinfo").read_text()
    return found + [str(run.state)] * (str(run.state) in mounts)


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[bytes]]:
    """A process that owns a run."""
    with subprocess.Popen(["sleep", "infinity"]) as process:
        yield process
        process.kill()


@pytest.fixture
def states(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """State directories of two runs, which are destroyed whatever happens."""
    both = (tmp_path / "one", tmp_path / "two")
    yield both
    for state in both:
        hosts_py("destroy", "--run=side", f"--state={state}")


def test_a_life_of_two_runs(owner: subprocess.Popen[bytes], states: tuple[Path, Path]) -> None:
    owned = ["create", "--run=side", f"--state={states[0]}", f"--owner={owner.pid}", "left=trixie"]
    kept = ["create", "--run=side", f"--state={states[1]}", "--persistent", "right=trixie"]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda arguments: hosts_py(*arguments), [owned, kept]))
    one, two = (runs.find("side", state) for state in states)
    left, right = one.machine("left"), two.machine("right")

    def on_right(command: str) -> str:
        return hosts_py("ssh", f"--state={states[1]}", "right", command).strip()

    assert left.address != right.address
    assert hosts_py("ssh", f"--state={states[0]}", "left", "uname -n").strip() == "left"
    assert on_right("uname -n; systemctl is-system-running; systemctl --failed --no-legend") == "right\nrunning"
    stranger = [*one.ssh, right.address, "true"]
    assert not succeeds(*stranger), "the key of one run opens a host of another, or its host key was not pinned"

    # What units rely on when they are confined is enforced, not only accepted.
    probe = f"python3 -c 'import socket; socket.create_connection((\"{left.address}\", 22), 2)'"
    on_right(probe)
    denied = on_right(f"systemd-run --quiet --wait --pipe -p IPAddressDeny=any -p DynamicUser=yes {probe} 2>&1 || true")
    assert "TimeoutError" in denied

    pid = right.pid()
    assert hosts_py(*kept) == "", "hosts that run are left alone"
    assert right.pid() == pid

    on_right("echo kept > /root/kept && sync")
    boot = on_right("cat /proc/sys/kernel/random/boot_id /proc/1/stat")
    bridge = Path(f"/sys/class/net/{two.network.bridge}/address")
    gateway = bridge.read_text()
    hosts_py("kill", f"--state={states[1]}", "right")
    assert bridge.read_text() == gateway, "the other hosts of a run would lose their gateway with a host"
    assert right.pid() is None
    assert not succeeds(*two.ssh, "-o", "ConnectTimeout=2", right.address, "true")
    assert left.pid() is not None
    hosts_py("start", f"--state={states[1]}", "right")
    assert on_right("cat /root/kept") == "kept"
    assert on_right("cat /proc/sys/kernel/random/boot_id /proc/1/stat") != boot

    hosts_py("stop", f"--state={states[1]}", "right")
    assert right.pid() is None
    assert "right: boot" in hosts_py(*kept), "create starts what is down"

    owner.kill()
    owner.wait()
    assert f"run side ({states[0]}): its owner is gone" in hosts_py(*kept)
    assert traces(one) == []
    assert on_right("uname -n") == "right"

    hosts_py("destroy", f"--state={states[1]}")
    assert traces(two) == []
    assert hosts_py("destroy", f"--state={states[1]}") == "", "to destroy what is not there is fine"
