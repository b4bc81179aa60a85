#!/usr/bin/python
"""The index of a host: what serves, back to what served before, on again, and ingest now."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ragrack_index
short_description: Roll back, resume and ingest the index of a host
description:
  - Each O(state) asks the command line of the live release, checks first, then changes, and can be run again.
  - It works on the snapshots that the live release can open. Those of other releases have a history of their own.
  - Everything that changes the index fails while a run other than O(run) holds the fleet's lock.
options:
  state:
    description:
      - V(query) tells which snapshot is live, where a rollback goes and what is held, and resolves O(target).
      - V(rolled_back) goes back to O(targets) and holds the index there. All of a snapshot is read before that.
      - V(resumed) lets go of what is held and moves on.
      - V(pruned) removes snapshots that no rollback needs, and indexes that no release on the host opens.
      - V(ingested) runs C(ragrack-ingest@COLLECTION.service) or goes on waiting for it, for O(wait) seconds at most.
      - V(pulled) runs C(ragrack-index-pull@COLLECTION.service), within O(wait) seconds.
    type: str
    required: true
    choices: [query, rolled_back, resumed, pruned, ingested, pulled]
  collections:
    description: The collections; by default all of the live release. V(ingested) takes exactly one.
    type: list
    elements: str
    default: []
  target:
    description: With O(state=query), V(previous) or the id of a snapshot.
    type: str
  targets:
    description:
      - The id of a snapshot for each collection. Needed for V(rolled_back); for V(resumed), where to go.
      - V(query) fails where one is not there or not whole.
    type: dict
    default: {}
  why:
    description: With O(state=rolled_back), for those who find the index held.
    type: str
    default: rollback
  wait:
    description: Seconds after which V(ingested) returns though the ingestion goes on, and V(pulled) fails.
    type: float
    default: 60
  since:
    description: With O(state=ingested), what the call returned that began the ingestion; not given, it begins one.
    type: str
  root:
    description: Where the releases are.
    type: path
    default: /opt/ragrack
  run:
    description: Name of this run, as P(ragrack_controller#lookup) makes it.
    type: str
attributes:
  check_mode:
    support: partial
    details: V(ingested) and V(pulled) look at no document and no other host, so they cannot tell what would change.
  diff_mode:
    support: full
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
- name: Find out where a rollback would go
  ragrack_index:
    state: query
    target: previous
  register: found

- name: Go back, and stay there
  ragrack_index:
    state: rolled_back
    targets: "{{ found.targets }}"
    why: it knows nothing of limits
    run: "{{ lookup('ragrack_controller').run }}"

- name: Let new snapshots in again
  ragrack_index:
    state: resumed
    run: "{{ lookup('ragrack_controller').run }}"
"""

RETURN = r"""
indexes:
  description: C(collection), C(fingerprint), C(current), C(previous), C(held) and C(snapshots) of each collection.
  type: list
  elements: dict
  returned: with O(state=query)
targets:
  description: The id that O(target) resolved to, by collection.
  type: dict
  returned: with O(target)
moves:
  description: C(collection), C(from), C(to) and C(held) of each collection.
  type: list
  elements: dict
  returned: with O(state=rolled_back), O(state=resumed) and O(state=pulled)
removed:
  description: C(snapshots) and C(indexes) that were removed, and in C(notes) why indexes stay that might not be needed.
  type: dict
  returned: with O(state=pruned)
finished:
  description: Whether the ingestion has ended.
  type: bool
  returned: with O(state=ingested)
since:
  description: For the next call while the ingestion goes on.
  type: str
  returned: with O(state=ingested) until it has ended
progress:
  description: How far it is, as C(embed 1200/4000).
  type: str
  returned: with O(state=ingested) until it has ended
result:
  description: What C(ragrack ingest --json) printed at its end.
  type: dict
  returned: with O(state=ingested) when it has ended
words:
  description: The same in a line.
  type: str
  returned: with O(state=ingested) when it has ended
log:
  description: Last lines of the unit that failed; they are in the message too.
  type: list
  elements: str
  returned: on failure
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule

if TYPE_CHECKING:
    from module_utils import index_steps
    from module_utils.release_service import Systemd
    from module_utils.release_state import Releases, StateError
    from module_utils.release_steps import Host, Outcome
else:
    from ansible.module_utils import index_steps
    from ansible.module_utils.release_service import Systemd
    from ansible.module_utils.release_state import Releases, StateError
    from ansible.module_utils.release_steps import Host, Outcome

STATES = ("query", "rolled_back", "resumed", "pruned", "ingested", "pulled")
ARGUMENTS: dict[str, dict[str, Any]] = {
    "state": {"type": "str", "required": True, "choices": [*STATES]},
    "collections": {"type": "list", "elements": "str", "default": []},
    "target": {"type": "str"},
    "targets": {"type": "dict", "default": {}},
    "why": {"type": "str", "default": "rollback"},
    "wait": {"type": "float", "default": 60},
    "since": {"type": "str"},
    "root": {"type": "path", "default": "/opt/ragrack"},
    "run": {"type": "str"},
}


def step(host: Host, params: dict[str, Any]) -> Outcome:
    match params["state"]:
        case "query":
            return index_steps.query(host, params["collections"], params["target"], params["targets"])
        case "rolled_back":
            return index_steps.rolled_back(host, params["targets"], params["why"])
        case "resumed":
            return index_steps.resumed(host, params["collections"], params["targets"])
        case "pruned":
            return index_steps.pruned(host)
        case "pulled":
            return index_steps.pulled(host, params["collections"], params["wait"])
    if len(params["collections"]) != 1:
        raise StateError(f"collections: {params['collections']} is not one collection; ingest one at a time")
    return index_steps.ingested(host, params["collections"][0], params["wait"], params["since"])


def run(params: dict[str, Any], *, check: bool, diff: bool) -> dict[str, Any]:
    """What the module does, without Ansible around it: `params` over the defaults. Raises StateError."""
    params = {name: argument.get("default") for name, argument in ARGUMENTS.items()} | params
    if params["wait"] <= 0:
        raise StateError(f"wait: {params['wait']} is not above 0")
    host = Host(
        releases=Releases(Path(params["root"])),
        systemd=Systemd(),
        run_dir=Path("/run/ragrack"),
        who="root",
        run=params["run"],
        check=check,
    )
    outcome = step(host, params)
    answer = {"changed": outcome.changed, **outcome.facts}
    if diff and "moves" in outcome.facts:
        moves = outcome.facts["moves"]
        sides = (("before", "from"), ("after", "to"))
        answer["diff"] = {side: {row["collection"]: row[end] for row in moves} for side, end in sides}
    return answer


def main() -> None:
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
        required_if=[("state", "rolled_back", ("targets",)), ("state", "ingested", ("collections",))],
        supports_check_mode=True,
    )
    try:
        answer = run(module.params, check=module.check_mode, diff=module._diff)
    except StateError as error:
        module.fail_json(msg=error.words(), log=error.log, **error.facts)
    except OSError as error:
        module.fail_json(msg=f"state {module.params['state']}: {error}")
    for note in answer.get("removed", {}).get("notes", []):
        module.warn(note)
    module.exit_json(**answer)


if __name__ == "__main__":
    main()
