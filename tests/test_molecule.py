"""Molecule's scenarios on hosts that are made for the run: one create, all scenarios, one destroy."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STATE = ROOT / ".state"
# What a reader wants to see go by; the rest is in the log.
NEWS = re.compile(r"Executed: |\d+ (passed|failed)|failed of \d+|a host lost|CRITICAL|^\S*(FAILED|ERROR)")


# Certificates of an ACME server, each alert for real, failing databases, an upgrade: slow, and few changes touch them.
RARE = ["acme", "monitoring", "postgres", "upgrade"]


@pytest.mark.hosts
def test_every_scenario(capsys: pytest.CaptureFixture[str], pytestconfig: pytest.Config) -> None:
    left_out = [] if pytestconfig.getoption("--rare") else [f"--exclude={name}" for name in RARE]
    STATE.mkdir(exist_ok=True)
    log = STATE / "molecule.log"
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "MOLECULE_", "PYTEST_"))
    }
    environment = kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MOLECULE_EPHEMERAL_DIRECTORY": str(STATE / "molecule-scratch"),
        "NO_COLOR": "1",
        "COLUMNS": "160",
    }
    with (
        log.open("w") as file,
        capsys.disabled(),
        subprocess.Popen(
            ["molecule", "test", "--all", *left_out],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as molecule,
    ):
        assert molecule.stdout
        for line in molecule.stdout:
            file.write(line)
            if NEWS.search(line):
                # A process of several has but its standard error in common with who started it.
                print(line.rstrip(), file=sys.stderr, flush=True)
    tail = "".join(log.read_text().splitlines(keepends=True)[-300:])
    assert molecule.returncode == 0, f"the whole output is in {log}\n{tail}"
