"""Lets tests import modules and their utilities as mypy sees them, with one copy of each behind Ansible's name."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from testing.release_host import Place

PLUGINS = Path(__file__).parents[1]

sys.path.insert(0, str(PLUGINS))
for utility in sorted((PLUGINS / "module_utils").glob("*.py")):
    loaded = importlib.import_module(f"module_utils.{utility.stem}")
    sys.modules[f"ansible.module_utils.{utility.stem}"] = loaded
    setattr(importlib.import_module("ansible.module_utils"), utility.stem, loaded)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A host that was prepared and that an artifact was shipped to. What it runs is stopped after the test."""
    from testing.release_host import Place

    with tempfile.TemporaryDirectory(prefix="ragrack-") as directory:  # short: sockets have 107 bytes for their path
        made = Place(Path(directory))
        monkeypatch.setenv("PATH", made.install_programs()["PATH"])
        made.write_artifact()
        yield made
        for unit in sorted((made.path / "units").glob("ragrack@*.json")):
            subprocess.run(["systemctl", "stop", unit.stem], check=True)
