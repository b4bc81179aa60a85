"""A release as a service: its units under systemd, its socket, its own answers."""

from __future__ import annotations

import http.client
import json
import os
import pwd
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .release_state import StateError

LOG_LINES = 50


@dataclass(frozen=True)
class Unit:
    """What systemd says of a unit; `invocation` names one start of it, and is empty before the first."""

    loaded: bool
    active: str
    result: str
    invocation: str


class Systemd:
    """The few questions and orders that releases have for systemd, the journal and the kernel's socket table."""

    def show(self, unit: str) -> Unit:
        output = self._ask("systemctl", "show", "--property=LoadState,ActiveState,Result,InvocationID", unit)
        facts = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
        return Unit(
            facts.get("LoadState") == "loaded",
            facts.get("ActiveState", "unknown"),
            facts.get("Result", ""),
            facts.get("InvocationID", ""),
        )

    def start(self, unit: str, timeout: float) -> str | None:
        """Start a unit and wait for it, at most `timeout` seconds. Returns what went wrong."""
        subprocess.run(["systemctl", "reset-failed", unit], capture_output=True, check=False)
        try:
            done = subprocess.run(
                ["systemctl", "start", unit], capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return f"{unit} was not up after {timeout:g} s"
        return None if done.returncode == 0 else f"{unit} failed to start: {first_line(done.stderr)}"

    def restart(self, unit: str) -> None:
        self._order("restart", unit)

    def stop(self, unit: str) -> None:
        """Stop a unit and wait until it has ended; one that was about to be restarted after a crash too."""
        self._order("stop", unit)
        subprocess.run(["systemctl", "reset-failed", unit], capture_output=True, check=False)

    def instances(self, template: str, states: str) -> list[str]:
        """The instances of `ragrack@.service` and the like that are in one of `states` (comma separated)."""
        prefix, suffix = template.split("@")
        try:
            output = self._ask(
                *("systemctl", "list-units", "--all", "--plain", "--no-legend", "--full", f"--state={states}"),
                f"{prefix}@*{suffix}",
            )
        except StateError:
            if Path("/run/systemd/system").is_dir():
                raise
            return []  # nothing can run on a host that was not booted with systemd
        names = [line.split()[0] for line in output.splitlines() if line.split()]
        return sorted(name.removeprefix(f"{prefix}@").removesuffix(suffix) for name in names)

    def opens(self, sealed: Path) -> bool:
        """Whether this host can open a sealed credential, as the unit would have it opened."""
        command = ["systemd-creds", "decrypt", f"--name=credentials_{sealed.name}", str(sealed), "-"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def journal(self, unit: str) -> list[str]:
        """The last 50 lines of a unit."""
        subprocess.run(["journalctl", "--sync"], capture_output=True, check=False)
        done = subprocess.run(
            ["journalctl", "-u", unit, "-n", str(LOG_LINES), "-o", "cat", "--no-pager"],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.splitlines()

    def said(self, unit: str, since: str) -> list[str]:
        """What a unit wrote since a time, in journalctl's words (`@` and the seconds since 1970)."""
        subprocess.run(["journalctl", "--sync"], capture_output=True, check=False)
        return self._ask(
            *("journalctl", "-u", unit, "-n", "1000", f"--since={since}", "-o", "cat", "--no-pager")
        ).splitlines()

    def backlog(self, socket_path: Path) -> int:
        """Connections that a listening socket has not accepted yet; 0 when nothing listens there."""
        for line in self._ask("ss", "-xlnH").splitlines():
            fields = line.split()
            if str(socket_path) in fields:
                return int(fields[2])
        return 0

    def _order(self, verb: str, unit: str) -> None:
        self._ask("systemctl", verb, unit)

    def _ask(self, *command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise StateError(f"{command[0]} was not found on this host; ragrack runs on Debian with systemd") from None
        if done.returncode != 0:
            raise StateError(f"`{' '.join(command)}` failed: {first_line(done.stderr)}")
        return done.stdout


def first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "no reason given")


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


def why_not_ready(socket_path: Path) -> str | None:
    """None if GET /readyz answers 200, else the reason in words."""
    try:
        status, body = _readyz(UnixConnection(socket_path, timeout=5))
    except (OSError, http.client.HTTPException) as error:
        return f"nothing answers on {socket_path}: {error}"
    return None if status == 200 else f"not ready ({status}): {reasons(body)}"


def _readyz(connection: http.client.HTTPConnection) -> tuple[int, str]:
    """Status and text of one GET /readyz. Raises OSError or HTTPException where there is no answer."""
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        return response.status, response.read(20_000).decode(errors="replace")
    finally:
        connection.close()


def why_not_answering(edge: str, release: str, ca: Path, *, verify: bool) -> str | None:
    """None if GET /readyz at an edge host, over TLS, says that this release is ready; else the reason in words."""
    context = ssl.create_default_context(cafile=str(ca))
    if not verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        status, body = _readyz(http.client.HTTPSConnection(edge, timeout=5, context=context))
    except (OSError, http.client.HTTPException) as error:
        return f"https://{edge} does not answer: {error}"
    if status != 200:
        return f"https://{edge} is not ready ({status}): {reasons(body)}"
    try:
        answered = json.loads(body)["release"]
    except (ValueError, KeyError, TypeError):
        return f"https://{edge} answers, but not of a release: {' '.join(body.split())[:200]}"
    return None if answered == release else f"https://{edge} answers from release {answered}"


def reasons(body: str) -> str:
    """The required checks that failed, by an answer of /readyz, or as much of the answer as fits in a message."""
    try:
        checks = json.loads(body)["checks"]
        failed = [f"{check['name']}: {check['reason']}" for check in checks if check["required"] and not check["ok"]]
    except (ValueError, KeyError, TypeError):
        failed = []
    return "; ".join(failed) or " ".join(body.split())[:500] or "no reason given"


def wait_until_ready(
    systemd: Systemd, unit: str, socket_path: Path, timeout: float, ready: Callable[[Path], str | None]
) -> str | None:
    """Start a unit and poll its socket. Returns None once it is ready, else why it is not after `timeout` seconds.

    READY=1 of gunicorn says only that its arbiter runs; workers may yet fail to load, and systemd starts them anew:
    a second invocation within the wait is a crash, whatever it would come to.
    """
    deadline = time.monotonic() + timeout
    failed = systemd.start(unit, timeout)
    if failed is not None:
        return failed
    first = systemd.show(unit).invocation
    while True:
        unready = ready(socket_path)
        if unready is None:
            return None
        state = systemd.show(unit)
        if state.active not in ("active", "reloading"):
            return f"{unit} is {state.active} (result: {state.result or 'none'}) instead of running"
        if state.invocation != first:
            return f"{unit} crashed and was started again by systemd"
        if time.monotonic() > deadline:
            return f"{unit} was not ready after {timeout:g} s: {unready}"
        time.sleep(0.1)


def wait_for_empty_backlog(systemd: Systemd, socket_path: Path, settle: float, timeout: float) -> int:
    """Wait until nothing has waited to be accepted for `settle` seconds. Returns what still waits at the timeout."""
    began = empty_since = time.monotonic()
    while True:
        waiting, at = systemd.backlog(socket_path), time.monotonic()
        if waiting:
            empty_since = at
        if at - empty_since >= settle or at - began >= timeout:
            return waiting
        time.sleep(0.05)


def read_env_file(text: str) -> dict[str, str]:
    """The variables of a file in the form of systemd's EnvironmentFile, as the release carries it."""
    variables = {}
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if not equals or name.startswith(("#", ";")):
            continue
        if len(value) >= 2 and value[0] == value[-1] == '"':
            value = re.sub(r"\\(.)", r"\1", value[1:-1])
        elif len(value) >= 2 and value[0] == value[-1] == "'":
            value = value[1:-1]
        variables[name.strip()] = value
    return variables


@dataclass(frozen=True)
class Cli:
    """The command line of a release, run as the release's service would be, but for its sandbox."""

    release_dir: Path
    env: str | None = None
    """Text of another app.env than its own, to ask what would be."""

    def run(self, *arguments: str, timeout: float, owner: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run `python -m ragrack ...` as the user that owns `owner`. Raises StateError where it takes too long."""
        try:
            return subprocess.run(
                [str(self.release_dir / "venv/bin/python"), "-I", "-B", "-m", "ragrack", *arguments],
                env=self.environment(),
                cwd="/",
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
                **as_owner(owner),
            )
        except subprocess.TimeoutExpired:
            raise StateError(f"`ragrack {arguments[0]}` took longer than {timeout:g} s") from None
        except OSError as error:
            raise StateError(f"`ragrack {arguments[0]}` could not be run: {error}") from error

    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.defpath,
            "LANG": "C.UTF-8",
            "RAGRACK_EMBED_MODEL_DIR": str(next(self.release_dir.glob("models/*"), self.release_dir / "models")),
            **read_env_file((self.release_dir / "app.env").read_text() if self.env is None else self.env),
        }

    def collections(self) -> list[str]:
        """The collections that the release's own settings name."""
        names = self.environment().get("RAGRACK_COLLECTIONS", "").split(",")
        return [name.strip() for name in names if name.strip()]

    def fingerprint(self, timeout: float) -> str:
        """What this release's snapshots must have been built with: 16 hex digits."""
        done = self.run("config", "fingerprint", timeout=timeout)
        found = re.findall(r"\b[0-9a-f]{16}\b", done.stdout)
        if done.returncode != 0 or not found:
            raise StateError(
                f"`ragrack config fingerprint` of {self.release_dir.name} failed with exit code {done.returncode}",
                (done.stderr or done.stdout).splitlines()[-LOG_LINES:],
            )
        return str(found[0])

    def index(self, *arguments: str, timeout: float) -> Any:
        """What `ragrack index ... --json` prints. Raises StateError with its own words where it refuses."""
        done = self.run("index", *arguments, "--json", timeout=timeout)
        try:
            if done.returncode == 0:
                return json.loads(done.stdout)
        except ValueError:
            pass
        raise StateError((done.stderr or done.stdout).strip() or f"`ragrack index {arguments[0]}` gave no reason")

    def golden(
        self, collection: str, socket_path: Path, key_file: Path, timeout: float, *, degraded: bool = False
    ) -> dict[str, Any]:
        """Ask the golden questions of a collection through the release's own API.

        A collection without any must still answer one probe. `degraded` lets a release pass whose language model is
        down. Returns its report (`passed`, `hit_rate`, `mrr`, `k`, `questions`, `failed`, `seconds`).
        """
        done = self.run(
            *(
                "golden",
                "--socket",
                str(socket_path),
                "--collection",
                collection,
                "--key-file",
                str(key_file),
                "--json",
                "--allow-missing",
                *(["--allow-degraded"] if degraded else []),
            ),
            timeout=timeout,
            owner=socket_path,
        )
        try:
            report = json.loads(done.stdout)
            report["passed"] = bool(report["passed"]) and done.returncode == 0
        except (ValueError, KeyError, TypeError):
            said = (done.stderr or done.stdout).strip().splitlines()[-3:]
            raise StateError(
                f"the golden questions of {collection} could not be asked (exit code {done.returncode}): "
                f"{' '.join(said) or 'no reason given'}"
            ) from None
        return dict(report)


def as_owner(path: Path | None) -> Mapping[str, Any]:
    """Arguments for a process that runs as whoever owns a path, with that user's groups; none where that is us."""
    if path is None or os.geteuid() != 0:
        return {}
    uid = path.stat().st_uid
    if uid == 0:
        return {}
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return {"user": uid, "group": path.stat().st_gid, "extra_groups": []}
    return {"user": uid, "group": user.pw_gid, "extra_groups": os.getgrouplist(user.pw_name, user.pw_gid)}


def why_failed(report: Mapping[str, Any]) -> str:
    """A golden report that did not pass, in words: its figures, and each failed question with what came instead."""
    words = [f"hit rate@{report.get('k')} {report.get('hit_rate')}, MRR {report.get('mrr')}"]
    if report.get("degraded"):
        words.append("the LLM did not answer")
    words += [
        f"failed: {failed.get('question')!r} (expected {failed.get('expected')}, got {failed.get('got')})"
        for failed in report.get("failed", [])
    ]
    return "; ".join(words)
