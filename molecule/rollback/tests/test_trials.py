"""The control node dies after it has switched a host: the host goes back by itself, and the next run finds it well."""

from __future__ import annotations

from typing import Any

import fleet
from load import Load

HOSTS = fleet.hosts()
CANARY = HOSTS[0]
SECONDS = 600


def killed_after_the_first_switch(**variables: Any) -> None:
    """A deploy that dies as soon as it has switched the canary."""
    live = "readlink /opt/ragrack/current"
    before = CANARY.run(live)
    with fleet.killed("deploy", variables=variables):
        # Asked there, where the answer is there at once: a moment later it would have switched the next host too.
        CANARY.run(f"timeout {SECONDS} sh -c 'while [ \"$({live})\" = {before} ]; do sleep 0.02; done'")


def until(what: str, condition: Any) -> None:
    fleet.until(what, condition, SECONDS)


def serving() -> str:
    [release] = {host.release for host in HOSTS}
    return release


def went_back() -> dict[str, Any]:
    """What the canary wrote down last."""
    return CANARY.history()[-1]


def test_it_goes_back_when_time_is_up() -> None:
    before = serving()
    asked = [entry["question"] for entry in fleet.questions()]
    with Load([host.url for host in HOSTS], key=fleet.api_key(), ca=fleet.CA, questions=asked, clients=2) as load:
        killed_after_the_first_switch(app_top_k=2, release_confirm_timeout=6)
        until("the way back", lambda: {host.release for host in HOSTS} == {before})
    assert load.count.failures == []
    assert went_back()["result"] == "went back by itself"
    assert "nobody confirmed release" in went_back()["what"]


def test_it_goes_back_at_boot() -> None:
    before = serving()
    killed_after_the_first_switch(app_top_k=2, release_confirm_timeout=3600)
    fleet.machine("stop", CANARY.name)
    fleet.machine("start", CANARY.name)
    until("its start", lambda: CANARY.running() == [before])
    assert serving() == before
    assert went_back()["result"] == "went back by itself"
    CANARY.ask(fleet.questions()[0]["question"])


def test_the_next_run_takes_over_and_stays() -> None:
    before = serving()
    played = fleet.play("deploy", variables={"app_top_k": 2})
    assert played.status == 0, played.output
    assert serving() != before
    for host in HOSTS:
        host.run("! test -e /opt/ragrack/trial.json")
        assert host.run("systemctl is-active ragrack-trial.service || true") == "inactive"
    assert fleet.play("rollback").status == 0
    assert serving() == before


def test_check_mode_foretells_what_a_deploy_changes() -> None:
    before, variables = serving(), {"app_top_k": 7}
    foretold = fleet.play("deploy", "--check", "--diff", variables=variables)
    assert foretold.status == 0, foretold.output
    assert serving() == before
    made = fleet.play("deploy", variables=variables)
    assert made.status == 0, made.output
    assert foretold.changes == made.changes
    assert {host for _, host in made.changes} == {host.name for host in HOSTS}
    assert fleet.play("rollback").status == 0
    assert serving() == before
