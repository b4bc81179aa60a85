#!/usr/bin/python
"""Ask a host everything that a deploy needs of it, and report all that is wrong in one go."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ragrack_preflight
short_description: Everything that is wrong with a host, before anything is changed
description:
  - Reads; changes nothing.
  - Returns the problems instead of failing, so that a play can list those of every host together.
options:
  host:
    description: Name of the host, for the sentences.
    type: str
    required: true
  paths:
    description: Files that C(playbooks/site.yml) makes, with what each is for.
    type: dict
    default: {}
  space:
    description: Bytes needed, by directory.
    type: dict
    default: {}
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
- name: Ask the host
  ragrack_preflight:
    host: "{{ inventory_hostname }}"
    paths: {/usr/local/bin/uv: uv}
    space: {/opt/ragrack: 1000000000}
  register: preflight
"""

RETURN = r"""
problems: {description: One sentence for each problem with its mend., type: list, elements: str, returned: always}
prepared: {description: Whether C(playbooks/site.yml) has made all of O(paths)., type: bool, returned: always}
python: {description: Version of C(/usr/bin/python3) as C(3.13)., type: str, returned: always}
architecture: {description: Machine type., type: str, returned: always}
"""

import os
import platform
import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

SITE = "run playbooks/site.yml on it"


def nearest(path: Path) -> Path:
    """The path itself or the first of its parents that exists."""
    return next(p for p in [path, *path.parents] if p.exists())


def missing_paths(paths: dict[str, str]) -> list[str]:
    absent = [f"{path} ({what})" for path, what in paths.items() if not os.path.lexists(path)]
    return [f"not prepared for ragrack, {', '.join(absent)} missing; mend: {SITE}."] if absent else []


def missing_space(space: dict[str, int]) -> list[str]:
    problems = []
    for directory, needed in space.items():
        free = shutil.disk_usage(nearest(Path(directory))).free
        if free < int(needed):
            problems.append(
                f"{directory} has {free // 2**20} MiB free and a release needs {int(needed) // 2**20} MiB; "
                "mend: free space there (fewer kept releases: release_keep) or give the host a larger disk."
            )
    return problems


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "host": {"type": "str", "required": True},
            "paths": {"type": "dict", "default": {}},
            "space": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    problems = []
    if platform.system() != "Linux" or not Path("/run/systemd/system").is_dir():
        problems.append("systemd does not run here; mend: use a Debian 12 or 13 host that was booted with systemd.")
    if os.geteuid() != 0:
        problems.append(f"the play runs as uid {os.geteuid()}; mend: connect as root or set ansible_become: true.")
    python = ".".join(platform.python_version_tuple()[:2])
    if python not in ("3.11", "3.12", "3.13"):
        problems.append(f"/usr/bin/python3 is {python}; mend: use Debian 12 (3.11) or Debian 13 (3.13).")
    unprepared = missing_paths(module.params["paths"])
    problems += unprepared
    problems += missing_space(module.params["space"])
    problems = [f"{module.params['host']}: {problem}" for problem in problems]
    module.exit_json(
        changed=False, prepared=not unprepared, problems=problems, python=python, architecture=platform.machine()
    )


if __name__ == "__main__":
    main()
