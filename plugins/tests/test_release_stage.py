"""A release is built from what was verified, as a whole or not at all."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from module_utils.release_state import StateError
from modules import ragrack_release
from testing.release_host import UV, Place

ID = "0.1.0-0123456789ab"
OTHER = "0.1.0-ba9876543210"


def stage(place: Place, release: str = ID, check: bool = False, **changes: Any) -> dict[str, Any]:
    return ragrack_release.run(place.parameters("staged", id=release, **changes), check=check, diff=True)


def refused(place: Place, **changes: Any) -> str:
    """The message with which staging is refused, having left the host as it was."""
    before = place.snapshot()
    with pytest.raises(StateError) as caught:
        stage(place, **changes)
    assert place.snapshot() == before
    return str(caught.value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 24 MiB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", mounted], check=True)
    yield mounted
    subprocess.run(["umount", mounted], check=True)


def test_a_release_is_complete_and_runs(place: Place) -> None:
    credentials = place.path / "credstore"
    credentials.mkdir()
    answer = stage(place, credentials_dir=str(credentials))
    release = place.release(ID)
    assert answer["changed"] and answer["env_built"]
    assert answer["diff"]["after"]["releases"] == [ID]
    assert (release / "run").readlink() == place.path / "run" / ID
    assert (release / "credentials").readlink() == credentials
    assert (release / "app.env").read_text() == 'RAGRACK_COLLECTIONS="postgres"\n'
    assert stat.S_IMODE((release / "app.env").stat().st_mode) == 0o640
    facts = json.loads((release / "release.json").read_text())
    manifest = json.loads((place.artifact / "manifest.json").read_text())
    assert (facts["id"], facts["version"], facts["artifact"]) == (ID, "0.1.0", manifest["digest"])
    said = subprocess.run(
        [release / "venv/bin/python", "-m", "ragrack", "config", "fingerprint"], capture_output=True, check=True
    )
    assert said.stdout.strip()
    writable = [path for path in release.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o022]
    assert writable == [], "nobody but root can change a release"


def test_what_is_installed_can_be_checked_for_drift(place: Place) -> None:
    stage(place)
    check = ["sha256sum", "--check", "--quiet", "--strict", "manifest.sha256"]
    assert subprocess.run(check, cwd=place.release(ID), capture_output=True, check=False).returncode == 0
    listed = (place.release(ID) / "manifest.sha256").read_text()
    for name in ("app.env", "models/all-minilm-l6-v2/model.onnx", "site-packages/ragrack/__init__.py", "library.py"):
        assert name in listed
    drifted = place.release(ID) / "models/all-minilm-l6-v2/model.onnx"
    drifted.write_bytes(b"other")
    found = subprocess.run(check, cwd=place.release(ID), capture_output=True, text=True, check=False)
    assert "model.onnx: FAILED" in found.stdout


def test_everything_is_byte_compiled_for_good(place: Place) -> None:
    stage(place)
    packages = next((place.release(ID) / "venv/lib").glob("python*/site-packages"))
    for source in (packages / "library.py", packages / "ragrack/__init__.py"):
        [compiled] = (source.parent / "__pycache__").glob(f"{source.stem}.*.pyc")
        assert int.from_bytes(compiled.read_bytes()[4:8], "little") == 0b01, "hash-based and never checked"


def test_a_second_release_shares_packages_and_models(place: Place) -> None:
    stage(place)
    answer = stage(place, OTHER)
    assert answer["changed"] and not answer["env_built"]
    for name in ("models/all-minilm-l6-v2/model.onnx", "venv/pyvenv.cfg"):
        assert (place.release(ID) / name).samefile(place.release(OTHER) / name)


def test_a_release_survives_its_artifact_its_siblings_and_the_cache(place: Place) -> None:
    stage(place)
    stage(place, OTHER)
    for directory in (place.artifact, place.cache, place.release(ID)):
        subprocess.run(["rm", "-r", directory], check=True)
    check = ["sha256sum", "--check", "--quiet", "manifest.sha256"]
    subprocess.run(check, cwd=place.release(OTHER), check=True)
    subprocess.run([place.release(OTHER) / "venv/bin/python", "-c", "import ragrack, library"], check=True)


def test_the_same_release_again_changes_nothing(place: Place) -> None:
    stage(place)
    before = place.snapshot()
    assert stage(place)["changed"] is False
    assert place.snapshot() == before


def test_the_cache_may_be_on_another_file_system(place: Place, small_disk: Path) -> None:
    assert stage(place, cache_dir=str(small_disk))["changed"]
    assert stage(place, OTHER, cache_dir=str(small_disk))["env_built"] is False
    subprocess.run(["sha256sum", "--check", "--quiet", "manifest.sha256"], cwd=place.release(OTHER), check=True)


def spoil_model(place: Place) -> None:
    (place.artifact / "models/all-minilm-l6-v2/model.onnx").write_bytes(b"weighty" * 1000)


def shorten_app(place: Place) -> None:
    [app] = (place.artifact / "app").iterdir()
    app.write_bytes(app.read_bytes()[:-7])


def lose_wheel(place: Place) -> None:
    [wheel] = (place.artifact / "wheels").iterdir()
    wheel.unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_model, "models/all-minilm-l6-v2/model.onnx has SHA-256 "),
        (shorten_app, "app/ragrack-0.1.0-py3-none-any.whl has "),
        (lose_wheel, "wheels/library-1.0-py3-none-any.whl is missing"),
    ],
)
def test_a_file_that_is_not_what_was_built_is_named(place: Place, spoil: Any, words: str) -> None:
    spoil(place)
    assert words in refused(place)
    with pytest.raises(StateError):
        stage(place, check=True)


def test_a_manifest_that_nobody_trusted_has_signed_is_refused(place: Place) -> None:
    for signature in ("", "no signature", place.signature.read_text().replace("U1NIU0lH", "U1NIU0lI")):
        assert "is not signed by a key that" in refused(place, signature=signature)
    place.sign("a_strangers_key")
    assert "name the key in release_signers" in refused(place)


def test_a_manifest_that_was_changed_since_is_refused(place: Place) -> None:
    manifest = place.artifact / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"0.1.0"', '"0.1.1"'))
    assert "is not signed by a key that" in refused(place, version="0.1.1")


def test_a_host_that_trusts_nobody_says_so(place: Place) -> None:
    assert "signers: there is no" in refused(place, signers="/nowhere/allowed_signers")


def test_a_wheel_that_was_slipped_in_is_refused(place: Place) -> None:
    (place.artifact / "app/ragrack-0.1.0-1-py3-none-any.whl").write_bytes(b"")
    assert "app/ragrack-0.1.0-1-py3-none-any.whl is in no manifest" in refused(place)


def test_a_manifest_that_is_none_is_refused(place: Place) -> None:
    (place.artifact / "manifest.json").write_text("{}")
    place.sign()
    assert "manifest.json is not a manifest (KeyError: 'files')" in refused(place)


def test_a_manifest_that_points_outside_is_refused(place: Place) -> None:
    place.write_manifest(files={"../../etc/passwd": {"sha256": "0", "size": 1}})
    assert "names ../../etc/passwd, which is outside" in refused(place)


def test_an_artifact_for_other_hosts_is_refused(place: Place) -> None:
    place.write_manifest(pythons=["3.8"])
    assert "the artifact was built for 3.8; build it for" in refused(place)
    place.write_manifest(platform="s390x")
    assert "the artifact was built for s390x" in refused(place)
    place.write_manifest()
    assert "is 0.1.0, not 0.2.0" in refused(place, version="0.2.0")


def test_all_that_is_missing_is_said_in_one_go(place: Place) -> None:
    message = refused(
        place, uv="/nowhere/uv", python="/nowhere/python", group="nobodies", credentials_dir="/nowhere/credstore"
    )
    for word in ("uv: ", "python: ", "group: ", "credentials_dir: ", "Nothing was changed"):
        assert word in message


def test_a_host_without_room_is_refused_with_figures(place: Place) -> None:
    assert "MiB are to stay free (min_free_mb)" in refused(place, min_free_mb=10**9)


def test_check_mode_on_a_bare_host_says_that_it_would_stage(place: Place) -> None:
    subprocess.run(["rm", "-r", place.artifact], check=True)
    before = place.snapshot()
    answer = stage(place, check=True, uv="/nowhere/uv", group="nobodies")
    assert answer["changed"]
    assert (answer["diff"]["before"]["releases"], answer["diff"]["after"]["releases"]) == ([], [ID])
    assert place.snapshot() == before


def test_check_mode_predicts_what_staging_does(place: Place) -> None:
    before = place.snapshot()
    predicted = stage(place, check=True)
    assert place.snapshot() == before
    made = stage(place)
    assert (predicted["changed"], predicted["env_built"]) == (made["changed"], made["env_built"])
    assert predicted["diff"] == made["diff"]


def wrapped_uv(place: Place, before: str) -> str:
    """A uv that first does something to its host when it is to install."""
    program = place.path / "uv"
    program.write_text(f'#!/bin/sh\ncase "$*" in pip*) {before};; esac\nexec {UV} "$@"\n')
    program.chmod(0o755)
    return str(program)


def test_a_disk_that_fills_up_on_the_way_leaves_nothing(place: Place, small_disk: Path) -> None:
    """Real ENOSPC: somebody else fills the disk between the check and the installation."""
    uv = wrapped_uv(place, f"head -c 100M /dev/zero > {small_disk}/log")
    root, cache = small_disk / "root", small_disk / "cache"
    with pytest.raises(StateError, match=r"disk filled up while release .* nothing was changed"):
        stage(place, uv=uv, root=str(root), cache_dir=str(cache))
    assert [str(path) for path in small_disk.rglob("*") if ID in path.name or path.name.startswith(".")] == []
    assert list((cache / "envs").iterdir()) == []
    (small_disk / "log").unlink()
    assert stage(place, root=str(root), cache_dir=str(cache))["changed"]


def test_a_failed_installation_leaves_nothing_and_says_why(place: Place) -> None:
    lock = next(place.artifact.glob("requirements-*.txt"))
    lock.write_text(f"library==1.0 --hash=sha256:{'0' * 64}\n")
    place.write_manifest()
    with pytest.raises(StateError, match=r"`uv pip install|`uv .*failed with exit code") as caught:
        stage(place)
    assert any("ash" in line for line in caught.value.log), "uv's own words about the hash"
    assert list((place.root / "releases").iterdir()) == []
    assert list((place.cache / "envs").iterdir()) == []


@pytest.mark.parametrize("moment", ["--require-hashes", "ragrack==0.1.0"])
def test_killed_on_the_way_and_run_again(place: Place, moment: str) -> None:
    """kill -9 of the module while third-party packages, or the app, are installed."""
    uv = wrapped_uv(place, f'case "$*" in *{moment}*) kill -9 $PPID;; esac')
    child = os.fork()
    if child == 0:
        stage(place, uv=uv)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 9
    assert not place.release(ID).exists()
    assert stage(place)["changed"]
    assert [path.name for path in (place.root / "releases").iterdir() if path.name[0] != "."] == [ID]
    subprocess.run(["sha256sum", "--check", "--quiet", "manifest.sha256"], cwd=place.release(ID), check=True)
