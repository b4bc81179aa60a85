"""The service as systemd runs it: gunicorn, two workers, a unix socket; and the gate that asks it questions."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ragrack import cli
from ragrack.settings import Settings, variable

COMMAND = [sys.executable, "-m", "gunicorn", "--config", "python:ragrack.gunicorn_conf", "ragrack.api:create_app()"]
PASSED_ON = ("collections", "index_dir", "golden_dir", "embed_model_dir", "api_keys_file", "runtime_dir", "release")


def environment(settings: Settings, **more: str) -> dict[str, str]:
    values = {variable(name): str(getattr(settings, name)) for name in PASSED_ON}
    values["RAGRACK_COLLECTIONS"] = "island"
    return {"PATH": os.defpath, **values, **more}


def get(sock: Path, path: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("localhost", timeout=20)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(sock))
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


@pytest.fixture(params=["uvicorn", "asgi"])
def gunicorn(settings: Settings, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    log = tmp_path / "gunicorn.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            COMMAND, env=environment(settings, RAGRACK_WORKER_CLASS=request.param), stdout=out, stderr=out, cwd=tmp_path
        )
    try:
        deadline = time.monotonic() + 60
        # Both workers: gunicorn's own class loses a SIGTERM that comes while it loads, and is killed when time is up.
        while log.read_text().count('"started ready"') < 2:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)


def test_it_serves_from_a_private_socket_and_lets_requests_in_flight_finish(
    gunicorn: subprocess.Popen[bytes], settings: Settings, tmp_path: Path
) -> None:
    assert stat.S_IMODE(settings.socket.stat().st_mode) == 0o660
    assert stat.S_IMODE(settings.gate_key_file.stat().st_mode) == 0o600
    assert get(settings.socket, "/readyz")[0] == 200
    assert get(settings.socket, "/healthz") == (200, {"status": "ok", "release": settings.release})

    body = json.dumps({"query": "When does the bakery open?"}).encode()
    head = (
        "POST /query HTTP/1.1\r\nHost: service\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
        f"Authorization: Bearer {settings.gate_key_file.read_text()}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(settings.socket))
        client.sendall(head.encode())
        # The app is waiting for the body: the request is in flight beyond doubt.
        assert client.recv(1000).startswith(b"HTTP/1.1 100")
        gunicorn.send_signal(signal.SIGTERM)
        while settings.socket.exists():
            time.sleep(0.05)
        client.sendall(body)
        answer = b""
        while b"bakery.md" not in answer and (part := client.recv(65536)):
            answer += part
    assert answer.startswith(b"HTTP/1.1 200")
    assert gunicorn.wait(30) == 0
    lines = [json.loads(line) for line in (tmp_path / "gunicorn.log").read_text().splitlines()]
    assert {line["release"] for line in lines} == {settings.release}
    assert [line["status"] for line in lines if line.get("path") == "/query"] == [200]


def test_settings_that_do_not_hold_end_it_with_all_problems_and_no_socket(settings: Settings, tmp_path: Path) -> None:
    wrong = environment(settings, RAGRACK_TOP_K="many", RAGRACK_ANSWER="generate", RAGRACK_CHUNK_SIZ="1")
    done = subprocess.run(COMMAND, env=wrong, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
    assert done.returncode != 0
    for name in ("RAGRACK_TOP_K", "RAGRACK_LLM_BASE_URL", "RAGRACK_LLM_MODEL", "RAGRACK_CHUNK_SIZE"):
        assert name in done.stderr
    assert "Traceback" not in done.stderr
    assert not settings.socket.exists()


BEFORE_THE_FORK = """
import gc, json, sys
from ragrack import preload, settings
preload.import_all(settings.load())
print(json.dumps([gc.isenabled(), gc.get_freeze_count(), len(gc.get_objects()), sorted(sys.modules)]))
"""


def test_workers_find_what_they_need_imported_and_their_collector_looks_at_their_own_alone(settings: Settings) -> None:
    llm = environment(settings, RAGRACK_LLM_BASE_URL="http://127.0.0.1:9/v1", RAGRACK_LLM_MODEL="m")
    command = [sys.executable, "-c", BEFORE_THE_FORK]
    done = subprocess.run(command, env=llm, capture_output=True, text=True, timeout=60, check=True)
    collects, frozen, looked_at, modules = json.loads(done.stdout)
    assert collects
    assert looked_at < frozen / 100
    assert {"ragrack.api", "ragrack.store", "llama_index.llms.openai_like"} <= set(modules)


GOLDEN = """
k: 1
questions:
  - {question: "When does the bakery open?", sources: [bakery.md], phrase: six in the morning}
  - {question: "What does the ferry cost?", sources: [ferry.html]}
"""


@pytest.mark.parametrize("gunicorn", ["uvicorn"], indirect=True)
def test_the_gate_asks_through_the_api(
    gunicorn: subprocess.Popen[bytes], settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = tmp_path / "golden.yml"
    arguments = ["golden", "--collection", "island", "--golden-file", str(golden), "--socket", str(settings.socket)]

    golden.write_text(GOLDEN)
    assert cli.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["passed"], report["hit_rate"], report["mrr"], report["k"]) == (True, 1.0, 1.0, 1)
    assert (report["questions"], report["failed"], report["phrases_missing"]) == (2, [], [])
    assert report["release"] == settings.release

    golden.write_text(GOLDEN.replace("[ferry.html]", "[museum.html]"))
    assert cli.main([*arguments, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["passed"], report["hit_rate"]) == (False, 0.5)
    failed = {"question": "What does the ferry cost?", "expected": ["museum.html"], "got": ["ferry.html"]}
    assert report["failed"] == [failed]
    assert cli.main(arguments) == 1
    assert "What does the ferry cost?" in capsys.readouterr().out

    golden.unlink()
    assert cli.main(arguments) == 1
    assert str(golden) in capsys.readouterr().err
    assert cli.main([*arguments, "--allow-missing"]) == 0
    assert "probe" in capsys.readouterr().out

    wrong = tmp_path / "wrong.key"
    wrong.write_text("rr_wrong")
    assert cli.main([*arguments, "--allow-missing", "--key-file", str(wrong)]) == 1
    assert "401" in capsys.readouterr().err


def test_the_gate_says_when_nothing_answers(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    settings.gate_key_file.write_text("rr_any")
    arguments = ["golden", "--collection", "island", "--allow-missing", "--socket", str(settings.socket)]
    assert cli.main(arguments) == 1
    assert "cannot be asked" in capsys.readouterr().err
