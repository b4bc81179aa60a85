#!/usr/bin/python
"""The fleet's lock on one host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ragrack_lock
short_description: Let one run at a time change a fleet
description:
  - Takes or gives up C(lock.json) below O(root), made in one atomic step, so that of two runs exactly one gets it.
  - The same run may take it again. It survives the run that took it; whether that run still lives is for its control
    node to tell, by RV(holder), which goes into P(ragrack_controller#lookup) as it is.
  - A lock is taken over from exactly the run named in O(takeover_of), and from nobody who came after. The history keeps
    both names.
options:
  state:
    description: V(present) takes the lock, V(absent) gives it up, V(query) tells who holds it.
    type: str
    choices: [present, absent, query]
    default: present
  root:
    description: Where the lock and the history are.
    type: path
    default: /opt/ragrack
  holder:
    description: This run, as P(ragrack_controller#lookup) describes it. Not needed for V(query).
    type: dict
    suboptions:
      run: {description: Name of the run., type: str, required: true}
      owner: {description: Who runs it., type: str, required: true}
      controller: {description: Name of the control node., type: str, required: true}
      machine: {description: Machine id of the control node., type: str, default: ""}
      boot: {description: Boot id of the control node., type: str, default: ""}
      pid: {description: Process of the run., type: int, default: 0}
      pid_started: {description: When that process started in clock ticks since boot., type: str, default: ""}
  why:
    description: What the run is about; others read it while they wait.
    type: str
    default: ""
  wait:
    description: Seconds to wait for a lock that is held. Check mode does not wait.
    type: float
    default: 0
  takeover_of:
    description: Take the lock over from this run, which is known to be dead.
    type: str
  force:
    description: With O(state=absent), give up a lock of any other run as well. The history keeps its name.
    type: bool
    default: false
  mend:
    description: What to do about a lock that is held, in the words of whatever command was typed.
    type: str
    default: wait for that run to end (`wait`), or take the lock over if the run is dead (`takeover_of`)
attributes:
  check_mode:
    support: full
    details: Takes nothing, but fails where the lock is held.
  diff_mode:
    support: none
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
- name: Keep other runs out
  ragrack_lock:
    holder: "{{ lookup('ragrack_controller') }}"
    why: deploy 0.1.0
    wait: 60

- name: Let other runs in
  ragrack_lock:
    state: absent
    holder: "{{ lookup('ragrack_controller') }}"
"""

RETURN = r"""
holder:
  description:
    - Who holds the lock, on failure too, or null.
    - C(run), C(owner), C(controller), C(machine), C(boot), C(pid), C(pid_started), C(why) and C(since).
  type: dict
  returned: always
released: {description: Whose lock was given up., type: dict, returned: when O(state=absent) gave up one}
taken_over: {description: Whether it was taken over from another run., type: bool, returned: with O(state=present)}
"""

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule

if TYPE_CHECKING:
    from module_utils.fleet_lock import FleetLock, Holder
    from module_utils.release_state import StateError
else:
    from ansible.module_utils.fleet_lock import FleetLock, Holder
    from ansible.module_utils.release_state import StateError

HOLDER: dict[str, dict[str, Any]] = {
    "run": {"type": "str", "required": True},
    "owner": {"type": "str", "required": True},
    "controller": {"type": "str", "required": True},
    "machine": {"type": "str", "default": ""},
    "boot": {"type": "str", "default": ""},
    "pid": {"type": "int", "default": 0},
    "pid_started": {"type": "str", "default": ""},
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "state": {"type": "str", "choices": ["present", "absent", "query"], "default": "present"},
    "root": {"type": "path", "default": "/opt/ragrack"},
    "holder": {"type": "dict", "options": HOLDER},
    "why": {"type": "str", "default": ""},
    "wait": {"type": "float", "default": 0},
    "takeover_of": {"type": "str"},
    "force": {"type": "bool", "default": False},
    "mend": {
        "type": "str",
        "default": "wait for that run to end (`wait`), or take the lock over if the run is dead (`takeover_of`)",
    },
}


def taken(lock: FleetLock, wanted: Holder, takeover_of: str | None, wait: float, mend: str) -> dict[str, Any]:
    """Take the lock within `wait` seconds. Raises StateError that names who has it."""
    deadline = time.monotonic() + wait
    while True:
        before = lock.holder()
        changed, holder = lock.acquire(wanted, takeover_of)
        if holder.run == wanted.run:
            return {"changed": changed, "holder": asdict(holder), "taken_over": changed and before is not None}
        if time.monotonic() >= deadline:
            raise StateError(f"{holder.words()}; {mend}", holder=asdict(holder))
        time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))


def would_take(lock: FleetLock, wanted: Holder, takeover_of: str | None, mend: str) -> dict[str, Any]:
    held = lock.holder()
    if held is not None and held.run not in (wanted.run, takeover_of):
        raise StateError(f"{held.words()}; {mend}", holder=asdict(held))
    ours = held is not None and held.run == wanted.run
    return {"changed": not ours, "taken_over": held is not None and not ours, "holder": as_fact(held)}


def given_up(lock: FleetLock, run: str, force: bool, check: bool) -> dict[str, Any]:
    if check:
        held = lock.holder()
        changed = held is not None and (force or held.run == run)
    else:
        changed, held = lock.release(run, force=force)
    if changed:
        return {"changed": True, "released": as_fact(held), "holder": None}
    return {"changed": False, "holder": as_fact(held)}


def as_fact(holder: Holder | None) -> dict[str, Any] | None:
    return None if holder is None else asdict(holder)


def main() -> None:
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
        required_if=[("state", state, ("holder",)) for state in ("present", "absent")],
        supports_check_mode=True,
    )
    os.umask(0o022)
    params = module.params
    lock = FleetLock(Path(params["root"]))
    try:
        if params["wait"] < 0:
            raise StateError(f"wait: {params['wait']} is below 0")
        if params["state"] == "query":
            module.exit_json(changed=False, holder=as_fact(lock.holder()))
        wanted = Holder(**params["holder"], why=params["why"])
        if params["state"] == "absent":
            answer = given_up(lock, wanted.run, params["force"], module.check_mode)
        elif module.check_mode:
            answer = would_take(lock, wanted, params["takeover_of"], params["mend"])
        else:
            answer = taken(lock, wanted, params["takeover_of"], params["wait"], params["mend"])
    except StateError as error:
        module.fail_json(msg=str(error), **error.facts)
    except OSError as error:
        module.fail_json(msg=f"the lock {lock.path} could not be changed: {error}")
    module.exit_json(**answer)


if __name__ == "__main__":
    main()
