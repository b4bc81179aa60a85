#!/usr/bin/python
"""A Patroni cluster as the inventory wants it: one dynamic configuration, restarts one member at a time."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ragrack_patroni
short_description: Wait for a Patroni cluster, set its dynamic configuration, restart what waits for it
description:
  - Asks the members' REST API over mutual TLS. Runs on one of them.
  - O(config) is the whole truth, but for C(pause), which C(patronictl pause) keeps there too.
options:
  members:
    description: Base URLs of the REST APIs, as C(https://192.0.2.10:8008), by name of the member.
    type: dict
    required: true
  expect:
    description: Names of the members that must be up. Others may be away.
    type: list
    elements: str
    required: true
  config:
    description: The dynamic configuration. Left out, it stays as it is.
    type: dict
  restart:
    description:
      - V(pending) restarts PostgreSQL where Patroni says that a new value waits for it. Replicas come first, one at a
        time, the primary last; each must be back before the next goes.
      - V(service) restarts the unit C(patroni) of this host as soon as all others are up, and returns when it is, too.
    type: str
    choices: [pending, service]
  name:
    description: Name of the member that this host is. Needed for O(restart=service).
    type: str
  tls_dir:
    description: Directory of C(ca.pem) and this host's C(fullchain.pem) and C(key.pem).
    type: path
    required: true
  timeout: {description: Seconds that the cluster has to come up in., type: int, default: 180}
attributes:
  check_mode:
    support: full
    details: Does not wait. Where no member answers, a change is predicted.
  diff_mode:
    support: full
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
- name: Apply what all members have in common
  ragrack_patroni:
    members: {db1: "https://192.0.2.10:8008", db2: "https://192.0.2.11:8008", db3: "https://192.0.2.12:8008"}
    expect: [db1, db2, db3]
    config: {ttl: 20, loop_wait: 5, retry_timeout: 5, synchronous_mode: true}
    tls_dir: /etc/ragrack/tls/postgres
"""

RETURN = r"""
leader: {description: Name of the primary., type: str, returned: where the cluster answers}
pending: {description: Members whose PostgreSQL waits for a restart., type: list, elements: str, returned: always}
"""

import http.client
import json
import ssl
import time
import urllib.parse
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

UP = ("running", "streaming", "in archive recovery")


class UnreachableError(Exception):
    """No member gave an answer."""


class NotWholeError(Exception):
    """Members are missing, and time is up."""


class Cluster:
    """The cluster behind the REST APIs at `members` (URL by name). Raises UnreachableError where none answers."""

    def __init__(self, members: dict[str, str], context: ssl.SSLContext) -> None:
        self._members, self._context = members, context

    def state(self) -> list[dict[str, Any]]:
        members: list[dict[str, Any]] = self._ask("GET", "/cluster")["members"]
        return members

    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self._ask("GET", "/config")
        return config

    def set_config(self, config: dict[str, Any]) -> None:
        self._ask("PUT", "/config", config)

    def restart(self, name: str) -> None:
        self._call(self._members[name], "POST", "/restart", {"restart_pending": True}, seconds=300)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        said = []
        for name, url in self._members.items():
            try:
                return json.loads(self._call(url, method, path, body))
            except (OSError, http.client.HTTPException, ValueError) as error:
                said.append(f"{name}: {error}")
        raise UnreachableError("; ".join(said))

    def _call(self, url: str, method: str, path: str, body: Any = None, seconds: float = 15) -> bytes:
        where = urllib.parse.urlsplit(url)
        connection = http.client.HTTPSConnection(
            where.hostname or "", where.port, timeout=seconds, context=self._context
        )
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise http.client.HTTPException(f"{response.status} {answer.decode(errors='replace')}")
        return answer


def trouble(state: list[dict[str, Any]], expect: list[str]) -> list[str]:
    """What keeps the cluster from being whole, a sentence for each member."""
    found = {member["name"]: member for member in state}
    problems = [] if leader(state) else ["there is no primary"]
    problems += [f"{name} has not joined" for name in expect if name not in found]
    problems += [f"{name} is {m['state']}" for name in expect if (m := found.get(name)) and m["state"] not in UP]
    if len(expect) > 1 and not any(member["role"] == "sync_standby" for member in state):
        problems.append("no replica is synchronous yet")
    return problems


def leader(state: list[dict[str, Any]]) -> str | None:
    return next((member["name"] for member in state if member["role"] == "leader"), None)


def pending(state: list[dict[str, Any]]) -> list[str]:
    """Who waits for a restart, in the order that it is done in: the primary last."""
    waiting = [member for member in state if member.get("pending_restart")]
    return [member["name"] for member in sorted(waiting, key=lambda member: member["role"] == "leader")]


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "members": {"type": "dict", "required": True},
            "expect": {"type": "list", "elements": "str", "required": True},
            "config": {"type": "dict"},
            "restart": {"type": "str", "choices": ["pending", "service"]},
            "name": {"type": "str"},
            "tls_dir": {"type": "path", "required": True},
            "timeout": {"type": "int", "default": 180},
        },
        supports_check_mode=True,
        required_if=[("restart", "service", ["name"])],
    )
    try:
        module.exit_json(**Run(module).result())
    except UnreachableError as error:
        if module.check_mode:
            module.exit_json(changed=True, pending=[], msg=f"no member answers yet: {error}")
        module.fail_json(msg=f"no member of the cluster answers: {error}")
    except http.client.HTTPException as error:
        module.fail_json(msg=f"Patroni refuses: {error}")
    except NotWholeError as error:
        module.fail_json(
            msg=f"the cluster is not whole: {error}; "
            "mend: read `journalctl -u patroni -u etcd` on the hosts named, then run this again"
        )


class Run:
    """One call of the module."""

    def __init__(self, module: AnsibleModule) -> None:
        self._module = module
        self._asked = module.params
        tls = Path(self._asked["tls_dir"])
        context = ssl.create_default_context(cafile=str(tls / "ca.pem"))
        context.load_cert_chain(tls / "fullchain.pem", tls / "key.pem")
        self._cluster = Cluster(self._asked["members"], context)

    def result(self) -> dict[str, Any]:
        if self._asked["restart"] == "service":
            return self._restart_service()
        state = self._whole()
        before = self._cluster.config()
        after = before
        if self._asked["config"] is not None:
            after = self._asked["config"] | {name: value for name, value in before.items() if name == "pause"}
        if after != before and not self._module.check_mode:
            self._cluster.set_config(after)
        waiting = self._restart_pending(state, before) if self._asked["restart"] else pending(state)
        return {
            "changed": after != before or bool(waiting),
            "leader": leader(state),
            "pending": waiting,
            "diff": {"before": before, "after": after},
        }

    def _restart_service(self) -> dict[str, Any]:
        if not self._module.check_mode:
            self._whole(without=self._asked["name"])
            self._module.run_command(["systemctl", "restart", "patroni"], check_rc=True)
            self._whole()
        return {"changed": True, "pending": []}

    def _restart_pending(self, state: list[dict[str, Any]], config: dict[str, Any]) -> list[str]:
        """Restart who waits for it. Returns their names."""
        if self._module.check_mode:
            return pending(state)
        restarted: list[str] = []
        # A smaller value takes two rounds: a replica keeps the larger one until the primary has let go of it.
        for _ in range(3):
            time.sleep(config.get("loop_wait", 10) + 2)  # Patroni looks at its configuration once in each of its rounds
            waiting = pending(self._whole())
            if not waiting:
                return restarted
            for name in waiting:
                self._cluster.restart(name)
                self._whole()
            restarted += waiting
        raise NotWholeError(f"{', '.join(waiting)} wait for a restart again and again")

    def _whole(self, without: str | None = None) -> list[dict[str, Any]]:
        """The state of the cluster, once it is whole. Raises UnreachableError or NotWholeError, with who is missing."""
        if self._module.check_mode:
            return self._cluster.state()
        expect = [name for name in self._asked["expect"] if name != without]
        deadline = time.monotonic() + self._asked["timeout"]
        while True:
            try:
                state = self._cluster.state()
                problems = trouble(state, expect)
                if not problems:
                    return state
            except UnreachableError as error:
                problems = [str(error)]
            if time.monotonic() > deadline:
                raise NotWholeError("; ".join(problems))
            time.sleep(1)


if __name__ == "__main__":
    main()
