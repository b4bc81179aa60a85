#!/usr/bin/python
"""The packets that a host takes: changed at once, and back by itself where nobody can reach the host any more."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ragrack_firewall
short_description: Load a table of nftables that reverts itself unless it is confirmed
description:
  - V(loaded) has nftables check the rules, starts a timer that brings back what was before, and loads them in one
    transaction. V(confirmed), over a new connection, stops the timer and keeps the rules for the next boot.
  - A rule that locks Ansible out thus ends by itself. A host that dies in between boots with what was confirmed last.
  - The table is C(inet ragrack); no other table is touched.
  - Needs nftables and systemd. A unit of the site's loads O(path) at boot.
options:
  state:
    description: What to do.
    type: str
    choices: [loaded, confirmed]
    required: true
  rules:
    description: With O(state=loaded), the chains of the table as nftables takes them.
    type: str
  path:
    description: The file that is loaded at boot.
    type: path
    default: /etc/ragrack/firewall.nft
  revert_after:
    description: Seconds in which it must be confirmed.
    type: int
    default: 60
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
- name: Take these packets
  ragrack_firewall:
    state: loaded
    rules: |
      chain input {
        type filter hook input priority filter; policy drop;
        ct state established,related accept
        tcp dport 22 accept
      }

- name: Come in anew
  ansible.builtin.meta: reset_connection

- name: Keep them
  ragrack_firewall:
    state: confirmed
"""

RETURN = r"""
on_trial: {description: Whether the rules wait to be confirmed., type: bool, returned: success}
"""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule

if TYPE_CHECKING:
    from module_utils.release_state import fsync_dir, write_atomically
else:
    from ansible.module_utils.release_state import fsync_dir, write_atomically

TABLE = "inet ragrack"
# In one file, so one transaction: there is no moment without rules.
ANEW = f"table {TABLE}\ndelete table {TABLE}\n"
REVERT = "ragrack-firewall-revert"


class FirewallError(Exception):
    """Ends the module with this message."""


def run(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def must(*command: str, what: str, text: str | None = None) -> None:
    done = run(*command, text=text)
    if done.returncode:
        raise FirewallError(f"{what}: {(done.stderr or done.stdout).strip()}")


@dataclass(frozen=True)
class Firewall:
    """The rules that are confirmed, those on trial beside them, and the timer that ends the trial."""

    path: Path

    @property
    def trial(self) -> Path:
        return self.path.with_suffix(".trial")

    def confirmed(self) -> str:
        return self.path.read_text() if self.path.exists() else ""

    def on_trial(self) -> bool:
        return run("systemctl", "is-active", "--quiet", f"{REVERT}.timer").returncode == 0

    def is_loaded(self) -> bool:
        return run("nft", "list", "table", *TABLE.split()).returncode == 0

    def stands(self, rules: str) -> bool:
        """Whether these rules are confirmed and in force."""
        return self.confirmed() == rules and self.is_loaded() and not self.on_trial()

    def load(self, rules: str, seconds: int) -> None:
        must(
            "nft", "--check", "--file", "-", text=rules, what="rules: nftables does not take them; nothing was changed"
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.stop_timer()
        write_atomically(self.trial, rules, 0o600)
        # What is confirmed stays where it is until the timer is stopped; where nothing is, there was no table.
        back = ["--file", str(self.path)] if self.path.exists() else ["delete", "table", *TABLE.split()]
        timer = [
            f"--unit={REVERT}",
            f"--on-active={seconds}",
            "--timer-property=AccuracySec=1s",
            "--collect",
            "--quiet",
        ]
        cannot = "the timer that would revert the rules cannot start; nothing was changed"
        must("systemd-run", *timer, "/usr/sbin/nft", *back, what=cannot)
        must("nft", "--file", str(self.trial), what="rules: nftables refused them; nothing was changed")

    def confirm(self) -> None:
        """Raises FirewallError where the rules have gone back by themselves."""
        if not self.trial.exists():
            return
        if not self.on_trial():
            self.trial.unlink()
            raise FirewallError("the rules were not confirmed in time and what was before is in force again")
        self.stop_timer()
        self.trial.replace(self.path)
        fsync_dir(self.path.parent)

    def forget_trial(self) -> None:
        self.trial.unlink(missing_ok=True)

    def stop_timer(self) -> None:
        run("systemctl", "stop", f"{REVERT}.timer")


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["loaded", "confirmed"], "required": True},
            "rules": {"type": "str"},
            "path": {"type": "path", "default": "/etc/ragrack/firewall.nft"},
            "revert_after": {"type": "int", "default": 60},
        },
        required_if=[("state", "loaded", ("rules",))],
        supports_check_mode=True,
    )
    asked = module.params
    firewall = Firewall(Path(asked["path"]))
    answer: dict[str, Any] = {"changed": False}
    try:
        if asked["state"] == "confirmed":
            if not module.check_mode:
                firewall.confirm()
        else:
            body = "".join(f"  {line}\n" if line else "\n" for line in asked["rules"].rstrip().splitlines())
            rules = f"{ANEW}table {TABLE} {{\n{body}}}\n"
            if firewall.stands(rules):
                # What went back by itself, after a run that wanted other rules.
                if not module.check_mode:
                    firewall.forget_trial()
            else:
                answer["changed"] = True
                answer["diff"] = {
                    "before": firewall.confirmed(),
                    "after": rules,
                    "before_header": str(firewall.path),
                    "after_header": str(firewall.path),
                }
                if not module.check_mode:
                    firewall.load(rules, asked["revert_after"])
        answer["on_trial"] = firewall.on_trial()
    except (FirewallError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**answer)


if __name__ == "__main__":
    main()
