"""Keys take effect when their file changes, and nothing that is wrong with the file lets anyone in."""

from __future__ import annotations

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from ragrack.auth import (
    THE_GATE,
    ApiKey,
    Authenticator,
    Identity,
    KeysError,
    add_key,
    hash_key,
    new_key,
    read_keys,
    revoke_key,
    write_gate_key,
)
from ragrack.snapshot import write_file


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "api-keys.json"


@pytest.fixture
def authenticator(keys_file: Path, tmp_path: Path) -> Authenticator:
    return Authenticator(keys_file, tmp_path / "gate.key")


def write(path: Path, *entries: dict[str, Any]) -> None:
    write_file(path, json.dumps({"keys": entries}).encode())


def entry(name: str, key: str, **more: object) -> dict[str, object]:
    return {"name": name, "sha256": hash_key(key), **more}


def test_a_key_is_valid_from_the_moment_it_is_added_until_it_is_taken_out(
    authenticator: Authenticator, keys_file: Path
) -> None:
    assert authenticator.identify("k1") is None
    write(keys_file, entry("one", "k1"))
    assert authenticator.identify("k1") == Identity("one")
    write(keys_file, entry("one", "k1"), entry("two", "k2"))
    assert authenticator.identify("k2") == Identity("two")
    write(keys_file, entry("two", "k2"))
    assert authenticator.identify("k1") is None
    keys_file.unlink()
    assert authenticator.identify("k2") is None


@pytest.mark.parametrize("expires", ["2020-01-01", "2020-01-01T00:00:00+02:00"])
def test_an_expired_key_is_no_key(authenticator: Authenticator, keys_file: Path, expires: str) -> None:
    write(keys_file, entry("old", "k1", expires=expires), entry("new", "k2", expires="2999-01-01"))
    assert authenticator.identify("k1") is None
    assert authenticator.identify("k2") == Identity("new")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "JSON"),
        ("[]", "the file"),
        ('{"keys": [{"name": "a", "sha256": "abc"}]}', "keys.0.sha256"),
        ('{"keys": [{"name": "a b", "sha256": "%s"}]}' % ("0" * 64), "keys.0.name"),
        ('{"keys": [{"name": "a", "sha256": "%s", "expires": "soon"}]}' % ("0" * 64), "keys.0.expires"),
        ('{"keys": [{"name": "a", "sha256": "%s", "role": "x"}]}' % ("0" * 64), "keys.0.role"),
        ('{"keys": [{"name": "gate", "sha256": "%s"}]}' % ("0" * 64), "gate"),
        (json.dumps({"keys": [{"name": "a", "sha256": "0" * 64}, {"name": "a", "sha256": "1" * 64}]}), "twice"),
    ],
)
def test_a_damaged_file_is_refused_and_the_keys_stay_as_they_were(
    authenticator: Authenticator, keys_file: Path, text: str, complaint: str
) -> None:
    write(keys_file, entry("one", "k1"))
    assert authenticator.identify("k1") == Identity("one")
    write_file(keys_file, text.encode())
    assert authenticator.identify("k1") == Identity("one")
    with pytest.raises(KeysError, match=complaint):
        read_keys(keys_file)


def test_the_gates_key_works_without_a_keys_file_and_is_private(authenticator: Authenticator, tmp_path: Path) -> None:
    path = tmp_path / "gate.key"
    write_gate_key(path)
    first = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert authenticator.identify(first) == THE_GATE
    write_gate_key(path)
    assert authenticator.identify(first) is None
    assert authenticator.identify(path.read_text()) == THE_GATE
    assert list(tmp_path.iterdir()) == [path]


def test_a_key_brings_its_tenant_and_its_roles(authenticator: Authenticator, keys_file: Path) -> None:
    write(keys_file, entry("one", "k1", tenant="acme", roles=["ingester", "reader"]), entry("two", "k2"))
    assert authenticator.identify("k1") == Identity("one", "acme", frozenset({"reader", "ingester"}))
    assert authenticator.identify("k2") == Identity("two", None, frozenset({"reader"}))


@pytest.mark.parametrize(
    "more",
    [{"tenant": "../a"}, {"tenant": ""}, {"tenant": "a\n"}, {"tenant": 7}, {"roles": []}, {"roles": ["root"]}],
)
def test_a_tenant_or_role_that_is_none_is_refused(keys_file: Path, more: dict[str, Any]) -> None:
    write(keys_file, entry("one", "k1", **more))
    with pytest.raises(KeysError, match=rf"keys\.0\.{next(iter(more))}"):
        read_keys(keys_file)


def test_a_revoked_key_is_refused_at_once_and_keeps_its_name_its_file_its_mode(
    authenticator: Authenticator, keys_file: Path
) -> None:
    write(keys_file, entry("one", "k1"), entry("two", "k2"))
    keys_file.chmod(0o640)
    assert authenticator.identify("k1") == Identity("one")
    moment = datetime.now(UTC)
    revoke_key(keys_file, "one", moment)
    assert authenticator.identify("k1") is None
    assert authenticator.identify("k2") == Identity("two")
    assert stat.S_IMODE(keys_file.stat().st_mode) == 0o640
    # Again: it was revoked when it was.
    assert revoke_key(keys_file, "one", datetime.now(UTC) + timedelta(days=1)).revoked == moment
    with pytest.raises(KeysError, match="one is taken"):
        add_key(keys_file, ApiKey(name="one", sha256=hash_key("k3")))
    with pytest.raises(KeysError, match=r"no key three.*one, two"):
        revoke_key(keys_file, "three", moment)


def test_of_many_who_change_the_file_at_once_none_undoes_anothers(keys_file: Path) -> None:
    names = [f"key-{number}" for number in range(24)]

    def make_and_revoke(name: str) -> None:
        add_key(keys_file, ApiKey(name=name, sha256=hash_key(name)))
        revoke_key(keys_file, name, datetime.now(UTC))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make_and_revoke, names))
    keys = read_keys(keys_file)
    assert {key.name for key in keys} == set(names)
    assert all(key.revoked for key in keys)


def test_add_key_keeps_the_others_and_refuses_a_name_that_is_taken(keys_file: Path) -> None:
    first, second = new_key(), new_key()
    add_key(keys_file, ApiKey(name="one", sha256=hash_key(first)))
    add_key(keys_file, ApiKey(name="two", sha256=hash_key(second)))
    before = keys_file.read_text()
    for name in ("one", "gate"):
        with pytest.raises(KeysError, match=name):
            add_key(keys_file, ApiKey(name=name, sha256=hash_key(new_key())))
    assert keys_file.read_text() == before
    assert [key.name for key in read_keys(keys_file)] == ["one", "two"]
    assert first not in before
