#!/usr/bin/python
"""The life cycle of a release on one host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ragrack_release
short_description: Stage, start, gate, switch, drain and prune releases of ragrack
description:
  - One call is one step of a deploy or a rollback on one host. Each step checks everything it needs before it changes
    anything, is atomic, and can be run again after dying at any point.
  - C(current) below O(root) is the only pointer. What was live before is read from C(history.jsonl), never from the
    time of a file.
  - While another run holds the fleet's lock (see M(ragrack_lock)), every O(state) but V(query) and V(audit) is refused.
  - Needs systemd 252, iproute2 and coreutils; V(staged) needs uv. No package index is asked.
options:
  state:
    description:
      - Several are taken one after the other, as far as each ends well.
      - V(query) returns the facts; with O(target) it resolves a rollback target, with O(id) it says whether a deploy of
        that release would change anything.
      - V(staged) builds the release from the artifact, aside, and renames it to its place. An id that is there is left
        alone.
      - V(indexed) has the staged release build the index snapshots it lacks (C(ragrack-index@ID.service)).
      - V(started) starts C(ragrack@ID.service) and waits until C(/readyz) on its own socket answers 200.
      - V(gated) asks the golden questions through the release's own API.
      - V(live) points C(current) at a release that passed its gate since it was started.
      - V(answering) waits until O(edge) answers from the release. It reports no change.
      - V(confirmed) keeps the host on it, see O(confirm_within). It reports no change.
      - V(drained) stops every other running release, or starts the timer that does so later.
      - V(pruned) removes releases that nothing needs. The live one, the rollback target and what runs always stay. A
        history of more than 5000 lines keeps the last 4000.
      - V(bad) marks a release, which is then never a rollback target until it goes live again.
      - V(audit) adds the playbook's line to the history. It reports no change.
      - A release that fails V(started) or V(gated) is stopped and marked bad, unless it is the one that is live.
    type: list
    elements: str
    required: true
    choices: [query, staged, indexed, started, gated, live, answering, confirmed, drained, pruned, bad, audit]
  id:
    description: The release, as C(0.1.0-0123456789ab).
    type: str
  root:
    description: Where releases, C(current) and C(history.jsonl) are.
    type: path
    default: /opt/ragrack
  run_dir:
    description: Where each running release has a directory with its C(gunicorn.sock) and C(gate.key).
    type: path
    default: /run/ragrack
  cache_dir:
    description:
      - Keeps what releases share, by hash. Best on the file system of O(root), so that a release is made of hard links.
    type: path
    default: /var/cache/ragrack
  run:
    description: The run of the playbook, as M(ragrack_lock) was given it.
    type: str
  who:
    description: Who does this; goes into the history.
    type: str
    default: root
  what:
    description: What for; goes into the history.
    type: str
    default: ""
  target:
    description: With O(state=query), the rollback target to resolve, V(previous) or an id.
    type: str
  history_lines:
    description: With O(state=query), how many of the last events to return.
    type: int
    default: 20
  version:
    description: With O(state=staged), the version that the artifact must have.
    type: str
  artifact_dir:
    description: With O(state=staged), the directory on the host that holds the artifact and its C(manifest.json).
    type: path
  signature:
    description: With O(state=staged), the signature of the artifact's manifest, as M(ragrack_artifact) returns it.
    type: str
  signers:
    description: With O(state=staged), the file of the keys that may sign, as ssh's ALLOWED SIGNERS.
    type: path
    default: /etc/ragrack/allowed_signers
  env:
    description:
      - With O(state=staged), the text of C(app.env), which must hold no secrets.
      - With O(state=indexed) in check mode, the same, to foretell whether the release would lack an index.
    type: str
  credentials_dir:
    description: With O(state=staged), the directory of the credentials' generation that C(credentials) shall link to.
    type: path
  group:
    description: With O(state=staged), the group that may read C(app.env).
    type: str
    default: ragrack
  python:
    description: With O(state=staged), the interpreter.
    type: path
    default: /usr/bin/python3
  uv:
    description: With O(state=staged), the uv binary.
    type: path
    default: /usr/local/bin/uv
  min_free_mb:
    description: With O(state=staged), MiB that must stay free on each file system written to.
    type: int
    default: 200
  collections:
    description:
      - With O(state=indexed) and O(state=gated), the collections; by default those that the release's C(app.env) names.
    type: list
    elements: str
    default: []
  index_dir:
    description: With O(state=indexed), where the snapshots are.
    type: path
    default: /var/lib/ragrack/indexes
  timeout:
    description:
      - Seconds to wait.
      - Where not given, V(started) 60, V(gated) 120 for each collection, V(indexed) 3600, V(answering) 10 and
        V(drained) 30.
    type: float
  how:
    description:
      - With O(state=gated) and O(state=live), whether this is a deploy or a rollback. A language model that is down
        does not hold up a rollback.
    type: str
    choices: [deploy, rollback]
    default: deploy
  confirm_within:
    description:
      - With O(state=live), the host goes back to what it ran unless V(confirmed) comes within so many seconds, whatever
        becomes of the control node. 0 waits for nothing.
      - Again for the release that is live, the time counts from then.
    type: float
    default: 0
  edge:
    description: With O(state=answering), the address that is asked over TLS, as a host's name or C(host:port).
    type: str
  edge_ca:
    description: With O(state=answering), the certificate that the edge's own is verified with.
    type: path
    default: /etc/ragrack/tls/default/ca.pem
  edge_verify:
    description: With O(state=answering), false where the edge's certificate is not for O(edge).
    type: bool
    default: true
  keep_warm:
    description:
      - With O(state=drained), 0 stops what was live before at once.
      - Anything else starts C(ragrack-drain@ID.timer), which knows how long.
    type: float
    default: 600
  settle:
    description: With O(state=drained), a release is stopped once nothing has waited on its socket for so many seconds.
    type: float
    default: 1.5
  keep:
    description: With O(state=pruned), how many good releases stay, the live one and the rollback target among them.
    type: int
    default: 5
  reason:
    description: With O(state=bad), why.
    type: str
  from:
    description: With O(state=audit), the release that was live before.
    type: str
  to:
    description: With O(state=audit), the release that was to be live after.
    type: str
  result:
    description: With O(state=audit), how it ended, as V(ok) or V(failed at gate).
    type: str
  seconds:
    description: With O(state=audit), what the whole play took.
    type: float
  stages:
    description: With O(state=audit), what each stage took, in seconds.
    type: dict
attributes:
  check_mode:
    support: full
    details: Works on a bare host too, where it takes what earlier steps would have made as made.
  diff_mode:
    support: full
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
- name: Stage the release beside the others
  ragrack_release:
    state: staged
    id: 0.1.0-0123456789ab
    version: 0.1.0
    artifact_dir: /var/cache/ragrack/artifact
    signature: "{{ artifact.signature }}"
    env: |
      RAGRACK_COLLECTIONS="postgres"
    credentials_dir: /etc/ragrack/credstore/none
    run: "{{ lookup('ragrack_controller').run }}"

- name: Start it, ask it, switch to it
  ragrack_release:
    state: [started, gated, live]
    id: 0.1.0-0123456789ab
    collections: [postgres]
    run: "{{ lookup('ragrack_controller').run }}"

- name: Find out where a rollback would go
  ragrack_release:
    state: query
    target: previous
  register: rollback
"""

RETURN = r"""
id:
  description: The release that was asked for.
  type: str
  returned: when O(id) was given
current:
  description: The live release.
  type: str
  returned: always
previous:
  description: The rollback target.
  type: str
  returned: always
releases:
  description:
    - The releases on the host.
    - Each has C(id), C(version), C(artifact), C(python), C(staged_at), C(live), C(previous), C(bad), C(bad_reason),
      C(running) and C(warm).
  type: list
  elements: dict
  returned: with O(state=query)
history:
  description: The last events.
  type: list
  elements: dict
  returned: with O(state=query)
lock:
  description: Who holds the lock.
  type: dict
  returned: with O(state=query)
target:
  description: The id that O(target) resolved to.
  type: str
  returned: with O(target)
ready:
  description: Whether the target runs, in a life that passed its gate, so that it can go live at once.
  type: bool
  returned: with O(target)
settled:
  description: Whether a deploy of O(id) would leave the host as it is.
  type: bool
  returned: with O(state=query) and O(id)
env_built:
  description: Whether third-party packages had to be installed.
  type: bool
  returned: with O(state=staged)
stage_seconds:
  description: Seconds of each part of staging.
  type: dict
  returned: with O(state=staged)
missing_snapshots:
  description: Collections that lacked a snapshot.
  type: list
  elements: str
  returned: with O(state=indexed)
fingerprint:
  description: What the snapshots are built with.
  type: str
  returned: with O(state=indexed)
gated:
  description: Whether the release ran already, in a life that has passed its gate.
  type: bool
  returned: with O(state=started)
start_seconds:
  description: Seconds until the release was ready.
  type: float
  returned: when O(state=started) started it
golden:
  description: The report of each collection.
  type: dict
  returned: with O(state=gated)
flip_ms:
  description: Milliseconds of the switch.
  type: float
  returned: with O(state=live)
stopped:
  description: Releases that were stopped.
  type: list
  elements: str
  returned: with O(state=drained)
warm:
  description: Releases that run until their time is up.
  type: list
  elements: str
  returned: with O(state=drained)
dropped:
  description: Connections that still waited when the time to drain was up.
  type: int
  returned: with O(state=drained)
removed:
  description: Releases that were removed.
  type: list
  elements: str
  returned: with O(state=pruned)
removed_leftovers:
  description: What dead runs had left and what of the cache no release is made of.
  type: list
  elements: str
  returned: with O(state=pruned)
log:
  description: Last lines of the unit that failed; they are in the message too.
  type: list
  elements: str
  returned: on failure
"""

import grp
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule

if TYPE_CHECKING:
    from module_utils import release_steps as steps
    from module_utils.release_artifact import SHIP_AGAIN, Artifact, check_signature
    from module_utils.release_service import Systemd
    from module_utils.release_stage import Stager, host_python
    from module_utils.release_state import ID, Releases, StateError
else:
    from ansible.module_utils import release_steps as steps
    from ansible.module_utils.release_artifact import SHIP_AGAIN, Artifact, check_signature
    from ansible.module_utils.release_service import Systemd
    from ansible.module_utils.release_stage import Stager, host_python
    from ansible.module_utils.release_state import ID, Releases, StateError

TIMEOUTS = {"started": 60.0, "gated": 120.0, "indexed": 3600.0, "answering": 10.0, "drained": 30.0}
NEEDS = {
    **dict.fromkeys(("indexed", "started", "gated", "live", "confirmed"), ("id",)),
    "staged": ("id", "version", "artifact_dir", "env", "signature"),
    "answering": ("id", "edge"),
    "bad": ("id", "reason"),
    "audit": ("result", "what"),
}

ARGUMENTS: dict[str, dict[str, Any]] = {
    "state": {
        "type": "list",
        "elements": "str",
        "required": True,
        "choices": [
            *(
                "query",
                "staged",
                "indexed",
                "started",
                "gated",
                "live",
                "answering",
                "confirmed",
                "drained",
                "pruned",
                "bad",
                "audit",
            ),
        ],
    },
    "id": {"type": "str"},
    "root": {"type": "path", "default": "/opt/ragrack"},
    "run_dir": {"type": "path", "default": "/run/ragrack"},
    "cache_dir": {"type": "path", "default": "/var/cache/ragrack"},
    "run": {"type": "str"},
    "who": {"type": "str", "default": "root"},
    "what": {"type": "str", "default": ""},
    "target": {"type": "str"},
    "history_lines": {"type": "int", "default": 20},
    "version": {"type": "str"},
    "artifact_dir": {"type": "path"},
    "signature": {"type": "str"},
    "signers": {"type": "path", "default": "/etc/ragrack/allowed_signers"},
    "env": {"type": "str"},
    "credentials_dir": {"type": "path"},
    "group": {"type": "str", "default": "ragrack"},
    "python": {"type": "path", "default": "/usr/bin/python3"},
    "uv": {"type": "path", "default": "/usr/local/bin/uv"},
    "min_free_mb": {"type": "int", "default": 200},
    "collections": {"type": "list", "elements": "str", "default": []},
    "index_dir": {"type": "path", "default": "/var/lib/ragrack/indexes"},
    "timeout": {"type": "float"},
    "how": {"type": "str", "choices": ["deploy", "rollback"], "default": "deploy"},
    "confirm_within": {"type": "float", "default": 0},
    "edge": {"type": "str"},
    "edge_ca": {"type": "path", "default": "/etc/ragrack/tls/default/ca.pem"},
    "edge_verify": {"type": "bool", "default": True},
    "keep_warm": {"type": "float", "default": 600},
    "settle": {"type": "float", "default": 1.5},
    "keep": {"type": "int", "default": 5},
    "reason": {"type": "str"},
    "from": {"type": "str"},
    "to": {"type": "str"},
    "result": {"type": "str"},
    "seconds": {"type": "float"},
    "stages": {"type": "dict"},
}


def check_numbers(params: dict[str, Any]) -> None:
    wrong = [
        f"{name}: {params[name]} is below {least}"
        for name, least in (
            *(("history_lines", 0), ("min_free_mb", 0), ("timeout", 0), ("confirm_within", 0), ("keep_warm", 0)),
            *(("settle", 0), ("keep", 1)),
        )
        if params[name] is not None and params[name] < least
    ]
    if params["id"] is not None and not ID.fullmatch(params["id"]):
        wrong.append(
            f"id: {params['id']!r} is no name for a release; use at most 64 of A-Z, a-z, 0-9, `.`, `_` and `-`, "
            "a letter or digit first"
        )
    if wrong:
        raise StateError("; ".join(wrong))


def stage(host: steps.Host, params: dict[str, Any]) -> steps.Outcome:
    """Check what staging needs of the host, then stage. In check mode, what other tasks would have made may lack."""
    artifact_dir, python, uv = Path(params["artifact_dir"]), Path(params["python"]), Path(params["uv"])
    signers = Path(params["signers"])
    credentials = Path(params["credentials_dir"]) if params["credentials_dir"] else None
    if params["id"] in host.releases.all():
        return steps.Outcome(facts={"env_built": False, "stage_seconds": {}})
    absent = []
    if not uv.is_file():
        absent.append(f"uv: there is no {uv}; run playbooks/site.yml on this host")
    if not python.is_file():
        absent.append(f"python: there is no {python}; run playbooks/site.yml on this host")
    if not (artifact_dir / "manifest.json").is_file():
        absent.append(f"artifact_dir: there is no {artifact_dir}/manifest.json; {SHIP_AGAIN}")
    if not signers.is_file():
        absent.append(f"signers: there is no {signers}; run playbooks/site.yml on this host")
    if credentials is not None and not credentials.is_dir():
        absent.append(f"credentials_dir: there is no directory {credentials}; deploy the credentials first")
    try:
        gid = grp.getgrnam(params["group"]).gr_gid
    except KeyError:
        gid = -1
        absent.append(f"group: there is no group {params['group']}; run playbooks/site.yml on this host")
    if absent and host.check:
        predicted = {"releases": sorted([*host.releases.all(), params["id"]])}
        return steps.Outcome(True, {"env_built": True, "stage_seconds": {}}, predicted)
    if absent:
        raise StateError("; ".join(absent) + ". Nothing was changed")
    # In check mode what lies there is an earlier artifact, or was not shipped at all.
    if not host.check:
        check_signature(artifact_dir / "manifest.json", params["signature"], signers)
    artifact = Artifact.load(artifact_dir)
    if artifact.version != params["version"] and not host.check:
        raise StateError(f"version: the artifact in {artifact_dir} is {artifact.version}, not {params['version']}")
    version, machine = host_python(python)
    artifact.check_fits(version, machine)
    stager = Stager(
        releases=host.releases,
        id=params["id"],
        artifact=artifact,
        env=params["env"],
        credentials=credentials,
        gid=gid,
        python=python,
        python_version=version,
        uv=uv,
        cache=Path(params["cache_dir"]),
        run_dir=host.run_dir,
    )
    return steps.staged(host, stager, params["min_free_mb"])


def query(host: steps.Host, params: dict[str, Any]) -> steps.Outcome:
    outcome = steps.query(host, params["target"], params["history_lines"])
    if params["id"] is not None:
        would = replace(host, check=True)
        away = [step(would, state, params) for state in ("drained", "pruned")]
        index_dir = Path(params["index_dir"])
        outcome.facts["settled"] = steps.settled(host, params["id"], params["collections"], index_dir, away)
    return outcome


def step(host: steps.Host, state: str, params: dict[str, Any]) -> steps.Outcome:
    release, collections = params["id"], params["collections"]
    timeout = TIMEOUTS.get(state, 0.0) if params["timeout"] is None else params["timeout"]
    match state:
        case "query":
            return query(host, params)
        case "staged":
            return stage(host, params)
        case "indexed":
            return steps.indexed(host, release, collections, Path(params["index_dir"]), timeout, params["env"])
        case "started":
            return steps.started(host, release, timeout)
        case "gated":
            return steps.gated(host, release, collections, timeout, params["how"])
        case "live":
            return steps.live(host, release, params["how"], params["confirm_within"])
        case "answering":
            return steps.answering(
                host, release, params["edge"], Path(params["edge_ca"]), timeout, verify=params["edge_verify"]
            )
        case "confirmed":
            return steps.confirmed(host, release)
        case "drained":
            return steps.drained(host, params["keep_warm"], params["settle"], timeout, params["id"])
        case "pruned":
            return steps.pruned(host, params["keep"], {release} if release else set(), Path(params["cache_dir"]))
        case "bad":
            return steps.bad(host, release, params["reason"])
    record = {key: params[key] for key in ("from", "to", "result", "seconds", "stages")}
    return steps.audit(host, record)


def result(host: steps.Host, params: dict[str, Any], diff: bool) -> dict[str, Any]:
    """What the module returns: facts of the steps, the live release and the rollback target, and the diff."""
    check_numbers(params)
    changes = any(state not in ("query", "audit") for state in params["state"])
    if changes:
        host.check_ours()
    before = host.state() if changes and diff else {}
    changed = False
    facts: dict[str, Any] = {}
    predicted: dict[str, Any] = {}
    for state in params["state"]:
        outcome = step(host, state, params)
        changed |= outcome.changed
        facts |= outcome.facts
        predicted |= outcome.predicted if outcome.changed else {}
    answer: dict[str, Any] = {
        "changed": changed,
        "current": host.releases.current(),
        "previous": host.releases.previous(),
        **facts,
    }
    if params["id"]:
        answer["id"] = params["id"]
    if before and changed:
        answer["diff"] = {"before": before, "after": before | predicted if host.check else host.state()}
    return answer


def run(params: dict[str, Any], *, check: bool, diff: bool) -> dict[str, Any]:
    """What the module does, without Ansible around it: `params` over the defaults. Raises StateError."""
    params = {name: argument.get("default") for name, argument in ARGUMENTS.items()} | params
    os.umask(0o022)
    host = steps.Host(
        releases=Releases(Path(params["root"])),
        systemd=Systemd(),
        run_dir=Path(params["run_dir"]),
        who=params["who"],
        run=params["run"],
        what=params["what"],
        check=check,
    )
    return result(host, params, diff)


def main() -> None:
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
        supports_check_mode=True,
    )
    if os.geteuid() != 0:
        module.fail_json(msg=f"the play runs as uid {os.geteuid()}; mend: connect as root or set ansible_become: true")
    lacking = [
        f"{name}: state {state} needs it"
        for state in module.params["state"]
        for name in NEEDS.get(state, ())
        if module.params[name] is None
    ]
    if lacking:
        module.fail_json(msg="; ".join(lacking))
    try:
        answer = run(module.params, check=module.check_mode, diff=module._diff)
    except StateError as error:
        module.fail_json(msg=error.words(), log=error.log, **error.facts)
    except OSError as error:
        module.fail_json(msg=f"state {', '.join(module.params['state'])}: {error}")
    if answer.get("dropped"):
        module.warn(f"{answer['dropped']} connections still waited on a release when its time to drain was up")
    module.exit_json(**answer)


if __name__ == "__main__":
    main()
