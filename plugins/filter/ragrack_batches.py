"""The hosts of a fleet in the order and the groups that a switch takes them."""

from __future__ import annotations

DOCUMENTATION = r"""
name: ragrack_batches
short_description: Split hosts into batches
description:
  - Takes the hosts in their order, so many at a time; the last size is used until none is left.
options:
  _input:
    description: Names of hosts.
    type: list
    elements: str
    required: true
  sizes:
    description: Sizes of the batches, each a number of hosts or a share of all as V(25%), at least one host.
    type: list
    required: true
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
# [['app1'], ['app2'], ['app3', 'app4']]
- ansible.builtin.debug:
    msg: "{{ ['app1', 'app2', 'app3', 'app4'] | ragrack_batches([1, '25%', '100%']) }}"
"""

RETURN = r"""
_value:
  description: Lists of names.
  type: list
"""

import re
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from typing import Any

from ansible.errors import AnsibleFilterError

MEND = "give numbers of hosts above 0, or shares as '25%', for instance [1, '25%', '100%']"


def ragrack_batches(hosts: Sequence[str], sizes: Sequence[int | str]) -> list[list[str]]:
    """Raises AnsibleFilterError for a size that is none."""
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not sizes:
        raise AnsibleFilterError(f"release_batches: {sizes!r} is no list of sizes; {MEND}")
    numbers = [_number(size, len(hosts)) for size in sizes]
    batches, left = [], list(hosts)
    for number in chain(numbers, repeat(numbers[-1])):
        if not left:
            break
        batches.append(left[:number])
        left = left[number:]
    return batches


def _number(size: int | str, hosts: int) -> int:
    text = str(size).strip()
    found = re.fullmatch(r"([0-9]+)(%?)", text)
    if found is None or int(found[1]) == 0 or (found[2] and int(found[1]) > 100):
        raise AnsibleFilterError(f"release_batches: {size!r} is no size; {MEND}")
    return max(1, hosts * int(found[1]) // 100) if found[2] else int(found[1])


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"ragrack_batches": ragrack_batches}
