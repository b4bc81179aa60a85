"""Releases come and go under load: A, B, back to A, a broken C that never serves, a mended C, back by name, prune.

The tests tell one story and run in this order. Clients ask through TLS from the first to the last, and none may notice.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fleet
import pytest
from load import Load

HOSTS = fleet.hosts()
STORY: dict[str, str] = {}
BEFORE = {host.name: len(host.history()) for host in HOSTS}


@pytest.fixture(scope="module", autouse=True)
def load() -> Iterator[Load]:
    asked = [entry["question"] for entry in fleet.questions()]
    with Load([host.url for host in HOSTS], key=fleet.api_key(), ca=fleet.CA, questions=asked) as running:
        yield running


def deploy(**variables: Any) -> fleet.Played:
    return fleet.play("deploy", variables=variables)


def happened(host: fleet.Host, event: str) -> list[dict[str, Any]]:
    """Events of one kind since the story began, oldest first."""
    return [one for one in host.history()[BEFORE[host.name] :] if one["event"] == event]


def serving() -> str:
    """The one release that all hosts serve."""
    [release] = {host.release for host in HOSTS}
    return release


@contextlib.contextmanager
def told() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL of a webhook, and what it is sent."""
    messages: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", messages
        server.shutdown()


def checkout_with(tmp_path: Path, file: str, text: str) -> Path:
    """A copy of the project in which the app's `file` ends with `text`."""
    project = tmp_path / "checkout"
    ignore = shutil.ignore_patterns(".*", "build", "__pycache__")
    shutil.copytree(fleet.ROOT, project, ignore=ignore)
    path = project / "app/src/ragrack" / file
    path.write_text(path.read_text() + text)
    return project


def test_deploy_a_with_task_files_of_the_site(tmp_path: Path) -> None:
    hook = tmp_path / "hook.yml"
    hook.write_text(
        "- name: Leave a mark\n  ansible.builtin.command: {argv: [touch, '/run/hook-{{ release_stage }}']}\n"
    )
    played = deploy(app_top_k=4, release_hooks={"before_gate": [str(hook)], "after_audit": [str(hook)]})
    assert played.status == 0, played.output
    STORY["A"] = serving()
    for host in HOSTS:
        assert host.run("ls /run/hook-*").split() == ["/run/hook-audit", "/run/hook-gate"]


def test_a_hook_at_no_point_of_a_deploy_is_refused() -> None:
    played = deploy(app_top_k=5, release_hooks={"before_lunch": ["hooks/webhook.yml"]})
    assert played.status != 0
    assert "before_lunch is no point of a deploy" in played.output
    assert serving() == STORY["A"]


def test_deploying_the_same_again_changes_nothing() -> None:
    played = deploy(app_top_k=4)
    assert played.status == 0, played.output
    assert played.changed == 0, played.output
    assert serving() == STORY["A"]


def test_deploy_b_with_another_app(tmp_path: Path) -> None:
    project = checkout_with(tmp_path, "__main__.py", "\n# Another app.\n")
    played = deploy(app_top_k=6, release_project_dir=str(project))
    assert played.status == 0, played.output
    STORY["B"] = serving()
    assert STORY["B"] != STORY["A"]
    for host in HOSTS:
        assert sorted(host.running()) == sorted([STORY["A"], STORY["B"]]), "A stays warm, and nothing else"


def test_roll_back_to_a_warm_release() -> None:
    played = fleet.play("rollback")
    assert played.status == 0, played.output
    assert serving() == STORY["A"]
    for host in HOSTS:
        assert 'TOP_K="4"' in host.run("cat /opt/ragrack/current/app.env"), "settings come back with their release"


def test_roll_back_again_goes_further_back_never_forward() -> None:
    played = fleet.play("rollback")
    assert played.status == 0, played.output
    assert serving() not in (STORY["A"], STORY["B"])
    STORY["first"] = serving()


def test_a_release_that_crashes_never_serves(tmp_path: Path) -> None:
    project = checkout_with(tmp_path, "api.py", '\nraise RuntimeError("broken at import")\n')
    with told() as (url, messages):
        hooks = {"on_failure": ["hooks/webhook.yml"]}
        played = deploy(app_top_k=7, release_project_dir=str(project), release_hooks=hooks, release_webhook_url=url)
    assert played.status != 0
    assert "broken at import" in played.output, "the failed release's own last words are shown"
    [message] = messages
    assert (message["verb"], message["result"]) == ("deploy", "failed")
    assert "did not start" in message["text"]
    assert serving() == STORY["first"]
    for host in HOSTS:
        [mark] = happened(host, "bad")
        assert mark["reason"]
        assert mark["release"] not in host.running()
        STORY["crashed"] = mark["release"]


def test_a_release_that_answers_wrongly_never_serves(tmp_path: Path) -> None:
    played = deploy(app_similarity_cutoff=0.99)
    assert played.status != 0
    assert "hit rate" in played.output
    assert fleet.questions()[0]["question"] in played.output, "the questions that failed are named"
    assert serving() == STORY["first"]
    for host in HOSTS:
        assert len(happened(host, "bad")) == 2


def test_a_bad_release_is_no_target() -> None:
    played = fleet.play("rollback", variables={"release_to": STORY["crashed"]})
    assert played.status != 0
    assert "bad" in played.output
    assert serving() == STORY["first"]


def test_deploy_c_mended() -> None:
    played = deploy(app_top_k=7)
    assert played.status == 0, played.output
    STORY["C"] = serving()


def test_the_artifact_that_was_seen_to_work_is_the_one_that_goes_elsewhere(tmp_path: Path) -> None:
    """Whatever the checkout holds by then."""
    played = fleet.play("smoke")
    assert (played.status, played.changed) == (0, 0), played.output
    seen = re.search(rf"{STORY['C']} of artifact ([0-9a-f]{{64}}) on ", played.output)
    assert seen
    assert played.output.count("gate passed: hit rate") == len(HOSTS)
    project = checkout_with(tmp_path, "__main__.py", "\n# What nobody has tried.\n")
    played = deploy(app_top_k=5, release_project_dir=str(project), release_artifact_digest=seen[1])
    assert played.status == 0, played.output
    for host in HOSTS:
        assert json.loads(host.run("cat /opt/ragrack/current/release.json"))["artifact"] == seen[1]
    refused = deploy(release_artifact_digest="0" * 64)
    assert refused.status != 0
    assert "the artifact 0000000000000000 is not in" in refused.output


def test_roll_back_by_name() -> None:
    played = fleet.play("rollback", variables={"release_to": STORY["A"]})
    assert played.status == 0, played.output
    assert serving() == STORY["A"]


def test_prune_keeps_the_live_release_and_the_way_back() -> None:
    played = deploy(app_top_k=3, release_keep=1, release_keep_warm=0)
    assert played.status == 0, played.output
    for host in HOSTS:
        assert host.running() == [serving()]
        assert set(host.releases()) == {serving(), STORY["A"]}
    played = fleet.play("rollback")
    assert played.status == 0, played.output
    assert serving() == STORY["A"]


def test_the_history_tells_the_story() -> None:
    for host in HOSTS:
        audit = happened(host, "audit")
        assert [event["result"] for event in audit].count("failed") == 2
        assert all(event["who"] and event["seconds"] >= 0 for event in audit)


def test_no_request_failed(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{load.count}")
    assert load.count.total > 500
    assert load.count.failures == []
