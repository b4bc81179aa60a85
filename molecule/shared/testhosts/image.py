"""Root file systems: one tarball per suite, made by mmdebstrap from the mirror that this machine's apt uses."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from testhosts.shell import HostsError, locked, run

SUITES = ("bookworm", "trixie")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
PIP_CONF = Path("/etc/pip.conf")
MAX_AGE_S = 14 * 86400

# What is on a Debian server after its installer has run and that a deployment builds on. python3-apt is among the
# installer's "standard system utilities", and Ansible's check mode cannot do without it. Roles install the rest.
PACKAGES = (
    "ca-certificates",
    "dbus",
    "iproute2",
    "iputils-ping",
    "logrotate",
    "netbase",
    "openssh-server",
    "procps",
    "python3",
    "python3-apt",
    "sudo",
    "systemd",
    "systemd-resolved",
    "systemd-sysv",
)


@dataclass(frozen=True)
class Mirrors:
    """Where Debian's archive and its security updates are fetched from."""

    archive: str = "http://deb.debian.org/debian"
    security: str = "http://deb.debian.org/debian-security"


def read_mirrors(index_targets: str) -> Mirrors:
    """Pick Debian's own mirrors out of ``uri|release|component|origin`` lines; third parties' lists never match."""
    found = asdict(Mirrors())
    for line in index_targets.splitlines():
        uri, release, component, origin = line.split("|")
        uri = _resolve_mirror_list(uri)
        # Without downloaded lists apt knows no origin and leaves the placeholder.
        if (
            component != "main"
            or origin not in ("Debian", "", "$(ORIGIN)")
            or not uri.startswith(("http://", "https://"))
        ):
            continue
        if release in SUITES:
            found["archive"] = uri.rstrip("/")
        elif release.removesuffix("-security") in SUITES:
            found["security"] = uri.rstrip("/")
    return Mirrors(**found)


def _resolve_mirror_list(uri: str) -> str:
    """Debian's cloud images name a file of mirrors instead of a mirror."""
    if not uri.startswith("mirror+file:"):
        return uri
    mirrors = Path(uri.removeprefix("mirror+file:").rstrip("/"))
    lines = mirrors.read_text().split() if mirrors.is_file() else []
    return next((line for line in lines if line.startswith("http")), "")


def read_apt_settings(config_dump: str) -> list[str]:
    """Keep the settings without which this machine's mirror cannot be used (proxy, CA, expired snapshots)."""
    keep = ("Acquire::http", "Acquire::https", "Acquire::Check-Valid-Until", "Acquire::Check-Date", "Acquire::Retries")
    settings = []
    for line in config_dump.splitlines():
        name, _, value = line.partition(" ")
        # A proxy on this machine's loopback is out of a host's reach.
        if name.startswith(keep) and value != '"";' and "//localhost" not in value and "//127." not in value:
            settings.append(f'{name} "{CA_BUNDLE}";' if name.lower().endswith("::cainfo") else line)
    return settings


def sources(suite: str, mirrors: Mirrors) -> str:
    """Apt's sources of a host, as the Debian installer would write them."""
    entries = ((mirrors.archive, f"{suite} {suite}-updates"), (mirrors.security, f"{suite}-security"))
    return "\n".join(
        f"Types: deb\nURIs: {uri}\nSuites: {suites}\nComponents: main\nSigned-By: {KEYRING}\n"
        for uri, suites in entries
    )


def ensure(suite: str, cache: Path, say: Callable[[str], None]) -> Path:
    """Return the suite's tarball, made now unless a fresh one of the same recipe is in the cache."""
    if (
        not KEYRING.with_name(f"debian-archive-{suite}-automatic.gpg").exists()
        and not KEYRING.with_name(f"debian-archive-{suite}-automatic.pgp").exists()
    ):
        raise HostsError(
            f"{KEYRING.parent} has no key of Debian {suite}, so its packages cannot be verified: "
            "apt-get update && apt-get install debian-archive-keyring"
        )
    mirrors = read_mirrors(run("apt-get", "indextargets", "--format", "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)"))
    settings = read_apt_settings(run("apt-config", "dump"))
    recipe = json.dumps(
        [
            *[suite, PACKAGES, asdict(mirrors), settings],
            *[hashlib.sha256(p.read_bytes()).hexdigest() for p in (CA_BUNDLE, PIP_CONF, Path(__file__)) if p.exists()],
        ]
    )
    tarball = cache / f"{suite}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.tar"
    with locked(cache / f"{suite}.lock"):
        if not tarball.exists() or time.time() - tarball.stat().st_mtime > MAX_AGE_S:
            say(f"Debian {suite}: make the image from {mirrors.archive} (about half a minute, then kept in {cache})")
            _build(suite, mirrors, settings, tarball)
    return tarball


def _build(suite: str, mirrors: Mirrors, settings: list[str], tarball: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{suite}-", dir=tarball.parent) as scratch:
        work = Path(scratch)
        aside = work / "image.tar"
        (work / "debian.sources").write_text(sources(suite, mirrors))
        (work / "apt.conf").write_text("".join(f"{line}\n" for line in settings))
        files = work / "files"
        _site_files(files)
        run(
            *["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}"],
            *[f"--keyring={KEYRING}", f"--aptopt={work / 'apt.conf'}"],
            # A host has package lists from the day it was installed; in check mode Ansible's apt reads those.
            "--skip=cleanup/apt/lists",
            f"--customize-hook=sync-in {files} /",
            '--customize-hook=cd "$1"/etc/apt/sources.list.d && mv *debian.sources debian.sources',
            '--customize-hook=chroot "$1" update-ca-certificates',
            '--customize-hook=chroot "$1" systemctl enable systemd-networkd systemd-resolved ssh',
            # Each host gets keys of its own.
            '--customize-hook=rm -f "$1"/etc/ssh/ssh_host_*',
            *[suite, str(aside), str(work / "debian.sources")],
        )
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        aside.replace(tarball)
    for old in tarball.parent.glob(f"{suite}-*.tar"):
        if old != tarball:
            old.unlink()


def _site_files(root: Path) -> None:
    """Lay out what this machine needs to reach its site's servers (CAs, pip's configuration), and a locale."""
    authorities = root / "usr/local/share/ca-certificates"
    authorities.mkdir(parents=True)
    (root / "etc/default").mkdir(parents=True)
    (root / "etc/locale.conf").write_text("LANG=C.UTF-8\n")
    (root / "etc/default/locale").symlink_to("../locale.conf")  # as Debian 13 has it; Debian 12 reads only this one
    if CA_BUNDLE.exists():
        everybodys = {pem for crt in Path("/usr/share/ca-certificates").rglob("*.crt") for pem in _certificates(crt)}
        for number, pem in enumerate(pem for pem in _certificates(CA_BUNDLE) if pem not in everybodys):
            (authorities / f"control-{number:03}.crt").write_text(pem)
    if PIP_CONF.exists():
        shutil.copy(PIP_CONF, root / "etc/pip.conf")


def _certificates(bundle: Path) -> list[str]:
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----\n"
    return [begin + part.partition(end)[0] + end for part in bundle.read_text().split(begin)[1:]]
