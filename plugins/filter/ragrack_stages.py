"""The task files of a run: its stages, each between its hooks."""

from __future__ import annotations

DOCUMENTATION = r"""
name: ragrack_stages
short_description: Put hooks around stages
description:
  - Takes stages in their order and returns the task files to include, each with the stage that it belongs to.
options:
  _input:
    description: Names of stages; a stage's task file is called as it is.
    type: list
    elements: str
    required: true
  hooks:
    description: Lists of task files by V(before_STAGE) and V(after_STAGE).
    type: dict
    required: true
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
# [{'stage': 'gate', 'file': 'gate.yml'}, {'stage': 'gate', 'file': 'hooks/webhook.yml'}]
- ansible.builtin.debug:
    msg: "{{ ['gate'] | ragrack_stages({'after_gate': ['hooks/webhook.yml']}) }}"
"""

RETURN = r"""
_value:
  description: Dicts of C(stage) and C(file).
  type: list
"""

from collections.abc import Callable, Mapping, Sequence


def ragrack_stages(stages: Sequence[str], hooks: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    return [
        {"stage": stage, "file": file}
        for stage in stages
        for file in (*hooks.get(f"before_{stage}", ()), f"{stage}.yml", *hooks.get(f"after_{stage}", ()))
    ]


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., list[dict[str, str]]]]:
        return {"ragrack_stages": ragrack_stages}
