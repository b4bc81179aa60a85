"""`bin/bench deploy`: a deploy by ragrack and one of the usual shape (`plain/`), on the same hosts under the same load.

Six Debian hosts are made for it, each an app host that is its own edge. For each size of the fleet and either way: a
deploy that changes nothing, one of a change of code, and the way back; wall seconds of the whole command, and what the
clients saw meanwhile. The plain way serves the same app with the same settings and index, by HTTP on a port.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from load import Load

ROOT = Path(__file__).parents[1]
PLAIN = ROOT / "bench/plain"
STATE = ROOT / ".state/bench"
INVENTORY = STATE / "inventory"
GOLDEN = ROOT / "inventories/demo/collections/postgres/golden.yml"
DOCUMENTS = ROOT / "build/documents/postgres"
RUN = "bench"
REQUESTS_PER_SECOND = 10
STEPS = ("no change", "change of code", "rollback")

Json = dict[str, Any]


@dataclass(frozen=True)
class Fleet:
    """The first hosts of those that were made: their inventory's file and their addresses."""

    hosts: Path
    addresses: list[str]


class PlaybookError(Exception):
    """A playbook failed; the message holds its last lines."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bin/bench deploy", description="ragrack's deploy and a plain one, side by side."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--hosts", default="1,3,6", help="sizes of the fleet (default 1,3,6)")
    parser.add_argument("--keep", action="store_true", help="keep the hosts, for another run")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("bin/bench deploy makes test hosts. Mend: run it as root on Debian.", file=sys.stderr)
        return 2
    sizes = sorted({int(n) for n in arguments.hosts.split(",")})
    # So that the hosts are removed when this is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        figures = _measure(sizes)
    except PlaybookError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if not arguments.keep:
            _hosts("destroy")
            shutil.rmtree(STATE, ignore_errors=True)
    _show(figures)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def _measure(sizes: list[int]) -> Json:
    fleets = _make(sizes)
    largest = fleets[sizes[-1]]
    _play(largest, ROOT / "playbooks/site.yml")
    _play(largest, ROOT / "playbooks/deploy.yml")
    packages = _packages()
    _play(largest, PLAIN / "prepare.yml")
    _play(largest, PLAIN / "deploy.yml", packages | {"plain_project": str(ROOT)})
    figures: Json = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
        "requests_per_second": REQUESTS_PER_SECOND,
        "sizes": {},
    }
    for number, fleet in fleets.items():
        changed = _project(f"bench of {number} hosts")
        ours = [
            (ROOT / "playbooks/deploy.yml", {}),
            (ROOT / "playbooks/deploy.yml", {"release_project_dir": str(changed)}),
            (ROOT / "playbooks/rollback.yml", {}),
        ]
        theirs = [
            (PLAIN / "deploy.yml", packages | {"plain_project": str(ROOT)}),
            (PLAIN / "deploy.yml", packages | {"plain_project": str(changed)}),
            (PLAIN / "rollback.yml", {}),
        ]
        figures["sizes"][str(number)] = {
            "plain": _steps(fleet, theirs, [f"http://{address}:8000" for address in fleet.addresses]),
            "ragrack": _steps(fleet, ours, [f"https://{address}" for address in fleet.addresses]),
        }
    return figures


def _steps(fleet: Fleet, steps: list[tuple[Path, Json]], urls: list[str]) -> Json:
    return {name: _step(fleet, *step, urls) for name, step in zip(STEPS, steps, strict=True)}


def _step(fleet: Fleet, playbook: Path, variables: Json, urls: list[str]) -> Json:
    """One run of a playbook with questions asked from three seconds before it until three after it."""
    questions = [each["question"] for each in yaml.safe_load(GOLDEN.read_text())["questions"]]
    load = Load(
        urls,
        key=(INVENTORY / "pki/bench.key").read_text().strip(),
        ca=INVENTORY / "pki/ca.pem",
        questions=questions,
        clients=2,
        pause=2 * len(urls) / REQUESTS_PER_SECOND,
    )
    with load:
        time.sleep(3)
        began = time.monotonic()
        output = _play(fleet, playbook, variables)
        seconds = time.monotonic() - began
        time.sleep(3)
    print(f"{len(urls)} hosts, {playbook.parent.name}/{playbook.name}: {seconds:.1f} s, {load.count}", file=sys.stderr)
    flips = [float(ms) for ms in re.findall(r'"flip_ms": ([0-9.]+)', output)]
    return {
        "seconds": round(seconds, 1),
        "requests": load.count.total,
        "failed": len(load.count.failures),
        "failures": sorted(set(load.count.failures))[:3],
    } | ({"flip_ms": max(flips)} if flips else {})


def _make(sizes: list[int]) -> dict[int, Fleet]:
    names = [f"app{number}" for number in range(1, sizes[-1] + 1)]
    _hosts("create", "--persistent", "--host-vars", str(INVENTORY / "host_vars"), *(f"{name}=trixie" for name in names))
    subprocess.run([ROOT / "inventories/demo/collections/postgres/fetch", DOCUMENTS], check=True, stdout=sys.stderr)
    answered = (
        "lookup('ansible.builtin.password', inventory_dir ~ '/pki/bench.key', length=40, chars=['ascii_letters'])"
    )
    settings = {
        "app_collections": ["postgres"],
        "app_api_keys": [{"name": "bench", "sha256": f"{{{{ {answered} | hash('sha256') }}}}"}],
        "index_collections": [{"name": "postgres", "source": str(DOCUMENTS), "golden": str(GOLDEN)}],
        # What is measured is the way back while the previous release is warm.
        "release_keep_warm": 3600,
    }
    group_vars = INVENTORY / "group_vars"
    group_vars.mkdir(exist_ok=True)
    (group_vars / "all.yml").write_text(yaml.safe_dump(settings))
    fleets = {}
    for size in sizes:
        members: Json = {name: {} for name in names[:size]}
        groups = {"edge": {"hosts": members}, "app": {"hosts": members}, "ingest": {"hosts": {names[0]: {}}}}
        hosts = INVENTORY / f"hosts-{size}.yml"
        # All are known, as each has variables; a group has its own.
        hosts.write_text(json.dumps({"all": {"hosts": dict.fromkeys(names), "children": groups}}))
        fleets[size] = Fleet(hosts, [_address(name) for name in names[:size]])
    return fleets


def _address(name: str) -> str:
    address: str = yaml.safe_load((INVENTORY / "host_vars" / name / "connection.yml").read_text())["ansible_host"]
    return address


def _packages() -> Json:
    """What the plain way sends: the packages and the model of the artifact that ragrack has built."""
    artifact = max((ROOT / "build/artifacts").iterdir(), key=lambda path: path.stat().st_mtime)
    packages = STATE / "packages"
    shutil.rmtree(packages, ignore_errors=True)
    shutil.copytree(artifact, packages)
    shutil.rmtree(packages / "app")
    [requirements] = packages.glob("requirements-*.txt")
    # By hashes pip would take no wheel of the app, which the plain way builds anew each time.
    lines = re.sub(r" \\\n", " ", requirements.read_text()).splitlines()
    pinned = [re.sub(r" +--hash=\S+", "", line) for line in lines if not line.lstrip().startswith("#")]
    (packages / "requirements.txt").write_text("\n".join(pinned) + "\n")
    return {"plain_artifact": str(packages)}


def _project(change: str) -> Path:
    """A checkout whose app differs in one line."""
    project = STATE / "project"
    shutil.rmtree(project, ignore_errors=True)
    shutil.copytree(ROOT / "app", project / "app", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    for name in ("uv.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, project)
    with (project / "app/src/ragrack/__init__.py").open("a") as file:
        file.write(f"# {change}\n")
    return project


def _play(fleet: Fleet, playbook: Path, variables: Json | None = None) -> str:
    command = ["ansible-playbook", "-v", "-i", str(fleet.hosts), str(playbook), "-e", json.dumps(variables or {})]
    environment = os.environ | {
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise PlaybookError(f"{playbook} failed:\n{done.stdout[-5000:]}")
    return done.stdout


def _hosts(verb: str, *arguments: str) -> None:
    program = ROOT / "molecule/shared/hosts.py"
    which = ["--run", RUN, "--state", str(STATE / "hosts")]
    subprocess.run([sys.executable, str(program), verb, *which, *arguments], check=True)


def _show(figures: Json) -> None:
    print(f"{figures['machine']['cpus']} cpus, {figures['requests_per_second']} questions a second meanwhile")
    print(
        "\n| hosts | step | plain s | ragrack s | share | plain failed | ragrack failed | flip ms |\n"
        + "|---" * 8
        + "|"
    )
    for size, ways in figures["sizes"].items():
        for step in STEPS:
            plain, ours = ways["plain"][step], ways["ragrack"][step]
            failed = [f"{way['failed']} of {way['requests']}" for way in (plain, ours)]
            share = f"{ours['seconds'] / plain['seconds']:.2f}"
            row = [size, step, plain["seconds"], ours["seconds"], share, *failed, ours.get("flip_ms", "")]
            print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    sys.exit(main())
