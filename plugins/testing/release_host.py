"""A host for tests in a directory: an artifact with a real app, a real uv, and units that are plain processes.

The app is a few lines that speak the service's command line and endpoints. What it does wrong is in its settings
(FAULT). `systemctl`, `journalctl` and `ss` are programs in <host>/bin, so that the modules call them as on a real host.
"""

from __future__ import annotations

import base64
import grp
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")
PYTHON_VERSION = "{}.{}".format(*sys.version_info[:2])
FINGERPRINT = "0123456789abcdef"

APP = """
import argparse, http.server, json, os, pathlib, socketserver, sys, time
import library

def serve(socket):
    fault = os.environ.get("FAULT", "")
    print("starting", os.environ["RAGRACK_RELEASE"], flush=True)
    if fault == "crash":
        sys.exit("ImportError: no module named nonsense")
    pathlib.Path(socket).with_name("gate.key").write_text("key")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            ready = fault != "unready"
            check = {"name": "index postgres", "ok": ready, "required": True, "reason": "no snapshot", "ms": 1}
            body = json.dumps({"ready": ready, "checks": [check]}).encode()
            self.send_response(200 if ready else 503)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self):
            return "local"

        def log_message(self, *_):
            pass

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

    Server(socket, Handler).serve_forever()

def golden(options):
    assert pathlib.Path(options.key_file).read_text() == "key"
    passed = os.environ.get("FAULT") != "wrong"
    failed = [] if passed else [{"question": "What is an index?", "expected": ["indexes.html"], "got": ["other.html"]}]
    report = {"passed": passed, "hit_rate": 1.0 if passed else 0.5, "mrr": 1.0, "k": 5, "questions": 2,
              "failed": failed, "degraded": False, "seconds": 0.1}
    print(json.dumps(report))
    return 0 if passed else 1

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("what", nargs="?")
    for name in ("--socket", "--collection", "--key-file"):
        parser.add_argument(name)
    for name in ("--json", "--allow-missing", "--allow-degraded"):
        parser.add_argument(name, action="store_true")
    options = parser.parse_args()
    if options.command == "serve":
        serve(options.socket)
    if options.command == "golden":
        return golden(options)
    if options.command == "config":
        print("FINGERPRINT")
    if options.command == "index":
        row = {"collection": "postgres", "fingerprint": "FINGERPRINT", "current": True}
        print(json.dumps([row] if pathlib.Path(os.environ["DATABASE"]).exists() else []))
    if options.command == "ingest":
        if os.environ.get("FAULT") == "no-documents":
            sys.exit("no documents for postgres")
        if os.environ.get("RAGRACK_VECTOR_STORE") == "postgres":
            pathlib.Path(os.environ["DATABASE"]).touch()
            return 0
        index = pathlib.Path(os.environ["INDEX_DIR"], "postgres", "FINGERPRINT")
        index.joinpath("snapshots", "one").mkdir(parents=True)
        index.joinpath("current").symlink_to("snapshots/one")
    return 0
""".replace("FINGERPRINT", FINGERPRINT)

SYSTEMCTL = """
import json, os, pathlib, signal, subprocess, sys, time, uuid

HOST = pathlib.Path(__file__).resolve().parents[1]
UNITS = HOST / "units"

def load(unit):
    path = UNITS / (unit + ".json")
    return json.loads(path.read_text()) if path.exists() else {"ActiveState": "inactive", "SubState": "dead"}

def save(unit, facts):
    UNITS.mkdir(exist_ok=True)
    UNITS.joinpath(unit + ".json").write_text(json.dumps(facts))

def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

def state(unit):
    facts = load(unit)
    if facts.get("pid") and not alive(facts["pid"]):
        facts |= {"ActiveState": "failed", "Result": "exit-code", "pid": 0}
    return facts

def environment(release):
    pairs = [line.split("=", 1) for line in (HOST / "root/releases" / release / "app.env").read_text().splitlines()]
    return {name: value.strip('"') for name, value in pairs} | {
        "RAGRACK_RELEASE": release, "INDEX_DIR": str(HOST / "indexes"), "PYTHONUNBUFFERED": "1"}

def spawn(unit, release, arguments, log):
    python = HOST / "root/releases" / release / "venv/bin/python"
    return subprocess.Popen([python, "-m", "ragrack", *arguments], env=environment(release), cwd="/",
                            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

def start(unit):
    kind, _, release = unit.rpartition(".")[0].partition("@")
    if state(unit)["ActiveState"] == "active":
        return 0
    facts = {"ActiveState": "active", "SubState": "running", "Result": "success", "InvocationID": uuid.uuid4().hex}
    if unit.endswith(".timer") or kind == "ragrack-trial":
        save(unit, facts | {"SubState": "waiting"})
        return 0
    HOST.joinpath("log").mkdir(exist_ok=True)
    with HOST.joinpath("log", unit).open("a") as log:
        if kind in ("ragrack-index", "ragrack-ingest", "ragrack-index-pull"):
            ingest = [HOST / "ingest", release]
            code = (
                spawn(unit, release, ["ingest", "missing"], log)
                if kind == "ragrack-index"
                else subprocess.Popen(ingest, stdout=log, stderr=log)
            ).wait()
            save(unit, {"ActiveState": "failed" if code else "inactive", "Result": "exit-code" if code else "success"})
            if code:
                print(f"Job for {unit} failed.", file=sys.stderr)
            return int(code != 0)
        run = HOST / "run" / release
        run.mkdir(parents=True, exist_ok=True)
        run.joinpath("gunicorn.sock").unlink(missing_ok=True)
        process = spawn(unit, release, ["serve", "--socket", str(run / "gunicorn.sock")], log)
    save(unit, facts | {"pid": process.pid})
    return 0

def stop(unit):
    facts = state(unit)
    if facts.get("pid"):
        os.kill(facts["pid"], signal.SIGTERM)
        while alive(facts["pid"]):
            time.sleep(0.01)
    save(unit, {"ActiveState": "inactive", "SubState": "dead"})
    return 0

def main():
    options = [a for a in sys.argv[1:] if a.startswith("-")]
    verb, *names = [a for a in sys.argv[1:] if not a.startswith("-")]
    if verb == "show":
        print("LoadState=" + ("not-found" if HOST.joinpath("no-units").exists() else "loaded"))
        for key, value in state(names[0]).items():
            print(f"{key}={value}")
    elif verb == "start":
        return start(names[0])
    elif verb == "stop":
        return stop(names[0])
    elif verb == "restart":
        stop(names[0])
        return start(names[0])
    elif verb == "list-units":
        wanted = next(o for o in options if o.startswith("--state=")).removeprefix("--state=").split(",")
        for path in sorted(UNITS.glob(names[0] + ".json")):
            facts = state(path.stem)
            if facts["ActiveState"] in wanted or facts.get("SubState") in wanted:
                print(path.stem, "loaded", facts["ActiveState"], facts.get("SubState"), "a unit")
    return 0

sys.exit(main())
"""

JOURNALCTL = """
import pathlib, sys
if "-u" in sys.argv:
    log = pathlib.Path(__file__).resolve().parents[1] / "log" / sys.argv[sys.argv.index("-u") + 1]
    if log.exists():
        print("\\n".join(log.read_text().splitlines()[-int(sys.argv[sys.argv.index("-n") + 1]):]))
"""


def wheel(path: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """A wheel with the given Python files."""
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    target = path / f"{name}-{version}-py3-none-any.whl"
    path.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w") as archive:
        for file, text in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{file},sha256={digest},{len(text.encode())}\n"
            archive.writestr(zipfile.ZipInfo(file), text)
        archive.writestr(zipfile.ZipInfo(f"{info}/RECORD"), f"{record}{info}/RECORD,,\n")
    return target


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Place:
    """The directory of one host."""

    path: Path

    @property
    def root(self) -> Path:
        return self.path / "root"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def artifact(self) -> Path:
        return self.path / "artifact"

    @property
    def signature(self) -> Path:
        return self.path / "signature"

    def parameters(self, *states: str, **changes: Any) -> dict[str, Any]:
        """Arguments of the module for this host."""
        places: dict[str, Any] = {
            "root": str(self.root),
            "run_dir": str(self.path / "run"),
            "cache_dir": str(self.cache),
            "artifact_dir": str(self.artifact),
            "signature": self.signature.read_text() if self.signature.exists() else "",
            "signers": str(self.path / "signers"),
            "index_dir": str(self.path / "indexes"),
            "python": sys.executable,
            "uv": str(UV),
            "group": grp.getgrgid(os.getgid()).gr_name,
            "min_free_mb": 1,
            "version": "0.1.0",
            "env": 'RAGRACK_COLLECTIONS="postgres"',
            "settle": 0.1,
            "timeout": 20.0,
        }
        return {**places, "state": [*states], **changes}

    def release(self, release: str) -> Path:
        return self.root / "releases" / release

    def install_programs(self) -> dict[str, str]:
        """The host's programs; returns the environment in which they are found."""
        programs = self.path / "bin"
        programs.mkdir(parents=True)
        (self.path / "units").mkdir()
        for name, text in {"systemctl": SYSTEMCTL, "journalctl": JOURNALCTL}.items():
            (programs / name).write_text(f"#!{sys.executable} -IS\n{text}")
            (programs / name).chmod(0o755)
        return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}

    def write_artifact(self, version: str = "0.1.0", *, app: str = APP, library: str = "WORDS = 1\n") -> None:
        """Build an artifact of an app that needs one third-party package, for this machine's Python."""
        shutil.rmtree(self.artifact, ignore_errors=True)
        third = wheel(self.artifact / "wheels", "library", "1.0", {"library.py": library})
        (self.artifact / f"requirements-{PYTHON_VERSION}.txt").write_text(
            f"library==1.0 --hash=sha256:{sha256(third)}\n"
        )
        main = "import sys\nfrom ragrack import main\nsys.exit(main())\n"
        wheel(self.artifact / "app", "ragrack", version, {"ragrack/__init__.py": app, "ragrack/__main__.py": main})
        model = self.artifact / "models/all-minilm-l6-v2/model.onnx"
        model.parent.mkdir(parents=True)
        model.write_bytes(b"weights" * 1000)
        self.write_manifest(version)

    def write_manifest(self, version: str = "0.1.0", **changes: object) -> None:
        files = {
            str(path.relative_to(self.artifact)): {"sha256": sha256(path), "size": path.stat().st_size}
            for path in sorted(self.artifact.rglob("*"))
            if path.is_file() and path.name != "manifest.json"
        }
        facts: dict[str, object] = {
            "name": "ragrack",
            "version": version,
            "digest": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
            "pythons": [PYTHON_VERSION],
            "platform": platform.machine(),
            "files": files,
            **changes,
        }
        (self.artifact / "manifest.json").write_text(json.dumps(facts))
        self.sign()

    def sign(self, key: str = "signing_key") -> None:
        """Sign the manifest as it is; `signing_key` is the one that this host trusts."""
        path = self.path / key
        if not path.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
        trusted = (self.path / "signing_key.pub").read_text()
        (self.path / "signers").write_text(f'ragrack namespaces="ragrack-artifact" {trusted}')
        manifest = (self.artifact / "manifest.json").read_bytes()
        asked = ["ssh-keygen", "-Y", "sign", "-q", "-f", str(path), "-n", "ragrack-artifact"]
        self.signature.write_bytes(subprocess.run(asked, input=manifest, stdout=subprocess.PIPE, check=True).stdout)

    def snapshot(self) -> dict[str, str]:
        """Every path below the host with its content or target, to see that nothing changed."""
        seen = {}
        for path in sorted(self.path.rglob("*")):
            if path.is_symlink():
                seen[str(path)] = f"-> {path.readlink()}"
            else:
                seen[str(path)] = sha256(path) if path.is_file() else "directory"
        return seen


def play(
    tmp_path: Path, tasks: list[dict[str, Any]], *options: str, environment: dict[str, str] | None = None
) -> tuple[int, list[dict[str, Any]]]:
    """Run tasks on this machine as Ansible does; returns the exit code and each task's result."""
    book = tmp_path / "play.yml"
    book.write_text(yaml.safe_dump([{"hosts": "localhost", "connection": "local", "tasks": tasks}]))
    environment = {
        **(environment or os.environ),
        "ANSIBLE_CONFIG": str(REPO / "ansible.cfg"),
        "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
        "ANSIBLE_CALLBACKS_ENABLED": "ansible.posix.json",
    }
    program = str(Path(sys.executable).with_name("ansible-playbook"))
    command = [program, "-i", "localhost,", *options, str(book)]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    try:
        [played] = json.loads(done.stdout[done.stdout.index("{") :])["plays"]
    except ValueError:
        pytest.fail(done.stdout + done.stderr)
    return done.returncode, [task["hosts"]["localhost"] for task in played["tasks"]]
