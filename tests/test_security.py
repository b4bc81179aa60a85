"""docs/security.md promises nothing that no test would notice, and what it says of the sources is so."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs/security.md").read_text()
PROMISES = [line for line in DOCUMENT.splitlines() if line.startswith("| ") and "shown by |" not in line]
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", DOCUMENT)))


@pytest.mark.parametrize("promise", PROMISES, ids=lambda line: line.split(" | ")[0].strip("| "))
def test_each_promise_names_a_test(promise: str) -> None:
    assert re.search(r"`[\w/]+\.py::test_\w+` \|$", promise)


@pytest.mark.parametrize(("file", "test"), NAMED, ids=lambda part: Path(part).name)
def test_the_tests_are_there(file: str, test: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert test in functions


def test_nothing_unpickles() -> None:
    """Neither the service nor what runs on hosts imports a module that does, or asks numpy to."""
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    found = []
    for path in [*(ROOT / "app/src").rglob("*.py"), *(ROOT / "plugins").rglob("*.py"), *(ROOT / "roles").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [key.arg or "" for key in node.keywords] if isinstance(node, ast.Call) else []
            found += [f"{path}: {name}" for name in names if name.split(".")[0] in unsafe | {"allow_pickle"}]
    assert found == []


def test_bandits_rules_are_on() -> None:
    """But for two that are about commands being lists and found on the PATH."""
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "S" in lint["select"]
    assert [rule for rule in lint["ignore"] if rule.startswith("S")] == ["S603", "S607"]


def test_ci_examples_pin_by_digest() -> None:
    github = yaml.safe_load((ROOT / "docs/ci/github.yml").read_text())
    used = [step["uses"] for job in github["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used
    assert [one for one in used if not re.search(r"@[0-9a-f]{40}$", one)] == []
    gitlab = yaml.safe_load((ROOT / "docs/ci/gitlab.yml").read_text())
    images = [job["image"] for job in gitlab.values() if isinstance(job, dict) and "image" in job]
    assert [one for one in images if "@sha256:" not in one] == []


def test_bin_deps_says_what_it_does() -> None:
    said = subprocess.run([ROOT / "bin/deps"], capture_output=True, text=True, check=False)
    assert said.returncode == 2
    assert "bin/deps audit" in said.stdout + said.stderr
    assert "bin/deps update" in said.stdout + said.stderr
