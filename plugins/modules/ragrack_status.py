#!/usr/bin/python
"""What a host serves, and what it would."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ragrack_status
short_description: Which release and which snapshots a host serves, and who changes it
description:
  - Reads; changes nothing.
  - What serves is what the live release says on its own socket, not what a file says it should.
  - A part that cannot be told is null, and RV(problems) says why.
options:
  root:
    description: Where the releases are.
    type: path
    default: /opt/ragrack
  run_dir:
    description: Where the releases have their sockets.
    type: path
    default: /run/ragrack
  drained:
    description: The file that is there while edge hosts ask this host nothing.
    type: path
    default: /etc/ragrack/drained.json
  left_out:
    description: On edge hosts, where the names of the app hosts are that the last deploy left out.
    type: path
    default: /etc/ragrack/left-out
  tls:
    description: Where the certificates are, a directory for each realm.
    type: path
    default: /etc/ragrack/tls
  backups:
    description: The file that tells when a backup was made and the repository found well.
    type: path
    default: /var/lib/ragrack-metrics/backup.prom
  deploys:
    description: How many deploys, rollbacks and ingests of the history to return.
    type: int
    default: 5
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
- name: Look at the host
  ragrack_status:
  register: status
"""

RETURN = r"""
release: {description: The live release., type: str, returned: always}
artifact: {description: Digest of the artifact that the live release was made of., type: str, returned: always}
previous: {description: Where a rollback goes., type: str, returned: always}
state:
  description: V(ready), V(not ready), V(not running) or V(nothing deployed).
  type: str
  returned: always
indexes:
  description: C(collection), C(serves), C(current), C(previous) and C(held) of each collection.
  type: list
  elements: dict
  returned: always
lock: {description: Who changes the fleet now, in words., type: str, returned: always}
drained: {description: Since when and why edge hosts ask this host nothing., type: dict, returned: always}
left_out: {description: The app hosts that this edge host sends nothing to, with why., type: dict, returned: always}
deploys: {description: The last lines of the audit log., type: list, elements: dict, returned: always}
timeline: {description: What those runs did on this host., type: list, elements: dict, returned: always}
certificates: {description: Days that the certificate of each realm is still good., type: dict, returned: always}
rotated:
  description: Days since C(credentials) and C(certificates) were last rotated by a playbook, or the history began.
  type: dict
  returned: always
backups: {description: Days since the last C(success) and the last C(check) that was one., type: dict, returned: always}
drift: {description: Files of the live release that were changed., type: list, elements: str, returned: always}
problems: {description: What is wrong, one sentence each., type: list, elements: str, returned: always}
"""

import http.client
import json
import re
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule

if TYPE_CHECKING:
    from module_utils.fleet_lock import FleetLock
    from module_utils.index_steps import indexes
    from module_utils.release_service import Cli, UnixConnection, why_not_ready
    from module_utils.release_state import Releases, StateError
else:
    from ansible.module_utils.fleet_lock import FleetLock
    from ansible.module_utils.index_steps import indexes
    from ansible.module_utils.release_service import Cli, UnixConnection, why_not_ready
    from ansible.module_utils.release_state import Releases, StateError

TIMEOUT_SECONDS = 5
DAY_SECONDS = 86400


def status(
    root: Path, run_dir: Path, drained: Path, left_out: Path, tls: Path, backups: Path, deploys: int
) -> dict[str, Any]:
    """What the module returns. Raises nothing for a host that is in a bad way: its problems are the answer."""
    releases = Releases(root)
    found: dict[str, Any] = {
        "release": None,
        "artifact": None,
        "previous": None,
        "state": "nothing deployed",
        "indexes": [],
        "lock": None,
        "drained": None,
        "left_out": {},
    }
    found |= {"deploys": [], "timeline": [], "rotated": {}, "backups": {}, "drift": [], "problems": []}
    found["certificates"] = {}
    for certificate in sorted(tls.glob("*/cert.pem")):
        with _noting(found["problems"]):
            found["certificates"][certificate.parent.name] = days_left(certificate)
    with _noting(found["problems"]):
        holder = FleetLock(root).holder()
        found["lock"] = holder.words() if holder else None
    with _noting(found["problems"]):
        found["backups"] = backed_up(backups) if backups.exists() else {}
    with _noting(found["problems"]):
        found["drained"] = json.loads(drained.read_text()) if drained.exists() else None
    with _noting(found["problems"]):
        found["left_out"] = {path.name: path.read_text().strip() for path in sorted(left_out.glob("*"))}
    with _noting(found["problems"]):
        events = releases.history.read()
        audits = [event for event in events if event.get("event") == "audit"]
        found["deploys"] = audits[-deploys:] if deploys else []
        runs = {audit.get("run") for audit in found["deploys"]} - {None}
        found["rotated"] = {what: days_since(events, f"rotate {what}") for what in ("credentials", "certificates")}
        found["timeline"] = [event for event in events if event.get("run") in runs]
        found["release"] = releases.current()
        found["previous"] = releases.previous()
    if found["release"] is None:
        return found
    with _noting(found["problems"]):
        found["drift"] = drift(releases.path(found["release"]))
    socket = run_dir / found["release"] / "gunicorn.sock"
    unready = why_not_ready(socket)
    found["state"] = "ready" if unready is None else "not ready" if unready.startswith("not ready") else "not running"
    if unready is not None:
        found["problems"].append(unready)
    says: dict[str, Any] = {}
    if found["state"] != "not running":
        with _noting(found["problems"]):
            says = version(socket)
    with _noting(found["problems"]):
        found["artifact"] = releases.require(found["release"]).artifact
        cli = Cli(releases.path(found["release"]))
        serves = says.get("snapshots") or {}
        found["indexes"] = [
            {"serves": serves.get(index["collection"])}
            | {name: index[name] for name in ("collection", "current", "previous", "held")}
            for index in indexes(cli, fingerprint=says.get("fingerprint"))
        ]
    return found


def version(socket: Path) -> dict[str, Any]:
    """What GET /version of a release says. Raises StateError."""
    connection = UnixConnection(socket, TIMEOUT_SECONDS)
    try:
        key = socket.with_name("gate.key").read_text().strip()
        connection.request("GET", "/version", headers={"Authorization": f"Bearer {key}"})
        response = connection.getresponse()
        body = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise StateError(f"GET /version on {socket} failed: {error}") from error
    finally:
        connection.close()
    if response.status != http.client.OK or not isinstance(body, dict):
        raise StateError(f"GET /version on {socket} answered {response.status}")
    return body


def drift(release: Path) -> list[str]:
    """The files that differ from the release's manifest, with what is wrong. Raises StateError."""
    check = ["sha256sum", "--check", "--quiet", "--strict", "manifest.sha256"]
    done = subprocess.run(check, cwd=release, capture_output=True, text=True, check=False)
    if done.returncode and not done.stdout:
        raise StateError(f"{release}: {done.stderr.strip()}")
    return done.stdout.splitlines()


def days_left(certificate: Path) -> int:
    """Whole days until a certificate ends. Raises StateError."""
    command = ["openssl", "x509", "-noout", "-enddate", "-in", str(certificate)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StateError(f"{certificate}: {done.stderr.strip()}")
    end = ssl.cert_time_to_seconds(done.stdout.strip().removeprefix("notAfter="))
    return int((end - time.time()) // DAY_SECONDS)


def days_since(events: list[dict[str, Any]], what: str) -> int | None:
    """Since that last went well, or since the first event where it never did; None where there is none."""
    done = [one for one in events if one.get("what") == what and one.get("result") == "ok"]
    told = done[-1:] or events[:1]
    if not told:
        return None
    then = datetime.strptime(str(told[0]["time"]), "%Y-%m-%dT%H:%M:%S%z")
    return days_ago(then.timestamp())


def backed_up(file: Path) -> dict[str, int | None]:
    """Days by what went well then, None for what never did. Raises ValueError."""
    values = dict(re.findall(r"^ragrack_backup_(\w+)_timestamp_seconds (\S+)$", file.read_text(), re.MULTILINE))
    return {what: days_ago(float(then)) if float(then) else None for what, then in values.items()}


def days_ago(then: float) -> int:
    return int((time.time() - then) // DAY_SECONDS)


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except (StateError, OSError, ValueError) as error:
        problems.append(str(error))


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "default": "/opt/ragrack"},
            "run_dir": {"type": "path", "default": "/run/ragrack"},
            "drained": {"type": "path", "default": "/etc/ragrack/drained.json"},
            "left_out": {"type": "path", "default": "/etc/ragrack/left-out"},
            "tls": {"type": "path", "default": "/etc/ragrack/tls"},
            "backups": {"type": "path", "default": "/var/lib/ragrack-metrics/backup.prom"},
            "deploys": {"type": "int", "default": 5},
        },
        supports_check_mode=True,
    )
    params = module.params
    if params["deploys"] < 0:
        module.fail_json(msg=f"deploys: {params['deploys']} is below 0")
    names = ("root", "run_dir", "drained", "left_out", "tls", "backups")
    root, run_dir, drained, left_out, tls, backups = (Path(params[name]) for name in names)
    module.exit_json(changed=False, **status(root, run_dir, drained, left_out, tls, backups, params["deploys"]))


if __name__ == "__main__":
    main()
