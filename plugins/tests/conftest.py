"""Lets tests import modules and their utilities as mypy sees them, with one copy of each behind Ansible's name."""

import importlib
import sys
from pathlib import Path

PLUGINS = Path(__file__).parents[1]

sys.path.insert(0, str(PLUGINS))
for utility in sorted((PLUGINS / "module_utils").glob("*.py")):
    loaded = importlib.import_module(f"module_utils.{utility.stem}")
    sys.modules[f"ansible.module_utils.{utility.stem}"] = loaded
    setattr(importlib.import_module("ansible.module_utils"), utility.stem, loaded)
