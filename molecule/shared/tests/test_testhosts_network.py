"""Subnets do not overlap what is there, and names fit into the kernel's 15 characters."""

import ipaddress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from testhosts.machine import Machine, read_resolv_conf
from testhosts.network import RANGE, Network, choose_subnet, dropping_chains, passes
from testhosts.shell import HostsError

SUBNETS = [str(subnet) for subnet in RANGE.subnets(new_prefix=24)]


@given(st.lists(st.sampled_from(SUBNETS), max_size=100))
def test_a_subnet_is_never_given_twice(taken: list[str]) -> None:
    subnet = choose_subnet(taken)
    assert subnet in SUBNETS
    assert subnet not in taken


@pytest.mark.parametrize("there", ["198.18.0.0/16", "198.18.0.1/24", "198.18.0.77/32", "198.16.0.0/14"])
def test_a_subnet_keeps_clear_of_wider_and_narrower_ones(there: str) -> None:
    other = ipaddress.IPv4Network(there, strict=False)
    if other.supernet_of(RANGE):
        with pytest.raises(HostsError, match=r"every /24 .* in use"):
            choose_subnet([there])
    else:
        assert not ipaddress.IPv4Network(choose_subnet([there, "10.0.0.0/8"])).overlaps(other)


def test_with_no_subnet_left_the_mend_is_told() -> None:
    with pytest.raises(HostsError, match="destroy runs"):
        choose_subnet(SUBNETS)


@pytest.mark.parametrize("subnet", ["198.18.0.0/24", "198.19.255.0/24"])
def test_names_of_interfaces_are_short_enough(subnet: str) -> None:
    network = Network(subnet)
    machine = Machine("h", "trixie", network.address(200), Path("h"))
    assert max(map(len, [network.bridge, f"vb-{machine.unit}"])) <= 15


def test_two_runs_share_no_name() -> None:
    networks = [Network(subnet) for subnet in SUBNETS]
    assert len({network.bridge for network in networks}) == len({network.table for network in networks}) == len(SUBNETS)


def test_a_stub_resolver_of_this_machine_is_not_handed_to_hosts() -> None:
    text = (
        "# stub\nnameserver 127.0.0.53\nnameserver 192.0.2.53\nnameserver ::1\nsearch corp.example .\noptions edns0\n"
    )
    assert read_resolv_conf(text) == (["192.0.2.53"], ["corp.example"])


def test_only_chains_that_drop_forwarded_packets_are_touched_and_only_our_rules_are_found() -> None:
    def chain(name: str, **more: str) -> dict[str, Any]:
        return {"chain": {"family": "ip", "table": "filter", "name": name, **more}}

    def rule(handle: int, side: str, interface: str) -> dict[str, Any]:
        match = {"match": {"op": "==", "left": {"meta": {"key": side}}, "right": interface}}
        expr = [match, {"counter": {"packets": 0, "bytes": 0}}, {"accept": None}]
        return {"rule": {"family": "ip", "table": "filter", "chain": "FORWARD", "handle": handle, "expr": expr}}

    ruleset = [
        {"metainfo": {"version": "1.0.6"}},
        chain("FORWARD", hook="forward", policy="drop"),
        chain("INPUT", hook="input", policy="drop"),
        chain("DOCKER-USER"),
        rule(7, "iifname", "ragrack-18-0"),
        rule(8, "oifname", "ragrack-18-0"),
        rule(9, "iifname", "docker0"),
    ]
    assert dropping_chains(ruleset) == [("ip", "filter", "FORWARD")]
    assert passes(ruleset, "ragrack-18-0") == [
        (["ip", "filter", "FORWARD", "handle", "7"], "iifname"),
        (["ip", "filter", "FORWARD", "handle", "8"], "oifname"),
    ]
