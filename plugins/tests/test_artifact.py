"""The artifact: the same bytes from the same project, and refusals in words."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from module_utils.wheels import WheelError
from modules import ragrack_artifact as artifact

ROOT = Path(__file__).parents[2]
POOL = ROOT / "build" / "wheels"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout of its own, so that a test may change it."""
    target = tmp_path / "checkout"
    target.mkdir()
    for name in ("pyproject.toml", "uv.lock", "README.md"):
        shutil.copy2(ROOT / name, target / name)
    ignore = shutil.ignore_patterns("__pycache__", "tests", ".*")
    shutil.copytree(ROOT / "app", target / "app", ignore=ignore)
    return target


def out_dir(path: Path) -> Path:
    """An empty build directory that need not download again what this machine has downloaded before."""
    (path / "wheels").mkdir(parents=True)
    for file in POOL.iterdir() if POOL.exists() else []:
        if file.is_file():
            os.link(file, path / "wheels" / file.name)
    return path


def tree(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_two_builds_of_one_project_are_the_same_bytes(project: Path, tmp_path: Path) -> None:
    first = artifact.ensure(project, out_dir(tmp_path / "one"), ["3.11", "3.13"], "x86_64", keep=5)
    for path in project.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    second = artifact.ensure(project, out_dir(tmp_path / "two"), ["3.11", "3.13"], "x86_64", keep=5)
    assert first["digest"] == second["digest"]
    assert tree(Path(first["artifact_dir"])) == tree(Path(second["artifact_dir"]))
    manifest = json.loads((Path(first["artifact_dir"]) / "manifest.json").read_text())
    files = {name: file["sha256"] for name, file in manifest["files"].items()}
    assert files == {k: v for k, v in tree(Path(first["artifact_dir"])).items() if k != "manifest.json"}
    for python, tag in (("3.11", "cp311"), ("3.13", "cp313")):
        assert any(f"-{tag}-" in name for name in files), f"no wheel for Python {python}"

    again = artifact.ensure(project, tmp_path / "one", ["3.13", "3.11"][::-1], "x86_64", keep=5)
    assert not again["changed"]
    assert again["artifact_dir"] == first["artifact_dir"]

    (project / "app/src/ragrack/__main__.py").write_text("# Another app.\n")
    changed = artifact.ensure(project, tmp_path / "one", ["3.11", "3.13"], "x86_64", keep=1)
    assert changed["changed"]
    assert changed["digest"] != first["digest"]
    assert not Path(first["artifact_dir"]).exists(), "keep=1 leaves the newest alone"


def test_an_incomplete_checkout_is_named(project: Path, tmp_path: Path) -> None:
    (project / "uv.lock").unlink()
    with pytest.raises(WheelError, match=r"uv\.lock not found; mend: point project_dir at a whole checkout"):
        artifact.ensure(project, tmp_path / "out", ["3.13"], "x86_64", keep=5)


@pytest.mark.parametrize(("python", "numpy"), [("3.11", "2.4."), ("3.13", "2.5.")])
def test_requirements_are_those_of_the_host_not_of_the_control_node(python: str, numpy: str, tmp_path: Path) -> None:
    listed = artifact.requirements(ROOT, python, "aarch64", [], tmp_path)
    assert f"numpy=={numpy}" in listed
    assert "--hash=sha256:" in listed
    assert "ragrack" not in listed
    assert "qdrant" not in listed


def test_a_lock_that_was_narrowed_before_is_asked_of_no_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listed = artifact.requirements(ROOT, "3.13", "x86_64", [], tmp_path)
    for name, value in {"UV_OFFLINE": "1", "UV_CACHE_DIR": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    assert artifact.requirements(ROOT, "3.13", "x86_64", [], tmp_path) == listed
    with pytest.raises(WheelError):
        artifact.requirements(ROOT, "3.11", "x86_64", [], tmp_path)


def test_an_extra_is_in_the_artifact_that_asks_for_it(tmp_path: Path) -> None:
    listed = artifact.requirements(ROOT, "3.13", "x86_64", ["qdrant"], tmp_path)
    assert "llama-index-vector-stores-qdrant==" in listed
    assert "qdrant-client==" in listed
    keys = {artifact.input_key(ROOT, ["3.13"], "x86_64", extras) for extras in ([], ["qdrant"])}
    assert len(keys) == 2


def test_the_bill_of_materials_lists_what_is_installed(project: Path, tmp_path: Path) -> None:
    made = Path(artifact.ensure(project, out_dir(tmp_path), ["3.11"], "x86_64", keep=5)["artifact_dir"])
    bill = json.loads((made / "sbom.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    listed = {f"{part['name']}=={part['version']}" for part in bill["components"]}
    locked = {line.split()[0] for line in (made / "requirements-3.11.txt").read_text().splitlines() if "==" in line}
    assert locked <= listed
    assert artifact.bill_of_materials(project) == artifact.bill_of_materials(project)


def test_a_key_that_is_not_there_or_needs_a_passphrase_is_refused_in_words(tmp_path: Path) -> None:
    manifest, key = tmp_path / "manifest.json", tmp_path / "key"
    manifest.write_text("{}")
    with pytest.raises(WheelError, match=r"signing_key: there is no .*Mend: run playbooks/site.yml"):
        artifact.sign(manifest, key)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "a passphrase", "-f", key], check=True)
    with pytest.raises(WheelError, match=r"signing_key: .* cannot sign .*Mend: give a private key without"):
        artifact.sign(manifest, key)
