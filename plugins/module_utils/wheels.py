"""Wheels for hosts, fetched by the control node: pinned by hash, for any Python and platform, never built."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Debian 12 has glibc 2.36. pip matches platform tags exactly, so each older one is named.
GLIBC_MINORS = range(36, 16, -1)


class WheelError(Exception):
    """A wheel cannot be had; the message names the cause and the mend."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run(command: list[str], cwd: Path | None = None, **env: str) -> str:
    """Standard output of a command. Raises WheelError with its last lines where it fails."""
    # A site's own certificate authority is in the system's store.
    environment = {**os.environ, "UV_SYSTEM_CERTS": "true", **env}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
        raise WheelError(f"`{' '.join(command[:6])} ...` failed with exit status {done.returncode}:\n{tail}")
    return done.stdout


def platforms(architecture: str) -> list[str]:
    """The platform tags that Debian 12 and 13 can install from."""
    names = [f"manylinux_2_{minor}_{architecture}" for minor in GLIBC_MINORS]
    return [*names, f"manylinux2014_{architecture}", f"manylinux2010_{architecture}", f"manylinux1_{architecture}"]


def download(listed: str, python: str, architecture: str, pool: Path) -> tuple[list[Path], bool]:
    """Fetch the wheel of each requirement into the pool, where it is not there already.

    `listed` is a requirements file's text, every line with its hashes. Returns the wheels' paths, sorted by name, and
    whether any had to be fetched. Raises WheelError where there is no such wheel or its bytes are others.
    """
    wanted = set(re.findall(r"--hash=sha256:([0-9a-f]{64})", listed))
    listing = pool / f".{hashlib.sha256(f'{listed}{python}{architecture}'.encode()).hexdigest()[:16]}.json"
    if listing.exists():
        names = json.loads(listing.read_text())
        if all((pool / name).exists() and sha256(pool / name) in wanted for name in names):
            return [pool / name for name in names], False
    with tempfile.TemporaryDirectory(dir=pool) as scratch:
        file = Path(scratch) / "requirements.txt"
        file.write_text(listed)
        target = Path(scratch) / "wheels"
        tags = [option for name in platforms(architecture) for option in ("--platform", name)]
        try:
            run(
                [
                    *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"),
                    *("--only-binary=:all:", "--python-version", python, "--implementation", "cp", *tags),
                    *("--dest", str(target), "--requirement", str(file)),
                ],
                PIP_CONSTRAINT="",
            )
        except WheelError as error:
            raise WheelError(
                f"A wheel for Python {python} on {architecture} is missing; hosts install wheels only.\n{error}\n"
                "Mend: pin a version that has such a wheel, with its hash."
            ) from error
        names = sorted(path.name for path in target.iterdir())
        for name in names:
            (target / name).replace(pool / name)
    listing.write_text(json.dumps(names))
    return [pool / name for name in names], True
