#!/usr/bin/python
"""The certificate of a host: asked for, and put in place with its key."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ragrack_certificate
short_description: Ask for a host's certificate, or put it in place with its key
description:
  - With O(names), looks whether the host's certificate is good. Where it is not, a new key is made on the host, and a
    request for it returned; the certificate that is served stays.
  - Without, puts O(trusted) and, where it is given, O(certificate) in place, by one rename of both key and certificate.
options:
  path: {description: Directory of the realm., type: path, required: true}
  group: {description: Group that may read the key., type: str, required: true}
  names: {description: DNS names and addresses that it is for; the first is its common name., type: list, elements: str}
  authority: {description: Certificate of the CA that it has to be signed by., type: str}
  days: {description: Days that it has to be good for., type: int, default: 0}
  anew: {description: Make a new one though the present one is good., type: bool, default: false}
  trusted: {description: Certificates of the CAs that are trusted., type: str}
  system: {description: 'Put what the host itself trusts before them.', type: bool, default: false}
  certificate: {description: The certificate, and after it those between it and the root., type: str}
  key: {description: Its key; without it, the one that the request was made with., type: str}
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
- name: Ask for a certificate where a new one is needed
  ragrack_certificate:
    path: /etc/ragrack/tls/default
    group: ragrack-tls
    names: [rag.example.org]
    authority: "{{ ca.signing }}"
    days: 30
"""

RETURN = r"""
request: {description: The request; empty where the certificate is good., type: str, returned: always}
why: {description: Why a new certificate is needed; empty where it is good., type: str, returned: always}
"""

import grp
import os
import subprocess
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from ansible.module_utils.basic import AnsibleModule
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from module_utils.certificate_set import CertificateError, blocks, check, is_placed, place
else:
    from ansible.module_utils.certificate_set import CertificateError, blocks, check, is_placed, place


SYSTEM = Path("/etc/ssl/certs/ca-certificates.crt")


def general_name(name: str) -> x509.GeneralName:
    """A name or an address as a certificate has it."""
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the CA's key made the signature: two CAs may have one name."""
    public, digest = authority.public_key(), certificate.signature_hash_algorithm
    if not isinstance(public, ec.EllipticCurvePublicKey) or digest is None:
        return False
    try:
        public.verify(certificate.signature, certificate.tbs_certificate_bytes, ec.ECDSA(digest))
    except InvalidSignature:
        return False
    return True


def why_not_good(realm: Path, names: list[str], authority: str, days: int) -> str:
    """Why the certificate that a host has is not the one that it should have; empty where it is."""
    try:
        key, chain = (realm / "key.pem").read_text(), (realm / "fullchain.pem").read_text()
    except OSError:
        return "there is none"
    try:
        check(key, chain)
    except CertificateError as error:
        return str(error)
    if not is_placed(realm, key, chain):
        return "it was not put in place as one with its key"
    certificate = x509.load_pem_x509_certificate(blocks(chain)[0].encode())
    if not is_signed_by(certificate, x509.load_pem_x509_certificate(authority.encode())):
        return "another CA has signed it"
    try:
        covered = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        covered = x509.SubjectAlternativeName([])
    if set(covered) != set(map(general_name, names)):
        return "it is for other names"
    ends = ["openssl", "x509", "-noout", "-checkend", str(days * 86400)]
    if subprocess.run(ends, input=chain, text=True, capture_output=True, check=False).returncode:
        return f"it is good for less than {days} days"
    return ""


def request(path: Path, names: list[str]) -> str:
    """A request for a certificate (PEM), for a new key that is written to `path`."""
    key = ec.generate_private_key(ec.SECP256R1())
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign"),
        False,
    ) | {"encipher_only": False, "decipher_only": False}
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    asked = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])]))
        .add_extension(x509.SubjectAlternativeName([*map(general_name, names)]), critical=False)
        .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    return asked.public_bytes(serialization.Encoding.PEM).decode()


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "group": {"type": "str", "required": True},
            "names": {"type": "list", "elements": "str"},
            "authority": {"type": "str"},
            "days": {"type": "int", "default": 0},
            "anew": {"type": "bool", "default": False},
            "trusted": {"type": "str"},
            "system": {"type": "bool", "default": False},
            "certificate": {"type": "str"},
            "key": {"type": "str", "no_log": True},
        },
        required_together=[("names", "authority")],
        required_one_of=[("names", "trusted", "certificate")],
        supports_check_mode=True,
    )
    asked = module.params
    realm = Path(asked["path"])
    # Made for the request, and gone once its certificate is in place.
    fresh = realm / "key.next.pem"
    try:
        if asked["names"]:
            why = "it was asked for" if asked["anew"] else ""
            why = why or why_not_good(realm, asked["names"], asked["authority"], asked["days"])
            made = request(fresh, asked["names"]) if why and not module.check_mode else ""
            # Nothing that is served has changed yet.
            module.exit_json(changed=bool(why) and module.check_mode, why=why, request=made)
        changed = False
        if asked["trusted"] is not None:
            system = SYSTEM.read_text() if asked["system"] else ""
            changed = write(realm / "ca.pem", system + asked["trusted"], dry=module.check_mode)
        if asked["certificate"]:
            key, gid = asked["key"] or fresh.read_text(), grp.getgrnam(asked["group"]).gr_gid
            if module.check_mode:
                changed |= not is_placed(realm, key, asked["certificate"])
            else:
                changed |= place(realm, key, asked["certificate"], gid)
                fresh.unlink(missing_ok=True)
        module.exit_json(changed=changed, why="", request="")
    except (CertificateError, OSError) as error:
        module.fail_json(msg=f"{realm}: {error}")


def write(path: Path, text: str, *, dry: bool) -> bool:
    """Replace a file as a whole; whether it was another."""
    if path.is_file() and path.read_text() == text:
        return False
    if not dry:
        aside = path.with_name(f".{path.name}.part")
        aside.write_text(text)
        aside.chmod(0o644)
        with aside.open() as file:
            os.fsync(file.fileno())
        aside.replace(path)
    return True


if __name__ == "__main__":
    main()
