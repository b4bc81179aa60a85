"""How `bin/test` shares the tests between its two processes: by file, and all that make hosts to one of them."""

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling
from xdist.scheduler.protocol import Scheduling

HOSTS = ("tests/test_demo.py", "tests/test_molecule.py", "molecule/shared/tests/test_testhosts_real.py")


class ByFile(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "hosts" if file in HOSTS else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return ByFile(config, log)
