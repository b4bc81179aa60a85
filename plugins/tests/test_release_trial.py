"""A host that was switched and is not told that all is well goes back by itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from module_utils import release_trial
from module_utils.release_state import Releases, StateError
from module_utils.release_trial import Trials, watch
from modules import ragrack_release
from testing.release_host import Place

A, B = "0.1.0-aaaaaaaaaaaa", "0.1.0-bbbbbbbbbbbb"


def do(place: Place, state: str, release: str | None = None, **changes: Any) -> dict[str, Any]:
    return ragrack_release.run(place.parameters(state, id=release, **changes), check=False, diff=False)


def switch(place: Place, release: str, **changes: Any) -> dict[str, Any]:
    do(place, "staged", release)
    for state in ("started", "gated"):
        do(place, state, release)
    return do(place, "live", release, **changes)


@pytest.fixture
def trials(place: Place) -> Trials:
    """B is live on trial, A runs beside it."""
    switch(place, A)
    switch(place, B, confirm_within=60)
    return Trials(Releases(place.root))


def started() -> tuple[list[str], release_trial.Start]:
    units: list[str] = []
    return units, units.append


def test_unconfirmed_it_goes_back(place: Place, trials: Trials) -> None:
    units, start = started()
    assert watch(trials, start, over=True) == A
    assert units == [f"ragrack@{A}.service", f"ragrack-drain@{B}.timer"]
    found = do(place, "query")
    assert found["current"] == A
    [went, audit] = found["history"][-2:]
    assert (went["how"], went["from"], went["to"], went["who"]) == ("rollback", B, A, "this host")
    assert audit["result"] == "went back by itself"
    assert B in audit["what"]
    with pytest.raises(StateError, match=f"serves {A}, not {B}: it went back by itself.*release_confirm_timeout"):
        do(place, "confirmed", B)


def test_confirmed_it_stays(place: Place, trials: Trials) -> None:
    assert do(place, "confirmed", B)["changed"] is False
    assert watch(trials, lambda _: None, over=True) is None
    assert do(place, "query")["current"] == B
    do(place, "confirmed", B)


def test_it_waits_as_long_as_it_was_told_last(place: Place, trials: Trials) -> None:
    first = trials.at_hand()
    do(place, "live", B, confirm_within=3600)
    second = trials.at_hand()
    assert first is not None
    assert second is not None
    assert second.until > first.until + 3000
    assert (second.back_to, second.since) == (A, first.since)
    trials.begin(B, A, None, seconds=0)
    assert watch(trials, lambda _: None, over=False) == A


def test_a_switch_that_never_happened_is_no_trial(place: Place, trials: Trials) -> None:
    do(place, "live", A, how="rollback")
    trials.begin(B, A, "dead", seconds=0)
    assert watch(trials, lambda _: None, over=False) is None
    assert do(place, "query")["current"] == A


def test_a_way_back_by_hand_ends_the_trial(place: Place, trials: Trials) -> None:
    do(place, "live", A, how="rollback")
    assert trials.at_hand() is None


def test_a_first_deploy_has_nothing_to_go_back_to(place: Place) -> None:
    switch(place, A, confirm_within=60)
    assert Trials(Releases(place.root)).at_hand() is None
    do(place, "confirmed", A)


def test_a_damaged_trial_is_told_of(place: Place, trials: Trials) -> None:
    (place.root / "trial.json").write_text("{")
    with pytest.raises(StateError, match=r"trial.json is damaged"):
        do(place, "live", B, confirm_within=60)


def test_on_a_host_it_runs_without_ansible(place: Place, trials: Trials, tmp_path: Path) -> None:
    package = tmp_path / "release"
    package.mkdir()
    for name in ("release_trial.py", "release_state.py"):
        shutil.copy(Path(release_trial.__file__).with_name(name), package)
    program = (package / "release_trial.py").read_text().replace('"/opt/ragrack"', json.dumps(str(place.root)))
    (package / "release_trial.py").write_text(program)
    command = [sys.executable, "-EsB", "-m", "release.release_trial", "--over"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"went back to release {A}" in done.stdout
    assert do(place, "query")["current"] == A
