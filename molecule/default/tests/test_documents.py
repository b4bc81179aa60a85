"""A document that comes by the API of the host that ingests is answered from on every host after the next ingest."""

from __future__ import annotations

import hashlib
import time

import fleet
import httpx
import yaml

HOSTS = fleet.hosts()
KEY = "rr_writer-of-the-tests"
FACT = "The museum of lighthouses opens at nine and closes at five on Sundays."


def test_a_document_by_the_api_is_answered_from() -> None:
    inventory = yaml.safe_load((fleet.INVENTORY / "group_vars/all.yml").read_text())
    variables = {
        "app_ingests": True,
        "app_collections": ["postgres", "notes"],
        "index_collections": [*inventory["index_collections"], {"name": "notes"}],
        "app_api_keys": [
            *inventory["app_api_keys"],
            {"name": "writer", "roles": ["reader", "ingester"], "sha256": hashlib.sha256(KEY.encode()).hexdigest()},
        ],
    }
    played = fleet.play("site", "--tags", "app,index", variables=variables)
    assert played.status == 0, played.output
    source = fleet.ingesting()
    source.run("echo 'A keeper paints the door.' > /var/lib/ragrack/documents/notes/first.md")
    try:
        played = fleet.play("deploy", variables=variables)
        assert played.status == 0, played.output
        with source.client(key=KEY) as client:
            assert client.put("/documents/notes/more/museum.md", content=FACT).status_code == httpx.codes.CREATED
            refused = client.put("/documents/postgres/more.md", content=FACT)
            assert refused.status_code == httpx.codes.CONFLICT, "what comes from the control node stays as it is"
        with fleet.pulling().client(key=KEY) as client:
            elsewhere = client.put("/documents/notes/more/museum.md", content=FACT)
            assert elsewhere.status_code == httpx.codes.MISDIRECTED_REQUEST
        played = fleet.play("ingest", variables=variables | {"ingest_collections": "notes"})
        assert played.status == 0, played.output
        for host in HOSTS:
            deadline = time.monotonic() + 30
            while True:
                answer = host.ask("When does the museum close on Sundays?", collection="notes")
                if [source["document"] for source in answer["sources"]] == ["more/museum.md"]:
                    break
                assert time.monotonic() < deadline, answer
            assert "five" in answer["response"]
    finally:
        assert fleet.play("rollback").status == 0
        assert fleet.play("site", "--tags", "app,index").status == 0
