"""One bridge and one nftables table per run, on a subnet of 198.18.0.0/15 (RFC 2544) that nobody else here uses."""

import ipaddress
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testhosts.shell import HostsError, run, succeeds, write

RANGE = ipaddress.IPv4Network("198.18.0.0/15")
FIRST_HOST = 10
FORWARDING = "/proc/sys/net/ipv4/conf/{}/forwarding"


@dataclass(frozen=True)
class Network:
    """A /24 and what is named after it, so that names cannot collide where subnets do not."""

    subnet: str

    @property
    def gateway(self) -> str:
        return str(ipaddress.IPv4Network(self.subnet)[1])

    @property
    def _tail(self) -> tuple[str, str]:
        _, second, third, _ = self.gateway.split(".")
        return second, third

    @property
    def bridge(self) -> str:
        return "ragrack-{}-{}".format(*self._tail)

    @property
    def mac(self) -> str:
        return "02:52:52:{:02x}:{:02x}:01".format(*map(int, self._tail))

    @property
    def table(self) -> str:
        return "ragrack_{}_{}".format(*self._tail)

    def address(self, index: int) -> str:
        """Address of the run's host number ``index``, from 0."""
        return str(ipaddress.IPv4Network(self.subnet)[FIRST_HOST + index])


def choose_subnet(taken: Iterable[str]) -> str:
    """Return the first /24 that overlaps none of ``taken`` (networks in CIDR notation)."""
    used = [ipaddress.IPv4Network(net, strict=False) for net in taken]
    for subnet in RANGE.subnets(new_prefix=24):
        if not any(subnet.overlaps(net) for net in used):
            return str(subnet)
    raise HostsError(f"every /24 of {RANGE} is in use on this machine: destroy runs of test hosts that you do not need")


def subnets_in_use(but_not_on: str = "") -> list[str]:
    """List the subnets of this machine's interfaces and routes, but for those of one interface."""
    addresses = [
        f"{info['local']}/{info['prefixlen']}"
        for link in json.loads(run("ip", "-json", "-4", "address"))
        if link["ifname"] != but_not_on
        for info in link["addr_info"]
    ]
    routes = [
        route["dst"]
        for route in json.loads(run("ip", "-json", "-4", "route", "show", "table", "main"))
        if route["dst"] != "default" and route.get("dev") != but_not_on
    ]
    return addresses + routes


def uplink() -> str | None:
    """Return the interface of the default route."""
    routes = json.loads(run("ip", "-json", "-4", "route", "show", "default"))
    return routes[0]["dev"] if routes else None


def mtu() -> int:
    """Return the MTU towards the world: a bridge's own may be larger, and not all sites let ICMP through."""
    device = uplink()
    return int(Path(f"/sys/class/net/{device}/mtu").read_text()) if device else 1500


def up(network: Network, registry: Path) -> None:
    """Make the bridge, masquerading and forwarding; what is there already stays as it is."""
    if not Path(f"/sys/class/net/{network.bridge}").exists():
        # An address of its own: else it has that of one of its ports, and loses it with that host.
        run("ip", "link", "add", network.bridge, "address", network.mac, "type", "bridge")
    run("ip", "address", "replace", f"{network.gateway}/24", "dev", network.bridge)
    run("ip", "link", "set", network.bridge, "mtu", str(mtu()), "up")
    # The bridge's own flag and the uplink's suffice: the machine as a whole does not become a router.
    Path(FORWARDING.format(network.bridge)).write_text("1")
    _forward_uplink(registry)
    if not succeeds("nft", "list", "table", "ip", network.table):
        rules = (
            f"table ip {network.table} {{ chain postrouting {{ type nat hook postrouting priority srcnat; "
            f'ip saddr {network.subnet} oifname != "{network.bridge}" masquerade; }}; }}\n'
        )
        run("nft", "-f", "-", stdin=rules)
    _pass_firewall(network)


def _pass_firewall(network: Network) -> None:
    """Let the bridge through where a firewall drops what is forwarded, as Docker's does."""
    ruleset = json.loads(run("nft", "--json", "list", "ruleset"))["nftables"]
    for family, table, chain in dropping_chains(ruleset):
        for side in {"iifname", "oifname"} - {side for _, side in passes(ruleset, network.bridge, chain)}:
            # iptables reads a rule of this form as one of its own.
            run("nft", "insert", "rule", family, table, chain, side, network.bridge, "counter", "accept")


def dropping_chains(ruleset: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return (family, table, name) of the chains that drop forwarded IPv4 packets by policy."""
    chains = [item["chain"] for item in ruleset if "chain" in item]
    return [
        (chain["family"], chain["table"], chain["name"])
        for chain in chains
        if chain.get("hook") == "forward" and chain.get("policy") == "drop" and chain["family"] in ("ip", "inet")
    ]


def passes(ruleset: list[dict[str, Any]], bridge: str, chain: str | None = None) -> list[tuple[list[str], str]]:
    """Return what ``_pass_firewall`` inserted for a bridge: how nft names the rule, and iifname or oifname."""
    found = []
    for rule in (item["rule"] for item in ruleset if "rule" in item):
        match: dict[str, Any] = rule["expr"][0].get("match", {}) if rule["expr"] else {}
        side = match.get("left", {}).get("meta", {}).get("key") if isinstance(match.get("left"), dict) else None
        if match.get("right") == bridge and {"accept": None} in rule["expr"] and chain in (None, rule["chain"]):
            name = [rule["family"], rule["table"], rule["chain"], "handle", str(rule["handle"])]
            found.append((name, str(side)))
    return found


def down(network: Network, registry: Path, *, last: bool) -> None:
    """Remove what ``up`` made; with the last run the uplink gets back the forwarding flag that it had."""
    if succeeds("nft", "list", "table", "ip", network.table):
        run("nft", "delete", "table", "ip", network.table)
    for rule, _ in passes(json.loads(run("nft", "--json", "list", "ruleset"))["nftables"], network.bridge):
        run("nft", "delete", "rule", *rule)
    if Path(f"/sys/class/net/{network.bridge}").exists():
        run("ip", "link", "delete", network.bridge)
    if last:
        _restore_uplink(registry)


def boot_id() -> str:
    """Return the id of this boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _forward_uplink(registry: Path) -> None:
    device = uplink()
    if device is None:
        return
    flag = Path(FORWARDING.format(device))
    if flag.read_text().strip() == "0":
        saved = registry / "forwarding"
        devices = {device}
        if saved.exists():
            before = json.loads(saved.read_text())
            devices |= set(before["devices"]) if before["boot"] == boot_id() else set()
        write(saved, json.dumps({"boot": boot_id(), "devices": sorted(devices)}))
        flag.write_text("1")


def _restore_uplink(registry: Path) -> None:
    saved = registry / "forwarding"
    if not saved.exists():
        return
    before = json.loads(saved.read_text())
    for device in before["devices"]:
        flag = Path(FORWARDING.format(device))
        # A reboot has reset the flag already.
        if before["boot"] == boot_id() and flag.exists():
            flag.write_text("0")
    saved.unlink()
