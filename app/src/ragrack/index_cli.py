"""`ragrack index ...`: snapshots as an operator sees them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragrack.command import RefusedError, print_json
from ragrack.settings import Settings

if TYPE_CHECKING:
    from ragrack.snapshot import SnapshotDir


def add_commands(commands: Any) -> None:
    """`commands`: what `add_subparsers` of the whole command line gave."""
    index = commands.add_parser("index", help="look at snapshots").add_subparsers(required=True, metavar="COMMAND")
    for name, what, run in (
        ("list", "list snapshots", _list),
        ("show", "show one", _show),
        ("verify", "compare one with its manifest", _verify),
    ):
        command = index.add_parser(name, help=what)
        command.add_argument("--collection", help="of this collection; all by default")
        if run is not _list:
            command.add_argument("--snapshot", help="its id; the current one by default")
        command.add_argument("--json", action="store_true")
        command.set_defaults(run=run)


def _list(arguments: argparse.Namespace) -> int:
    rows = []
    for directory in _directories(arguments.collection):
        current = directory.current_id()
        for snapshot in directory.list():
            row = {"collection": directory.collection, "fingerprint": directory.fingerprint, "snapshot": snapshot.id}
            rows.append({**row, "current": snapshot.id == current, **figures(snapshot.manifest)})
    if arguments.json:
        print_json(rows)
        return 0
    for row in rows:
        mark = "*" if row["current"] else " "
        print(f"{mark} {row['collection']} {row['fingerprint']} {row['snapshot']} {row['nodes']} nodes")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    import dataclasses

    from ragrack.snapshot import SnapshotError

    shown = []
    try:
        for directory, snapshot_id in _chosen(arguments):
            shown.append(dataclasses.asdict(directory.get(snapshot_id).manifest))
    except SnapshotError as error:
        raise RefusedError(str(error)) from error
    print_json(shown)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from ragrack.snapshot import SnapshotError

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


def _directories(collection: str | None) -> list[SnapshotDir]:
    """Of every fingerprint: those of other releases are worth seeing too, so no embedding model is asked for."""
    from ragrack.snapshot import SnapshotDir

    root = Path(os.environ.get("RAGRACK_INDEX_DIR") or Settings.model_fields["index_dir"].default)
    return [d for d in SnapshotDir.all(root) if collection in (None, d.collection)]


def _chosen(arguments: argparse.Namespace) -> list[tuple[SnapshotDir, str]]:
    chosen = []
    for directory in _directories(arguments.collection):
        snapshot_id = arguments.snapshot or directory.current_id()
        if snapshot_id is not None and (arguments.snapshot is None or (directory.snapshots / snapshot_id).is_dir()):
            chosen.append((directory, snapshot_id))
    if not chosen:
        raise RefusedError("there is no such snapshot; `ragrack index list` shows those there are")
    return chosen


def figures(manifest: Any) -> dict[str, Any]:
    names = ("created", "documents", "nodes", "engine", "golden", "skipped")
    return {name: getattr(manifest, name) for name in names}
