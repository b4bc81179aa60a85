"""Random deploys, rollbacks, prunes, bad marks and deaths on a real file system, against a model of a few lines."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from module_utils import release_steps as steps
from module_utils.release_service import Systemd, Unit
from module_utils.release_state import Releases, StateError
from module_utils.release_trial import Trials

NAMES = [f"1-{letter * 12}" for letter in "abcdef"]


class PowerError(Exception):
    """The host lost power here."""


class Units(Systemd):
    """Units in memory; a start fails where a step asks for it."""

    def __init__(self) -> None:
        self.lives: dict[str, str] = {}
        self.timers: set[str] = set()
        self.starts = 0
        self.fail_next = False

    def show(self, unit: str) -> Unit:
        life = self.lives.get(unit, "")
        return Unit(True, "active" if life else "inactive", "success", life)

    def start(self, unit: str, timeout: float) -> str | None:
        if self.fail_next:
            self.fail_next = False
            return f"{unit} failed to start"
        self.starts += 1
        self.lives.setdefault(unit, f"life{self.starts}")
        return None

    def restart(self, unit: str) -> None:
        self.timers.add(unit)

    def stop(self, unit: str) -> None:
        self.lives.pop(unit, None)
        self.timers.discard(unit)

    def instances(self, template: str, states: str) -> list[str]:
        prefix = template.split(".")[0]
        units = self.timers if template.endswith(".timer") else set(self.lives)
        return sorted(unit.removeprefix(prefix).rpartition(".")[0] for unit in units if unit.startswith(prefix))

    def journal(self, unit: str) -> list[str]:
        return ["last words"]

    def backlog(self, socket_path: Path) -> int:
        return 0


class LosesPower(Releases):
    """Dies between writing a flip to the history and making it, or just after."""

    die: str = ""

    def flip(self, release: str, **words: Any) -> float:
        if self.die == "before the link":
            self.history.append({"event": "live", "from": self.current(), "to": release, **words})
            raise PowerError
        took = super().flip(release, **words)
        if self.die == "after the link":
            raise PowerError
        return took


class ReleaseMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="ragrack-"))
        self.releases = LosesPower(self.root)
        self.releases.dir.mkdir()
        self.units = Units()
        self.stack: list[str] = []  # the model: what went live and was not rolled back from
        self.bad: set[str] = set()
        self.staged: set[str] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @property
    def host(self) -> steps.Host:
        return steps.Host(self.releases, self.units, self.root / "run", "ann", run="r", ready=lambda _: None)

    @property
    def target(self) -> str | None:
        """The rollback target by the model."""
        good = [name for name in self.stack if name != self.stack[-1] and name in self.staged - self.bad]
        return good[-1] if good else None

    @initialize()
    def first(self) -> None:
        self.stage(NAMES[0])
        self.go("deploy", NAMES[0], "")

    def stage(self, name: str) -> None:
        if name not in self.staged:
            aside = self.releases.dir / f".staging-{name}"
            aside.mkdir(exist_ok=True)
            (aside / "release.json").write_text(json.dumps({"id": name, "env": "e"}))
            aside.rename(self.releases.path(name))
            self.staged.add(name)

    def go(self, how: str, name: str, die: str, confirm_within: float = 0) -> None:
        """Start, gate (the answers are always right here) and switch, as a play does."""
        steps.started(self.host, name, timeout=1)
        self.releases.remember_gate(name, self.units.show(self.host.unit(name)).invocation)
        self.releases.die = die
        try:
            changed = steps.live(self.host, name, how, confirm_within).changed
        except PowerError:
            changed = die == "after the link"
        finally:
            self.releases.die = ""
        if changed:
            self.went_live(how, name)
        if changed or (die and name != self.stack[-1]):
            self.bad.discard(name)  # it had passed its gate

    def went_live(self, how: str, name: str) -> None:
        if how == "rollback" and name in self.stack:
            while self.stack[-1] != name:
                self.stack.pop()
        else:
            self.stack.append(name)

    @rule(name=st.sampled_from(NAMES), die=st.sampled_from(["", "", "before the link", "after the link"]))
    def deploy(self, name: str, die: str) -> None:
        self.stage(name)
        self.go("deploy", name, die)

    @rule(name=st.sampled_from(NAMES))
    def deploy_that_does_not_start(self, name: str) -> None:
        self.stage(name)
        if self.host.unit(name) in self.units.lives:
            return
        self.units.fail_next = True
        try:
            steps.started(self.host, name, timeout=1)
        except StateError as error:
            assert error.log == ["last words"]
        else:
            raise AssertionError("it did not start")
        if name != self.stack[-1]:
            self.bad.add(name)
        else:
            self.units.start(self.host.unit(name), 1)  # systemd tries again

    @rule(die=st.sampled_from(["", "", "before the link", "after the link"]))
    def roll_back(self, die: str) -> None:
        if self.target is None:
            try:
                steps.query(self.host, "previous", 0)
            except StateError as error:
                assert "nothing to roll back to" in str(error)
                return
            raise AssertionError("it found a target")
        found = steps.query(self.host, "previous", 0).facts["target"]
        assert found == self.target
        self.go("rollback", found, die)

    @rule(name=st.sampled_from(NAMES), die=st.sampled_from(["", "", "before the link", "after the link"]))
    def deploy_on_trial(self, name: str, die: str) -> None:
        """The play is confirmed, or it dies: then nobody comes to confirm, and the host goes back by itself."""
        self.stage(name)
        before = self.stack[-1]
        self.go("deploy", name, die, confirm_within=60)
        if not die:
            steps.confirmed(self.host, self.stack[-1])
        switched = self.stack[-1] != before
        went = Trials(self.releases).go_back(lambda unit: None)
        assert went == (before if die and switched else None)
        if went is not None:
            self.went_live("rollback", went)
            self.bad.discard(went)
        assert Trials(self.releases).at_hand() is None

    @rule(name=st.sampled_from(NAMES), die=st.sampled_from(["", "", "before the link", "after the link"]))
    def roll_back_to(self, name: str, die: str) -> None:
        allowed = name in self.staged and (name not in self.bad or name == self.stack[-1])
        try:
            found = steps.query(self.host, name, 0).facts["target"]
        except StateError as error:
            assert not allowed
            assert name in str(error)
            return
        assert allowed
        if found != self.stack[-1]:
            self.go("rollback", found, die)

    @rule(name=st.sampled_from(NAMES))
    def mark_bad(self, name: str) -> None:
        if name in self.staged:
            steps.bad(self.host, name, "by hand")
            self.bad.add(name)

    @rule(keep_warm=st.sampled_from([0.0, 600.0]))
    def drain(self, keep_warm: float) -> None:
        steps.drained(self.host, keep_warm, settle=0, timeout=1)

    @precondition(lambda self: bool(self.units.timers))
    @rule()
    def time_is_up(self) -> None:
        for timer in sorted(self.units.timers):
            name = timer.removeprefix("ragrack-drain@").removesuffix(".timer")
            self.units.timers.discard(timer)
            if name != self.releases.current():
                self.units.lives.pop(self.host.unit(name), None)

    @rule(keep=st.integers(1, 3))
    def prune(self, keep: int) -> None:
        needed = {self.stack[-1], self.target, *self.host.running()}
        good = len(self.staged - self.bad)
        removed = set(steps.pruned(self.host, keep, set(), self.root / "cache").facts["removed"])
        self.staged -= removed
        assert not removed & needed
        assert len(self.staged - self.bad) >= min(keep, good)

    @rule()
    def host_reboots(self) -> None:
        self.units.lives.clear()
        self.units.timers.clear()
        self.units.start(self.host.unit(self.stack[-1]), 1)  # ragrack.service

    @rule(length=st.integers(1, 60))
    def power_is_lost_while_a_line_is_written(self, length: int) -> None:
        line = json.dumps({"event": "audit", "what": "x" * 60})
        with self.releases.history.path.open("a") as file:
            file.write(line[:length])

    @rule()
    def power_is_lost_while_a_release_is_built(self) -> None:
        (self.releases.dir / ".staging-1-zzzzzzzzzzzz").mkdir(exist_ok=True)

    @invariant()
    def current_resolves_to_what_is_live_and_runs(self) -> None:
        if self.stack:
            assert self.releases.current() == self.stack[-1]
            assert (self.releases.link / "release.json").exists()
            assert self.stack[-1] in self.host.running()

    @invariant()
    def the_target_is_the_models_and_is_there_and_good(self) -> None:
        if self.stack:
            assert self.releases.previous() == self.target
            assert set(self.releases.all()) == self.staged
            assert set(self.releases.bad()) & self.staged == self.bad & self.staged


TestReleases = ReleaseMachine.TestCase
TestReleases.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,  # the same sequences each time; a longer random search is one setting away
    suppress_health_check=[HealthCheck.too_slow],
)
