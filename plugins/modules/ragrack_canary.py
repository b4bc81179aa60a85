#!/usr/bin/python
"""How the live release of a host answers, and how the one that it replaced did."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ragrack_canary
short_description: Count what releases of ragrack have answered
description:
  - Reads the metrics of the live release, and of the one that it replaced while that still runs beside it.
  - Changes nothing. Filter P(ragrack_canary#filter) compares what it returns.
options:
  root:
    description: Where releases and C(current) are.
    type: path
    default: /opt/ragrack
  run_dir:
    description: Where each running release has a directory with its C(gunicorn.sock) and C(gate.key).
    type: path
    default: /run/ragrack
  beside:
    description: The release that ran before. Where it is the live one or does not run any more, it is not asked.
    type: str
    default: ""
  collections:
    description: Collections whose golden questions both are asked.
    type: list
    elements: str
    default: []
  timeout:
    description: Seconds for the golden questions of one collection.
    type: float
    default: 120
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
- name: Count what this host has answered
  ragrack_canary:
    beside: 0.1.0-0123456789ab
  register: counted
"""

RETURN = r"""
live:
  description:
    - What the live release has answered since it was started, as C(requests), C(errors) (5xx), C(buckets) (by seconds,
      cumulative) and C(golden) (the hit rate of each collection).
  type: dict
  returned: always
before:
  description: The same of the release that ran before; empty where it was not asked.
  type: dict
  returned: always
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule

if TYPE_CHECKING:
    from module_utils.release_service import Cli, Systemd
    from module_utils.release_state import Releases, StateError
    from module_utils.release_traffic import metrics, traffic
else:
    from ansible.module_utils.release_service import Cli, Systemd
    from ansible.module_utils.release_state import Releases, StateError
    from ansible.module_utils.release_traffic import metrics, traffic

ARGUMENTS: dict[str, dict[str, Any]] = {
    "root": {"type": "path", "default": "/opt/ragrack"},
    "run_dir": {"type": "path", "default": "/run/ragrack"},
    "beside": {"type": "str", "default": ""},
    "collections": {"type": "list", "elements": "str", "default": []},
    "timeout": {"type": "float", "default": 120},
}


def counted(release: Path, socket: Path, collections: list[str], timeout: float) -> dict[str, Any]:
    """A language model that is down is counted as it is: both releases have the same."""
    ask, key = Cli(release).golden, socket.with_name("gate.key")
    golden = {name: ask(name, socket, key, timeout, degraded=True)["hit_rate"] for name in collections}
    return {**traffic(metrics(socket)), "golden": golden}


def run(params: dict[str, Any]) -> dict[str, Any]:
    """What the module returns. Raises StateError."""
    params = {name: argument["default"] for name, argument in ARGUMENTS.items()} | params
    releases, run_dir = Releases(Path(params["root"])), Path(params["run_dir"])
    live, beside = releases.current(), params["beside"]
    if live is None:
        raise StateError("no release is live on this host; run playbooks/deploy.yml first")

    def ask(release: str) -> dict[str, Any]:
        socket = run_dir / release / "gunicorn.sock"
        return counted(releases.path(release), socket, params["collections"], params["timeout"])

    asked = beside not in ("", live) and Systemd().show(f"ragrack@{beside}.service").active == "active"
    return {"changed": False, "live": ask(live), "before": ask(beside) if asked else {}}


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    try:
        module.exit_json(**run(module.params))
    except StateError as error:
        module.fail_json(msg=error.words())


if __name__ == "__main__":
    main()
