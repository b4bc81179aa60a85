"""The index of one host as a playbook changes it, by the command line of the live release.

A step returns an Outcome, or raises StateError. In check mode it changes nothing and says what it would have changed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .release_service import Cli
from .release_state import StateError
from .release_steps import Host, Outcome

TIMEOUT_SECONDS = 600  # every byte of a snapshot is read before one goes back to it
RUNNING = ("activating", "active", "reloading", "deactivating")
TAIL = 20


def live_cli(host: Host) -> Cli:
    """The command line of the live release. Raises StateError where none is live."""
    current = host.releases.current()
    if current is None:
        raise StateError("no release is live on this host; run playbooks/deploy.yml first. Nothing was changed")
    host.releases.require(current)
    return Cli(host.releases.path(current))


def asked(cli: Cli, *arguments: str) -> Any:
    """What `ragrack index ... --json` prints. Raises StateError with its own words where it refuses."""
    return cli.index(*arguments, timeout=TIMEOUT_SECONDS)


def indexes(cli: Cli, collections: Sequence[str] = (), fingerprint: str | None = None) -> list[dict[str, Any]]:
    """`{collection, fingerprint, current, previous, held, snapshots}` of what the release opens, by collection."""
    fingerprint = fingerprint or cli.fingerprint(TIMEOUT_SECONDS)
    rows = [row for row in asked(cli, "list") if row["fingerprint"] == fingerprint]
    return [
        {
            "collection": name,
            "fingerprint": fingerprint,
            "current": next((row["snapshot"] for row in mine if row["current"]), None),
            "previous": next((row["snapshot"] for row in mine if row["previous"]), None),
            "held": next((row["held"] for row in mine if row["current"]), None),
            "snapshots": [row["snapshot"] for row in mine],
        }
        for name in collections or cli.collections()
        for mine in [[row for row in rows if row["collection"] == name]]
    ]


def query(host: Host, collections: Sequence[str], target: str | None, targets: Mapping[str, str]) -> Outcome:
    """The indexes of the live release; resolves `target` (`previous` or an id) to a snapshot for each collection.

    Raises StateError where one of `targets` is not there or not whole.
    """
    cli = live_cli(host)
    for collection, snapshot in targets.items():
        asked(cli, "rollback", "--dry-run", "--collection", collection, "--to", snapshot)
    facts: dict[str, Any] = {"indexes": indexes(cli, collections or list(targets))}
    if target is not None:
        to = [] if target == "previous" else ["--to", target]
        rows = asked(cli, "rollback", "--dry-run", *named(collections), *to)
        facts["targets"] = {row["collection"]: row["to"] for row in rows}
    return Outcome(facts=facts)


def rolled_back(host: Host, targets: Mapping[str, str], why: str) -> Outcome:
    """Go back to the snapshot named for each collection, and hold it. All of them are read before one is moved."""
    cli = live_cli(host)
    before = {index["collection"]: index for index in indexes(cli, list(targets))}
    moves = []
    for collection, snapshot in targets.items():
        now = before[collection]
        if now["current"] != snapshot or now["held"] is None:
            moves.append((collection, snapshot))
            asked(cli, "rollback", "--dry-run", "--collection", collection, "--to", snapshot)
    if not host.check:
        host.check_ours()
        for collection, snapshot in moves:
            asked(cli, "rollback", "--collection", collection, "--to", snapshot, "--why", why)
    return _moved(host, cli, before, dict(moves))


def resumed(host: Host, collections: Sequence[str], targets: Mapping[str, str]) -> Outcome:
    """Let go of what is held and move on: to the snapshot named in `targets`, else to what came last."""
    cli = live_cli(host)
    wanted = list(targets) or list(collections)
    before = {index["collection"]: index for index in indexes(cli, wanted)}
    held = [name for name, now in before.items() if now["held"] is not None]
    if not host.check:
        host.check_ours()
        for name in held:
            to = ["--to", targets[name]] if name in targets else []
            asked(cli, "resume", "--collection", name, *to)
    return _moved(host, cli, before, {name: targets.get(name, "the newest") for name in held})


def pruned(host: Host) -> Outcome:
    """Remove snapshots that no rollback needs, and whole indexes that no release on the host opens.

    Where it cannot be told what a release opens, all indexes stay, and `notes` say why. Before the first deploy there
    is nothing to remove.
    """
    if host.releases.current() is None:
        return Outcome(facts={"removed": {"snapshots": [], "indexes": [], "notes": []}})
    cli = live_cli(host)
    if not host.check:
        host.check_ours()
    gone = asked(cli, "prune", *(["--dry-run"] if host.check else []))
    facts = {"snapshots": gone["snapshots"], "indexes": gone["indexes"], "notes": gone["notes"]}
    return Outcome(bool(gone["snapshots"] or gone["indexes"]), {"removed": facts})


def ingested(host: Host, collection: str, wait: float, since: str | None) -> Outcome:
    """Run the ingestion's unit, or go on waiting for it, for `wait` seconds at most.

    Facts: `finished`; while it runs `since`, for the next call, and `progress` in words; then `result`, which is what
    `ragrack ingest --json` printed. In check mode no document is read, so it cannot tell what would change.
    """
    if host.check:
        return Outcome(facts={"finished": True, "result": None, "words": f"{collection}: check mode ingests nothing"})
    cli = live_cli(host)
    if collection not in cli.collections():
        there = ", ".join(cli.collections())
        raise StateError(f"the live release has no collection {collection}; it has {there}. Nothing was changed")
    unit = f"ragrack-ingest@{collection}.service"
    if not host.systemd.show(unit).loaded:
        raise StateError(f"there is no unit {unit} on this host; run playbooks/site.yml on it. Nothing was changed")
    host.check_ours()
    failed = None
    if since is None or host.systemd.show(unit).active in RUNNING:
        since = since or f"@{time.time():.6f}"
        failed = host.systemd.start(unit, wait)
    state = host.systemd.show(unit)
    said = host.systemd.said(unit, since)
    lines = [line for line in map(_object, said) if line is not None]
    if state.active in RUNNING:
        return Outcome(facts={"finished": False, "since": since, "progress": _progress(lines)})
    # Its own last word decides: it may have ended while `start` gave up waiting.
    result = next((line for line in reversed(lines) if "snapshot" in line), None)
    if result is None or state.active == "failed":
        why = f" ({failed})" if failed else ""
        raise StateError(f"{collection} was not ingested{why}; what served goes on serving", said[-TAIL:])
    changed = result["built"] or (result["live"] and result["snapshot"] != result["from"])
    return Outcome(changed, {"finished": True, "result": result, "words": _words(result)})


def pulled(host: Host, collections: Sequence[str], wait: float) -> Outcome:
    """Fetch what is live where snapshots are built, now; without this, the host does so by itself a little later."""
    if host.check:
        return Outcome(facts={"moves": []})
    cli = live_cli(host)
    before = {index["collection"]: index for index in indexes(cli, collections)}
    for collection in before:
        unit = f"ragrack-index-pull@{collection}.service"
        failed = host.systemd.start(unit, wait)
        if failed is not None:
            log = host.systemd.journal(unit)
            raise StateError(f"{collection} was not fetched: {failed}; what served goes on serving", log[-TAIL:])
    after = {index["collection"]: index["current"] for index in indexes(cli, collections)}
    return _moved(host, cli, before, {name: now for name, now in after.items() if now != before[name]["current"]})


def named(collections: Sequence[str]) -> list[str]:
    return [word for name in collections for word in ("--collection", name)]


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _progress(lines: Sequence[Mapping[str, Any]]) -> str:
    last = next((line for line in reversed(lines) if "stage" in line), None)
    return "starting" if last is None else f"{last['stage']} {last['done']}/{last['total']}"


def _words(result: Mapping[str, Any]) -> str:
    golden, held = result["golden"], result["held"]
    asked = f"hit rate {golden['hit_rate']:.3f}, MRR {golden['mrr']:.3f}" if golden else "no golden questions"
    counts = f"{result['documents']} documents, {result['nodes']} nodes, {len(result['skipped'])} skipped"
    live = "live" if result["live"] else "not live"
    if held and not result["live"]:
        live += f", held since {held['at']} ({held['why']}): -e index_resume=true lets go"
    return f"{result['collection']}: snapshot {result['snapshot']}, {counts}, {asked}, {live}"


def _moved(host: Host, cli: Cli, before: Mapping[str, Mapping[str, Any]], moves: Mapping[str, str]) -> Outcome:
    after = {index["collection"]: index for index in indexes(cli, list(before))} if moves and not host.check else before
    rows = [
        {
            "collection": name,
            "from": before[name]["current"],
            "to": moves.get(name, after[name]["current"]) if host.check else after[name]["current"],
            "held": after[name]["held"],
        }
        for name in before
    ]
    predicted = {"indexes": {row["collection"]: row["to"] for row in rows}}
    return Outcome(bool(moves), {"moves": rows}, predicted)
