"""What the edge stands: a judge of its TLS, slow clients, smuggled requests, forged addresses, too much of anything."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
from pathlib import Path

import fleet
import httpx
import pytest
from fleet import Host

HOSTS = fleet.hosts()
HOST = HOSTS[-1]
# The house's own CA publishes no list of what it revoked: its certificates are replaced.
OURS = {"cert_revocation", "cert_crlDistributionPoints", "cert_ocspURL"}


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def node(request: pytest.FixtureRequest) -> Host:
    host: Host = request.param
    return host


def connect(host: Host = HOST) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(fleet.CA))
    raw = socket.create_connection((host.address, 443), timeout=60)
    return context.wrap_socket(raw, server_hostname=host.address)


def answer(request: bytes) -> bytes:
    """All that comes back until the server closes."""
    with connect() as connection:
        connection.sendall(request)
        received = b""
        with contextlib.suppress(ConnectionResetError, ssl.SSLError):
            while block := connection.recv(65536):
                received += block
        return received


def test_testssl_finds_nothing_above_low_and_no_weak_protocol(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    asked = ["--quiet", "--color", "0", "--warnings", "off", "--add-ca", str(fleet.CA), "--jsonfile", str(report)]
    done = subprocess.run(["testssl", *asked, HOST.address], capture_output=True, text=True, check=False)
    assert report.exists(), done.stdout + done.stderr
    found = json.loads(report.read_text())
    above = [f"{one['severity']} {one['id']}: {one['finding']}" for one in found if one["id"] not in OURS]
    assert [one for one in above if one.startswith(("MEDIUM", "HIGH", "CRITICAL", "FATAL"))] == []
    said = {one["id"]: one["finding"] for one in found}
    assert {name: said[name] for name in ("SSLv2", "SSLv3", "TLS1", "TLS1_1")} == dict.fromkeys(
        ("SSLv2", "SSLv3", "TLS1", "TLS1_1"), "not offered"
    )
    assert {said[name].split()[0] for name in ("TLS1_2", "TLS1_3")} == {"offered"}


def test_every_answer_tells_browsers_what_they_may_do(node: Host) -> None:
    with node.client(key=None) as client:
        for path in ("/", "/readyz", "/nowhere"):
            headers = client.get(path).headers
            assert "max-age=31536000" in headers["strict-transport-security"], path
            assert "default-src 'none'" in headers["content-security-policy"], path
            assert "unsafe" not in headers["content-security-policy"], path
            assert headers["x-content-type-options"] == "nosniff", path
            assert headers["x-frame-options"] == "DENY", path
            assert "/" not in headers.get("server", ""), "the version is nobody's business"


def test_speaks_http_2(node: Host) -> None:
    context = ssl.create_default_context(cafile=str(fleet.CA))
    context.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection((node.address, 443), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname=node.address) as connection,
    ):
        assert connection.selected_alpn_protocol() == "h2"


START = b"POST /query HTTP/1.1\r\nHost: x\r\n"
SMUGGLED = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        START + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        START + b"Transfer-Encoding: chunked\r\nContent-Length: 60\r\n\r\n0\r\n\r\n" + SMUGGLED,
        START + b"Content-Length: 0\r\nContent-Length: 60\r\n\r\n" + SMUGGLED,
        START + b"Content-Length: +0\r\n\r\n" + SMUGGLED,
        START + b"Content-Length : 0\r\n\r\n" + SMUGGLED,
        START + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        START + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
        START + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        b"POST /query HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        START + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n" + SMUGGLED,
    ],
    ids=["CL-TE", "TE-CL", "CL-CL", "CL-plus", "CL-space", "TE-x", "TE-list", "TE-tab", "HTTP-1.0", "chunk-size"],
)
def test_a_smuggled_request_is_not_answered(request_: bytes) -> None:
    received = answer(request_)
    assert received.count(b"HTTP/1.1 ") == 1, received
    assert received.split()[1] in (b"400", b"501"), received
    assert b"snapshots" not in received


def test_who_sends_slowly_keeps_nobody_waiting_and_is_cut_off() -> None:
    slow = [connect() for _ in range(200)]
    try:
        for number, connection in enumerate(slow):
            connection.sendall(START if number % 2 else START + b"Content-Length: 1000\r\n\r\n{")
        assert HOST.ask("What does VACUUM do?")["response"]
        for connection in slow:
            with contextlib.suppress(OSError):
                received = connection.recv(65536)
                assert not received or received.split()[1] in (b"400", b"408", b"401"), received
    finally:
        for connection in slow:
            connection.close()


def test_too_large_a_header_or_body_is_refused() -> None:
    with HOST.client() as client:
        assert client.get("/readyz", headers={"X-Long": "x" * 40_000}).status_code == httpx.codes.BAD_REQUEST
        refused = client.post("/query", content=b'{"query": "' + b"x" * 12_000_000 + b'"}')
        assert refused.status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE
        assert refused.headers["content-type"] == "application/problem+json"


def test_a_forged_address_is_not_believed() -> None:
    with HOST.client() as client:
        for name in ("X-Forwarded-For", "X-Real-IP", "Forwarded"):
            client.get("/readyz", headers={name: "203.0.113.9", "X-Request-ID": "forged-address"})
    logged = HOST.run("grep -h forged-address /var/log/nginx/access.log")
    assert logged.count("\n") == 2
    assert "203.0.113.9" not in logged
    assert HOST.shell.run("journalctl --no-pager -u 'ragrack@*' | grep -F 203.0.113.9").rc != 0


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "//metrics", "/%6detrics", "/x/../metrics", "/admin"])
def test_what_is_private_is_closed_from_outside(path: str) -> None:
    received = answer(b"GET " + path.encode() + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert received.split()[1] in (b"403", b"404", b"401"), received
    assert b"ragrack_requests" not in received


def test_metrics_tell_when_certificates_end(node: Host) -> None:
    node.run("systemctl start ragrack-certificate-ends.service")
    told = node.run("cat /var/lib/ragrack-metrics/certificates.prom").splitlines()[-1]
    with connect(node) as connection:
        served = connection.getpeercert()
    assert told.startswith('ragrack_certificate_not_after_timestamp_seconds{realm="default"} ')
    assert served
    assert int(told.split()[-1]) == ssl.cert_time_to_seconds(str(served["notAfter"]))
    node.run("systemd-analyze security --no-pager --threshold=25 ragrack-certificate-ends.service")
