"""New snapshots from the host that ingests to this one: rsync over ssh, verified before it is opened.

What is fetched lies aside until every byte of it is what its manifest says. It can be killed at any point and run
again, and goes on where it was cut off. `current` moves last, or not at all. The golden questions were asked where the
snapshot was made, before it became the one to pull.

    <index_dir>/<collection>/<fingerprint>/snapshots/.pull-<id>/   what has been fetched of it
    <index_dir>/<collection>/<fingerprint>/pull.json               how the last pull ended
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ragrack import integrity
from ragrack.fingerprint import Fingerprint, ModelError
from ragrack.lock import BusyError, building
from ragrack.snapshot import (
    MANIFEST,
    SNAPSHOT_ID,
    Manifest,
    Snapshot,
    SnapshotDir,
    SnapshotError,
    timestamp,
    write_file,
)

if TYPE_CHECKING:
    from ragrack.progress import Progress
    from ragrack.settings import Settings

REFUSED_FOR = timedelta(minutes=15)
"""A damaged snapshot is not fetched again before that."""
ASK_AGAIN_SECONDS = 2
SILENT_SECONDS = 60
"""Without a byte from the source, after which the connection is given up."""
MANIFEST_BYTES = 16 * 1024 * 1024
SPARE_BYTES = 64 * 1024 * 1024
"""Left free on the disk."""
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class PullError(Exception):
    """What served goes on serving; the message says why and what mends it."""


class NotNowError(PullError):
    """Nothing is wrong here: the source has no snapshot yet or cannot be reached, or another run is at it."""


class DamagedError(PullError):
    """What the source has is not what its manifest says."""


@dataclass(frozen=True)
class Outcome:
    """How the last pull ended; `snapshot` is the one that the source names, where that is known."""

    at: str
    snapshot: str | None
    problem: str | None
    damaged: bool = False


def last(directory: SnapshotDir) -> Outcome | None:
    """None where nothing was ever pulled, or nobody can tell how it ended."""
    try:
        return Outcome(**json.loads((directory.root / "pull.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def pull(settings: Settings, collection: str, progress: Progress, wait: float = 0) -> Snapshot:
    """The snapshot that is live at the source, fetched if it is not here, and live here unless `current` is held.

    Where that cannot be now it is tried again for `wait` seconds. Raises PullError, NotNowError.
    """
    deadline = time.monotonic() + wait
    while True:
        try:
            return _pull(settings, collection, progress)
        except NotNowError as error:
            if time.monotonic() >= deadline:
                raise
            progress("wait", 0, 0, str(error))
        time.sleep(ASK_AGAIN_SECONDS)


def _pull(settings: Settings, collection: str, progress: Progress) -> Snapshot:
    if settings.index_source is None:
        raise PullError(
            "RAGRACK_INDEX_SOURCE is not set: this host ingests for itself, or was not told where to pull from"
        )
    source = _Source(settings.index_source, settings.index_ssh_config)
    try:
        directory = SnapshotDir(settings.index_dir, collection, Fingerprint.of(settings).digest)
        with building(settings.index_dir, collection):
            return _noted(source, directory, settings.keep_snapshots, progress)
    except BusyError as error:
        raise NotNowError(str(error)) from error
    except (ModelError, SnapshotError) as error:
        raise PullError(str(error)) from error
    except OSError as error:
        raise PullError(f"cannot write below {settings.index_dir}: {error}") from error


def _noted(source: _Source, directory: SnapshotDir, keep: int, progress: Progress) -> Snapshot:
    """Leaves how the pull ended, for /readyz and for the next one."""
    directory.snapshots.mkdir(parents=True, exist_ok=True)
    before = last(directory)
    wanted = None
    try:
        wanted = _current(source, directory)
        if before and before.problem and before.damaged and before.snapshot == wanted:
            again = datetime.fromisoformat(before.at) + REFUSED_FOR
            if again > datetime.now(UTC):
                raise _RefusedError(f"{before.problem}; it is fetched again after {again:%H:%M} UTC")
        snapshot = _bring(source, directory, wanted, keep, progress)
    except _RefusedError:
        raise
    except (PullError, SnapshotError, OSError) as error:
        outcome = Outcome(timestamp(), wanted, str(error), isinstance(error, DamagedError))
        _write_last(directory, outcome, before)
        raise
    _write_last(directory, Outcome(timestamp(), wanted, None), before)
    return snapshot


def _write_last(directory: SnapshotDir, outcome: Outcome, before: Outcome | None) -> None:
    # `at` is since when it is so, but a damaged snapshot's is when it was fetched last.
    if before is None or outcome.damaged or outcome != replace(before, at=outcome.at):
        write_file(directory.root / "pull.json", json.dumps(asdict(outcome)).encode())


def _bring(source: _Source, directory: SnapshotDir, snapshot_id: str, keep: int, progress: Progress) -> Snapshot:
    snapshot = _here(directory, snapshot_id)
    if snapshot is None:
        progress("fetch", 0, 0, f"snapshot {snapshot_id} is live at {source.name}")
        snapshot = _fetch(source, directory, snapshot_id, progress)
    before = directory.current_id()
    # Where the source went back, what it went back from is not where a rollback goes here.
    live = directory.offer(snapshot_id, "pull", back=snapshot_id in directory.ways_back())
    hold = directory.held()
    if not live and hold is not None:
        progress("done", 1, 1, f"snapshot {snapshot_id} is here and not live: {directory.collection} is {hold.words()}")
    elif before == snapshot_id:
        progress("done", 1, 1)
    else:
        directory.prune(keep)
        progress("done", 1, 1, f"snapshot {snapshot_id} is live")
    return snapshot


def _current(source: _Source, directory: SnapshotDir) -> str:
    """The id of the snapshot that is live at the source. Raises NotNowError."""
    link = directory.root / ".pull" / "current"
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    try:
        source.copy([f"{directory.collection}/{directory.fingerprint}/current"], link.parent, "--links")
        target = link.readlink()
    except (_AbsentError, FileNotFoundError) as error:
        raise NotNowError(
            f"{source.name} has no snapshot of {directory.collection} with fingerprint {directory.fingerprint} yet"
        ) from error
    except OSError as error:
        raise PullError(f"{source.name}: `current` of {directory.collection} is no link") from error
    if not SNAPSHOT_ID.fullmatch(target.name) or target.parent != Path("snapshots"):
        raise PullError(f"{source.name}: `current` of {directory.collection} points at {str(target)!r}")
    return target.name


def _here(directory: SnapshotDir, snapshot_id: str) -> Snapshot | None:
    """It, if it is on this host and whole."""
    with contextlib.suppress(SnapshotError):
        snapshot = directory.get(snapshot_id)
        integrity.check(directory, snapshot)
        if not integrity.is_noted(directory, snapshot):
            integrity.note(directory, snapshot)
        return snapshot
    return None


def _fetch(source: _Source, directory: SnapshotDir, snapshot_id: str, progress: Progress) -> Snapshot:
    aside = directory.snapshots / f".pull-{snapshot_id}"
    for left in directory.snapshots.glob(".pull-*"):
        if left != aside:
            shutil.rmtree(left)
    aside.mkdir(exist_ok=True)
    aside.chmod(0o755)
    remote = f"{directory.collection}/{directory.fingerprint}/snapshots/{snapshot_id}"
    try:
        source.copy([f"{remote}/{MANIFEST}"], aside, f"--max-size={MANIFEST_BYTES}")
        manifest = _manifest(directory, snapshot_id, aside)
        basis = _basis(directory)
        _resume(aside, manifest, basis)
        _space(directory, manifest, aside, basis)
        total = sum(entry.bytes for entry in manifest.files.values())

        def copy(names: Sequence[str], *options: str) -> None:
            # Of no file more than its manifest says, however much the source has of it.
            largest = max(manifest.files[name].bytes for name in names)
            source.copy(
                [f"{remote}/{name}" for name in names],
                aside,
                *("--partial", f"--max-size={largest}", *options),
                watch=lambda: progress("fetch", min(_size(aside), total), total),
            )

        copy(list(manifest.files), *([f"--link-dest={basis.path}"] if basis else []))
        for extra in {file.name for file in aside.iterdir()} - manifest.files.keys() - {MANIFEST}:
            (aside / extra).unlink()
        progress("verify", 0, total)
        wrong = integrity.damage(aside, manifest)
        if wrong and basis:
            # It may be what this host had that is damaged, and rsync took it for the same.
            for name in wrong:
                (aside / name).unlink(missing_ok=True)
            copy(list(wrong))
            wrong = integrity.damage(aside, manifest)
        progress("verify", total, total)
    except _AbsentError as error:
        raise NotNowError(f"{source.name}: snapshot {snapshot_id} went while it was fetched ({error})") from error
    except SnapshotError as error:
        wrong = {MANIFEST: str(error)}
    if wrong:
        shutil.rmtree(aside)
        raise DamagedError(f"snapshot {snapshot_id} of {source.name}: {'; '.join(wrong.values())}")
    return _publish(directory, aside, manifest)


def _manifest(directory: SnapshotDir, snapshot_id: str, aside: Path) -> Manifest:
    """What the source says of the snapshot. Raises SnapshotError where that is not what was asked for."""
    manifest = Manifest.read(aside)
    asked = (directory.collection, directory.fingerprint, snapshot_id)
    if (manifest.collection, manifest.fingerprint, manifest.id) != asked:
        raise SnapshotError(
            f"its manifest is that of {manifest.id} of {manifest.collection}/{manifest.fingerprint}, "
            f"not of {directory.collection}/{directory.fingerprint}"
        )
    bad = [name for name in manifest.files if name == MANIFEST or not FILE_NAME.fullmatch(name)]
    if bad or not manifest.files:
        raise SnapshotError(f"its manifest names files that no snapshot has: {', '.join(map(repr, bad)) or 'none'}")
    return manifest


def _basis(directory: SnapshotDir) -> Snapshot | None:
    """The live snapshot, of which rsync takes what has not changed."""
    try:
        current = directory.current()
        if current is not None:
            current.check()
        return current
    except SnapshotError:
        return None


def _resume(aside: Path, manifest: Manifest, basis: Snapshot | None) -> None:
    """Makes what a cut left the beginning of what is to come."""
    for name, entry in manifest.files.items():
        file = aside / name
        for left in aside.glob(f".{name}.??????"):
            # A killed rsync could not give it the name that the next one looks for.
            if not file.exists() or left.stat().st_size > file.stat().st_size:
                left.replace(file)
            else:
                left.unlink()
        if basis and file.exists() and file.stat().st_size < entry.bytes and (basis.path / name).exists():
            # rsync looks at nothing but this file now, so that it must hold all that need not travel.
            file.chmod(0o600)
            with file.open("ab") as end, (basis.path / name).open("rb") as old:
                shutil.copyfileobj(old, end, 1024 * 1024)


def _space(directory: SnapshotDir, manifest: Manifest, aside: Path, basis: Snapshot | None) -> None:
    have = basis.manifest.files if basis else {}
    need = sum(entry.bytes for name, entry in manifest.files.items() if have.get(name) != entry)
    free = shutil.disk_usage(directory.root).free + _size(aside)
    if free < need + SPARE_BYTES:
        raise PullError(
            f"snapshot {manifest.id} needs {need / 1e6:.0f} MB and some more below {directory.root}, which has "
            f"{free / 1e6:.0f} MB free: free some"
        )


def _publish(directory: SnapshotDir, aside: Path, manifest: Manifest) -> Snapshot:
    damaged = directory.snapshots / manifest.id
    if damaged.exists():
        damaged.rename(damaged.with_name(f".pull-damaged-{manifest.id}"))
    snapshot = directory.publish(aside, manifest)
    integrity.note(directory, snapshot)
    for left in directory.snapshots.glob(".pull-damaged-*"):
        shutil.rmtree(left)
    return snapshot


def _size(aside: Path) -> int:
    size = 0
    for file in aside.iterdir():
        # rsync renames what it has finished.
        with contextlib.suppress(FileNotFoundError):
            size += file.stat().st_size
    return size


class _AbsentError(Exception):
    """The source has no such file."""


class _RefusedError(PullError):
    """The source's snapshot was damaged a moment ago."""


@dataclass(frozen=True)
class _Source:
    """Where snapshots come from. It is trusted to name what is live, and with nothing else."""

    address: str
    ssh_config: Path

    @property
    def name(self) -> str:
        """For messages."""
        return self.address.rstrip(":/")

    def copy(self, paths: Sequence[str], to: Path, *options: str, watch: Callable[[], None] | None = None) -> None:
        """Copies plain files, or with `--links` links, into a directory; calls `watch` once a second.

        Raises _AbsentError where the source has no such file, NotNowError where it cannot be asked.
        """
        command = [
            *("rsync", "--rsh", f"ssh -F {self.ssh_config}", f"--timeout={SILENT_SECONDS}"),
            *("--times", "--perms", "--chmod=F0444", "--no-links", "--no-devices", "--no-specials", *options),
            *("--", *(f"{self.address}{path}" for path in paths), f"{to}/"),
        ]
        with tempfile.TemporaryFile("w+") as complaints:
            with _started(command, complaints) as process:
                try:
                    while process.poll() is None:
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            process.wait(1)
                        if watch:
                            watch()
                except BaseException:
                    process.terminate()
                    raise
            complaints.seek(0)
            said = "; ".join(line.strip() for line in complaints.readlines(2000) if line.strip())
        if process.returncode != 0:
            if "No such file or directory" in said:
                raise _AbsentError(said)
            raise NotNowError(f"{self.name} cannot be copied from (rsync {process.returncode}): {said}")


def _started(command: Sequence[str], complaints: IO[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=complaints)
    except FileNotFoundError as error:
        raise PullError(f"{command[0]} is not installed on this host: run playbooks/site.yml") from error
