"""What an operator's commands read of the release: credentials that systemd-creds has sealed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from ragrack.command import RefusedError, unsealed

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="systemd-creds keeps the host's key where root alone reads it"
)


@pytest.fixture
def sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of credentials with one, as a deploy leaves it."""
    monkeypatch.setenv("SYSTEMD_CREDENTIAL_SECRET", str(tmp_path / "credential.secret"))
    directory = tmp_path / "credentials"
    directory.mkdir()
    path = str(directory / "postgres_password")
    asked = ["systemd-creds", "encrypt", "--with-key=host", "--name=credentials_postgres_password", "-", path]
    subprocess.run(asked, input=b"a password\n", check=True)
    return directory


def test_root_reads_what_is_sealed(sealed: Path) -> None:
    assert unsealed(sealed) == {"postgres_password": "a password"}


def test_one_that_this_host_cannot_open_is_refused_in_words(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYSTEMD_CREDENTIAL_SECRET", str(sealed.parent / "another.secret"))
    with pytest.raises(RefusedError, match=r"postgres_password cannot be opened on this host .*Mend: deploy again"):
        unsealed(sealed)


def test_a_release_without_credentials_has_none(tmp_path: Path) -> None:
    assert unsealed(tmp_path / "none") == {}
