"""Kills an ingest at each of its points in turn, from nothing each time, then lets another come to its end.

A point is a call of its progress, or one that makes something durable or gives it its name. For each it prints a JSON
line: what had been reported, what was kept, what is live, what is left. One process forks for each run, as the imports
take longer than the runs.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ragrack.ingest
from ragrack.fingerprint import Fingerprint
from ragrack.settings import Settings
from ragrack.snapshot import SnapshotDir, SnapshotError
from ragrack.staging import Staging

ragrack.ingest.BATCH_CHARACTERS = 3_000


def ingest(settings: Settings, last: int, told: Path) -> None:
    """Writes the name of each point to `told`, and dies at the `last`."""
    points = itertools.count(1)

    def point(name: str) -> None:
        with told.open("a") as file:
            file.write(f"{name}\n")
        if next(points) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            point(name)
            return call(*arguments, **options)

        return wrapped

    for name in ("fsync", "rename", "replace"):
        setattr(os, name, before(name, getattr(os, name)))

    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        point(f"{stage} {done}")

    ragrack.ingest.ingest(settings, "manual", progress)


def forked(run: Callable[[], None]) -> int:
    """Its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(settings: Settings) -> None:
    directory = SnapshotDir(settings.index_dir, "manual", Fingerprint.of(settings).digest)
    told = settings.index_dir.with_name("told")
    for last in itertools.count(1):
        shutil.rmtree(settings.index_dir, ignore_errors=True)
        told.unlink(missing_ok=True)
        status = forked(lambda: ingest(settings, last, told))  # noqa: B023 it is over before the next
        if status == 0:
            return
        assert status == -signal.SIGKILL, f"a run ended with {status}"
        points = [line.split() for line in told.read_text().splitlines()]
        result: dict[str, Any] = {
            "point": points[-1][0],
            "reported": max((int(done) for stage, *rest in points if stage == "embed" for done in rest), default=0),
            "kept": kept(directory),
            "damage": damage(directory),
        }
        assert forked(lambda: ingest(settings, 0, told)) == 0
        live = directory.current()
        assert live is not None
        directory.verify(live.id)
        result |= {"live": live.id, "content": live.manifest.content}
        result["left"] = sorted(path.name for path in directory.root.iterdir())
        result["snapshots"] = sorted(path.name for path in directory.snapshots.iterdir())
        print(json.dumps(result), flush=True)


def kept(directory: SnapshotDir) -> int:
    path = directory.root / "staging.sqlite"
    if not path.exists():
        return 0
    staging = Staging(path)
    try:
        return len(staging.files())
    finally:
        staging.close()


def damage(directory: SnapshotDir) -> str | None:
    snapshot_id = directory.current_id()
    try:
        if snapshot_id is not None:
            directory.verify(snapshot_id)
    except SnapshotError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main(Settings.model_validate_json(sys.argv[1]))
