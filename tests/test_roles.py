"""What every role promises: specified, commented and documented variables that carry its name."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROLES = sorted(path for path in (Path(__file__).parents[1] / "roles").iterdir() if path.is_dir())


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
class TestRole:
    def test_defaults_and_specification_name_the_same_variables_and_values(self, role: Path) -> None:
        defaults = load(role / "defaults/main.yml") or {}
        options = load(role / "meta/argument_specs.yml")["argument_specs"]["main"].get("options", {})
        assert set(defaults) == {name for name, option in options.items() if not option.get("required")}
        for name, option in options.items():
            if "default" in option:
                assert option["default"] == defaults[name], name

    def test_variables_carry_the_name_of_the_role(self, role: Path) -> None:
        named = [
            load(role / folder / "main.yml") or {}
            for folder in ("defaults", "vars")
            if (role / folder / "main.yml").exists()
        ]
        assert [name for variables in named for name in variables if not name.startswith(f"{role.name}_")] == []

    def test_each_default_has_a_comment_of_one_line(self, role: Path) -> None:
        lines = (role / "defaults/main.yml").read_text().splitlines()
        bare = [
            line
            for before, line in zip(["", *lines], lines, strict=False)
            if line[:1].isalpha() and not before.startswith("# ")
        ]
        assert bare == []

    def test_has_a_readme(self, role: Path) -> None:
        assert (role / "README.md").read_text().startswith(f"# {role.name}\n")
