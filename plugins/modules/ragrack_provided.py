#!/usr/bin/python
"""A certificate that was made elsewhere, looked at on the control node before any host is touched."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ragrack_provided
short_description: Check a certificate that was made elsewhere
description:
  - Reads the certificate, its key and its CA, and finds all that is wrong with them in one go. Changes nothing.
options:
  certificate: {description: 'It and those between it and the root: PEM, or a path.', type: str, required: true}
  key: {description: 'Its key: PEM, or a path.', type: str, required: true}
  ca: {description: 'The root: PEM, or a path; empty for those that the system trusts.', type: str, default: ''}
  names: {description: DNS names and addresses that it has to cover., type: list, elements: str, required: true}
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
author: ragrack maintainers (@ragrack)
"""

EXAMPLES = r"""
- name: Check the certificate
  ragrack_provided:
    certificate: files/rag.pem
    key: "{{ vault_rag_key }}"
    names: [rag.example.org]
  delegate_to: localhost
"""

RETURN = r"""
certificate: {description: The certificate and those between it and the root., type: str, returned: success}
ca: {description: The root; empty where the system's are meant., type: str, returned: success}
"""

import subprocess
import tempfile
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from ansible.module_utils.basic import AnsibleModule

if TYPE_CHECKING:
    from module_utils.certificate_set import CertificateError, blocks, check
else:
    from ansible.module_utils.certificate_set import CertificateError, blocks, check


def text_of(variable: str, value: str) -> str:
    """The PEM that a variable holds or names the file of. Raises CertificateError."""
    if "-----BEGIN" in value:
        return value.rstrip() + "\n"
    if not value:
        raise CertificateError(f"{variable} is empty. Mend: give it PEM, or a path on the control node")
    try:
        text = Path(value).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CertificateError(f"{variable}: {value} cannot be read ({error}). Mend: give it PEM, or a path") from error
    if "-----BEGIN" not in text:
        raise CertificateError(f"{variable}: {value} holds no PEM. Mend: convert it, as by `openssl x509 -inform DER`")
    return text.rstrip() + "\n"


def problems(chain: str, key: str, ca: str, names: list[str]) -> list[str]:
    """What is wrong with a certificate for these names, a sentence each."""
    found = []
    try:
        check(key, chain)
    except CertificateError as error:
        found.append(f"tls_key, tls_certificate: {error}. Mend: give the key that the certificate was asked for with")
    if not blocks(chain):
        return found
    found += [
        f"tls_certificate does not cover {name}. Mend: take it out of tls_names, or have one made that does"
        for name in names
        if not _covers(blocks(chain)[0], name)
    ]
    if _openssl("x509", "-noout", "-checkend", "86400", text=blocks(chain)[0]).returncode:
        found.append("tls_certificate ends within a day, or has ended. Mend: have a new one made")
    elif said := _unverified(blocks(chain), ca):
        found.append(
            f"tls_certificate does not lead to {'tls_ca' if ca else 'a root that the system trusts'} ({said}). Mend: "
            "add the certificates between it and the root, leaf first; for a root of your own set tls_ca"
        )
    return found


def _covers(leaf: str, name: str) -> bool:
    try:
        ip_address(name)
        kind = "-checkip"
    except ValueError:
        kind = "-checkhost"
    # It says so in words and succeeds either way.
    return "does match" in _openssl("x509", "-noout", kind, name, text=leaf).stdout


def _unverified(chain: list[str], ca: str) -> str:
    with tempfile.TemporaryDirectory(prefix="ragrack-") as directory:
        between, root = Path(directory, "between.pem"), Path(directory, "root.pem")
        between.write_text("".join(chain[1:]))
        root.write_text(ca)
        trusted = ["-no-CApath", "-no-CAstore", "-CAfile", str(root)] if ca else []
        done = _openssl("verify", *trusted, *(["-untrusted", str(between)] if chain[1:] else []), text=chain[0])
    return " ".join(done.stderr.split()) if done.returncode else ""


def _openssl(*arguments: str, text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["openssl", *arguments], input=text, capture_output=True, text=True, check=False)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "certificate": {"type": "str", "required": True},
            "key": {"type": "str", "required": True, "no_log": True},
            "ca": {"type": "str", "default": ""},
            "names": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    asked = module.params
    found, read = [], {}
    for name in ("certificate", "key", "ca"):
        try:
            read[name] = text_of(f"tls_{name}", asked[name]) if name != "ca" or asked[name] else ""
        except CertificateError as error:
            found.append(str(error))
    found = found or problems(read["certificate"], read["key"], read["ca"], asked["names"])
    if found:
        module.fail_json(msg="Nothing was changed. " + ". ".join(found) + ".")
    # Ansible would blot out the key: who needs it reads it again.
    module.exit_json(changed=False, certificate=read["certificate"], ca=read["ca"])


if __name__ == "__main__":
    main()
