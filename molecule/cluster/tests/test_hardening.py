"""Behind the firewall: what nobody listed is closed, what locks Ansible out goes back by itself, keys alone log in."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import fleet
import pytest
from fleet import Host

HOSTS = [*fleet.hosts("edge"), *fleet.hosts()]
EDGE, APP = HOSTS[0], HOSTS[-1]
# What lynis warns of, and why it stays.
KNOWN = {
    "PKGS-7388": "these hosts know the archive that they were made from, and no other",
}


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def node(request: pytest.FixtureRequest) -> Host:
    host: Host = request.param
    return host


@pytest.fixture
def listener() -> Iterator[int]:
    """A port of an app host that somebody opened."""
    APP.run("systemd-run --quiet --unit=listener python3 -m http.server 8099")
    APP.run("timeout 20 sh -c 'until ss -tln | grep -q :8099; do sleep 0.1; done'")
    yield 8099
    APP.run("systemctl stop listener")


def opens(source: Host, target: Host, port: int) -> bool:
    code = f"import socket; socket.create_connection(('{target.address}', {port}), timeout=3)"
    return bool(source.shell.run(f'python3 -c "{code}"').rc == 0)


def rules(host: Host) -> str:
    return host.run("nft list table inet ragrack")


def test_the_rules_outlive_a_reboot(node: Host) -> None:
    assert "policy drop" in rules(node)
    assert node.run("systemctl is-enabled ragrack-firewall") == "enabled"


def test_a_port_that_nobody_listed_is_closed(listener: int) -> None:
    assert opens(APP, APP, listener)
    assert not opens(EDGE, APP, listener)
    assert "ragrack firewall: " in APP.run("cat /etc/ragrack/firewall.nft")


def test_app_hosts_are_asked_by_edge_hosts_alone() -> None:
    other = fleet.hosts()[0]
    assert opens(EDGE, APP, 8443)
    assert not opens(other, APP, 8443)
    assert opens(other, EDGE, 443)


def test_rules_that_lock_ansible_out_go_back_by_themselves() -> None:
    before, kept = rules(APP), APP.run("cat /etc/ragrack/firewall.nft")
    nobody = {"firewall_admins": ["203.0.113.0/24"], "firewall_revert_after": 30}
    played = fleet.play("harden", "--tags", "firewall", "--limit", APP.name, variables=nobody)
    assert played.status != 0
    assert "unreachable=1" in played.output, played.output
    knocks = ["ssh", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "ConnectTimeout=2", APP.address]
    fleet.until("an answer of sshd", lambda: "Permission" in said(*knocks), 60)
    assert rules(APP) == before
    assert APP.run("cat /etc/ragrack/firewall.nft") == kept
    played = fleet.play("harden", "--tags", "firewall", "--limit", APP.name)
    assert played.status == 0, played.output


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_no_password_is_asked_for(node: Host) -> None:
    never = ["-o", "StrictHostKeyChecking=no", "-o", "PubkeyAuthentication=no", "-o", "BatchMode=yes"]
    assert "Permission denied (publickey)." in said("ssh", *never, f"root@{node.address}")


def test_security_updates_come_by_themselves(node: Host) -> None:
    origins = node.run("unattended-upgrade --dry-run --debug 2>&1 | grep 'Allowed origins'")
    assert origins.count("origin=") == 1
    assert "label=Debian-Security" in origins
    assert node.run("systemctl is-active apt-daily-upgrade.timer") == "active"


def test_logs_are_kept_for_as_long_as_was_said(node: Host) -> None:
    said = node.run("systemd-analyze cat-config systemd/journald.conf | grep -v ^#")
    assert {"SystemMaxUse=2000M", "MaxRetentionSec=30day", "Storage=persistent"} <= set(said.split())
    directory = "/var/log/nginx"
    node.run(f"cd {directory} && touch -d -31days access.log.8.gz && touch -d -29days access.log.7.gz")
    node.run("systemctl start systemd-tmpfiles-clean")
    assert {"access.log.7.gz", "access.log"} <= set(node.run(f"ls {directory}").split())
    assert "access.log.8.gz" not in node.run(f"ls {directory}")
    assert node.run("systemctl is-active systemd-tmpfiles-clean.timer logrotate.timer") == "active\nactive"
    assert node.run("journalctl -q -n 1 -o cat"), "it goes on after its restart"


def test_lynis_warns_of_nothing_new(capsys: pytest.CaptureFixture[str]) -> None:
    # What Debian has mended since the hosts were made is put in as it will be every day.
    APP.run("apt-get update -qq && unattended-upgrade && apt-get install -y -qq lynis >/dev/null")
    APP.shell.run("lynis audit system --quick --quiet --no-colors")
    report = APP.run("cat /var/log/lynis-report.dat").splitlines()
    [index] = [line.split("=")[1] for line in report if line.startswith("hardening_index=")]
    warnings = [line.removeprefix("warning[]=") for line in report if line.startswith("warning[]=")]
    with capsys.disabled():
        print(f"\nlynis: hardening index {index} of 100")
    assert [one for one in warnings if one.split("|")[0] not in KNOWN] == []


def test_hardening_again_changes_nothing() -> None:
    again = fleet.play("harden", "--check", "--diff")
    assert (again.status, again.changed) == (0, 0), again.output
