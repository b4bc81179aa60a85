"""Credentials on a host: sealed by the real systemd-creds, whole or not at all, left alone where they are right."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from modules.ragrack_credentials import CredentialsError, Seal, in_clear, keep, seal_what_lies_in_clear

SEAL = Seal("host")
SECRET = "sk-a-secret-of-the-language-model"  # noqa: S105 - it opens nothing

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="systemd-creds keeps the host's key where root alone reads it"
)


@pytest.fixture(autouse=True)
def key_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYSTEMD_CREDENTIAL_SECRET", str(tmp_path_factory.mktemp("key") / "credential.secret"))


def test_what_is_kept_is_sealed_and_opens_to_the_value(tmp_path: Path) -> None:
    assert keep(tmp_path, "g1", {"llm_api_key": SECRET}, SEAL, check=False) == ["g1/llm_api_key"]
    path = tmp_path / "g1/llm_api_key"
    assert SECRET not in path.read_text()
    assert not in_clear(path)
    assert SEAL.open(path) == SECRET
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "g1").stat().st_mode & 0o777 == 0o700
    assert [one.name for one in tmp_path.iterdir()] == ["g1"]


def test_what_is_right_is_left_alone(tmp_path: Path) -> None:
    keep(tmp_path, "g1", {"llm_api_key": SECRET}, SEAL, check=False)
    before = (tmp_path / "g1/llm_api_key").read_bytes()
    assert keep(tmp_path, "g1", {"llm_api_key": SECRET}, SEAL, check=False) == []
    assert (tmp_path / "g1/llm_api_key").read_bytes() == before


def test_a_generation_without_credentials_is_an_empty_directory(tmp_path: Path) -> None:
    assert keep(tmp_path, "none", {}, SEAL, check=False) == ["none/"]
    assert keep(tmp_path, "none", {}, SEAL, check=False) == []


def test_check_mode_says_what_it_would_seal_and_writes_nothing(tmp_path: Path) -> None:
    assert keep(tmp_path / "store", "g1", {"llm_api_key": SECRET}, SEAL, check=True) == ["g1/llm_api_key"]
    assert not (tmp_path / "store").exists()


def test_what_lies_in_clear_is_sealed_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "old/llm_api_key"
    path.parent.mkdir()
    path.write_text(SECRET)
    assert seal_what_lies_in_clear(tmp_path, SEAL, check=True) == ["old/llm_api_key"]
    assert path.read_text() == SECRET
    assert seal_what_lies_in_clear(tmp_path, SEAL, check=False) == ["old/llm_api_key"]
    assert SEAL.open(path) == SECRET
    assert seal_what_lies_in_clear(tmp_path, SEAL, check=False) == []


def test_what_another_machine_sealed_is_sealed_anew_and_not_taken_for_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path / "store", "g1", {"llm_api_key": SECRET}, SEAL, check=False)
    monkeypatch.setenv("SYSTEMD_CREDENTIAL_SECRET", str(tmp_path / "another.secret"))
    assert seal_what_lies_in_clear(tmp_path / "store", SEAL, check=False) == []
    assert keep(tmp_path / "store", "g1", {"llm_api_key": SECRET}, SEAL, check=False) == ["g1/llm_api_key"]
    assert SEAL.open(tmp_path / "store/g1/llm_api_key") == SECRET


def test_a_sealed_value_is_bound_to_its_name(tmp_path: Path) -> None:
    keep(tmp_path, "g1", {"llm_api_key": SECRET}, SEAL, check=False)
    moved = (tmp_path / "g1/llm_api_key").rename(tmp_path / "g1/qdrant_api_key")
    assert SEAL.open(moved) is None


def test_a_name_that_is_gone_from_the_generation_goes(tmp_path: Path) -> None:
    keep(tmp_path, "g1", {"a": "1", "b": "2"}, SEAL, check=False)
    assert keep(tmp_path, "g1", {"a": "1"}, SEAL, check=False) == ["g1/"]
    assert [one.name for one in (tmp_path / "g1").iterdir()] == ["a"]


def test_a_host_without_systemd_creds_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(CredentialsError, match="Mend: use a host with systemd 250"):
        SEAL.close(tmp_path / "a", "1")
