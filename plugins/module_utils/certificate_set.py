"""A key and the certificate that fits it, put in place as one: services may read them at any moment.

They lie in `<realm>/sets/<id>/`, and `<realm>/current` is the link to the set that is served. The key is above
`public/`, so that whatever serves files from there could give away nothing. Also what certbot calls when it has a new
certificate: `python3 certificate_set.py REALM_DIRECTORY GROUP LINEAGE`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import ssl
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"-----BEGIN CERTIFICATE-----\n.+?-----END CERTIFICATE-----\n", re.DOTALL)
STABLE = {
    "key.pem": "current/key.pem",
    "cert.pem": "current/public/cert.pem",
    "fullchain.pem": "current/public/fullchain.pem",
}
# The one that is served, the one before it, which a handshake may be reading, and one to spare.
KEPT = 3


class CertificateError(Exception):
    """Why a key and a certificate cannot be put in place, in words."""


def blocks(text: str) -> list[str]:
    """The certificates in a text, each in PEM with its end of line."""
    return BLOCK.findall(text.replace("\r\n", "\n").rstrip("\n") + "\n")


def check(key: str, chain: str) -> None:
    """Raises CertificateError where the key does not fit the first certificate of the chain."""
    if not blocks(chain):
        raise CertificateError("there is no certificate in PEM")
    with tempfile.TemporaryDirectory(prefix="ragrack-") as directory:
        files = Path(directory, "chain.pem"), Path(directory, "key.pem")
        for path, text in zip(files, (chain, key), strict=True):
            path.touch(0o600)
            path.write_text(text)
        try:
            # A key with a passphrase would ask for it on a terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*files, password="")
        except (OSError, ValueError) as error:
            raise CertificateError(
                f"the key does not fit the certificate, or one of them cannot be read: {error}"
            ) from error


def name(key: str, chain: str) -> str:
    """The id of a set: what is the same is in place already."""
    return hashlib.sha256(f"{chain}\0{key}".encode()).hexdigest()[:16]


def is_placed(realm: Path, key: str, chain: str) -> bool:
    """Whether this set is the one that is served, by all of its names."""
    links = {realm / stable: target for stable, target in STABLE.items()} | {
        realm / "current": f"sets/{name(key, chain)}"
    }
    return all(path.is_symlink() and str(path.readlink()) == target and path.exists() for path, target in links.items())


def place(realm: Path, key: str, chain: str, gid: int) -> bool:
    """Put a key and its chain, leaf first, in place; whether that changed anything. Raises CertificateError."""
    check(key, chain)
    if is_placed(realm, key, chain):
        return False
    sets = realm / "sets"
    sets.mkdir(mode=0o755, exist_ok=True)
    made = sets / name(key, chain)
    if not made.is_dir():
        _write(made, key, chain, gid)
    _link(realm / "current", f"sets/{made.name}")
    for stable, target in STABLE.items():
        _link(realm / stable, target)
    os.utime(made)
    for old in sorted(sets.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
        shutil.rmtree(old)
    return True


def _write(made: Path, key: str, chain: str, gid: int) -> None:
    aside = made.with_name(f".{made.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "public").mkdir(parents=True)
    for directory in (aside, aside / "public"):
        directory.chmod(0o755)
    for path, text, mode, group in [
        (aside / "key.pem", key, 0o640, gid),
        (aside / "public/fullchain.pem", "".join(blocks(chain)), 0o644, 0),
        (aside / "public/cert.pem", blocks(chain)[0], 0o644, 0),
    ]:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            if os.geteuid() == 0:
                os.chown(file.fileno(), 0, group)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
    aside.rename(made)


def _link(path: Path, target: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def main() -> None:
    import grp

    realm, group, lineage = sys.argv[1:]
    files = Path(lineage)
    key, chain = (files / "privkey.pem").read_text(), (files / "fullchain.pem").read_text()
    if place(Path(realm), key, chain, grp.getgrnam(group).gr_gid):
        print(f"{realm} has a new certificate")


if __name__ == "__main__":
    main()
