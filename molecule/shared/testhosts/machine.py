"""One systemd-nspawn machine: its root file system, its processes, its cgroup. Whether it is up, /proc knows."""

import os
import signal
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from testhosts.network import Network, mtu
from testhosts.shell import HostsError, run, succeeds, write

SYSTEMD = Path("/run/systemd/system")  # is there where systemd is PID 1
BOOT_TIMEOUT_S = 120
STOP_TIMEOUT_S = 60
REBOOTS = 133
"""With this systemd-nspawn asks its unit to be started again, as the machine has asked it (`--keep-unit`)."""


@dataclass(frozen=True)
class Machine:
    """A host called ``name`` whose files are in ``directory`` (root/, console.log)."""

    name: str
    suite: str
    address: str
    directory: Path

    @property
    def root(self) -> Path:
        return self.directory / "root"

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    @property
    def unit(self) -> str:
        """Name of the machine: unique here, as its address is, and short enough for an interface's name."""
        return "rr" + "-".join(self.address.split(".")[1:])

    @property
    def host_key(self) -> Path:
        return self.root / "etc/ssh/ssh_host_ed25519_key.pub"

    def pid(self) -> int | None:
        """Return the pid of the machine's systemd-nspawn, or None if the machine is down."""
        argument = f"--directory={self.root}"
        ours = Path("/proc/self/ns/pid").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                # A test host may itself run test hosts, from the same paths: those are in its namespace, not in ours.
                ran = Path(command[0]).name == "systemd-nspawn" and argument in command
                if ran and (process / "ns/pid").readlink() == ours:
                    return int(process.name)
            except (FileNotFoundError, ProcessLookupError):
                continue
        return None

    def unpack(self, tarball: Path) -> None:
        """Make the root file system, aside first: a root/ is always a whole one."""
        aside = self.directory / "root.part"
        remove_tree(aside)
        aside.mkdir(parents=True)
        run("tar", "--extract", f"--file={tarball}", f"--directory={aside}", "--numeric-owner", "--xattrs-include=*")
        aside.rename(self.root)

    def configure(self, network: Network, neighbours: Sequence["Machine"], public_key: str) -> None:
        """Write the machine's identity: address, names, ssh keys. Only while it is down."""
        if not (self.root / "etc/ssh/ssh_host_ed25519_key").exists():
            write(self.root / "etc/machine-id", uuid.uuid4().hex + "\n", 0o444)
            run(
                "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.name, "-f", str(self.host_key.with_suffix(""))
            )
        write(self.root / "etc/hostname", self.name + "\n")
        names = "".join(f"{machine.address} {machine.name}\n" for machine in neighbours)
        write(self.root / "etc/hosts", f"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n{names}")
        servers, domains = resolvers()
        write(
            self.root / "etc/systemd/network/10-host0.network",
            "[Match]\nName=host0\n\n"
            f"[Link]\nMTUBytes={mtu()}\n\n"
            f"[Network]\nAddress={self.address}/24\nGateway={network.gateway}\nIPv6AcceptRA=no\nLLMNR=no\n"
            + "".join(f"DNS={server}\n" for server in servers)
            + (f"Domains={' '.join(domains)}\n" if domains else ""),
        )
        ssh = self.root / "root/.ssh"
        ssh.mkdir(mode=0o700, exist_ok=True)
        write(ssh / "authorized_keys", public_key, 0o600)

    def start(self, network: Network) -> None:
        """Power on: the machine outlives the process that calls this."""
        command = [
            "systemd-nspawn",
            *["--quiet", "--boot", f"--directory={self.root}", f"--machine={self.unit}", f"--hostname={self.name}"],
            *[f"--network-bridge={network.bridge}", "--resolv-conf=off", "--timezone=off", "--link-journal=no"],
            *["--register=no", "--keep-unit", "--console=pipe"],
            # Without these IPAddressDeny= and DeviceAllow= of a unit would be accepted and do nothing.
            *["--capability=CAP_BPF", "--system-call-filter=bpf"],
        ]
        environment = {
            # A systemd newer than 255 refuses the cgroup v1 layout that an older machine would hand down.
            "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
            # /tmp is as the host's own Debian has it, not a tmpfs of a tenth of the memory.
            "SYSTEMD_NSPAWN_TMPFS_TMP": "0",
        }
        run(*self._launcher(environment), *command)

    def _launcher(self, environment: dict[str, str]) -> list[str]:
        """Return the command prefix that gives the machine a life and a cgroup of its own.

        Two machines in one cgroup would manage each other's services.
        """
        if SYSTEMD.is_dir():
            output = [f"--property=Standard{stream}=append:{self.console}" for stream in ("Output", "Error")]
            # Mixed: when this machine shuts down, systemd-nspawn is told, and tells the host.
            restart = f"--property=RestartForceExitStatus={REBOOTS}"
            life = [
                restart,
                "--property=Delegate=yes",
                "--property=KillMode=mixed",
                "--collect",
                "--slice=machine.slice",
            ]
            variables = [f"--setenv={name}={value}" for name, value in environment.items()]
            return ["systemd-run", "--quiet", f"--unit={self.unit}", *life, *output, *variables]
        self.cgroup.mkdir(parents=True, exist_ok=True)
        # Not in that cgroup itself, as no process may be where cgroups below it are managed.
        loop = f'exec >> "$1" 2>&1 < /dev/null; shift; while "$@"; [ $? -eq {REBOOTS} ]; do :; done'
        enter = 'find "$1" -mindepth 1 -depth -type d -delete; echo $$ > "$1/cgroup.procs" && shift && exec "$@"'
        variables = [f"{name}={value}" for name, value in environment.items()]
        looped = ["setsid", "--fork", "sh", "-c", loop, "sh", str(self.console)]
        return [*looped, "sh", "-c", enter, "sh", str(self.cgroup), "env", *variables]

    @property
    def cgroup(self) -> Path:
        """Where the machine's processes are kept on a system without systemd."""
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, where, kind, *_ = line.split()
            if kind == "cgroup2":
                return Path(where) / self.unit
        raise HostsError("no cgroup v2 hierarchy is mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup")

    def kill(self) -> None:
        """Pull the plug: every process of the machine gets SIGKILL at once."""
        pid = self.pid()
        if pid is not None:
            # The death of its PID 1 is the death of a PID namespace; systemd-nspawn then cleans up after itself.
            for victim in _children(pid) or [pid]:
                _signal(victim, signal.SIGKILL)
            if not _wait(lambda: self.pid() is None, 10):
                _signal(pid, signal.SIGKILL)
                _wait(lambda: self.pid() is None, 10)
        self._tidy()

    def stop(self) -> None:
        """Power off in order; raises if the machine is not down in time."""
        pid = self.pid()
        if pid is not None:
            _signal(pid, signal.SIGTERM)
            if not _wait(lambda: self.pid() is None, STOP_TIMEOUT_S):
                raise HostsError(
                    f"{self.name} did not power off within {STOP_TIMEOUT_S} s: kill it; see {self.console}"
                )
        self._tidy()

    def _tidy(self) -> None:
        """Remove what the kernel may keep for a moment, and what a killed systemd-nspawn leaves."""
        if Path(f"/sys/class/net/vb-{self.unit}").exists():
            succeeds("ip", "link", "delete", f"vb-{self.unit}")
        if SYSTEMD.is_dir():
            succeeds("systemctl", "stop", f"{self.unit}.service")
        elif not _wait(lambda: _remove_cgroup(self.cgroup), 10):
            raise HostsError(f"processes are left in {self.cgroup}: kill them and run this again")

    def wait(self, ssh: Sequence[str]) -> None:
        """Wait until the machine has booted and root can log in; ``ssh`` is the command up to the host's address."""
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while not self._greets():
            if self.pid() is None:
                raise HostsError(
                    f"{self.name} went down while it booted; the end of {self.console}:\n{self._last_lines()}"
                )
            if time.monotonic() > deadline:
                raise HostsError(
                    f"{self.name} did not answer on port 22 within {BOOT_TIMEOUT_S} s: {self._last_lines()}"
                )
            time.sleep(0.05)
        # "degraded" (a unit failed) is for whoever works on the host to see: the host itself can be used.
        state = [*ssh, self.address, "systemctl is-system-running --wait || true"]
        answer = run("timeout", str(BOOT_TIMEOUT_S), *state).strip()
        if answer not in ("running", "degraded"):
            raise HostsError(
                f"{self.name} booted into state {answer!r}; the end of {self.console}:\n{self._last_lines()}"
            )

    def _greets(self) -> bool:
        try:
            with socket.create_connection((self.address, 22), timeout=1) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def _last_lines(self) -> str:
        return "\n".join(self.console.read_text(errors="replace").splitlines()[-20:]) if self.console.exists() else ""


def resolvers() -> tuple[list[str], list[str]]:
    """Return name servers and search domains that a host can use; a stub on loopback is not one."""
    servers: list[str] = []
    domains: list[str] = []
    for path in ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"):
        if Path(path).exists():
            servers, domains = read_resolv_conf(Path(path).read_text())
            if servers:
                break
    return servers, domains


def read_resolv_conf(text: str) -> tuple[list[str], list[str]]:
    """Return the name servers, but for those on loopback, and the search domains."""
    words = [line.split() for line in text.splitlines() if line.strip()]
    servers = [line[1] for line in words if line[0] == "nameserver" and not line[1].startswith(("127.", "::1"))]
    return servers, [name for line in words if line[0] in ("search", "domain") for name in line[1:] if name != "."]


def remove_tree(path: Path) -> None:
    """Remove a root file system, never what may still be mounted below it."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in sorted((mount for mount in mounts if Path(mount).is_relative_to(path)), reverse=True):
        run("umount", "--lazy", mount)
    if path.exists():
        run("rm", "--recursive", "--force", "--one-file-system", str(path))


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _remove_cgroup(cgroup: Path) -> bool:
    for directory, _, _ in os.walk(cgroup, topdown=False):
        try:
            Path(directory).rmdir()
        except OSError:
            return False
    return True


def _wait(done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
