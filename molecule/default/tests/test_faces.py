"""What clients of every kind get through the edge: streams, OpenAI's client, keys that come and go, limits."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator

import fleet
import httpx
import openai
import pytest
from fleet import Host

HOSTS = fleet.hosts()
QUESTION = "How do I take a base backup?"


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def node(request: pytest.FixtureRequest) -> Host:
    host: Host = request.param
    return host


@pytest.fixture
def client(node: Host) -> Iterator[openai.OpenAI]:
    context = ssl.create_default_context(cafile=str(fleet.CA))
    with openai.OpenAI(
        base_url=f"{node.url}/v1",
        api_key=fleet.api_key(),
        http_client=httpx.Client(verify=context, timeout=120),
        max_retries=0,
    ) as made:
        yield made


def test_a_stream_begins_with_the_sources_and_ends_with_done(node: Host) -> None:
    body = {"query": QUESTION, "stream": True}
    with node.client() as http, http.stream("POST", "/query", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("event: ") for line in response.iter_lines() if line.startswith("event: ")]
    assert (events[0], events[-1]) == ("sources", "done")
    assert "token" in events


def test_retrieve_gives_the_nodes_alone(node: Host) -> None:
    with node.client() as http:
        nodes = http.post("/retrieve", json={"query": QUESTION, "top_k": 3}).json()["nodes"]
    assert 0 < len(nodes) <= 3
    assert any("backup" in one["document"] for one in nodes)


def test_a_question_outside_the_corpus_is_not_answered(node: Host) -> None:
    answer = node.ask("Who won the football match between the two village teams yesterday?")
    assert "don't know" in answer["response"].lower()
    assert answer["sources"] == []


def test_openai_s_client_lists_and_asks_a_collection(client: openai.OpenAI) -> None:
    assert "postgres" in [model.id for model in client.models.list()]
    answer = client.chat.completions.create(model="postgres", messages=[{"role": "user", "content": QUESTION}])
    assert answer.choices[0].message.content


def test_openai_s_client_streams(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(
        model="postgres", messages=[{"role": "user", "content": QUESTION}], stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text


def test_metrics_are_closed_outside_and_open_on_the_host(node: Host) -> None:
    with node.client() as http:
        assert http.get("/metrics").status_code == httpx.codes.FORBIDDEN
    ask = "import http.client, socket; c = http.client.HTTPConnection('x'); c.sock = socket.socket(socket.AF_UNIX)"
    ask += "; c.sock.connect('/opt/ragrack/current/run/gunicorn.sock'); c.request('GET', '/metrics')"
    assert "ragrack_" in node.run(f'python3 -c "{ask}; print(c.getresponse().read().decode())"')


def test_a_key_works_at_once_and_a_revoked_one_no_longer() -> None:
    node = HOSTS[0]
    ragrack = "/opt/ragrack/current/venv/bin/ragrack keys"
    file = "--file /etc/ragrack/api-keys.json"
    made = json.loads(node.run(f"{ragrack} new --name guest {file} --json"))
    try:
        with node.client(key=made["key"]) as http:
            assert http.post("/query", json={"query": QUESTION}).status_code == httpx.codes.OK
            node.run(f"{ragrack} revoke guest {file}")
            assert http.post("/query", json={"query": QUESTION}).status_code == httpx.codes.UNAUTHORIZED
    finally:
        assert fleet.play("site", "--tags", "app", "--limit", node.name).status == 0


def test_documents_are_taken_by_the_host_that_ingests_alone(node: Host) -> None:
    with node.client() as http:
        response = http.put("/documents/postgres/new.html", content=b"<p>new</p>")
    assert response.status_code in (httpx.codes.FORBIDDEN, httpx.codes.MISDIRECTED_REQUEST)
    assert response.headers["content-type"] == "application/problem+json"


def test_a_key_that_asks_too_often_is_told_to_wait() -> None:
    limited = {"nginx_rate": "1r/m", "nginx_rate_burst": 1}
    here = ("site", "--tags", "nginx", "--limit", HOSTS[0].name)
    assert fleet.play(*here, variables=limited).status == 0
    try:
        with HOSTS[0].client() as http:
            answers = [http.post("/query", json={"query": QUESTION}) for _ in range(6)]
    finally:
        assert fleet.play(*here).status == 0
    refused = [answer for answer in answers if answer.status_code == httpx.codes.TOO_MANY_REQUESTS]
    assert answers[0].status_code == httpx.codes.OK
    assert refused
    assert refused[0].headers["retry-after"]
    assert refused[0].headers["content-type"] == "application/problem+json"
