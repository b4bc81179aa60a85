"""A canary is told from what it replaces by what each has answered."""

from __future__ import annotations

import http.server
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filter.ragrack_canary import ragrack_canary
from module_utils.release_state import StateError
from module_utils.release_traffic import metrics, traffic

LIMITS = {"requests": 50, "errors": 0.01, "slower": 0.5, "hit_rate": 0.0}
PAGE = """
# HELP ragrack_requests_total Requests answered.
ragrack_requests_total{method="POST",route="/query",status="200"} 90.0
ragrack_requests_total{method="POST",route="/retrieve",status="503"} 6.0
ragrack_requests_total{method="POST",route="/query",status="422"} 4.0
ragrack_requests_total{method="GET",route="/readyz",status="503"} 1000.0
ragrack_request_seconds_bucket{le="0.1",route="/query"} 80.0
ragrack_request_seconds_bucket{le="+Inf",route="/query"} 94.0
ragrack_request_seconds_bucket{le="0.1",route="/retrieve"} 1.0
ragrack_request_seconds_bucket{le="+Inf",route="/retrieve"} 6.0
ragrack_request_seconds_bucket{le="+Inf",route="/readyz"} 1.2e+03
"""


def counted(requests: int = 0, errors: int = 0, fast: int | None = None, **golden: float) -> dict[str, Any]:
    """`fast` of them took less than 100 ms, the rest up to a second."""
    fast = requests if fast is None else fast
    buckets = {"0.1": fast, "1.0": requests, "+Inf": requests}
    return {"requests": requests, "errors": errors, "buckets": buckets, "golden": golden}


def host(live: dict[str, Any], before: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"live": live, "before": before or {}}


def worse(canary: dict[str, Any], other: dict[str, Any], **limits: float) -> list[str]:
    first = {"app1": host(counted(10, 9)), "app2": host(counted(1000, 900))}
    return ragrack_canary({"app1": canary, "app2": other}, first, ["app1"], LIMITS | limits)


def test_it_counts_what_clients_wait_for() -> None:
    assert traffic(PAGE) == {"requests": 100, "errors": 6, "buckets": {"0.1": 81, "+Inf": 100}}


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[Path]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = PAGE.encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self) -> str:
            return "local"

        def log_message(self, *_: object) -> None:
            """Nothing."""

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

    path = tmp_path / "gunicorn.sock"
    with Server(str(path), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield path
        server.shutdown()


def test_it_reads_them_from_the_release_s_socket(socket: Path) -> None:
    assert traffic(metrics(socket))["requests"] == 100
    with pytest.raises(StateError, match="nothing answers on"):
        metrics(socket.with_name("none.sock"))


def test_only_what_was_answered_meanwhile_counts() -> None:
    assert worse(host(counted(110, 9)), host(counted(1100, 900))) == []


def test_errors() -> None:
    [said] = worse(host(counted(110, 14)), host(counted(1100, 901)))
    assert said == "5.0% of 100 requests failed, before 1.0% of 100"
    assert worse(host(counted(110, 14)), host(counted(1100, 904))) == [], "the others are no better"
    assert worse(host(counted(110, 14)), host(counted(1100, 901)), errors=0.05) == []


def test_time() -> None:
    [said] = worse(host(counted(110, 9, fast=60)), host(counted(1100, 900)))
    assert said == "p95 is 910 ms, before 95 ms"
    assert worse(host(counted(110, 9, fast=60)), host(counted(1100, 900, fast=1050))) == []


def test_few_requests_are_not_judged() -> None:
    assert worse(host(counted(50, 49, fast=10)), host(counted(1100, 900))) == []


def test_golden_questions() -> None:
    found = host(counted(10, 9, postgres=0.9), counted(5, postgres=0.95))
    [said] = worse(found, host(counted(1000, 900)))
    assert said == "app1: golden hit rate of postgres is 0.900, before 0.950"
    assert worse(found, host(counted(1000, 900)), hit_rate=0.1) == []


def test_a_release_that_was_started_anew_counts_from_nought() -> None:
    first = {"app1": host(counted(500, 500)), "app2": host(counted())}
    found = {"app1": host(counted(100, 5)), "app2": host(counted(100))}
    [said] = ragrack_canary(found, first, ["app1"], LIMITS)
    assert said == "5.0% of 100 requests failed, before 0.0% of 100"


def test_a_fleet_that_is_all_canary_is_compared_with_what_it_ran() -> None:
    first = {"app1": host(counted(0), counted(1000, 10))}
    assert ragrack_canary({"app1": host(counted(100, 1))}, first, ["app1"], LIMITS) == []
    [said] = ragrack_canary({"app1": host(counted(100, 5))}, first, ["app1"], LIMITS)
    assert said == "5.0% of 100 requests failed, before 1.0% of 1000"


def test_where_nothing_was_answered_nothing_is_said() -> None:
    first = {"app1": host(counted())}
    assert ragrack_canary(first, first, ["app1"], LIMITS) == []
