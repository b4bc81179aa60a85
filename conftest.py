"""How `bin/test` shares the tests between its two processes: by file, and all that make hosts go to one of them."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        group = "hosts" if item.get_closest_marker("hosts") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
