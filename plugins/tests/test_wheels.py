"""Wheels are what their hashes say, or the error says what is wrong and how to mend it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from module_utils import wheels

SIX = "six==1.17.0 --hash=sha256:4721f391ed90541fddacab5acf947aa0d3dc7d27b2e1e8eda2be8970586c3274\n"


def test_a_wheel_is_fetched_once(tmp_path: Path) -> None:
    [wheel], fetched = wheels.download(SIX, "3.13", "aarch64", tmp_path)
    assert (wheel.name, fetched) == ("six-1.17.0-py2.py3-none-any.whl", True)
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in SIX
    assert wheels.download(SIX, "3.13", "aarch64", tmp_path) == ([wheel], False)


def test_a_wheel_that_was_tampered_with_is_fetched_again(tmp_path: Path) -> None:
    [wheel], _ = wheels.download(SIX, "3.13", "x86_64", tmp_path)
    good = wheel.read_bytes()
    wheel.write_bytes(good + b"more")
    assert wheels.download(SIX, "3.13", "x86_64", tmp_path) == ([wheel], True)
    assert wheel.read_bytes() == good


def test_a_package_without_a_wheel_is_refused_with_the_mend(tmp_path: Path) -> None:
    source_only = "docopt==0.6.2 --hash=sha256:49b3a825280bd66b3aa83585ef59c4a8c82f2c8a522dbe754a8bc8d08c85c491\n"
    with pytest.raises(wheels.WheelError) as refusal:
        wheels.download(source_only, "3.13", "x86_64", tmp_path)
    said = str(refusal.value)
    assert "A wheel for Python 3.13 on x86_64 is missing" in said
    assert "docopt" in said
    assert "Mend: " in said


def test_a_wheel_with_other_bytes_is_refused(tmp_path: Path) -> None:
    wrong = f"six==1.17.0 --hash=sha256:{'0' * 64}\n"
    with pytest.raises(wheels.WheelError, match="HASHES"):
        wheels.download(wrong, "3.13", "x86_64", tmp_path)
