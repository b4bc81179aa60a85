"""Alerts say what they should, each has a runbook, and dashboards show what is measured."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
ROLE = ROOT / "roles/monitoring"
CASES = ROOT / "tests/alerts.yml"
RUNBOOK = (ROOT / "docs/operations.md").read_text()
METRICS = (ROOT / "docs/metrics.md").read_text()


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rules as the role writes them to a host by default."""
    made = tmp_path_factory.mktemp("rules") / "ragrack-rules.yml"
    variables = [f"--extra-vars=@{ROLE / folder / 'main.yml'}" for folder in ("defaults", "vars")]
    template = f"src={ROLE / 'templates/ragrack-rules.yml.j2'} dest={made}"
    ansible = Path(sys.executable).parent / "ansible"
    where = ["--inventory=localhost,", "--connection=local"]
    run(
        ansible,
        "localhost",
        *where,
        "-e",
        "ansible_become=false",
        *variables,
        "-m",
        "ansible.builtin.template",
        "-a",
        template,
    )
    return made


@pytest.fixture(scope="module")
def promtool(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Debian's, out of the package, as that would start a server here."""
    if found := shutil.which("promtool"):
        return found
    kept = ROOT / ".cache/promtool"
    if not kept.exists():
        folder = tmp_path_factory.mktemp("prometheus")
        if subprocess.run(["apt-get", "download", "prometheus"], cwd=folder, check=False).returncode != 0:
            run("apt-get", "update")
            run("apt-get", "download", "prometheus", cwd=folder)
        [package] = folder.glob("*.deb")
        run("dpkg-deb", "--extract", package, folder)
        kept.parent.mkdir(exist_ok=True)
        aside = kept.with_suffix(".new")
        shutil.copy(folder / "usr/bin/promtool", aside)
        aside.replace(kept)
    return str(kept)


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What it said. Raises AssertionError where it fails."""
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def alerts(rules: Path) -> list[str]:
    groups = yaml.safe_load(rules.read_text())["groups"]
    return [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]


def test_alerts_are_on_when_they_should_be_and_off_below(rules: Path, promtool: str) -> None:
    shutil.copy(CASES, rules.parent)
    run(promtool, "check", "rules", rules)
    assert "SUCCESS" in run(promtool, "test", "rules", rules.parent / CASES.name)


def test_every_alert_is_seen_on(rules: Path) -> None:
    seen = set(re.findall(r'labels: \'\{alertname="(\w+)"\}', CASES.read_text()))
    assert seen == set(alerts(rules))


def test_every_alert_has_a_runbook(rules: Path) -> None:
    described = RUNBOOK.split("\n## Alerts\n")[1].split("\n## ")[0]
    sections = re.findall(r"^### (\w+)\n\n\S", described, re.MULTILINE)
    assert sorted(sections) == sorted(alerts(rules))
    assert len(sections) == len(set(sections))


def test_links_between_runbooks_lead_somewhere() -> None:
    headings = re.findall(r"^##+ (.*)$", RUNBOOK, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\(#([\w-]+)\)", RUNBOOK)) <= anchors


def test_rules_and_dashboard_use_what_the_service_measures(rules: Path) -> None:
    dashboard = (ROLE / "files/grafana/dashboards/ragrack.json").read_text()
    json.loads(dashboard)
    elsewhere = {"ragrack_certificate", "ragrack_backup", "ragrack_golden"}
    used = {
        re.sub(r"_(bucket|count|sum)$", "", name)
        for name in re.findall(r"\bragrack_\w+", rules.read_text() + dashboard)
    }
    unknown = [name for name in used if f"`{name}`" not in METRICS and not name.startswith(tuple(elsewhere))]
    assert unknown == []
