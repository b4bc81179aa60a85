"""What `bin/test` runs, and how its two processes share it: by file, and all files that make hosts to one of them."""

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling
from xdist.scheduler.protocol import Scheduling

HOSTS = ("tests/test_demo.py", "tests/test_molecule.py", "molecule/shared/tests/test_testhosts_real.py")


class ByFile(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "hosts" if file in HOSTS else file


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rare", action="store_true", help="also the scenarios that are slow and rarely touched")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return ByFile(config, log)
