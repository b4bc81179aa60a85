"""New keys and certificates, and a new CA, while clients ask: what they connect to changes, and they do not notice.

The tests tell one story and run in this order.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import fleet
import pytest
from fleet import Host
from load import Load

EDGES, APPS = fleet.hosts("edge"), fleet.hosts()
URL = f"https://{EDGES[0].address.rsplit('.', 1)[0]}.200"
TLS = "/etc/ragrack/tls"
QUESTIONS = [entry["question"] for entry in fleet.questions()]
# An edge's nginx reads what it trusts at a reload, which closes idle connections: test_an_edge_s_nginx_is_reloaded.
OF_A_RELOAD = ("RemoteProtocolError", "ReadError")


@pytest.fixture(scope="module", autouse=True)
def load() -> Iterator[Load]:
    with Load([URL], key=fleet.api_key(), ca=fleet.CA, questions=QUESTIONS, clients=4, streams=True) as running:
        yield running


def served(edge: Host, trusted: str | None = None) -> bytes:
    """The certificate that an edge host serves (DER). Raises ssl.SSLError where it is not to be `trusted` (PEM)."""
    context = ssl.create_default_context(cadata=trusted or fleet.CA.read_text())
    with (
        socket.create_connection((edge.address, 443), 10) as plain,
        context.wrap_socket(plain, server_hostname=edge.address) as connection,
    ):
        found = connection.getpeercert(binary_form=True)
    assert found
    return found


def of_the_fleet() -> dict[str, str]:
    """The certificate that each host shows to the others."""
    return {host.name: host.run(f"cat {TLS}/fleet/cert.pem") for host in [*EDGES, *APPS]}


def rotate(ca: str | None = None, *arguments: str) -> fleet.Played:
    return fleet.play("rotate_certificates", *arguments, variables={"ca": ca} if ca else None)


def blocks(text: str) -> int:
    return text.count("BEGIN CERTIFICATE")


def test_every_key_and_certificate_is_made_anew(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    shown, between = [served(edge) for edge in EDGES], of_the_fleet()
    keys = [edge.run(f"sha256sum <{TLS}/default/key.pem") for edge in EDGES]
    played = rotate()
    assert played.status == 0, played.output
    assert not any(served(edge) in shown for edge in EDGES)
    assert not any(edge.run(f"sha256sum <{TLS}/default/key.pem") in keys for edge in EDGES)
    assert all(between[name] != now for name, now in of_the_fleet().items())
    assert all(host.history()[-1]["what"] == "rotate certificates" for host in APPS)
    with capsys.disabled():
        print(f"\nacross new certificates everywhere: {load.count}")
    assert load.count.failures == []


def test_each_handshake_finds_a_key_that_fits(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    """However often key and certificate change."""
    program = f"""
cd {TLS}/$1; served=$(readlink current)
for _ in $(seq 400); do for set in sets/*; do ln -s $set .again; mv -T .again current; done; done
ln -s $served .again; mv -T .again current"""
    for host in [*EDGES, APPS[0]]:
        host.run(f"bash -c '{program}' - {'default' if host in EDGES else 'fleet'}")
    with capsys.disabled():
        print(f"\nacross {400 * 3 * 2} changes and more: {load.count}")
    assert load.count.failures == []


def test_a_new_ca_is_trusted_before_it_signs(load: Load) -> None:
    old, before = fleet.CA.read_text(), [served(edge) for edge in EDGES]
    played = rotate("trust")
    assert played.status == 0, played.output
    assert blocks(fleet.CA.read_text()) == 2
    assert [served(edge, trusted=old) for edge in EDGES] == before
    assert {blocks(host.run(f"cat {TLS}/fleet/ca.pem")) for host in [*EDGES, *APPS]} == {2}
    refused = rotate("finish")
    assert refused.status != 0
    assert "ca=next" in refused.output
    assert blocks(fleet.CA.read_text()) == 2
    refused = rotate("next", "--limit", "edge1")
    assert refused.status != 0
    assert "would be left out" in refused.output
    assert [one for one in load.count.failures if not one.startswith(OF_A_RELOAD)] == []


def test_a_new_ca_signs_though_a_run_died_and_the_old_one_goes(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    """It died between the change of the key that signs and the first certificate that it signs."""
    old, between = fleet.CA.read_text().split("-----END", 1)[0] + "-----END CERTIFICATE-----\n", of_the_fleet()
    for directory in (fleet.CA.parent, fleet.CA.parent / "fleet"):
        (directory / "ca.next.key").rename(directory / "ca.key")
    played = rotate("next")
    assert played.status == 0, played.output
    assert blocks(fleet.CA.read_text()) == 2
    for edge in EDGES:
        served(edge)
        with pytest.raises(ssl.SSLCertVerificationError):
            served(edge, trusted=old)
    assert all(between[name] != now for name, now in of_the_fleet().items())
    # What is right in the middle of it is left alone.
    for again in (rotate("next"), fleet.play("site", "--tags", "tls,nginx,keepalived")):
        assert again.status == 0, again.output
        assert again.changed == 0, again.output
    played = rotate("finish")
    assert played.status == 0, played.output
    assert blocks(fleet.CA.read_text()) == 1
    assert {blocks(host.run(f"cat {TLS}/fleet/ca.pem")) for host in [*EDGES, *APPS]} == {1}
    for edge in EDGES:
        served(edge)
    with capsys.disabled():
        print(f"\nacross a new CA, {len(load.count.failures)} of them by the edge's reloads: {load.count}")
    assert [one for one in load.count.failures if not one.startswith(OF_A_RELOAD)] == []
