"""What a deployed host does: answers, refuses, keeps its secrets and comes back by itself."""

from __future__ import annotations

import subprocess
import time

import fleet
import httpx
import pytest
from fleet import Host

HOSTS = fleet.hosts()


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def node(request: pytest.FixtureRequest) -> Host:
    host: Host = request.param
    return host


def wait_until_it_answers(node: Host, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with node.client(key=None) as client:
                if client.get("/readyz").status_code == httpx.codes.OK:
                    return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, f"{node.name} does not answer\n{node.journal()}"
        time.sleep(0.2)


def test_answers_with_the_page_that_holds_the_answer(node: Host) -> None:
    first = fleet.questions()[0]
    answer = node.ask(first["question"])
    assert answer["response"]
    assert {source["document"] for source in answer["sources"]} & set(first["sources"])


def test_finds_the_sources_of_the_golden_questions(node: Host) -> None:
    where = ["--url", node.url, "--cacert", str(fleet.CA), "--key-file", str(fleet.INVENTORY / "pki/molecule.key")]
    ask = [str(fleet.BIN / "ragrack"), "golden", *where, "--collection", "postgres", "--golden-file", str(fleet.GOLDEN)]
    done = subprocess.run(ask, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_answers_from_the_language_model_when_asked_to(node: Host) -> None:
    answer = node.ask("What does VACUUM do?", answer="generate")
    assert answer["answer"] == "generate"
    assert not answer["degraded"]
    assert answer["response"]


def test_answers_from_the_passages_when_the_language_model_is_down(node: Host) -> None:
    node.run("systemctl stop ragrack-model")
    try:
        answer = node.ask("What does VACUUM do?", answer="generate")
    finally:
        node.run("systemctl start ragrack-model")
    assert answer["degraded"]
    assert answer["sources"]


@pytest.mark.parametrize(
    ("body", "status"),
    [({}, 422), ({"query": 7}, 422), ({"query": ""}, 422), ({"query": "What?", "top_k": 0}, 422)],
)
def test_refuses_a_malformed_question(node: Host, body: dict[str, object], status: int) -> None:
    with node.client() as client:
        response = client.post("/query", json=body)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("key", [None, "not-a-key"])
def test_refuses_who_has_no_key(node: Host, key: str | None) -> None:
    with node.client(key=key) as client:
        assert client.post("/query", json={"query": "What does VACUUM do?"}).status_code == httpx.codes.UNAUTHORIZED


def test_sends_plain_http_to_tls(node: Host) -> None:
    response = httpx.get(node.url.replace("https", "http") + "/healthz")
    assert response.status_code == httpx.codes.PERMANENT_REDIRECT or response.is_redirect
    assert response.headers["location"].startswith("https://")


def test_listens_only_where_it_must(node: Host) -> None:
    sockets = [line for line in node.run("ss -tlnpH").splitlines() if "systemd-resolve" not in line]
    outside = {line.split()[3] for line in sockets if not line.split()[3].startswith(("127.", "[::1]"))}
    assert {address.rsplit(":", 1)[1] for address in outside} == {"22", "80", "443"}


def test_the_sandbox_is_tight(node: Host) -> None:
    unit = f"ragrack@{node.release}.service"
    print(node.run(f"systemd-analyze security --no-pager {unit} | tail -n 1"))
    node.run(f"systemd-analyze security --no-pager --threshold=15 {unit}")
    for other in ("nginx", "ragrack-model", "ragrack-ingest@postgres"):
        if node.shell.run(f"systemctl cat {other}").rc == 0:
            node.run(f"systemd-analyze security --no-pager --threshold=25 {other}")


def test_the_service_cannot_change_its_release_nor_its_index(node: Host) -> None:
    main = node.run(f"systemctl show -P MainPID ragrack@{node.release}")
    for path in ("/opt/ragrack/current/app.env", "/var/lib/ragrack/indexes/probe", "/etc/ragrack/probe"):
        inside = f"nsenter --target {main} --mount --setuid $(id -u ragrack) -- sh -c 'echo x >> {path}'"
        assert node.shell.run(inside).rc != 0, path


def test_a_secret_is_where_the_service_reads_it_and_nowhere_else(node: Host) -> None:
    secret = (fleet.INVENTORY / "pki/llm.key").read_text().strip()
    main = node.run(f"systemctl show -P MainPID ragrack@{node.release}")
    node.run(f"grep -qF {secret} /proc/{main}/root/run/credentials/ragrack@*/credentials_llm_api_key")
    searched = "/opt/ragrack /etc /var/cache /var/lib /usr/local /home /root /tmp"
    assert node.shell.run(f"grep -rlF {secret} {searched}").stdout == ""
    assert node.shell.run(f"journalctl --no-pager | grep -F {secret}").stdout == ""
    # Out of a file, or grep would find the secret in its own arguments.
    node.run(f"echo {secret} >/run/secret")
    seen = node.shell.run(
        "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | grep -acFf /run/secret; rm /run/secret"
    )
    assert str(seen.stdout).strip() == "0"


def test_a_killed_worker_costs_nothing(node: Host) -> None:
    main = node.run(f"systemctl show -P MainPID ragrack@{node.release}")
    node.run(f"kill -9 $(pgrep -P {main} | head -n 1)")
    wait_until_it_answers(node)
    assert node.ask("What does VACUUM do?")["response"]


def test_comes_back_after_gunicorn_was_killed(node: Host) -> None:
    unit = f"ragrack@{node.release}"
    main = node.run(f"systemctl show -P MainPID {unit}")
    node.run(f"kill -9 {main}")
    # The workers that are left may still answer, so it is the new process that is waited for.
    another = f"systemctl show -P MainPID {unit} | grep -vxE '0|{main}'"
    node.run(f'timeout 30 sh -c "until {another}; do sleep 0.1; done"')
    wait_until_it_answers(node)
    assert node.ask("What does VACUUM do?")["response"]


def test_comes_back_after_a_power_cut_without_the_control_node(node: Host) -> None:
    release = node.release
    fleet.machine("kill", node.name)
    fleet.machine("start", node.name)
    wait_until_it_answers(node)
    assert node.ask("What does VACUUM do?")["response"]
    assert node.release == release
