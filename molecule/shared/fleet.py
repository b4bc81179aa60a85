"""The test hosts as the tests see them: what serves, what a playbook said, and what a client gets over TLS."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import testinfra
import yaml
from testhosts.machine import remove_tree

ROOT = Path(__file__).resolve().parents[2]
SCENARIO = Path(os.environ.get("MOLECULE_SCENARIO_DIRECTORY", ROOT / "molecule/default"))
# A scenario with an inventory has hosts of its own; the others share theirs.
OWN = (SCENARIO / "inventory").is_dir()
INVENTORY = SCENARIO / "inventory" if OWN else ROOT / "molecule/shared/inventory"
RUN = f"molecule-{SCENARIO.name}" if OWN else "molecule"
BIN = Path(sys.executable).parent
CA = INVENTORY / "pki/ca.pem"
STATE = ROOT / ".state" / RUN
GOLDEN = ROOT / "molecule/shared/collection/golden.yml"


@dataclass(frozen=True)
class Played:
    """How a playbook ended. `changed` and `failed` count tasks by host, as the recap does."""

    status: int
    output: str

    @property
    def recap(self) -> dict[str, dict[str, int]]:
        rows = re.findall(r"^(\S+)\s+: (ok=.*)$", self.output, re.MULTILINE)
        return {host: {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", counts)} for host, counts in rows}

    @property
    def changes(self) -> set[tuple[str, str]]:
        """Which tasks changed, or in check mode would change, which hosts."""
        found, task = set(), ""
        for line in self.output.splitlines():
            if named := re.match(r"(?:TASK|RUNNING HANDLER) \[(.*)\]", line):
                task = named[1]
            elif changed := re.match(r"changed: \[([^\] ]+)", line):
                found.add((task, changed[1]))
        return found

    @property
    def changed(self) -> int:
        return sum(counts["changed"] for counts in self.recap.values())


class Host:
    """One test host: commands by ssh, questions over TLS."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.url = f"https://{address}"
        self.shell = testinfra.get_host(f"ansible://{name}", ansible_inventory=str(INVENTORY))

    def run(self, command: str) -> str:
        """Standard output of a shell command. Raises AssertionError, with the journal's end, where it fails."""
        done = self.shell.run(command)
        assert done.rc == 0, f"{self.name}: {command}\n{done.stdout}{done.stderr}\n{self.journal()}"
        return str(done.stdout).strip()

    def journal(self) -> str:
        return str(self.shell.run("journalctl --no-pager -o cat -n 40 -u 'ragrack*' -u nginx").stdout)

    @property
    def release(self) -> str:
        return self.run("basename $(readlink /opt/ragrack/current)")

    def releases(self) -> list[str]:
        return self.run("ls /opt/ragrack/releases").split()

    def running(self) -> list[str]:
        units = self.run("systemctl list-units --no-legend --plain --state=active 'ragrack@*.service'")
        return [line.split()[0].removeprefix("ragrack@").removesuffix(".service") for line in units.splitlines()]

    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.run("cat /opt/ragrack/history.jsonl").splitlines()]

    def client(self, key: str | None = "") -> httpx.Client:
        """A client that verifies the certificate; `key` None sends none, "" the tests' own."""
        headers = {} if key is None else {"Authorization": f"Bearer {key or api_key()}"}
        context = ssl.create_default_context(cafile=str(CA))
        return httpx.Client(base_url=self.url, verify=context, headers=headers, timeout=60)

    def readiness(self) -> dict[str, Any]:
        """What /readyz says, whether ready or not."""
        with self.client(key=None) as client:
            report: dict[str, Any] = client.get("/readyz").json()
        return report

    def snapshot(self, collection: str = "postgres") -> str | None:
        """The snapshot that answers, whichever worker is asked; None while workers are on their way to another."""
        with self.client() as client:
            answering: str | None = client.get("/version").json()["snapshots"][collection]
        return answering if self.opened(collection) <= {answering} else None

    def opened(self, collection: str = "postgres") -> set[str]:
        """The snapshots that workers have open."""
        files = "for p in $(pgrep -f gunicorn); do find /proc/$p/fd -printf '%l\\n' 2>/dev/null; done; true"
        return set(re.findall(rf"/indexes/{collection}/.*/snapshots/([^/]+)/", self.run(files)))

    def ask(self, question: str, **more: Any) -> dict[str, Any]:
        with self.client() as client:
            response = client.post("/query", json={"query": question, **more})
        assert response.status_code == httpx.codes.OK, f"{self.name}: {response.status_code} {response.text}"
        answer: dict[str, Any] = response.json()
        return answer


def api_key() -> str:
    return (INVENTORY / "pki/molecule.key").read_text().strip()


def questions() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(GOLDEN.read_text())["questions"]
    return found


def hosts(group: str = "app") -> list[Host]:
    """The test hosts of a group by name. Raises AssertionError where there are none."""
    found = {path.parent.name: path for path in (INVENTORY / "host_vars").glob("*/connection.yml")}
    assert found, "there are no test hosts; `molecule create` makes them"
    members = yaml.safe_load((INVENTORY / "hosts.yml").read_text())["all"]["children"][group]["hosts"]
    return [Host(name, yaml.safe_load(found[name].read_text())["ansible_host"]) for name in sorted(members)]


def ingesting() -> Host:
    """The one that the others pull from."""
    [host] = hosts("ingest")
    return host


def pulling() -> Host:
    """One that pulls."""
    source = ingesting().name
    return next(host for host in hosts() if host.name != source)


def let_in(host: Host, directory: Path) -> tuple[str, str]:
    """A new key, made in `directory`, that may log in to a host as root, and that host's line of known_hosts."""
    key = directory / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    host.run(f"echo '{key.with_suffix('.pub').read_text().strip()}' >>/root/.ssh/authorized_keys")
    known = (STATE / "known_hosts").read_text().splitlines()
    return key.read_text(), next(line for line in known if line.startswith(f"{host.address} "))


def environment() -> dict[str, str]:
    """For a command of the project, whatever Molecule has put into ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "MOLECULE_"))}
    ours = {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "PATH": f"{BIN}:{os.environ['PATH']}"}
    # Test hosts are near: one that is down is known to be sooner.
    return kept | ours | {"ANSIBLE_TIMEOUT": "8"}


def command(playbook: str, *arguments: str, variables: Mapping[str, Any] | None = None) -> list[str]:
    extra = ["-e", json.dumps(dict(variables))] if variables else []
    return ["ansible-playbook", "-i", str(INVENTORY), str(ROOT / "playbooks" / f"{playbook}.yml"), *extra, *arguments]


def play(playbook: str, *arguments: str, variables: Mapping[str, Any] | None = None) -> Played:
    """Run a playbook of the project against the test hosts."""
    done = subprocess.run(
        command(playbook, *arguments, variables=variables),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return Played(done.returncode, done.stdout)


@contextlib.contextmanager
def killed(playbook: str, *, variables: Mapping[str, Any] | None = None) -> Iterator[Callable[[], bool]]:
    """A playbook that runs until the block ends and is killed then, with all that it started on the control node.

    Yields whether it still runs. Where the block fails, what it said is printed.
    """
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            command(playbook, variables=variables),
            cwd=ROOT,
            env=environment(),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            yield lambda: process.poll() is None
        except BaseException:
            out.seek(0)
            print(out.read().decode())
            raise
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until(what: str, holds: Callable[[], object], seconds: float) -> None:
    """Asks again and again. Raises AssertionError where it has not come to pass by then."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come to pass in {seconds} s"
        time.sleep(0.2)


def machine(verb: str, *names: str) -> None:
    """Start, stop or kill test hosts."""
    program = ROOT / "molecule/shared/hosts.py"
    subprocess.run([sys.executable, str(program), verb, "--run", RUN, "--state", str(STATE), *names], check=True)


def renew(host: Host) -> None:
    """A bare machine of the same name and address takes the place of a test host, which is lost with all it had."""
    machine("kill", host.name)
    remove_tree(STATE / host.name / "root")
    create = [str(BIN / "ansible-playbook"), "-i", str(INVENTORY), str(ROOT / "molecule/shared/create.yml")]
    subprocess.run(create, cwd=ROOT, env=environment(), check=True)
