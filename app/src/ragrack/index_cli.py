"""`ragrack index ...`: snapshots as an operator sees them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ragrack import catalog
from ragrack.catalog import Snapshots
from ragrack.command import (
    RefusedError,
    act_as_owner,
    collections_of,
    own_release,
    print_json,
    settings_here,
    snapshots_of,
)
from ragrack.embedded import EmbeddedSnapshots
from ragrack.lock import BusyError, building
from ragrack.needed import opened_by, unneeded
from ragrack.settings import Settings, SettingsError
from ragrack.snapshot import Hold, SnapshotError, UnavailableError


def add_commands(commands: Any) -> None:
    """`commands`: what `add_subparsers` of the whole command line gave."""
    index = commands.add_parser("index", help="look at snapshots, go back to one, remove old ones").add_subparsers(
        required=True, metavar="COMMAND"
    )
    listed = index.add_parser("list", help="list snapshots: which is live, where a rollback goes, what is held")
    show = index.add_parser("show", help="show one")
    verify = index.add_parser("verify", help="compare one with its manifest")
    for command in (listed, show, verify):
        command.add_argument("--collection", help="of this collection; all by default")
    for command in (show, verify):
        command.add_argument("--snapshot", help="its id; the current one by default")
    rollback = index.add_parser("rollback", help="go back to the snapshot that served before, and hold it there")
    rollback.add_argument("--why", default="rollback", help="for those who find it held")
    resume = index.add_parser("resume", help="let go of what a rollback holds, and move on to the newest snapshot")
    rollback.add_argument("--dry-run", action="store_true", help="change nothing, tell where it would go")
    for command in (rollback, resume):
        command.add_argument("--collection", action="append", help="this one (may be repeated); all by default")
        command.add_argument("--to", metavar="ID", help="to this snapshot")
    prune = index.add_parser("prune", help="remove snapshots that no rollback needs, and indexes that no release needs")
    prune.add_argument("--keep", type=_positive, help="how many to keep; default: RAGRACK_KEEP_SNAPSHOTS")
    prune.add_argument("--dry-run", action="store_true", help="remove nothing, tell what would go")
    move = index.add_parser("move", help="publish what is staged or live in the other store, without embedding it anew")
    move.add_argument("--to", choices=("embedded", "postgres"), required=True, help="the store that it goes to")
    move.add_argument("--collection", action="append", help="this one (may be repeated); all by default")
    for command, run in (
        (move, _move),
        (listed, _list),
        (show, _show),
        (verify, _verify),
        (rollback, _rollback),
        (resume, _resume),
        (prune, _prune),
    ):
        command.add_argument("--json", action="store_true")
        command.set_defaults(run=run)

    pull = index.add_parser("pull", help="fetch what is live at the host that ingests, and switch to it")
    which = pull.add_mutually_exclusive_group()
    which.add_argument("--collection", action="append", help="of this collection (may be repeated); of all by default")
    which.add_argument("--missing", action="store_true", help="only of those that have no snapshot for these settings")
    pull.add_argument(
        "--wait", type=float, default=0, metavar="SECONDS", help="how long to wait for a source that has none yet"
    )
    pull.add_argument("--json", action="store_true", help="progress and result as JSON lines")
    pull.set_defaults(run=_pull)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def _list(arguments: argparse.Namespace) -> int:
    rows = []
    for directory in _directories(arguments.collection):
        current, previous, hold = directory.current_id(), directory.previous_id(), directory.held()
        for snapshot in directory.list():
            held = hold if snapshot.id == current else None
            rows.append(
                {
                    **_whose(directory),
                    "snapshot": snapshot.id,
                    "current": snapshot.id == current,
                    "previous": snapshot.id == previous,
                    "held": asdict(held) if held else None,
                    **figures(snapshot.manifest),
                }
            )
            if not arguments.json:
                mark = "*" if snapshot.id == current else "<" if snapshot.id == previous else " "
                note = f", {held.words()}" if held else ""
                name = f"{directory.collection} {directory.fingerprint} {snapshot.id}"
                print(f"{mark} {name} {snapshot.manifest.nodes} nodes{note}")
    if arguments.json:
        print_json(rows)
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    settings = settings_here()
    act_as_owner(settings.index_dir)
    going = []
    problems = []
    for directory in _named(settings, arguments):
        try:
            going.append((directory, _target(directory, arguments.to)))
        except SnapshotError as error:
            problems.append(f"{directory.collection}: {error}")
    if problems:
        raise RefusedError("\n".join([*problems, "Nothing was changed; --collection and --to choose otherwise."]))
    results = []
    for directory, target in going:
        before = directory.current_id()
        if not arguments.dry_run:
            directory.hold(arguments.why)
            directory.flip(target, arguments.why, back=True)
        results.append(_moved(directory, before, target))
    _tell(results, arguments)
    return 0


def _target(directory: Snapshots, named: str | None) -> str:
    """It was sound when it last served; all of it is read before it serves again."""
    damage = []
    for snapshot_id in [named] if named else directory.ways_back():
        try:
            directory.verify(snapshot_id)
        except SnapshotError as error:
            damage.append(str(error))
        else:
            return snapshot_id
    there = ", ".join(snapshot.id for snapshot in directory.list()) or "none"
    raise SnapshotError("; ".join(damage) or f"no whole snapshot served before the live one; there are: {there}")


def _resume(arguments: argparse.Namespace) -> int:
    settings = settings_here()
    act_as_owner(settings.index_dir)
    results = []
    for directory in _named(settings, arguments):
        before = directory.current_id()
        try:
            directory.resume(arguments.to)
        except SnapshotError as error:
            raise RefusedError(f"{directory.collection}: {error}") from error
        results.append(_moved(directory, before, directory.current_id()))
    _tell(results, arguments)
    return 0


def _moved(directory: Snapshots, before: str | None, after: str | None) -> dict[str, Any]:
    held = directory.held()
    return {**_whose(directory), "from": before, "to": after, "held": asdict(held) if held else None}


def _tell(results: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print_json(results)
        return
    for row in results:
        moved = f"{row['to']} was live already" if row["from"] == row["to"] else f"{row['from']} -> {row['to']}"
        held = Hold(**row["held"]).words() if row["held"] else "not held"
        print(f"{row['collection']}: {moved}; {held}")


def _named(settings: Settings, arguments: argparse.Namespace) -> Sequence[Snapshots]:
    """Those that --collection names; with --to, the one that has that snapshot; else all. Of these settings' own."""
    directories = [snapshots_of(settings, name) for name in collections_of(settings, arguments.collection)]
    if arguments.to is None:
        return directories
    having = [directory for directory in directories if arguments.to in directory.ids()]
    if having:
        return having
    there = [f"{d.collection} {snapshot.id}" for d in directories for snapshot in d.list()]
    raise RefusedError(
        f"no snapshot {arguments.to} has the fingerprint of these settings; there are: {', '.join(there) or 'none'}"
    )


def _prune(arguments: argparse.Namespace) -> int:
    settings = settings_here()
    act_as_owner(settings.index_dir)
    keep = arguments.keep or settings.keep_snapshots
    release = own_release()
    try:
        there = [*catalog.every(settings)]
    except SnapshotError as error:
        raise RefusedError(str(error)) from error
    if settings.vector_store == "postgres":
        # What has been staged for an index lies on this host, wherever the index is.
        there += catalog.every(settings.model_copy(update={"vector_store": "embedded"}))
    # To ask each release takes its time, and mostly there are no indexes but those of the one that this is.
    own = opened_by(settings)
    others = [directory for directory in there if (directory.collection, directory.fingerprint) not in own]
    indexes, notes = unneeded(others, release.parent if release else None) if others or not release else ([], [])
    if not arguments.dry_run:
        indexes = [directory for directory in indexes if _discarded(settings, directory, notes)]
    snapshots = []
    for directory in there:
        if directory not in indexes:
            gone = directory.prunable(keep) if arguments.dry_run else directory.prune(keep)
            snapshots += [{**_whose(directory), "snapshot": snapshot_id} for snapshot_id in gone]
    if arguments.json:
        print_json({"snapshots": snapshots, "indexes": [_whose(directory) for directory in indexes], "notes": notes})
        return 0
    would = "would be " if arguments.dry_run else ""
    for row in snapshots:
        print(f"{row['collection']} {row['fingerprint']} {row['snapshot']} {would}removed")
    for directory in indexes:
        print(f"{directory.collection} {directory.fingerprint} {would}removed: no release on this host opens it")
    for note in notes:
        print(note, file=sys.stderr)
    return 0


def _discarded(settings: Settings, directory: Snapshots, notes: list[str]) -> bool:
    try:
        with building(settings.index_dir, directory.collection):
            directory.discard()
    except (BusyError, UnavailableError) as error:
        notes.append(f"{directory.collection} {directory.fingerprint} stays: {error}")
        return False
    return True


def _whose(directory: Snapshots) -> dict[str, str]:
    return {"collection": directory.collection, "fingerprint": directory.fingerprint}


def _show(arguments: argparse.Namespace) -> int:
    shown = []
    try:
        for directory, snapshot_id in _chosen(arguments):
            shown.append(asdict(directory.get(snapshot_id).manifest))
    except SnapshotError as error:
        raise RefusedError(str(error)) from error
    print_json(shown)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    results = []
    for directory, snapshot_id in _chosen(arguments):
        problem = None
        try:
            directory.verify(snapshot_id)
        except SnapshotError as error:
            problem = str(error)
        results.append({"collection": directory.collection, "snapshot": snapshot_id, "problem": problem})
    if arguments.json:
        print_json(results)
    else:
        for result in results:
            print(f"{result['collection']} {result['snapshot']}: {result['problem'] or 'as its manifest says'}")
    return 1 if any(result["problem"] for result in results) else 0


def _move(arguments: argparse.Namespace) -> int:
    from ragrack.move import MoveError, move
    from ragrack.progress import progress_to

    settings = settings_here()
    if arguments.to == "postgres" and not settings.postgres_hosts:
        raise RefusedError("RAGRACK_POSTGRES_HOSTS is not set: it says where PostgreSQL is")
    if settings.vector_store == "qdrant":
        raise RefusedError("an index with vectors in Qdrant has a fingerprint of its own: deploy for the other store")
    act_as_owner(settings.index_dir)
    failed = 0
    for name in collections_of(settings, arguments.collection):
        try:
            outcome = move(settings, name, arguments.to, progress_to(sys.stderr, arguments.json))
        except MoveError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = 1
            continue
        if arguments.json:
            row = {"collection": name, "to": arguments.to, "snapshot": outcome.snapshot.id, "source": outcome.source}
            print_json({**row, **figures(outcome.snapshot.manifest)})
        else:
            print(f"{name}: snapshot {outcome.snapshot.id} in the {arguments.to} store, from {outcome.source}")
    return failed


def _pull(arguments: argparse.Namespace) -> int:
    from ragrack.progress import progress_to
    from ragrack.pull import PullError, pull

    settings = settings_here()
    if settings.vector_store == "postgres":
        print("nothing to fetch: every host asks the same database", file=sys.stderr)
        return 0
    act_as_owner(settings.index_dir)
    collections = collections_of(settings, arguments.collection)
    if arguments.missing:
        collections = [name for name in collections if snapshots_of(settings, name).current_id() is None]
    if not collections:
        print("every collection has a snapshot", file=sys.stderr)
        return 0
    failed = 0
    deadline = time.monotonic() + arguments.wait
    for name in collections:
        progress = progress_to(sys.stderr, arguments.json)
        try:
            snapshot = pull(settings, name, progress, wait=deadline - time.monotonic())
        except PullError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = 1
            continue
        if arguments.json:
            print_json({"collection": name, "snapshot": snapshot.id, **figures(snapshot.manifest)})
        else:
            print(f"{name}: snapshot {snapshot.id}")
    return failed


def _directories(collection: str | None) -> list[Snapshots]:
    """Of every fingerprint: those of other releases are worth seeing too, so no embedding model is asked for."""
    try:
        there = catalog.every(settings_here())
    except SettingsError:
        # What lies on this host can be looked at whatever the settings say.
        root = Path(os.environ.get("RAGRACK_INDEX_DIR") or Settings.model_fields["index_dir"].default)
        there = EmbeddedSnapshots.all(root)
    except SnapshotError as error:
        raise RefusedError(str(error)) from error
    return [one for one in there if collection in (None, one.collection)]


def _chosen(arguments: argparse.Namespace) -> list[tuple[Snapshots, str]]:
    chosen = []
    for directory in _directories(arguments.collection):
        snapshot_id = arguments.snapshot or directory.current_id()
        if snapshot_id is not None and (arguments.snapshot is None or snapshot_id in directory.ids()):
            chosen.append((directory, snapshot_id))
    if not chosen:
        raise RefusedError("there is no such snapshot; `ragrack index list` shows those there are")
    return chosen


def figures(manifest: Any) -> dict[str, Any]:
    names = ("created", "documents", "nodes", "engine", "golden", "skipped")
    return {name: getattr(manifest, name) for name in names}
