"""The steps of a release's life on one host. Each checks first, then changes, and can be run again.

A step returns an Outcome, or raises StateError. In check mode it changes nothing and says what it would have changed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .fleet_lock import FleetLock
from .release_service import (
    Cli,
    Systemd,
    wait_for_empty_backlog,
    wait_until_ready,
    why_failed,
    why_not_answering,
    why_not_ready,
)
from .release_stage import Stager, unused_cache
from .release_state import Releases, StateError, exclusively
from .release_trial import Trials

RUNNING = "active,activating,reloading,deactivating"
TRIAL = "ragrack-trial.service"
EVENTS = (5000, 4000)
"""A history of more lines than the first is cut to the second: some hundreds of deploys."""
WARM = "waiting"  # a timer that is yet to fire; one that has fired may stay active as `elapsed`


@dataclass
class Outcome:
    """What a step did, or would do: `predicted` overrides the state of the host in the diff of check mode."""

    changed: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)


@dataclass
class Host:
    """One host, and the run that works on it."""

    releases: Releases
    systemd: Systemd
    run_dir: Path
    who: str
    run: str | None = None
    what: str = ""
    check: bool = False
    ready: Callable[[Path], str | None] = why_not_ready

    def unit(self, release: str) -> str:
        return f"ragrack@{release}.service"

    def timer(self, release: str) -> str:
        return f"ragrack-drain@{release}.timer"

    def socket(self, release: str) -> Path:
        """By the short path that gunicorn bound, which is also how the kernel lists it."""
        return self.run_dir / release / "gunicorn.sock"

    def running(self) -> list[str]:
        return self.systemd.instances("ragrack@.service", RUNNING)

    def warm(self) -> list[str]:
        """Releases that run until their time is up."""
        return self.systemd.instances("ragrack-drain@.timer", WARM)

    def could_go_live(self, release: str) -> bool:
        """Whether it runs, in a life that passed its gate, and is ready."""
        life = self.systemd.show(self.unit(release))
        gated = life.active == "active" and self.releases.gated_in(release) == life.invocation
        return gated and self.ready(self.socket(release)) is None

    def check_ours(self) -> None:
        """Raises StateError while another run holds the lock: what it is in the middle of is not ours to touch."""
        holder = FleetLock(self.releases.root).holder()
        if holder is not None and holder.run != self.run:
            raise StateError(f"{holder.words()}; nothing was changed")

    def state(self) -> dict[str, Any]:
        """What a diff shows."""
        return {
            "current": self.releases.current(),
            "releases": sorted(self.releases.all()),
            "running": self.running(),
            "bad": sorted(self.releases.bad()),
        }


def query(host: Host, target: str | None, history_lines: int) -> Outcome:
    """Facts of the host; resolves `target` (`previous` or an id) to what a rollback would go to."""
    releases = host.releases
    current, previous, bad = releases.current(), releases.previous(), releases.bad()
    running, warm = host.running(), host.warm()
    holder = FleetLock(releases.root).holder()
    facts: dict[str, Any] = {
        "releases": [
            {
                "id": release.id,
                "version": release.version,
                "artifact": release.artifact,
                "python": release.python,
                "staged_at": release.created,
                "live": release.id == current,
                "previous": release.id == previous,
                "bad": release.id in bad,
                "bad_reason": bad.get(release.id, ""),
                "running": release.id in running,
                "warm": release.id in warm,
            }
            for release in releases.all().values()
        ],
        "history": releases.history.read()[-history_lines:] if history_lines else [],
        "lock": None if holder is None else vars(holder),
    }
    if target is not None:
        facts["target"] = goes_to = releases.resolve(target)
        facts["ready"] = host.could_go_live(goes_to)
    return Outcome(facts=facts)


def settled(host: Host, release: str, collections: Iterable[str], index_dir: Path, away: Sequence[Outcome]) -> bool:
    """Whether a deploy of the release would leave this host as it is.

    It serves, for good, in a life that passed the gate and is ready; the next life can open its credentials; it has an
    index of each collection; and none of `away`, what draining and pruning would do in check mode, would change
    anything.
    """
    if host.releases.current() != release or Trials(host.releases).at_hand() is not None:
        return False
    path = host.releases.path(release)
    credentials = path / "credentials"
    environment = Cli(path).environment()
    indexed = environment.get("RAGRACK_VECTOR_STORE") == "postgres" or all(
        any((index_dir / name).glob("*/current")) for name in collections
    )
    return (
        indexed
        and credentials.exists() is credentials.is_symlink()
        and all(map(host.systemd.opens, credentials.glob("*")))
        and not any(outcome.changed for outcome in away)
        and host.could_go_live(release)
    )


def staged(host: Host, stager: Stager, min_free_mb: int) -> Outcome:
    """Build the release below `releases`, unless it is there."""
    releases = host.releases
    if stager.id in releases.all():
        return Outcome(facts={"env_built": False, "stage_seconds": {}})
    if releases.path(stager.id).exists():
        raise StateError(f"{releases.path(stager.id)} is there but has no release.json; look at it, then remove it")
    began = time.monotonic()
    stager.artifact.verify()
    verified = round(time.monotonic() - began, 3)
    stager.check_space(min_free_mb)
    predicted = {"releases": sorted([*releases.all(), stager.id])}
    if host.check:
        return Outcome(True, {"env_built": not stager.has_env, "stage_seconds": {"verify": verified}}, predicted)
    releases.dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    with exclusively(releases.dir):
        host.check_ours()
        if stager.id in releases.all():
            return Outcome(facts={"env_built": False, "stage_seconds": {}})
        built = stager.build()
        _note(host, "staged", stager.id)
    return Outcome(True, {"env_built": built, "stage_seconds": {"verify": verified, **stager.seconds}}, predicted)


def indexed(
    host: Host, release: str, collections: Sequence[str], index_dir: Path, timeout: float, env: str | None = None
) -> Outcome:
    """Build the snapshots that the release lacks: those of its own fingerprint.

    In check mode a release that is not staged is foretold from what is live with its settings, `env`: a new model or
    other code may have another fingerprint.
    """
    if host.check and release not in host.releases.all():
        current = host.releases.current()
        if current is None or env is None:
            return Outcome(True, {"missing_snapshots": list(collections)})
        cli = Cli(host.releases.path(current), env)
    else:
        host.releases.require(release)
        cli = Cli(host.releases.path(release))
    collections = collections or cli.collections()
    fingerprint = cli.fingerprint(timeout=60)

    def missing() -> list[str]:
        if cli.environment().get("RAGRACK_VECTOR_STORE") == "postgres":
            rows = cli.index("list", timeout=60)
            there = {row["collection"] for row in rows if row["current"] and row["fingerprint"] == fingerprint}
            return [name for name in collections if name not in there]
        return [name for name in collections if not (index_dir / name / fingerprint / "current").exists()]

    lacking = missing()
    facts = {"missing_snapshots": lacking, "fingerprint": fingerprint}
    if host.check or not lacking:
        return Outcome(bool(lacking), facts)
    unit = f"ragrack-index@{release}.service"
    _check_loaded(host, unit)
    failed = host.systemd.start(unit, timeout)
    if failed is None and missing():
        failed = f"{unit} ended without a snapshot of {', '.join(missing())} for fingerprint {fingerprint}"
    if failed is not None:
        log = host.systemd.journal(unit)
        host.systemd.stop(unit)
        raise StateError(f"the index of release {release} could not be built: {failed}", log, **facts)
    return Outcome(True, facts)


def started(host: Host, release: str, timeout: float) -> Outcome:
    """Start the release beside what is live and wait until it is ready. One that cannot is stopped and marked bad.

    Fact `gated`: whether it runs already, in a life that has passed its gate.
    """
    if host.check and release not in host.releases.all():
        return Outcome(True, predicted={"running": sorted({*host.running(), release})})
    host.releases.require(release)
    unit = host.unit(release)
    was_warm = release in host.warm()
    life = host.systemd.show(unit)
    done = life.active == "active" and host.ready(host.socket(release)) is None
    facts: dict[str, Any] = {"gated": done and host.releases.gated_in(release) == life.invocation}
    predicted = {"running": sorted({*host.running(), release})}
    if host.check:
        return Outcome(not done or was_warm, facts, predicted)
    _check_loaded(host, unit)
    if was_warm:
        host.systemd.stop(host.timer(release))  # or it would stop the release while it is being switched to
    if done:
        return Outcome(was_warm, facts, predicted)
    began = time.monotonic()
    failed = wait_until_ready(host.systemd, unit, host.socket(release), timeout, host.ready)
    if failed is not None:
        raise _failed(host, release, f"release {release} did not start: {failed}", failed)
    _note(host, "started", release)
    return Outcome(True, facts | {"start_seconds": round(time.monotonic() - began, 3)}, predicted)


def gated(host: Host, release: str, collections: Sequence[str], timeout: float, how: str = "deploy") -> Outcome:
    """Ask the golden questions of each collection. A release that does not pass is stopped and marked bad.

    A rollback does not wait for the language model: while that is down the way back must stay open.
    """
    if host.check:
        return Outcome(facts={"golden": {}})
    host.releases.require(release)
    life = host.systemd.show(host.unit(release))
    if life.active != "active":
        raise StateError(f"release {release} is {life.active}: it must be started before it is asked")
    cli, socket = Cli(host.releases.path(release)), host.socket(release)
    reports: dict[str, dict[str, Any]] = {}
    problems = []
    for collection in collections or cli.collections():
        try:
            report = cli.golden(collection, socket, socket.with_name("gate.key"), timeout, degraded=how == "rollback")
        except StateError as error:
            problems.append(str(error))
            continue
        reports[collection] = report
        if not report["passed"]:
            problems.append(f"{collection}: {why_failed(report)}")
    if problems:
        reason = "gate: " + " | ".join(problems)
        raise _failed(
            host, release, f"release {release} did not pass its gate: {' | '.join(problems)}", reason, reports
        )
    if host.systemd.show(host.unit(release)).invocation != life.invocation:
        raise _failed(host, release, f"release {release} was restarted while it was asked", "gate: it was restarted")
    if host.releases.gated_in(release) != life.invocation:
        _note(host, "gated", release)
    host.releases.remember_gate(release, life.invocation)
    return Outcome(facts={"golden": reports})


def live(host: Host, release: str, how: str, confirm_within: float = 0) -> Outcome:
    """Point `current` at the release, which must have passed its gate since it was started.

    With `confirm_within` seconds the host goes back by itself unless `confirmed` comes in time; where there is nothing
    to go back to, as in a first deploy, it stays. Again for the release that is on trial, the time counts anew.
    """
    current, trials = host.releases.current(), Trials(host.releases)
    predicted = {"current": release}
    if current == release:
        trial = trials.at_hand()
        if trial is not None and trial.release == release and confirm_within and not host.check:
            with exclusively(host.releases.dir):
                if host.releases.current() == release:
                    trials.begin(release, trial.back_to, host.run, confirm_within)
        return Outcome(facts={"flip_ms": 0.0}, predicted=predicted)
    if host.check and release not in host.releases.all():
        return Outcome(True, {"flip_ms": 0.0}, predicted)
    host.releases.require(release)
    if how == "rollback":
        host.releases.resolve(release)
    if host.check:
        return Outcome(True, {"flip_ms": 0.0}, predicted)
    with exclusively(host.releases.dir):
        host.check_ours()
        if release in host.warm():
            host.systemd.stop(host.timer(release))
        life = host.systemd.show(host.unit(release))
        if life.active != "active":
            raise StateError(f"release {release} is {life.active}; start it and ask it its questions first")
        if host.releases.gated_in(release) != life.invocation:
            raise StateError(f"release {release} has not passed its gate since it was started; ask its questions first")
        if current is not None:
            serving = host.systemd.show(host.unit(current))
            if serving.active == "active":  # it serves, in whichever life: the way back to it must stay open
                host.releases.remember_gate(current, serving.invocation)
        # The watch is there before what it watches: whoever dies between the two leaves a host that knows the way back.
        trials.end()
        if confirm_within and current is not None:
            trials.begin(release, current, host.run, confirm_within)
            failed = host.systemd.start(TRIAL, timeout=10)
            if failed is not None:
                trials.end()
                raise StateError(f"{failed}: without it this host could not go back by itself; nothing was changed")
        took = host.releases.flip(release, how=how, who=host.who, what=host.what, run=host.run)
    return Outcome(True, {"flip_ms": round(took, 2)}, predicted)


def answering(host: Host, release: str, edge: str, ca: Path, timeout: float, *, verify: bool) -> Outcome:
    """Wait until the edge answers from the release. Raises StateError where it does not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not host.check and (wrong := why_not_answering(edge, release, ca, verify=verify)) is not None:
        if time.monotonic() >= deadline:
            raise StateError(f"release {release} was not seen through the edge within {timeout:g} s: {wrong}")
        time.sleep(0.2)
    return Outcome()


def confirmed(host: Host, release: str) -> Outcome:
    """End the trial of the release that went live. Raises StateError where the host has gone back meanwhile."""
    if host.check:
        return Outcome()
    with exclusively(host.releases.dir):
        host.check_ours()
        current = host.releases.current()
        if current != release:
            raise StateError(
                f"this host serves {current}, not {release}: it went back by itself, as no confirmation came in time; "
                "its history says when. Give more time with -e release_confirm_timeout=SECONDS"
            )
        Trials(host.releases).end()
    return Outcome()


def drained(host: Host, keep_warm: float, settle: float, timeout: float, to: str | None = None) -> Outcome:
    """Send every other running release on its way.

    Where a rollback goes and what was live until the last flip stay warm if `keep_warm` is not 0, for as long as their
    timer on the host says. The rest, or all with 0, is stopped as soon as nothing has waited on its socket for
    `settle` seconds. In check mode `to` is what would be live by then.
    """
    current = host.releases.current()
    bad = host.releases.bad()
    flips = [event for event in host.releases.history.read() if event.get("event") == "live"]
    ways_back = {host.releases.previous(), *(flip["from"] for flip in flips[-1:])}
    if host.check and to not in (None, current):
        current, ways_back = to, {current}
    others = [release for release in host.running() if release != current]
    warm = set(host.warm())
    to_warm = [release for release in others if keep_warm > 0 and release in ways_back and release not in bad]
    to_stop = [release for release in others if release not in to_warm]
    new_warm = [release for release in to_warm if release not in warm]
    facts = {"stopped": to_stop, "warm": to_warm}
    predicted = {"running": [release for release in host.running() if release not in to_stop]}
    if host.check:
        return Outcome(bool(new_warm or to_stop), facts, predicted)
    for release in new_warm:
        host.systemd.restart(host.timer(release))
    dropped = 0
    for release in to_stop:
        dropped += wait_for_empty_backlog(host.systemd, host.socket(release), settle, timeout)
        if release in warm:
            host.systemd.stop(host.timer(release))
        host.systemd.stop(host.unit(release))
        host.releases.forget_gate(release)
    return Outcome(bool(new_warm or to_stop), {**facts, "dropped": dropped}, predicted)


def pruned(host: Host, keep: int, protect: set[str], cache: Path) -> Outcome:
    """Remove releases that nothing needs with their credentials, what dead runs left, and the cache's unused part."""
    releases = host.releases
    if not releases.dir.is_dir():
        return Outcome(facts={"removed": [], "removed_leftovers": []})
    with exclusively(releases.dir):
        host.check_ours()
        protect = protect | set(host.running()) | set(host.warm())
        gone = releases.prunable(keep, protect, host.run)
        stay = {release.env for release in releases.all().values() if release.id not in gone}
        leftovers = releases.leftovers()
        credentials = credentials_of(releases, gone) - credentials_of(releases, set(releases.all()) - set(gone))
        if not host.check:
            for release in gone:
                releases.remove(release)
        stale = [*leftovers, *unused_cache(cache, stay), *sorted(credentials)]
        if not host.check:
            releases.history.shorten(*EVENTS)
            for path in stale:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return Outcome(
        bool(gone or stale),
        {"removed": gone, "removed_leftovers": [str(path) for path in stale]},
        {"releases": sorted(set(releases.all()) - set(gone))},
    )


def credentials_of(releases: Releases, ids: Iterable[str]) -> set[Path]:
    """The generations of credentials that these releases read."""
    links = [releases.path(release) / "credentials" for release in ids]
    return {link.readlink() for link in links if link.is_symlink() and link.is_dir()}


def bad(host: Host, release: str, reason: str) -> Outcome:
    """Mark a release bad by hand."""
    host.releases.require(release)
    predicted = {"bad": sorted({*host.releases.bad(), release})}
    if host.check:
        return Outcome(host.releases.bad().get(release) != reason, predicted=predicted)
    return Outcome(host.releases.mark_bad(release, reason, who=host.who, run=host.run), predicted=predicted)


def audit(host: Host, record: Mapping[str, Any]) -> Outcome:
    """Add the play's one line to the history. To have written down what was done is no change of its own."""
    if not host.check:
        host.releases.root.mkdir(mode=0o755, parents=True, exist_ok=True)
        host.releases.history.append({"event": "audit", "who": host.who, "what": host.what, **record, "run": host.run})
    return Outcome()


def _note(host: Host, event: str, release: str) -> None:
    host.releases.history.append(
        {"event": event, "release": release, "who": host.who, "run": host.run, "what": host.what}
    )


def _check_loaded(host: Host, unit: str) -> None:
    if not host.systemd.show(unit).loaded:
        raise StateError(f"there is no unit {unit} on this host; run playbooks/site.yml on it. Nothing was changed")


def _failed(
    host: Host, release: str, message: str, reason: str, reports: Mapping[str, Any] | None = None
) -> StateError:
    """Stop and mark a release that failed, but never the one that serves, nor what another run has taken over."""
    log = host.systemd.journal(host.unit(release))
    facts = {"golden": dict(reports)} if reports is not None else {}
    if release == host.releases.current():
        return StateError(f"{message}; it is live, so it was left as it is", log, **facts)
    try:
        host.check_ours()
    except StateError as error:
        return StateError(f"{message}; it was left as it is: {error}", log, **facts)
    host.systemd.stop(host.unit(release))
    host.releases.mark_bad(release, reason, who=host.who, run=host.run)
    return StateError(f"{message}; it was stopped and marked bad", log, **facts)
