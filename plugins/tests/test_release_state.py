"""The history, the stack that it makes, the link, and what is pruned."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from module_utils.release_state import History, Releases, StateError, live_stack

Flip = tuple[str, str | None, str]


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    (tmp_path / "releases").mkdir()
    return Releases(tmp_path)


def stage(releases: Releases, *names: str) -> None:
    for name in names:
        releases.path(name).mkdir()
        (releases.path(name) / "release.json").write_text(json.dumps({"version": "1", "env": "e"}))


def deploy(releases: Releases, *names: str) -> None:
    for name in names:
        if name not in releases.all():
            stage(releases, name)
        releases.flip(name, how="deploy", who="ann", what="", run="r")


def roll_back(releases: Releases, target: str = "previous") -> str:
    found = releases.resolve(target)
    releases.flip(found, how="rollback", who="ann", what="", run="r")
    return found


def events(*flips: Flip) -> list[dict[str, str | None]]:
    return [{"event": "live", "how": how, "from": start, "to": end} for how, start, end in flips]


@pytest.mark.parametrize(
    ("flips", "current", "stack"),
    [
        pytest.param([], None, [], id="bare host"),
        pytest.param([("deploy", None, "a"), ("deploy", "a", "b")], "b", ["a", "b"], id="deploys push"),
        pytest.param(
            [("deploy", None, "a"), ("deploy", "a", "b"), ("rollback", "b", "a")], "a", ["a"], id="a rollback pops"
        ),
        pytest.param(
            [("deploy", None, "a"), ("deploy", "a", "b"), ("deploy", "b", "c"), ("rollback", "c", "a")],
            "a",
            ["a"],
            id="a named rollback pops down to it",
        ),
        pytest.param(
            [("deploy", None, "a"), ("deploy", "a", "b"), ("rollback", "b", "a"), ("rollback", "a", "b")],
            "b",
            ["a", "b"],
            id="a rollback to what is not in the stack pushes",
        ),
        pytest.param(
            [("deploy", None, "a"), ("deploy", "a", "b"), ("deploy", "b", "a")],
            "a",
            ["a", "b", "a"],
            id="the content of an old release deployed again",
        ),
        pytest.param(
            [("deploy", None, "a"), ("deploy", "a", "b")], "a", ["a"], id="the host died between history and link"
        ),
        pytest.param(
            [("deploy", None, "a"), ("deploy", "a", "b"), ("deploy", "a", "b")], "b", ["a", "b"], id="and was run again"
        ),
        pytest.param(
            [("deploy", None, "a"), ("deploy", "a", "b"), ("rollback", "b", "a")],
            "b",
            ["a", "b"],
            id="a rollback that never happened",
        ),
        pytest.param([("deploy", None, "a"), ("deploy", "a", "b")], "z", ["a", "b", "z"], id="moved by hand, forward"),
        pytest.param(
            [("deploy", None, "a"), ("deploy", "a", "b"), ("deploy", "b", "c")], "a", ["a"], id="moved by hand, back"
        ),
    ],
)
def test_stack_from_history(flips: list[Flip], current: str | None, stack: list[str]) -> None:
    assert live_stack(events(*flips), current) == stack


def test_previous_is_what_was_live_before_and_not_what_is_newest(releases: Releases) -> None:
    deploy(releases, "a", "b", "c")
    os.utime(releases.path("a"), (2e9, 2e9))
    assert releases.previous() == "b"
    assert roll_back(releases) == "b"
    assert roll_back(releases) == "a", "a second rollback goes further back, not forward"
    with pytest.raises(StateError, match=r"nothing to roll back to.*a \(live\), b, c"):
        releases.resolve("previous")


def test_previous_skips_bad_and_missing_releases(releases: Releases) -> None:
    deploy(releases, "a", "b", "c", "d")
    releases.mark_bad("c", "slow", who="ann", run=None)
    releases.remove("b")
    assert releases.previous() == "a"


def test_nothing_to_roll_back_to(releases: Releases) -> None:
    with pytest.raises(StateError, match="nothing to roll back to; the releases of this host are: none"):
        releases.resolve("previous")


def test_unknown_target_names_those_there_are(releases: Releases) -> None:
    deploy(releases, "a", "b")
    with pytest.raises(StateError, match=r"no release nope on this host; there are: a \(previous\), b \(live\)"):
        releases.resolve("nope")


def test_bad_target_is_refused_with_its_reason_until_it_goes_live_again(releases: Releases) -> None:
    deploy(releases, "a", "b")
    stage(releases, "c")
    assert releases.mark_bad("c", "gate: hit rate 0.2", who="ann", run=None)
    assert not releases.mark_bad("c", "gate: hit rate 0.2", who="ann", run=None)
    with pytest.raises(StateError, match=r"c is marked bad: gate: hit rate 0\.2"):
        releases.resolve("c")
    deploy(releases, "c", "b")
    assert releases.resolve("c") == "c"


def test_current_is_relative_and_replaced_as_a_whole(releases: Releases) -> None:
    deploy(releases, "a", "b")
    assert releases.link.readlink() == Path("releases/b")
    assert sorted(path.name for path in releases.root.iterdir()) == ["current", "history.jsonl", "releases"]


def test_current_that_is_no_link_is_refused(releases: Releases) -> None:
    releases.link.mkdir()
    with pytest.raises(StateError, match="current is not a link"):
        releases.current()


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_line_that_a_crash_cut_off_is_dropped_and_repaired(tmp_path: Path, cut: int) -> None:
    history = History(tmp_path / "history.jsonl")
    history.append({"event": "first"})
    history.append({"event": "second"})
    data = history.path.read_bytes()
    history.path.write_bytes(data[:-cut])
    whole = [event["event"] for event in history.read()]
    assert whole == (["first", "second"] if cut == 1 else ["first"])
    history.append({"event": "third"})
    assert [event["event"] for event in history.read()] == [*whole, "third"]
    assert all(json.loads(line) for line in history.path.read_text().splitlines())


def test_a_history_that_starts_with_a_cut_line(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    history.path.write_bytes(b'{"event": "fi')
    assert history.read() == []
    history.append({"event": "first"})
    assert [event["event"] for event in history.read()] == ["first"]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    history.path.write_text('{"event": "a"}\nnonsense\n{"event": "b"}\n')
    with pytest.raises(StateError, match=r"history\.jsonl line 2 is not an object of JSON"):
        history.read()


def test_a_long_history_is_shortened_and_knows_the_way_back(releases: Releases) -> None:
    deploy(releases, "a", "b")
    before = releases.history.read()
    for number in range(12):
        releases.history.append({"event": "audit", "number": number})
    assert not releases.history.shorten(above=12 + len(before), to=5)
    assert releases.history.shorten(above=11, to=5)
    kept = releases.history.read()
    assert [event["number"] for event in kept if event["event"] == "audit"] == [7, 8, 9, 10, 11]
    assert [event for event in kept if event["event"] == "live"] == [e for e in before if e["event"] == "live"]
    assert releases.previous() == "a"
    releases.history.append({"event": "audit", "number": 12})
    assert releases.history.read()[-1]["number"] == 12


def test_nothing_is_lost_while_a_history_is_shortened(releases: Releases) -> None:
    """Others append throughout."""
    written = 200

    def write(name: int) -> None:
        for number in range(written):
            History(releases.history.path).append(
                {"event": "live", "from": None, "to": f"{name}-{number}", "how": "deploy"}
            )

    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write, name) for name in range(2)]
        while not all(writer.done() for writer in writers):
            releases.history.shorten(above=3, to=100_000)
    for writer in writers:
        writer.result()
    assert len(releases.history.read()) == 2 * written


def test_prune_keeps_by_history_and_never_what_is_needed(releases: Releases) -> None:
    deploy(releases, "a", "b", "c", "d")
    roll_back(releases, "a")
    assert releases.previous() is None
    deploy(releases, "e")
    assert set(releases.prunable(2, set(), None)) == {"b", "c", "d"}
    assert set(releases.prunable(1, set(), None)) == {"b", "c", "d"}, (
        "the live one and the target stay whatever keep is"
    )
    assert set(releases.prunable(3, set(), None)) == {"b", "c"}
    assert set(releases.prunable(1, {"b"}, None)) == {"c", "d"}


def test_bad_releases_do_not_count_and_go(releases: Releases) -> None:
    deploy(releases, "a", "b")
    for number in range(6):
        stage(releases, f"broken{number}")
        releases.mark_bad(f"broken{number}", "gate", who="ann", run=None)
    assert releases.prunable(2, set(), None) == [f"broken{number}" for number in range(6)]


def test_a_bad_release_that_is_live_stays(releases: Releases) -> None:
    deploy(releases, "a", "b")
    releases.mark_bad("b", "slow", who="ann", run=None)
    assert releases.prunable(1, set(), None) == []


def test_what_this_run_staged_stays_and_what_a_dead_run_staged_goes(releases: Releases) -> None:
    deploy(releases, "a")
    stage(releases, "mine", "dead")
    releases.history.append({"event": "staged", "release": "mine", "run": "r2"})
    releases.history.append({"event": "staged", "release": "dead", "run": "r1"})
    assert releases.prunable(5, set(), "r2") == ["dead"]


def test_half_removed_is_no_release(releases: Releases) -> None:
    deploy(releases, "a")
    stage(releases, "b")
    releases.path("b").rename(releases.dir / ".trash-b")
    (releases.dir / ".staging-c").mkdir()
    assert list(releases.all()) == ["a"]
    assert [path.name for path in releases.leftovers()] == [".staging-c", ".trash-b"]
