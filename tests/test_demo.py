"""What a newcomer does: a fresh checkout, one command, a question, and all of it gone again."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from testhosts import runs

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.hosts


class Checkout:
    """A copy of what git would have in a clone, and its `bin/demo`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, path / name)

        # What it makes there once, the scenarios need too: images of Debian, packages, the model.
        for name in (".cache", "build"):
            (ROOT / name).mkdir(exist_ok=True)
            (path / name).symlink_to(ROOT / name)

    def demo(self, *arguments: str) -> str:
        outside = ("ANSIBLE_", "PYTEST_", "VIRTUAL_ENV", "UV_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
        done = subprocess.run(
            [str(self.path / "bin/demo"), *arguments],
            cwd="/",
            env=environment | {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def recap(self, playbook: str) -> dict[str, int]:
        log = (self.path / ".state/demo" / f"{playbook}.log").read_text()
        return {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", log[log.index("PLAY RECAP") :])}


def machine() -> tuple[set[str], set[str]]:
    """Network interfaces and firewall tables of this machine."""
    links = subprocess.run(["ip", "-json", "link"], capture_output=True, text=True, check=True)
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True)
    return {link["ifname"] for link in json.loads(links.stdout)}, set(tables.stdout.splitlines())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    made = Checkout(tmp_path_factory.mktemp("demo"))
    yield made
    if (made.path / ".state/demo").exists():
        made.demo("destroy")


@pytest.fixture(scope="module")
def before() -> tuple[set[str], set[str]]:
    # As the demo does before it makes its host: what a killed run has left is not its own to account for.
    runs.clean(print)
    return machine()


def test_one_command_leads_to_an_answer(before: object, checkout: Checkout) -> None:
    said = checkout.demo()
    assert re.search(r"\[1\] +routine-vacuuming\.html", said) or re.search(r"\[1\] +sql-vacuum\.html", said), said
    assert "What to type next" in said


def test_a_second_run_changes_nothing(checkout: Checkout) -> None:
    checkout.demo()
    for playbook in ("site", "deploy"):
        assert checkout.recap(playbook)["changed"] == 0


def test_ask_prints_the_answer_as_the_service_gave_it(checkout: Checkout) -> None:
    answer = json.loads(checkout.demo("ask", "--json", "How do I take a base backup?"))
    assert answer["response"]
    assert any("backup" in source["document"] for source in answer["sources"])


def test_the_language_model_answers_when_asked_to(checkout: Checkout) -> None:
    answer = json.loads(checkout.demo("ask", "--json", "--generate", "What does VACUUM do?"))
    assert (answer["answer"], answer["degraded"]) == ("generate", False)


def test_env_is_all_that_a_script_needs(checkout: Checkout) -> None:
    env = dict(assignment.split("=", 1) for assignment in shlex.split(checkout.demo("env")))
    context = ssl.create_default_context(cafile=env["RAGRACK_CA"])
    response = httpx.post(
        f"{env['RAGRACK_URL']}/query",
        json={"query": "What is a partial index?"},
        headers={"Authorization": f"Bearer {env['RAGRACK_KEY']}"},
        verify=context,
    )
    assert response.status_code == httpx.codes.OK
    assert response.json()["response"]


def test_traces_are_shown(checkout: Checkout) -> None:
    found = re.search(r"(http://\S+)/projects", checkout.demo("--traces"))
    assert found
    asked = json.loads(checkout.demo("ask", "--json", "What is a partial index?"))["request_id"]
    deadline = time.monotonic() + 60
    while True:
        spans = httpx.get(f"{found[1]}/v1/projects/default/spans", params={"limit": 1000}).json()["data"]
        traces = {
            span["context"]["trace_id"] for span in spans if span["attributes"].get("ragrack.request_id") == asked
        }
        if traces:
            break
        assert time.monotonic() < deadline, f"no span of request {asked} among {len(spans)}"
        time.sleep(1)
    assert "VectorIndexRetriever.aretrieve" in {s["name"] for s in spans if s["context"]["trace_id"] in traces}


def test_destroy_removes_all_that_it_made(before: tuple[set[str], set[str]], checkout: Checkout) -> None:
    checkout.demo("destroy")
    assert machine() == before
    for name in (".state/demo", "inventories/demo/pki", "inventories/demo/host_vars"):
        assert not (checkout.path / name).exists()
