#!/usr/bin/python
"""A new member of an etcd cluster that lives already, or one that lost its disk."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ragrack_etcd_join
short_description: Let a host without data join an etcd cluster
description:
  - Writes what etcd reads at its first start to O(path), and starts it. Runs on the host that joins, one at a time.
  - Where the others are a cluster with a majority, that is told of the host first, and an older member of the same name
    or address is taken out of it. Where they are none yet, the host is one of its founders.
options:
  name: {description: Name of the member., type: str, required: true}
  peers: {description: URLs that members talk to each other at, by name., type: dict, required: true}
  endpoints: {description: Client URLs of the other members., type: list, elements: str, required: true}
  tls_dir:
    description: Directory of C(ca.pem) and this host's C(fullchain.pem) and C(key.pem).
    type: path
    required: true
  path: {description: File of environment variables., type: path, required: true}
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
- name: Join
  ragrack_etcd_join:
    name: db3
    peers: {db1: "https://192.0.2.10:2380", db2: "https://192.0.2.11:2380", db3: "https://192.0.2.12:2380"}
    endpoints: ["https://192.0.2.10:2379", "https://192.0.2.11:2379"]
    tls_dir: /etc/ragrack/tls/postgres
    path: /etc/ragrack/etcd.first
  throttle: 1
"""

RETURN = r"""
joined: {description: Whether there was a cluster to join., type: bool, returned: always}
"""

import json
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule


def stale(members: list[dict[str, Any]], name: str, url: str) -> list[str]:
    """Ids, in hex, of members that the joining one replaces."""
    return [f"{m['ID']:x}" for m in members if m.get("name") == name or url in m["peerURLs"]]


def first(name: str, peers: dict[str, str], joins: bool, members: list[dict[str, Any]]) -> str:
    """What etcd reads at its first start: the members that there are, or will be, and itself."""
    if joins:
        peers = {m["name"]: m["peerURLs"][0] for m in members if m.get("name")} | {name: peers[name]}
    listed = ",".join(f"{member}={url}" for member, url in peers.items())
    return f'ETCD_INITIAL_CLUSTER="{listed}"\nETCD_INITIAL_CLUSTER_STATE="{"existing" if joins else "new"}"\n'


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "peers": {"type": "dict", "required": True},
            "endpoints": {"type": "list", "elements": "str", "required": True},
            "tls_dir": {"type": "path", "required": True},
            "path": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    asked = module.params
    name, peers, tls = asked["name"], asked["peers"], Path(asked["tls_dir"])

    def etcdctl(*arguments: str, check: bool = True) -> Any:
        """What etcdctl answers. None where it fails and may."""
        command = ["etcdctl", f"--endpoints={','.join(asked['endpoints'])}", "--write-out=json"]
        files = [f"--cacert={tls / 'ca.pem'}", f"--cert={tls / 'fullchain.pem'}", f"--key={tls / 'key.pem'}"]
        status, answer, _ = module.run_command([*command, *files, *arguments], check_rc=check)
        return json.loads(answer) if status == 0 else None

    listed = etcdctl("member", "list", check=False)
    joins = listed is not None
    if module.check_mode:
        module.exit_json(changed=True, joined=joins)
    members = listed["members"] if listed else []
    replaced = stale(members, name, peers[name])
    if joins:
        for member in replaced:
            etcdctl("member", "remove", member)
        add = ("member", "add", name, f"--peer-urls={peers[name]}")
        # It takes nobody in before all members that it has were up for five seconds.
        deadline = time.monotonic() + 30
        while etcdctl(*add, check=False) is None:
            time.sleep(2)
            if time.monotonic() > deadline:
                etcdctl(*add)
                break
    members = [m for m in members if f"{m['ID']:x}" not in replaced]
    aside = Path(f"{asked['path']}.part")
    aside.write_text(first(name, peers, joins, members))
    aside.chmod(0o644)
    aside.replace(asked["path"])
    # Founders wait for each other, so only one that joins can be waited for.
    module.run_command(["systemctl", "start", *([] if joins else ["--no-block"]), "etcd"], check_rc=True)
    module.exit_json(changed=True, joined=joins)


if __name__ == "__main__":
    main()
