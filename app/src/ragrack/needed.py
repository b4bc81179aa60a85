"""Which indexes on this host no release can open: they went with their release, or with its settings."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ragrack.catalog import Snapshots
from ragrack.fingerprint import Fingerprint, ModelError
from ragrack.settings import Settings, read_env_file

TIMEOUT_SECONDS = 60


class _UnsureError(Exception):
    """What a release needs cannot be told; the message says of which and why."""


def unneeded(there: Sequence[Snapshots], releases: Path | None) -> tuple[Sequence[Snapshots], list[str]]:
    """Those that none of the `releases` opens, and why there are none where that cannot be told."""
    if releases is None:
        return [], [
            "indexes of other fingerprints stay: not run by a deployed release, so it cannot tell who needs them"
        ]
    try:
        needed = {pair for release in _releases(releases) for pair in _opens(release)}
    except _UnsureError as error:
        return [], [f"indexes of other fingerprints stay: {error}"]
    return [d for d in there if (d.collection, d.fingerprint) not in needed], []


def opened_by(settings: Settings) -> set[tuple[str, str]]:
    """(collection, fingerprint) of the indexes that these settings open; none where their model cannot be read."""
    try:
        fingerprint = Fingerprint.of(settings).digest
    except ModelError:
        return set()
    return {(collection, fingerprint) for collection in settings.collections}


def _releases(directory: Path) -> Sequence[Path]:
    found = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    if not found:
        raise _UnsureError(f"{directory} holds no release")
    return found


def _opens(release: Path) -> Sequence[tuple[str, str]]:
    """(collection, fingerprint) of the indexes of a release, which tells its own: its code is part of the answer."""
    variables, problems = read_env_file(release / "app.env")
    names = [name.strip() for name in variables.get("RAGRACK_COLLECTIONS", "").split(",") if name.strip()]
    if problems or not names:
        raise _UnsureError(f"{release / 'app.env'} cannot be read or names no collections")
    model = next(release.glob("models/*"), release / "models")
    command = [str(release / "venv/bin/python"), "-I", "-B", "-m", "ragrack", "config", "fingerprint"]
    command += ["--env-file", str(release / "app.env"), "--model-dir", str(model)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False, cwd="/")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _UnsureError(f"release {release.name} does not tell its fingerprint ({error})") from error
    fingerprint = done.stdout.strip()
    if done.returncode != 0 or not re.fullmatch("[0-9a-f]{16}", fingerprint):
        raise _UnsureError(f"release {release.name} does not tell its fingerprint ({done.stderr.strip()})")
    return [(name, fingerprint) for name in names]
