"""Which mirror and settings of this machine's apt reach the hosts."""

from pathlib import Path

import pytest
from testhosts import image
from testhosts.image import Mirrors, read_apt_settings, read_mirrors
from testhosts.shell import HostsError

DEBIAN = """\
http://mirror.example/debian/|bookworm|main|Debian
http://mirror.example/debian/|bookworm-updates|main|Debian
https://mirror.example/security/|bookworm-security|main|Debian
"""


def test_the_mirrors_are_those_of_this_machine() -> None:
    assert read_mirrors(DEBIAN) == Mirrors("http://mirror.example/debian", "https://mirror.example/security")


@pytest.mark.parametrize(
    "line",
    [
        "https://apt.example.com/|bookworm|main|Example Corp",  # a third party that calls its suite as Debian does
        "https://download.docker.com/linux/debian/|bookworm|stable|Docker",
        "https://apt.postgresql.org/pub/repos/apt/|bookworm-pgdg|main|apt.postgresql.org",
        "https://packages.cloud.google.com/apt/|cloud-sdk-bookworm|main|cloud-sdk-bookworm",
        "cdrom:[Debian GNU/Linux 12]/|bookworm|main|Debian",  # out of a host's reach
        "file:/srv/mirror/debian/|bookworm|main|Debian",
    ],
)
def test_no_other_archive_takes_the_place_of_debian(line: str) -> None:
    assert read_mirrors(DEBIAN + line + "\n") == read_mirrors(DEBIAN)
    assert read_mirrors(line + "\n") == Mirrors()


def test_the_mirrors_are_known_before_the_first_apt_update() -> None:
    assert (
        read_mirrors("http://mirror.example/debian/|trixie|main|$(ORIGIN)\n").archive == "http://mirror.example/debian"
    )


def test_a_file_of_mirrors_stands_for_its_first(tmp_path: Path) -> None:
    mirrors = tmp_path / "debian.list"
    mirrors.write_text("https://deb.example/debian\nhttps://other.example/debian\n")
    assert read_mirrors(f"mirror+file:{mirrors}/|bookworm|main|Debian\n").archive == "https://deb.example/debian"


def test_settings_that_the_mirror_needs_are_kept_and_no_others() -> None:
    dump = """\
APT "";
Acquire "";
Acquire::Check-Valid-Until "false";
Acquire::http "";
Acquire::http::Proxy "http://proxy.example:3128";
Acquire::https::CAInfo "/etc/site/ca.pem";
Acquire::https::Proxy "http://127.0.0.1:3142";
DPkg::Post-Invoke:: "rm -rf /var/cache/apt";
"""
    assert read_apt_settings(dump) == [
        'Acquire::Check-Valid-Until "false";',
        'Acquire::http::Proxy "http://proxy.example:3128";',
        f'Acquire::https::CAInfo "{image.CA_BUNDLE}";',  # the hosts trust this machine's CAs by their own bundle
    ]


@pytest.mark.parametrize("suite", image.SUITES)
def test_every_source_of_a_host_is_verified(suite: str) -> None:
    entries = image.sources(suite, Mirrors("http://a", "http://s")).split("\n\n")
    assert [entry.splitlines()[1:3] for entry in entries] == [
        ["URIs: http://a", f"Suites: {suite} {suite}-updates"],
        ["URIs: http://s", f"Suites: {suite}-security"],
    ]
    assert all(f"Signed-By: {image.KEYRING}" in entry for entry in entries)


def test_a_suite_whose_keys_are_missing_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(image, "KEYRING", tmp_path / "debian-archive-keyring.gpg")
    with pytest.raises(HostsError, match=r"no key of Debian trixie.*apt-get install debian-archive-keyring"):
        image.ensure("trixie", tmp_path / "cache", print)
    assert not (tmp_path / "cache").exists()
