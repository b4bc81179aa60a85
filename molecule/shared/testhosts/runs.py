"""Runs: named sets of machines on one network, on record in a registry so that what a dead run left can be found."""

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from testhosts import image, network
from testhosts.machine import Machine, remove_tree
from testhosts.network import Network
from testhosts.shell import HostsError, UnsuitableMachineError, locked, run, write

T = TypeVar("T")
R = TypeVar("R")
REGISTRY = Path("/var/lib/ragrack-hosts")
RUNTIME = Path("/run/ragrack-hosts")
NAME = re.compile(r"[a-z][a-z0-9-]{0,19}")
NEEDS = {
    "systemd-nspawn": "systemd-container",
    "mmdebstrap": "mmdebstrap",
    "nft": "nftables",
    "ip": "iproute2",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "tar": "tar",
}


@dataclass(frozen=True)
class Owner:
    """A process that a run must not outlive. Its start time and the boot tell it from a later one of the same pid."""

    pid: int
    started: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> "Owner":
        started = process_start(pid)
        if started is None:
            raise HostsError(f"--owner {pid}: there is no such process; name one that lives as long as the run shall")
        return cls(pid, started, network.boot_id())

    def alive(self) -> bool:
        return self.boot == network.boot_id() and process_start(self.pid) == self.started


@dataclass(frozen=True)
class Run:
    """A run's record. ``owner`` None means that it stays until it is destroyed."""

    name: str
    state: Path
    subnet: str
    owner: Owner | None
    hosts: dict[str, str] = field(default_factory=dict)  # name: suite, in the order of their addresses
    files: list[str] = field(default_factory=list)  # what was written for the run outside of its state directory

    @property
    def id(self) -> str:
        return run_id(self.name, self.state)

    @property
    def network(self) -> Network:
        return Network(self.subnet)

    @property
    def key(self) -> Path:
        return self.state / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.state / "known_hosts"

    @property
    def machines(self) -> list[Machine]:
        return [
            Machine(name, suite, self.network.address(index), self.state / name)
            for index, (name, suite) in enumerate(self.hosts.items())
        ]

    def machine(self, name: str) -> Machine:
        for machine in self.machines:
            if machine.name == name:
                return machine
        raise HostsError(f"run {self.name} has no host {name}; it has {', '.join(self.hosts)}")

    @property
    def ssh_options(self) -> list[str]:
        """Options that make ssh trust the hosts' pinned keys and nothing else."""
        # Kept connections are the run's own: a new host must not get an old one's. A socket's path must be short: /run.
        return [
            *["-o", "StrictHostKeyChecking=yes", "-o", f'UserKnownHostsFile="{self.known_hosts}"'],
            *[
                "-o",
                "GlobalKnownHostsFile=/dev/null",
                "-o",
                "IdentitiesOnly=yes",
                "-o",
                f"ControlPath={self.sockets}/%C",
            ],
        ]

    @property
    def sockets(self) -> Path:
        return RUNTIME / self.id

    @property
    def ssh(self) -> list[str]:
        """The ssh command up to a host's address."""
        return ["ssh", "-i", str(self.key), "-l", "root", "-o", "BatchMode=yes", *self.ssh_options]

    def host_vars(self, name: str) -> dict[str, str]:
        """Ansible's connection variables of a host."""
        return {
            "ansible_host": self.machine(name).address,
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(self.key),
            "ansible_ssh_common_args": shlex.join(self.ssh_options),
        }

    @property
    def record(self) -> Path:
        return REGISTRY / f"{self.id}.json"

    def save(self) -> None:
        write(self.record, json.dumps(asdict(self) | {"state": str(self.state)}, indent=1), 0o600)

    @classmethod
    def load(cls, record: Path) -> "Run":
        known = json.loads(record.read_text())
        owner = Owner(**known["owner"]) if known["owner"] else None
        return cls(**known | {"state": Path(known["state"]), "owner": owner})


def run_id(name: str, state: Path) -> str:
    """Tell apart runs of one name in two checkouts."""
    return f"{name}-{hashlib.sha256(str(state).encode()).hexdigest()[:6]}"


def process_start(pid: int) -> int | None:
    """Return when a process started (clock ticks since boot), or None if it does not run."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(rest[18])


def molecule_test() -> int | None:
    """Return the ``molecule test`` that this process descends from, unless it was asked to keep the hosts."""
    pid = os.getpid()
    while pid > 1:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        names = [Path(word).name for word in command]
        tests = re.search(r"(?<!-s)(?<!--scenario-name) test\b", " ".join(command))
        keeps = re.search(r"--destroy[= ]never\b", " ".join(command))
        if "molecule" in names[:3] and tests and not keeps:
            return pid
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def check_machine() -> None:
    """Refuse, in one sentence, a machine that cannot run test hosts."""
    if os.uname().sysname != "Linux":
        raise UnsuitableMachineError(
            "test hosts need Linux: use a Debian virtual machine, or deploy to hosts of your own"
        )
    if os.geteuid() != 0:
        raise UnsuitableMachineError("test hosts are made by root: run this again with sudo")
    missing = sorted({package for program, package in NEEDS.items() if shutil.which(program) is None})
    if missing:
        raise UnsuitableMachineError(f"this machine lacks what test hosts need: apt-get install {' '.join(missing)}")


def all_runs() -> list[Run]:
    """List the runs on record."""
    return [Run.load(record) for record in sorted(REGISTRY.glob("*.json"))]


def find(name: str | None = None, state: Path | None = None, host: str | None = None) -> Run:
    """Return the one run on record that fits; raises if there is none or more than one."""
    fits = [
        known
        for known in all_runs()
        if name in (None, known.name) and state in (None, known.state) and (host is None or host in known.hosts)
    ]
    if len(fits) == 1:
        return fits[0]
    runs = "\n".join(
        f"  --run {known.name} --state {known.state}: {', '.join(known.hosts)}" for known in fits or all_runs()
    )
    raise HostsError(f"{'several runs fit, name one' if fits else 'no run fits'}; there are:\n{runs or '  none'}")


def create(
    name: str, state: Path, hosts: dict[str, str], owner: Owner | None, cache: Path, say: Callable[[str], None]
) -> Run:
    """Bring a run to life: make what is missing, start what is down, leave alone what runs."""
    check_machine()
    clean(say)
    _take_over(name, state, owner, say)
    with locked(RUNTIME / f"{run_id(name, state)}.lock"):
        known = _register(name, state, hosts, owner)
        known.sockets.mkdir(parents=True, exist_ok=True)
        if not known.key.exists():
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", known.id, "-f", str(known.key))
        new = [machine for machine in known.machines if not machine.root.exists()]
        suites = sorted({machine.suite for machine in new})
        tarballs = dict(zip(suites, each(lambda suite: image.ensure(suite, cache, say), suites), strict=True))
        each(lambda machine: machine.unpack(tarballs[machine.suite]), new)
        _start(known, known.machines, say)
    return known


def _take_over(name: str, state: Path, owner: Owner | None, say: Callable[[str], None]) -> None:
    """Give an owner hosts that nobody has used before it, and nobody hosts that have a living owner."""
    for known in all_runs():
        if known.id == run_id(name, state) and known.owner != owner:
            if known.owner is not None:
                raise HostsError(f"run {name} belongs to process {known.owner.pid}, which still runs: wait for its end")
            say(f"run {name}: remove the hosts that are there, to begin with bare ones")
            destroy(known)


def _register(name: str, state: Path, hosts: dict[str, str], owner: Owner | None) -> Run:
    """Put the run on record before anything of it exists, with a subnet of its own, and make its network."""
    with locked(RUNTIME / "registry.lock"):
        record = REGISTRY / f"{run_id(name, state)}.json"
        known = Run.load(record) if record.exists() else None
        others = [other.subnet for other in all_runs() if other.record != record]
        if known is None:
            known = Run(name, state, network.choose_subnet([*others, *network.subnets_in_use()]), owner)
        for host, suite in hosts.items():
            if known.hosts.get(host, suite) != suite:
                raise HostsError(f"{host} of run {name} is {known.hosts[host]}, not {suite}: destroy the run first")
        known = replace(known, owner=owner, hosts=known.hosts | hosts)
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        known.save()
        network.up(known.network, REGISTRY)
    return known


def _start(known: Run, machines: Sequence[Machine], say: Callable[[str], None]) -> None:
    down = [machine for machine in machines if machine.pid() is None]
    public_key = known.key.with_suffix(".pub").read_text()
    for machine in down:
        machine.configure(known.network, known.machines, public_key)
    pins = [f"{m.address} {m.host_key.read_text()}" for m in known.machines if m.host_key.exists()]
    write(known.known_hosts, "".join(pins))
    write(known.state / "inventory.yml", inventory(known), 0o600)
    for machine in down:
        say(f"{machine.name}: boot Debian {machine.suite} at {machine.address}")
        machine.start(known.network)
    each(lambda machine: machine.wait(known.ssh), machines)


def start(known: Run, names: Sequence[str], say: Callable[[str], None]) -> None:
    """Boot hosts that are down, at their old addresses."""
    check_machine()
    with locked(RUNTIME / f"{known.id}.lock"):
        with locked(RUNTIME / "registry.lock"):
            network.up(known.network, REGISTRY)
        _start(known, [known.machine(name) for name in names], say)


def stop(known: Run, names: Sequence[str]) -> None:
    """Power hosts off in order."""
    _hang_up(known, names)
    each(lambda name: known.machine(name).stop(), names)


def kill(known: Run, names: Sequence[str]) -> None:
    """Pull the plug of hosts."""
    _hang_up(known, names)
    each(lambda name: known.machine(name).kill(), names)


def _hang_up(known: Run, names: Sequence[str]) -> None:
    """Close the kept ssh connections: one to a host that died would fail the first command after its return."""
    for name in names:
        known.machine(name)
    for control in known.sockets.glob("*") if known.sockets.exists() else ():
        command = ["ssh", "-o", f"ControlPath={control}", "-O", "exit", "any"]
        run("sh", "-c", 'timeout 5 "$@" 2> /dev/null || true', "sh", *command)
        control.unlink(missing_ok=True)


def destroy(known: Run) -> None:
    """Remove all that the run made, and nothing else."""
    with locked(RUNTIME / f"{known.id}.lock"):
        if known.record.exists():
            _remove(Run.load(known.record))
    _prune(RUNTIME)


def _remove(known: Run) -> None:
    kill(known, list(known.hosts))
    for machine in known.machines:
        remove_tree(machine.directory)
    with locked(RUNTIME / "registry.lock"):
        others = [other for other in all_runs() if other.id != known.id]
        network.down(known.network, REGISTRY, last=not others)
        for path in [known.key, known.key.with_suffix(".pub"), known.known_hosts, known.state / "inventory.yml"]:
            path.unlink(missing_ok=True)
        for written in map(Path, known.files):
            written.unlink(missing_ok=True)
            _prune(written.parent)
            _prune(written.parent.parent)
        for directory in [known.sockets, known.state]:
            _prune(directory)
        known.record.unlink()
        _prune(REGISTRY)


def _prune(directory: Path) -> None:
    """Remove a directory if it is there and empty: somebody may keep files of their own in it."""
    if directory.exists() and not any(directory.iterdir()):
        directory.rmdir()


def clean(say: Callable[[str], None]) -> None:
    """Destroy the runs whose owner has died."""
    for known in all_runs():
        if known.owner is not None and not known.owner.alive():
            say(f"run {known.name} ({known.state}): its owner is gone, so it goes too")
            destroy(known)


def inventory(known: Run) -> str:
    """Write the run as an Ansible inventory (YAML) of connections, without groups."""
    lines = ["---", "all:", "  hosts:"]
    for host in known.hosts:
        lines.append(f"    {host}:")
        lines += [f"      {name}: {json.dumps(value)}" for name, value in known.host_vars(host).items()]
    return "\n".join(lines) + "\n"


def write_host_vars(known: Run, directory: Path) -> list[Path]:
    """Write ``<host>/connection.yml`` into the host_vars/ of somebody's inventory; the files go with the run."""
    written = []
    for host in known.hosts:
        variables = "".join(f"{name}: {json.dumps(value)}\n" for name, value in known.host_vars(host).items())
        written.append(directory / host / "connection.yml")
        write(written[-1], f"---\n{variables}", 0o600)
    with locked(RUNTIME / "registry.lock"):
        files = {*Run.load(known.record).files, *map(str, written)}
        replace(Run.load(known.record), files=sorted(files)).save()
    return written


def each(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Do the work for all items at once."""
    with ThreadPoolExecutor(max(1, len(items))) as pool:
        return list(pool.map(work, items))
