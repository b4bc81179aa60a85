"""Who runs this playbook, and whether another run is still alive."""

from __future__ import annotations

DOCUMENTATION = r"""
name: ragrack_controller
short_description: The run that this is, for a lock that others can read
description:
  - Without a term, returns one dictionary that identifies this run of C(ansible-playbook).
  - With such a dictionary as a term, returns V(alive), V(dead) or V(unknown) (a run on another control node).
options:
  _terms:
    description: Identities of other runs.
    required: false
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
- ansible.builtin.debug:
    msg: "{{ lookup('ragrack_controller').run }}"
"""

RETURN = r"""
_raw:
  description: Identity (owner, controller, machine, boot, pid, pid_started, run), or the state of each term.
  type: list
"""

import getpass
import os
import socket
from pathlib import Path
from typing import Any

from ansible.plugins.lookup import LookupBase


def stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat after the command's name (proc(5)); None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def started(pid: int) -> str | None:
    """Clock ticks from boot to the start of the process: tells a process from a later one of the same number."""
    fields = stat_fields(pid)
    return fields[19] if fields else None


def boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def machine() -> str:
    """The machine's id, so that two control nodes of one name are not taken for each other."""
    path = Path("/etc/machine-id")
    return path.read_text().strip() if path.exists() else ""


def playbook_pid() -> int:
    """The outermost `ansible-playbook` above this process: workers are forks that come and go."""
    pid, found = os.getpid(), os.getpid()
    while pid > 1:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"ansible-playbook" in command:
            found = pid
        fields = stat_fields(pid)
        pid = int(fields[1]) if fields else 0
    return found


def identity() -> dict[str, Any]:
    pid = playbook_pid()
    begun = started(pid)
    return {
        "owner": os.environ.get("SUDO_USER") or getpass.getuser(),
        "controller": socket.gethostname(),
        "machine": machine(),
        "boot": boot(),
        "pid": pid,
        "pid_started": begun,
        "run": f"{socket.gethostname()}-{boot()[:8]}-{pid}-{begun}",
    }


def state(holder: dict[str, Any]) -> str:
    if (holder.get("controller"), holder.get("machine")) != (socket.gethostname(), machine()):
        return "unknown"
    if holder.get("boot") != boot():
        return "dead"
    return "alive" if started(int(holder["pid"])) == str(holder.get("pid_started")) else "dead"


class LookupModule(LookupBase):
    def run(self, terms: list[Any], variables: Any = None, **kwargs: Any) -> list[Any]:
        return [state(term) for term in terms] if terms else [identity()]
