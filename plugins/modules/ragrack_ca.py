#!/usr/bin/python
"""An internal CA on the control node, and its way to a new key."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ragrack_ca
short_description: Make a CA, or take it a step towards a new key
description:
  - C(ca.key) is the key that signs, C(ca.pem) all that is trusted, the certificate of that key among them. While the CA
    changes, C(ca.pem) holds two certificates; before the change of key, the new one is in C(ca.next.key).
  - Each step is one rename, and can be run again.
options:
  path: {description: Directory of the CA on the control node., type: path, required: true}
  name: {description: Name that a new CA's certificate carries., type: str, required: true}
  days: {description: Days that a new CA is valid., type: int, required: true}
  step:
    description:
      - V(present) makes the CA where there is none. V(next) makes a second one that is trusted, too,
        and signs nothing yet.
      - V(switch) lets it sign instead of the first. V(finish) ends the trust in the first.
    type: str
    choices: [present, next, switch, finish]
    default: present
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
- name: Make or reuse the CA
  ragrack_ca:
    path: inventories/production/pki
    name: ragrack internal CA
    days: 3650
  delegate_to: localhost
"""

RETURN = r"""
signing: {description: Certificate of the key that signs; empty where none was made., type: str, returned: always}
pending: {description: Whether there is a second CA that does not sign yet., type: bool, returned: always}
trusted: {description: All certificates that are trusted., type: str, returned: always}
"""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class CaError(Exception):
    """Why a step cannot be taken, in words."""


class Ca:
    """The files of a CA. Every method may be called again after a run that died."""

    def __init__(self, path: Path, name: str, days: int, *, dry: bool = False) -> None:
        self.path, self.name, self.days, self.dry = path, name, days, dry
        self.key, self.next, self.trust = path / "ca.key", path / "ca.next.key", path / "ca.pem"
        self.changed = False

    def trusted(self) -> list[x509.Certificate]:
        if not self.trust.exists():
            return []
        try:
            return x509.load_pem_x509_certificates(self.trust.read_bytes())
        except ValueError as error:
            raise CaError(f"{self.trust} cannot be read ({error}). Mend: put it back from your copy") from error

    def certificate(self, key: Path) -> x509.Certificate | None:
        """The trusted certificate of a key; None where there is none yet."""
        public = _load(key).public_key()
        return next((one for one in self.trusted() if one.public_key() == public), None)

    def signing(self) -> x509.Certificate | None:
        """The certificate of the key that signs; None where there is no CA yet."""
        return self.certificate(self.key) if self.key.exists() else None

    def present(self) -> None:
        if self.trust.exists():
            if not self.key.exists():
                raise CaError(
                    f"{self.trust} is there and {self.key} is not. Mend: put the key back from your copy of it"
                )
            if self.signing() is None:
                raise CaError(
                    f"{self.key} is not the key of a certificate in {self.trust}. Mend: put both back from your copy"
                )
            return
        self.changed = True
        if self.dry:
            return
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._make(self.key)

    def take_next(self) -> None:
        self.present()
        if len(self.trusted()) > 1 and not self.next.exists():
            return  # That one signs already.
        if self.next.exists() and self.certificate(self.next) is not None:
            return
        self.changed = True
        if not self.dry:
            self._make(self.next)

    def switch(self) -> None:
        if not self.next.exists():
            return
        if self.certificate(self.next) is None:
            raise CaError(f"nobody trusts {self.next} yet. Mend: run the step before (ca=trust)")
        self.changed = True
        if not self.dry:
            self.next.replace(self.key)

    def finish(self) -> None:
        if self.next.exists():
            raise CaError(f"{self.next} does not sign yet, so what is old is still needed. Mend: run ca=next first")
        self.present()
        signing = self.signing()
        if signing is None or self.trusted() == [signing]:
            return
        self.changed = True
        if not self.dry:
            _write(self.trust, _pem([signing]), 0o644)

    def _make(self, path: Path) -> None:
        if not path.exists():
            made = ec.generate_private_key(ec.SECP256R1())
            plain = serialization.NoEncryption()
            pem = made.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
            _write(path, pem.decode(), 0o600)
        key = _load(path)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        begin = datetime.now(UTC) - timedelta(minutes=5)
        usage = dict.fromkeys(
            ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
        ) | {"encipher_only": False, "decipher_only": False}
        certificate = (
            x509.CertificateBuilder(subject, subject, key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + timedelta(days=self.days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        _write(self.trust, _pem([*self.trusted(), certificate]), 0o644)


def _load(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        # A new CA in its place would leave every client without trust.
        raise CaError(f"{path} cannot be read ({error}). Mend: put it back from your copy") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CaError(f"{path} is no key of an elliptic curve. Mend: put it back from your copy")
    return key


def _pem(certificates: list[x509.Certificate]) -> str:
    return "".join(one.public_bytes(serialization.Encoding.PEM).decode() for one in certificates)


def _write(path: Path, text: str, mode: int) -> None:
    aside = path.with_name(f".{path.name}.part")
    aside.unlink(missing_ok=True)
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        os.fchmod(file.fileno(), mode)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "name": {"type": "str", "required": True},
            "days": {"type": "int", "required": True},
            "step": {"type": "str", "choices": ["present", "next", "switch", "finish"], "default": "present"},
        },
        supports_check_mode=True,
    )
    asked = module.params
    ca = Ca(Path(asked["path"]), asked["name"], asked["days"], dry=module.check_mode)
    try:
        {"present": ca.present, "next": ca.take_next, "switch": ca.switch, "finish": ca.finish}[asked["step"]]()
        signing = ca.signing()
        pending = ca.next.exists() or (ca.changed and asked["step"] == "next")
        module.exit_json(
            changed=ca.changed, pending=pending, signing=_pem([signing] if signing else []), trusted=_pem(ca.trusted())
        )
    except (CaError, OSError) as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
