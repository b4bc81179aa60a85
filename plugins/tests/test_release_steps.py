"""A release starts beside the live one, answers, is switched to, and what it replaced goes its way."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from module_utils.fleet_lock import FleetLock, Holder
from module_utils.release_service import Systemd, Unit, reasons, wait_for_empty_backlog, wait_until_ready
from module_utils.release_state import StateError
from modules import ragrack_release
from testing.release_host import FINGERPRINT, Place

A, B, C = "0.1.0-aaaaaaaaaaaa", "0.1.0-bbbbbbbbbbbb", "0.1.0-cccccccccccc"


def do(place: Place, state: str, release: str | None = None, check: bool = False, **changes: Any) -> dict[str, Any]:
    return ragrack_release.run(place.parameters(state, id=release, **changes), check=check, diff=True)


def stage(place: Place, release: str, fault: str = "") -> None:
    do(place, "staged", release, env=f'RAGRACK_COLLECTIONS="postgres"\nFAULT="{fault}"')


def deploy(place: Place, release: str, fault: str = "", keep_warm: float = 600) -> None:
    stage(place, release, fault)
    for state in ("started", "gated", "live"):
        do(place, state, release)
    do(place, "drained", keep_warm=keep_warm)


def facts(place: Place, release: str) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {fact["id"]: fact for fact in do(place, "query")["releases"]}
    return found[release]


def test_a_deploy_and_a_rollback(place: Place) -> None:
    deploy(place, A)
    deploy(place, B)
    assert do(place, "query")["current"] == B
    assert (facts(place, A)["previous"], facts(place, A)["running"], facts(place, A)["warm"]) == (True, True, True)
    target = do(place, "query", target="previous")["target"]
    assert target == A
    assert do(place, "started", target)["changed"], "its timer is stopped, so that it stays"
    assert not facts(place, A)["warm"]
    do(place, "gated", target)
    answer = do(place, "live", target, how="rollback", who="ann", what="too slow")
    assert (answer["current"], answer["previous"], answer["changed"]) == (A, None, True)
    assert answer["flip_ms"] > 0
    [*_, last] = do(place, "query")["history"]
    assert {key: last[key] for key in ("event", "how", "from", "to", "who", "what")} == {
        "event": "live",
        "how": "rollback",
        "from": B,
        "to": A,
        "who": "ann",
        "what": "too slow",
    }


def test_every_step_again_changes_nothing(place: Place) -> None:
    deploy(place, A)
    deploy(place, B)
    for state in ("staged", "started", "gated", "live", "drained", "pruned"):
        before = do(place, "query")
        answer = do(place, state, None if state in ("drained", "pruned") else B)
        assert (state, answer["changed"]) == (state, False)
        assert do(place, "query") == before


@pytest.mark.parametrize(
    ("fault", "words", "log"),
    [
        ("crash", "did not start: ragrack@", "ImportError: no module named nonsense"),
        ("unready", "not ready (503): index postgres: no snapshot", "starting " + C),
    ],
)
def test_a_release_that_does_not_start_is_stopped_marked_and_shows_its_log(
    place: Place, fault: str, words: str, log: str
) -> None:
    deploy(place, A)
    stage(place, C, fault)
    with pytest.raises(StateError) as caught:
        do(place, "started", C, timeout=1.5)
    assert words in str(caught.value)
    assert log in caught.value.log
    assert (facts(place, C)["bad"], facts(place, C)["running"]) == (True, False)
    assert words.split(": ", 1)[1] in facts(place, C)["bad_reason"]
    assert do(place, "query")["current"] == A
    with pytest.raises(StateError, match="is marked bad"):
        do(place, "query", target=C)


def test_a_release_with_wrong_answers_does_not_go_live(place: Place) -> None:
    deploy(place, A)
    stage(place, C, "wrong")
    do(place, "started", C)
    with pytest.raises(StateError) as caught:
        do(place, "gated", C)
    for words in ("hit rate@5 0.5", "'What is an index?'", "expected ['indexes.html'], got ['other.html']"):
        assert words in str(caught.value)
    assert caught.value.facts["golden"]["postgres"]["mrr"] == 1.0
    assert not facts(place, C)["running"]
    with pytest.raises(StateError, match="is inactive"):
        do(place, "live", C)
    assert do(place, "query")["current"] == A


def test_a_gate_that_cannot_be_asked_has_failed(place: Place) -> None:
    stage(place, A)
    do(place, "started", A)
    (place.path / "run" / A / "gate.key").write_text("another")
    with pytest.raises(StateError, match=r"golden questions of postgres could not be asked .*AssertionError"):
        do(place, "gated", A)
    assert facts(place, A)["bad"]


def test_a_bad_release_that_passes_later_is_good_again(place: Place) -> None:
    deploy(place, A)
    do(place, "bad", A, reason="slow")
    do(place, "bad", A, reason="slow")
    deploy(place, B)
    assert do(place, "query")["previous"] is None
    for state in ("started", "gated", "live"):
        do(place, state, A)
    assert not facts(place, A)["bad"]


def test_only_a_release_that_passed_in_this_life_goes_live(place: Place) -> None:
    stage(place, A)
    with pytest.raises(StateError, match="is inactive; start it"):
        do(place, "live", A)
    do(place, "started", A)
    with pytest.raises(StateError, match="has not passed its gate since it was started"):
        do(place, "live", A)
    do(place, "gated", A)
    Systemd().restart(f"ragrack@{A}.service")
    with pytest.raises(StateError, match="has not passed its gate since it was started"):
        do(place, "live", A)
    do(place, "started", A)
    do(place, "gated", A)
    do(place, "live", A)


def test_what_served_until_the_flip_may_be_gone_back_to_at_once(place: Place) -> None:
    deploy(place, A)
    Systemd().restart(f"ragrack@{A}.service")
    deploy(place, B)
    assert do(place, "live", A, how="rollback")["current"] == A


def test_the_live_release_is_never_stopped_by_its_own_gate(place: Place) -> None:
    deploy(place, A)
    (place.path / "run" / A / "gate.key").write_text("another")
    with pytest.raises(StateError, match="it is live, so it was left as it is"):
        do(place, "gated", A)
    assert facts(place, A)["running"]
    assert not facts(place, A)["bad"]


def test_unknown_releases_are_named_with_those_there_are(place: Place) -> None:
    deploy(place, A)
    for state in ("indexed", "started", "gated", "live", "bad"):
        with pytest.raises(StateError, match=rf"no release nope on this host; there are: {A} \(live\)"):
            do(place, state, "nope", reason="x")


def test_units_that_are_not_installed_are_said_to_be(place: Place) -> None:
    stage(place, A)
    (place.path / "no-units").touch()
    with pytest.raises(StateError, match=r"no unit ragrack@.*run playbooks/site\.yml"):
        do(place, "started", A)


def test_a_snapshot_is_built_where_one_lacks(place: Place) -> None:
    stage(place, A)
    answer = do(place, "indexed", A)
    assert (answer["changed"], answer["missing_snapshots"], answer["fingerprint"]) == (True, ["postgres"], FINGERPRINT)
    assert (place.path / "indexes/postgres" / FINGERPRINT / "current").exists()
    assert do(place, "indexed", A)["changed"] is False


def test_what_a_database_holds_is_asked_of_it(place: Place) -> None:
    database = place.path / "database"
    settings = {"RAGRACK_COLLECTIONS": "postgres", "RAGRACK_VECTOR_STORE": "postgres", "DATABASE": str(database)}
    do(place, "staged", A, env="\n".join(f'{name}="{value}"' for name, value in settings.items()))
    answer = do(place, "indexed", A)
    assert (answer["changed"], answer["missing_snapshots"]) == (True, ["postgres"])
    assert database.exists()
    answer = do(place, "indexed", A)
    assert (answer["changed"], answer["missing_snapshots"]) == (False, [])


def test_an_index_that_cannot_be_built_shows_its_log(place: Place) -> None:
    stage(place, A, "no-documents")
    with pytest.raises(StateError, match="could not be built") as caught:
        do(place, "indexed", A)
    assert "no documents for postgres" in caught.value.log
    assert not facts(place, A)["bad"], "its documents are at fault"


def test_without_keep_warm_the_old_one_is_stopped(place: Place) -> None:
    deploy(place, A)
    deploy(place, B, keep_warm=0)
    assert (facts(place, A)["running"], facts(place, B)["running"]) == (False, True)
    assert do(place, "query")["previous"] == A, "it is still there to go back to"


def test_what_a_dead_run_started_is_stopped_even_if_warm_ones_stay(place: Place) -> None:
    deploy(place, A)
    stage(place, C)
    do(place, "started", C)
    deploy(place, B)
    assert [facts(place, release)["running"] for release in (A, B, C)] == [True, True, False]


def test_a_release_is_stopped_only_when_nothing_waits_on_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "gunicorn.sock"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(path))
        server.listen(5)
        assert wait_for_empty_backlog(Systemd(), path, settle=0, timeout=0.2) == 0
        client.connect(str(path))
        assert wait_for_empty_backlog(Systemd(), path, settle=0.05, timeout=0.3) == 1
        server.accept()[0].close()
        assert wait_for_empty_backlog(Systemd(), path, settle=0.05, timeout=5) == 0


class Restarting(Systemd):
    """systemd that has started the unit anew each time one asks."""

    def start(self, unit: str, timeout: float) -> str | None:
        return None

    def show(self, unit: str) -> Unit:
        return Unit(True, "active", "success", str(time.monotonic_ns()))


def test_a_release_that_systemd_starts_again_and_again_has_crashed(tmp_path: Path) -> None:
    why = wait_until_ready(Restarting(), "ragrack@a.service", tmp_path, 60, lambda _: "no answer")
    assert why == "ragrack@a.service crashed and was started again by systemd"


def test_reasons_of_an_answer_that_is_not_ours() -> None:
    assert reasons("<html>  busy </html>") == "<html> busy </html>"
    assert reasons("") == "no reason given"


def test_prune_leaves_what_runs_and_what_is_needed(place: Place) -> None:
    for release in (A, B, C):
        deploy(place, release, keep_warm=0)
    (place.root / "releases/.staging-x").mkdir()
    predicted = do(place, "pruned", keep=1, check=True)
    answer = do(place, "pruned", keep=1)
    assert (answer["removed"], answer["previous"]) == ([A], B)
    assert (predicted["removed"], predicted["diff"]) == (answer["removed"], answer["diff"])
    assert sorted(path.name for path in (place.root / "releases").iterdir()) == [B, C]
    assert do(place, "pruned", keep=1)["changed"] is False


def test_prune_removes_credentials_that_no_release_reads(place: Place) -> None:
    old, shared = place.path / "credstore/old", place.path / "credstore/shared"
    for release, generation in ((A, old), (B, shared), (C, shared)):
        generation.mkdir(parents=True, exist_ok=True)
        deploy(place, release, keep_warm=0)
        (place.release(release) / "credentials").symlink_to(generation)
    assert str(old) in do(place, "pruned", keep=1, check=True)["removed_leftovers"] and old.is_dir()
    do(place, "pruned", keep=1)
    assert (old.exists(), shared.exists()) == (False, True)


def test_prune_removes_environments_that_no_release_is_made_of(place: Place) -> None:
    deploy(place, A, keep_warm=0)
    place.write_artifact(library="WORDS = 2\n")
    deploy(place, B, keep_warm=0)
    assert len(list((place.cache / "envs").iterdir())) == 2
    do(place, "bad", A, reason="old")
    do(place, "pruned")
    assert len(list((place.cache / "envs").iterdir())) == 1
    assert Systemd().show(f"ragrack@{B}.service").active == "active"


def test_while_another_run_holds_the_lock_nothing_is_touched(place: Place) -> None:
    deploy(place, A)
    stage(place, B)
    FleetLock(place.root).acquire(Holder("run-1", "ann", "control1", "", "", 1, "", "deploy 0.2.0"))
    before = place.snapshot()
    for state in ("staged", "indexed", "started", "gated", "live", "drained", "pruned", "bad"):
        with pytest.raises(
            StateError, match=r"locked by ann on control1 since .*: deploy 0\.2\.0; nothing was changed"
        ):
            do(place, state, B, run="run-2", reason="x")
    assert place.snapshot() == before
    assert do(place, "query")["lock"]["owner"] == "ann"
    do(place, "started", B, run="run-1")


def test_a_failure_that_another_run_has_taken_over_from_is_left_to_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(place, C, "unready")
    ben = Holder("run-2", "ben", "control2", "", "", 1, "", "deploy")

    def taken_over(self: Systemd, unit: str) -> list[str]:
        FleetLock(place.root).acquire(ben)
        return []

    monkeypatch.setattr(Systemd, "journal", taken_over)
    with pytest.raises(StateError, match="left as it is: locked by ben"):
        do(place, "started", C, run="run-1", timeout=0.5)
    assert (facts(place, C)["bad"], facts(place, C)["running"]) == (False, True)


def test_a_bare_host_is_queried_and_checked_without_a_trace(place: Place) -> None:
    before = place.snapshot()
    assert do(place, "query") | {"lock": None} == {
        "changed": False,
        "current": None,
        "previous": None,
        "releases": [],
        "history": [],
        "lock": None,
    }
    would = {
        state: do(place, state, A, check=True)["changed"]
        for state in ("staged", "indexed", "started", "gated", "live", "drained", "pruned", "audit")
    }
    assert would == {
        "staged": True,
        "indexed": True,
        "started": True,
        "gated": False,
        "live": True,
        "drained": False,
        "pruned": False,
        "audit": False,
    }
    assert place.snapshot() == before


def test_check_mode_predicts_each_step(place: Place) -> None:
    deploy(place, A)
    for state in ("staged", "indexed", "started", "gated", "live", "drained"):
        release = None if state == "drained" else B
        before = place.snapshot()
        predicted = do(place, state, release, check=True, keep_warm=0)
        assert place.snapshot() == before, state
        made = do(place, state, release, keep_warm=0)
        assert predicted["changed"] == made["changed"], state
        assert predicted.get("diff") == made.get("diff"), state


def test_an_audit_line_holds_what_was_done(place: Place) -> None:
    do(place, "audit", who="ann", what="deploy", to=A, result="ok", seconds=12.5, stages={"build": 3.0}, run="r1")
    [event] = do(place, "query")["history"]
    assert event.pop("time").endswith("Z")
    assert event == {
        "event": "audit",
        "who": "ann",
        "what": "deploy",
        "from": None,
        "to": A,
        "result": "ok",
        "seconds": 12.5,
        "stages": {"build": 3.0},
        "run": "r1",
    }


def test_killed_between_history_and_link_and_run_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy(place, A)
    stage(place, B)
    do(place, "started", B)
    do(place, "gated", B)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Path, "symlink_to", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        do(place, "live", B)
        os._exit(0)
    os.waitpid(child, 0)
    assert (do(place, "query")["current"], do(place, "query")["previous"]) == (A, None)
    do(place, "live", B)
    assert (do(place, "query")["current"], do(place, "query")["previous"]) == (B, A)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep": 0}, "keep: 0 is below 1"),
        ({"min_free_mb": -1, "timeout": -2}, "min_free_mb: -1 is below 0; timeout: -2 is below 0"),
        ({"id": "a/b"}, "id: 'a/b' is no name for a release"),
        ({"id": "0.1.0+local"}, "id: '0.1.0+local' is no name"),
    ],
)
def test_bad_input_is_named(place: Place, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(StateError) as caught:
        ragrack_release.run(place.parameters("pruned", **changes), check=False, diff=False)
    assert words in str(caught.value)


def test_check_mode_foretells_what_a_release_that_is_not_staged_would_change(place: Place) -> None:
    deploy(place, A)
    env = 'RAGRACK_COLLECTIONS="postgres"'
    current = place.path / "indexes/postgres" / FINGERPRINT / "current"
    assert do(place, "indexed", B, check=True, env=env, collections=["postgres"])["changed"]
    current.mkdir(parents=True)
    assert not do(place, "indexed", B, check=True, env=env, collections=["postgres"])["changed"]
    foretold = do(place, "drained", B, check=True)
    assert (foretold["changed"], foretold["warm"]) == (True, [A])
    assert do(place, "drained", B, check=True, keep_warm=0)["stopped"] == [A]
    assert not do(place, "drained", A, check=True)["changed"]


def pid(place: Place, release: str) -> int:
    unit = json.loads((place.path / f"units/ragrack@{release}.service.json").read_text())
    return int(unit["pid"])


def settled(place: Place, release: str, **changes: Any) -> bool:
    there = place.path / "indexes/postgres" / FINGERPRINT / "current"
    there.mkdir(parents=True, exist_ok=True)
    answer = do(place, "query", release, collections=["postgres"], **changes)
    return bool(answer["settled"])


def test_a_host_tells_whether_a_deploy_would_change_anything(place: Place) -> None:
    assert not settled(place, A), "nothing was deployed"
    deploy(place, A)
    deploy(place, B)
    assert settled(place, B)
    assert settled(place, B, keep=5, keep_warm=60)
    assert not settled(place, A), "another one is live"
    assert not settled(place, B, keep_warm=0), "the previous one is to be stopped"
    assert not do(place, "query", B, collections=["postgres", "other"])["settled"], "an index is to be built"
    do(place, "live", A, how="rollback", confirm_within=60)
    do(place, "drained")
    assert not settled(place, A), "it is on trial"
    do(place, "confirmed", A)
    assert settled(place, A)
    os.kill(pid(place, A), signal.SIGKILL)
    do(place, "started", A)
    assert not settled(place, A), "in this life it has not passed its gate"


def test_a_way_back_that_is_warm_has_passed_its_gate(place: Place) -> None:
    deploy(place, A)
    deploy(place, B)
    assert do(place, "query", target="previous")["ready"]
    assert do(place, "started", A)["gated"]
    os.kill(pid(place, A), signal.SIGKILL)
    assert not do(place, "query", target="previous")["ready"]
    assert not do(place, "started", A)["gated"]


def test_steps_in_one_call_end_with_the_first_that_fails(place: Place) -> None:
    steps = ("started", "gated", "live")
    stage(place, A)
    answer = ragrack_release.run(place.parameters(*steps, id=A), check=False, diff=True)
    assert (answer["changed"], answer["current"], answer["diff"]["after"]["running"]) == (True, A, [A])
    stage(place, C, "wrong")
    with pytest.raises(StateError, match="did not pass its gate"):
        ragrack_release.run(place.parameters(*steps, id=C), check=False, diff=True)
    assert do(place, "query")["current"] == A


def test_what_the_edge_answers_is_seen(tmp_path: Path, place: Place) -> None:
    certificate = tmp_path / "edge.pem"
    made = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=edge"
    made += f" -addext subjectAltName=DNS:localhost -keyout {certificate} -out {certificate}"
    subprocess.run(made.split(), check=True, capture_output=True)
    answers = [(200, {"release": B}), (503, {"checks": []}), (200, "a page")]

    class Edge(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.pop(0) if answers else (200, {"release": A})
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Edge) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        edge: dict[str, Any] = {"edge_ca": str(certificate), "edge": f"localhost:{server.server_port}"}
        for wrong in (f"answers from release {B}", "is not ready", "but not of a release"):
            with pytest.raises(StateError, match=wrong):
                do(place, "answering", A, timeout=0, **edge)
        assert not do(place, "answering", A, **edge)["changed"]
        other = edge | {"edge": f"127.0.0.1:{server.server_port}"}
        with pytest.raises(StateError, match="certificate"):
            do(place, "answering", A, timeout=0, **other)
        assert not do(place, "answering", A, edge_verify=False, **other)["changed"]
        server.shutdown()
    with pytest.raises(StateError, match="does not answer"):
        do(place, "answering", A, timeout=0, **edge)
