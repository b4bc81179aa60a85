"""A host's key and certificate: when a new one is needed, and that both change as one."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from module_utils.certificate_set import KEPT, CertificateError, is_placed, place
from modules.ragrack_ca import Ca
from modules.ragrack_certificate import request, why_not_good

NAMES = ["rag.example.org", "192.0.2.10", "2001:db8::1"]


class Pki:
    """A CA, a host's realm, and certificates for it."""

    def __init__(self, path: Path) -> None:
        self.path, self.realm = path, path / "realm"
        self.realm.mkdir(parents=True)
        self.ca = Ca(path / "pki", "a test", 90)
        self.ca.present()

    @property
    def authority(self) -> str:
        return self.ca.trust.read_text()

    def sign(self, names: list[str], days: int = 60) -> tuple[str, str]:
        """A new key and its certificate."""
        key = self.path / "key"
        asked = x509.load_pem_x509_csr(request(key, names).encode())
        signer = serialization.load_pem_private_key(self.ca.key.read_bytes(), None)
        issuer = self.ca.signing()
        assert issuer
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(
            issuer.subject, asked.subject, asked.public_key(), x509.random_serial_number()
        )
        builder = builder.not_valid_before(now).not_valid_after(now + timedelta(days=days))
        for extension in asked.extensions:
            builder = builder.add_extension(extension.value, extension.critical)
        signed = builder.sign(signer, hashes.SHA256())  # type: ignore[arg-type]
        return key.read_text(), signed.public_bytes(serialization.Encoding.PEM).decode()

    def place(self, names: list[str], days: int = 60) -> tuple[str, str]:
        made = self.sign(names, days)
        assert place(self.realm, *made, os.getgid())
        return made


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def test_what_is_good_stays(pki: Pki) -> None:
    assert why_not_good(pki.realm, NAMES, pki.authority, 30) == "there is none"
    key, chain = pki.place(NAMES)
    assert why_not_good(pki.realm, NAMES, pki.authority, 30) == ""
    assert not place(pki.realm, key, chain, os.getgid())


@pytest.mark.parametrize("names", [["other.example.org"], NAMES[:2], [*NAMES, "more.example.org"]])
def test_other_names_need_another(pki: Pki, names: list[str]) -> None:
    pki.place(names)
    assert why_not_good(pki.realm, NAMES, pki.authority, 30) == "it is for other names"


def test_one_that_ends_soon_needs_another(pki: Pki) -> None:
    pki.place(NAMES, days=29)
    assert "30 days" in why_not_good(pki.realm, NAMES, pki.authority, 30)


def test_one_of_another_ca_of_the_same_name_needs_another(pki: Pki) -> None:
    pki.place(NAMES)
    other = Pki(pki.path / "other")
    assert why_not_good(pki.realm, NAMES, other.authority, 30) == "another CA has signed it"


def test_a_key_that_does_not_fit_is_never_put_in_place(pki: Pki) -> None:
    key, chain = pki.place(NAMES)
    _, other = pki.sign(NAMES)
    with pytest.raises(CertificateError, match="does not fit"):
        place(pki.realm, key, other, os.getgid())
    assert is_placed(pki.realm, key, chain)


def test_files_that_are_no_set_become_one(pki: Pki) -> None:
    key, chain = pki.sign(NAMES)
    for name, text in {"key.pem": key, "cert.pem": chain, "fullchain.pem": chain}.items():
        (pki.realm / name).write_text(text)
    assert "as one" in why_not_good(pki.realm, NAMES, pki.authority, 30)
    assert place(pki.realm, key, chain, os.getgid())
    assert why_not_good(pki.realm, NAMES, pki.authority, 30) == ""


def test_the_key_is_above_what_is_public_and_not_for_others(pki: Pki) -> None:
    pki.place(NAMES)
    served = (pki.realm / "current/public").resolve()
    assert sorted(path.name for path in served.iterdir()) == ["cert.pem", "fullchain.pem"]
    assert (pki.realm / "key.pem").stat().st_mode & 0o777 == 0o640
    assert (pki.realm / "key.pem").resolve() == served.parent / "key.pem"


def test_the_set_before_stays_for_who_is_reading_it(pki: Pki) -> None:
    sets = []
    for number in range(KEPT + 2):
        pki.place([f"{number}.example.org"])
        sets.append((pki.realm / "current").resolve())
        os.utime(sets[-1], (number, number))
    assert [made.is_dir() for made in sets] == [False] * 2 + [True] * KEPT


def test_what_a_dead_run_left_is_no_hindrance(pki: Pki) -> None:
    key, chain = pki.place(NAMES)
    (pki.realm / "current").unlink()
    (pki.realm / f".current.{os.getpid()}").symlink_to("nowhere")
    assert place(pki.realm, key, chain, os.getgid())
    assert why_not_good(pki.realm, NAMES, pki.authority, 30) == ""
