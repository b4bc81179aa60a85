"""A switch on trial: where nobody confirms it in time, the host goes back to what it ran, by itself.

This file and release_state.py know nothing of Ansible: role `release` installs both on the hosts, as a package, where
ragrack-trial.service runs this one while a switch waits to be confirmed, and ragrack.service at boot.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .release_state import Releases, StateError, exclusively, fsync_dir, now, write_atomically

ROOT = Path("/opt/ragrack")
THIS_HOST = "this host"
LOOK_SECONDS = 0.5

Start = Callable[[str], None]
"""Starts a unit of systemd by its name. Raises StateError."""


@dataclass(frozen=True)
class Trial:
    """`until`: seconds since the epoch."""

    release: str
    back_to: str
    run: str | None
    since: str
    until: float


class Trials:
    """The one trial of a host, in `<root>/trial.json`."""

    def __init__(self, releases: Releases) -> None:
        self._releases = releases
        self._path = releases.root / "trial.json"

    def at_hand(self) -> Trial | None:
        """Raises StateError for a file that this class did not write."""
        try:
            facts = json.loads(self._path.read_text())
            return Trial(**{field.name: facts[field.name] for field in fields(Trial)})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise StateError(f"{self._path} is damaged ({type(error).__name__}); look at it, then remove it") from error

    def begin(self, release: str, back_to: str, run: str | None, seconds: float) -> None:
        """Or go on: the time counts from now."""
        before = self.at_hand()
        since = before.since if before is not None and before.release == release else now()
        trial = Trial(release, back_to, run, since, time.time() + seconds)
        write_atomically(self._path, json.dumps(asdict(trial)) + "\n")

    def end(self) -> None:
        """If there is one."""
        self._path.unlink(missing_ok=True)
        fsync_dir(self._path.parent)

    def go_back(self, start: Start) -> str | None:
        """Ends the trial at hand by going back, where its release is live. Returns where to.

        The release that it goes back to is running, unless the host was restarted: then it is started first.
        """
        with exclusively(self._releases.dir):
            trial = self.at_hand()
            if trial is None:
                return None
            if self._releases.current() != trial.release:
                self.end()
                return None
            start(f"ragrack@{trial.back_to}.service")
            what = f"nobody confirmed release {trial.release}, which was switched to at {trial.since}"
            self._releases.flip(trial.back_to, how="rollback", who=THIS_HOST, what=what, run=trial.run)
            self._releases.history.append(
                {
                    "event": "audit",
                    "who": THIS_HOST,
                    "what": what,
                    "from": trial.release,
                    "to": trial.back_to,
                    "result": "went back by itself",
                    "run": trial.run,
                }
            )
            self.end()
        # Warm for a while, as after any switch; then its requests have ended.
        start(f"ragrack-drain@{trial.release}.timer")
        return trial.back_to


def watch(trials: Trials, start: Start, *, over: bool) -> str | None:
    """Waits until the trial at hand is confirmed or its time is up, and goes back then; with `over`, at once."""
    while (trial := trials.at_hand()) is not None:
        left = trial.until - time.time()
        if over or left <= 0:
            return trials.go_back(start)
        time.sleep(min(LOOK_SECONDS, left))
    return None


def start_unit(unit: str) -> None:
    done = subprocess.run(["systemctl", "start", unit], capture_output=True, text=True, check=False)
    if done.returncode:
        raise StateError(f"{unit} cannot be started: {done.stderr.strip()}")


def start_later(unit: str) -> None:
    """At boot, where waiting for a unit would wait for ourselves: ragrack.service starts what `current` points at."""
    with contextlib.suppress(OSError):
        subprocess.run(["systemctl", "start", "--no-block", unit], capture_output=True, check=False)


def main() -> int:
    over = sys.argv[1:] == ["--over"]
    try:
        went = watch(Trials(Releases(ROOT)), start_later if over else start_unit, over=over)
    except (StateError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if went is not None:
        print(f"nobody confirmed the switch in time: this host went back to release {went}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
