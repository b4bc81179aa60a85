"""Certificates of an ACME server: given through whichever edge host it asks, and renewed by the host alone."""

from __future__ import annotations

import socket
import ssl
import subprocess
from pathlib import Path

import fleet
import httpx
import pytest
from fleet import Host
from load import Load

EDGES = fleet.hosts("edge")
[ISSUER] = fleet.hosts("issuer")
NAME = "rag.test"
TLS = "/etc/ragrack/tls/default"
# As the timer does it, but now.
FORCED = """mkdir -p /run/systemd/system/certbot.service.d
printf '[Service]\\nExecStart=\\nExecStart=/usr/bin/certbot -q renew --force-renewal --no-random-sleep-on-renew\\n' \
>/run/systemd/system/certbot.service.d/zz-now.conf
systemctl daemon-reload && systemctl start certbot.service
rm -r /run/systemd/system/certbot.service.d && systemctl daemon-reload"""
HOOK = f"""#!/usr/bin/python3
import json, os, sys, urllib.request
verb = {{"add": "set-txt", "remove": "clear-txt"}}[sys.argv[1]]
body = {{"host": f"_acme-challenge.{{os.environ['CERTBOT_DOMAIN']}}.", "value": os.environ["CERTBOT_VALIDATION"]}}
urllib.request.urlopen(f"http://{ISSUER.address}:8055/{{verb}}", json.dumps(body).encode())
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of the certificates that the server gives: made anew at each of its starts."""
    path = tmp_path_factory.mktemp("acme") / "root.pem"
    context = ssl.create_default_context(cafile=str(fleet.INVENTORY / "pki/pebble.pem"))
    path.write_text(httpx.get(f"https://{ISSUER.address}:15000/roots/0", verify=context).text)
    return path


def served(edge: Host, root: Path, name: str = NAME) -> bytes:
    """The certificate that is served (DER). Raises ssl.SSLError where it is not the server's, or not for the name."""
    context = ssl.create_default_context(cafile=str(root))
    with (
        socket.create_connection((edge.address, 443), 10) as plain,
        context.wrap_socket(plain, server_hostname=name) as connection,
    ):
        found = connection.getpeercert(binary_form=True)
    assert found
    return found


async def there(client: httpx.AsyncClient, _: str) -> str | None:
    response = await client.get("/there", headers={"Host": NAME}, extensions={"sni_hostname": NAME})
    return None if response.status_code == httpx.codes.NO_CONTENT else f"{response.status_code}"


def test_every_edge_serves_a_certificate_of_the_server(root: Path) -> None:
    """The name leads to the first, so what the second was asked came through the first."""
    assert len({served(edge, root) for edge in EDGES}) == len(EDGES)
    answered = [edge.run("grep -c acme-challenge /var/log/nginx/access.log") for edge in EDGES]
    assert all(int(count) > 0 for count in answered)


def test_what_nobody_was_asked_for_is_not_found() -> None:
    for edge in EDGES:
        url = f"http://{edge.address}/.well-known/acme-challenge/none"
        assert httpx.get(url).status_code == httpx.codes.NOT_FOUND
        assert httpx.get(f"http://{edge.address}/query").status_code == httpx.codes.PERMANENT_REDIRECT


def test_the_host_renews_by_itself_and_nobody_notices(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [served(edge, root) for edge in EDGES]
    workers = [edge.run("pgrep -f 'nginx: worker'") for edge in EDGES]
    urls = [edge.url for edge in EDGES]
    with Load(urls, key="none", ca=root, questions=[""], clients=4, pause=0.02, ways=[there]) as load:
        for edge in EDGES:
            edge.run(FORCED)
        renewed = load.count.total
        fleet.until("some requests more", lambda: load.count.total > renewed + 200, 60)
    with capsys.disabled():
        print(f"\nacross a renewal on every edge host: {load.count}")
    assert load.count.failures == []
    assert not any(served(edge, root) in before for edge in EDGES)
    assert [edge.run("pgrep -f 'nginx: worker'") for edge in EDGES] == workers, "no reload"
    for edge in EDGES:
        assert edge.run("systemctl is-enabled certbot.timer") == "enabled"
        assert edge.run(f"stat -Lc '%U %G %a' {TLS}/key.pem") == "root ragrack-tls 640"


def test_a_hook_answers_in_the_dns(root: Path) -> None:
    """For a name of any host, which no web server can answer for."""
    hook = fleet.INVENTORY / "pki/dns-hook"
    hook.write_text(HOOK)
    variables = {"tls_names": [f"*.{NAME}", NAME], "tls_acme_dns_hook": str(hook)}
    played = fleet.play("site", "--tags", "tls", "--limit", "edge2", variables=variables)
    assert played.status == 0, played.output
    served(EDGES[1], root, f"any.{NAME}")
    before = served(EDGES[1], root)
    EDGES[1].run(FORCED)
    assert served(EDGES[1], root, f"any.{NAME}") != before
    played = fleet.play("site", "--tags", "tls", "--limit", "edge2", variables=variables)
    assert (played.status, played.changed) == (0, 0), played.output


def test_settings_that_cannot_work_are_refused() -> None:
    for variables in ({"tls_names": [EDGES[0].address]}, {"tls_names": [f"*.{NAME}"]}, {"tls_acme_ca": "/none.pem"}):
        refused = fleet.play("site", "--tags", "tls", variables=variables)
        assert refused.status != 0
        assert "Nothing was changed" in refused.output


@pytest.mark.parametrize("given", ["text", "path"])
def test_a_certificate_that_was_made_elsewhere(given: str, tmp_path: Path) -> None:
    """Its key is in no output, and one that does not fit the names is refused."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30"]
    made += ["-subj", "/CN=elsewhere", "-addext", f"subjectAltName=DNS:{NAME}", "-keyout", str(key)]
    subprocess.run([*made, "-out", str(certificate)], check=True, capture_output=True)
    secret = key.read_text()
    variables = {
        "tls_source": "provided",
        "tls_key": secret if given == "text" else str(key),
        "tls_certificate": str(certificate),
        "tls_ca": str(certificate),
    }
    command = ["--tags", "tls", "--limit", "edge1", "-vvv"]
    played = fleet.play("site", *command, variables=variables)
    assert played.status == 0, played.output
    served(EDGES[0], certificate)
    assert secret.splitlines()[1] not in played.output
    played = fleet.play("site", *command, variables=variables)
    assert (played.status, played.changed) == (0, 0), played.output
    other = {**variables, "tls_names": ["other.test"]}
    refused = fleet.play("site", *command, variables=other)
    assert refused.status != 0
    assert "does not cover other.test" in refused.output
    served(EDGES[0], certificate)
