"""A CA's files, and each step of its way to a new key, from wherever the run before it died."""

from __future__ import annotations

from pathlib import Path

import pytest
from modules.ragrack_ca import Ca, CaError


@pytest.fixture
def ca(tmp_path: Path) -> Ca:
    made = Ca(tmp_path / "pki", "a test", 30)
    made.present()
    return made


def again(ca: Ca, *, dry: bool = False) -> Ca:
    return Ca(ca.path, ca.name, ca.days, dry=dry)


def test_it_is_made_once(ca: Ca) -> None:
    assert ca.changed
    assert (ca.key.stat().st_mode & 0o777, ca.path.stat().st_mode & 0o777) == (0o600, 0o700)
    later = again(ca)
    later.present()
    assert not later.changed
    assert later.signing() == ca.signing()


def test_a_key_without_a_certificate_gets_one(ca: Ca) -> None:
    key = ca.key.read_bytes()
    ca.trust.unlink()
    again(ca).present()
    assert ca.key.read_bytes() == key
    assert ca.signing() is not None


def test_check_mode_makes_nothing(tmp_path: Path, ca: Ca) -> None:
    bare = Ca(tmp_path / "none", "a test", 30, dry=True)
    bare.present()
    assert bare.changed
    assert not bare.path.exists()
    dry = again(ca, dry=True)
    dry.take_next()
    assert dry.changed
    assert not ca.next.exists()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("ca.key", None, "put the key back"),
        ("ca.key", b"nonsense", "cannot be read"),
        ("ca.pem", b"nonsense", "cannot be read"),
    ],
)
def test_what_is_lost_or_broken_is_never_made_anew(ca: Ca, file: str, content: bytes | None, said: str) -> None:
    path = ca.path / file
    path.unlink()
    if content:
        path.write_bytes(content)
    with pytest.raises(CaError, match=said):
        again(ca).present()


def test_a_key_of_another_ca_is_refused(tmp_path: Path, ca: Ca) -> None:
    other = Ca(tmp_path / "other", "a test", 30)
    other.present()
    ca.key.write_bytes(other.key.read_bytes())
    with pytest.raises(CaError, match="is not the key"):
        again(ca).present()


def test_a_new_one_is_trusted_then_signs_then_is_alone(ca: Ca) -> None:
    old = ca.signing()
    for _ in range(2):
        again(ca).take_next()
        assert len(ca.trusted()) == 2
        assert ca.signing() == old
    with pytest.raises(CaError, match="ca=next"):
        again(ca).finish()
    for _ in range(2):
        again(ca).switch()
        assert old in ca.trusted()
        assert ca.signing() not in (old, None)
    new = ca.signing()
    again(ca).take_next()
    assert not ca.next.exists(), "one that signs already is not replaced by a third"
    for _ in range(2):
        again(ca).finish()
        assert ca.trusted() == [new]


def test_a_run_that_died_with_the_new_key_alone_goes_on(ca: Ca) -> None:
    old = ca.trust.read_bytes()
    again(ca).take_next()
    key = ca.next.read_bytes()
    ca.trust.write_bytes(old)
    with pytest.raises(CaError, match="nobody trusts"):
        again(ca).switch()
    again(ca).take_next()
    assert ca.next.read_bytes() == key
    assert len(ca.trusted()) == 2


def test_what_did_not_begin_cannot_be_switched_or_finished(ca: Ca) -> None:
    before = ca.trust.read_bytes(), ca.key.read_bytes()
    for step in (again(ca).switch, again(ca).finish):
        step()
    assert (ca.trust.read_bytes(), ca.key.read_bytes()) == before
