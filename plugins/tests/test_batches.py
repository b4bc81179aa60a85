from __future__ import annotations

from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from filter.ragrack_batches import ragrack_batches

HOSTS = [f"app{number}" for number in range(1, 9)]


@pytest.mark.parametrize(
    ("hosts", "sizes", "numbers"),
    [
        (8, [1, "25%", "100%"], [1, 2, 5]),
        (3, [1, "25%", "100%"], [1, 1, 1]),
        (1, [1, "25%", "100%"], [1]),
        (0, [1], []),
        (5, [2], [2, 2, 1]),
        (5, ["100%"], [5]),
        (5, ["1"], [1, 1, 1, 1, 1]),
    ],
)
def test_every_host_is_in_one_batch(hosts: int, sizes: list[Any], numbers: list[int]) -> None:
    batches = ragrack_batches(HOSTS[:hosts], sizes)
    assert [len(batch) for batch in batches] == numbers
    assert [host for batch in batches for host in batch] == HOSTS[:hosts]


@pytest.mark.parametrize("sizes", [[], "25%", [0], ["0%"], ["101%"], [-1], ["all"], [1.5], None])
def test_a_size_that_is_none_is_refused_in_words(sizes: Any) -> None:
    with pytest.raises(AnsibleFilterError, match=r"release_batches: .*\[1, '25%', '100%'\]"):
        ragrack_batches(HOSTS, sizes)
