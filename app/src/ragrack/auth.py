"""Who is asking: API keys by their SHA-256, and the gate's own key of this release's run.

The keys are random, 256 bits, so that a plain hash is as good as a slow one. The file holds no secret:

    {"keys": [{"name": "reports", "sha256": "<64 hex>", "expires": "2027-01-31", "tenant": "acme"}]}

A revoked key stays in it, with `revoked`, so that its name tells who it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from ragrack.snapshot import write_file

log = logging.getLogger(__name__)

GATE = "gate"

Role = Literal["reader", "ingester", "operator"]
"""reader asks, ingester writes documents, operator looks at the service itself; none holds another."""
ROLES: frozenset[Role] = frozenset(get_args(Role))
TENANT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


def _moment(value: Any) -> datetime | None:
    """ISO 8601, in UTC where it names no zone; a date alone means its start."""
    if value is None or isinstance(value, datetime):
        return value
    if not isinstance(value, str):
        raise ValueError("must be a text such as 2027-01-31")
    moment = datetime.fromisoformat(value)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class ApiKey(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    tenant: Annotated[str, StringConstraints(pattern=TENANT_PATTERN)] | None = None
    roles: Annotated[tuple[Role, ...], Field(min_length=1)] = ("reader",)
    expires: Annotated[datetime | None, BeforeValidator(_moment)] = None
    revoked: Annotated[datetime | None, BeforeValidator(_moment)] = None

    def state(self, now: datetime) -> Literal["active", "expired", "revoked"]:
        if self.revoked is not None and self.revoked <= now:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "active"


class ApiKeys(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    keys: tuple[ApiKey, ...] = ()


class KeysError(ValueError):
    """The keys file cannot be used; the message lists all that is wrong with it and shows no hash."""


@dataclass(frozen=True)
class Identity:
    """Who asks. No key or token brings `all_tenants`: it is the gate's, and everyone's where tenants are off."""

    name: str
    tenant: str | None = None
    roles: frozenset[Role] = frozenset({"reader"})
    all_tenants: bool = False


THE_GATE = Identity(GATE, roles=ROLES, all_tenants=True)


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    """A key to hand to its user once; only its hash is kept."""
    return f"rr_{secrets.token_urlsafe(32)}"


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Raises KeysError, FileNotFoundError included."""
    try:
        keys = ApiKeys.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise KeysError(
            f"{path} cannot be read: {error.strerror}; `ragrack keys new NAME --file {path}` makes it"
        ) from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()]
        raise KeysError(f"{path}: {'; '.join(problems)}") from error
    names = [key.name for key in keys]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise KeysError(f"{path}: the name {', '.join(twice)} is there twice; give each key its own")
    if GATE in names:
        raise KeysError(f"{path}: the name {GATE} is the deployment's own; choose another")
    return keys


def add_key(path: Path, key: ApiKey) -> None:
    """Adds a key to the file, which is made if it is not there. Raises KeysError and changes nothing when it cannot."""
    with _alone(path):
        keys = read_keys(path) if path.exists() else ()
        if key.name in [*(known.name for known in keys), GATE]:
            raise KeysError(f"{path}: the name {key.name} is taken; choose another")
        _write_keys(path, (*keys, key))


def revoke_key(path: Path, name: str, moment: datetime) -> ApiKey:
    """The key as it now stands in the file; one that was revoked before keeps its moment. Raises KeysError."""
    with _alone(path):
        keys = {key.name: key for key in read_keys(path)}
        if name not in keys:
            raise KeysError(f"{path}: there is no key {name}. Those there are: {', '.join(keys) or 'none'}")
        if keys[name].state(moment) != "revoked":
            keys[name] = keys[name].model_copy(update={"revoked": moment})
            _write_keys(path, tuple(keys.values()))
    return keys[name]


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Of two who change the file, the second waits: else it would undo what the first did."""
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KeysError(f"{path} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _write_keys(path: Path, keys: tuple[ApiKey, ...]) -> None:
    text = ApiKeys(keys=keys).model_dump_json(indent=2, exclude_none=True)
    try:
        write_file(path, f"{text}\n".encode(), like=path if path.exists() else None)
    except OSError as error:
        raise KeysError(f"{path} cannot be written: {error.strerror}") from error


def write_gate_key(path: Path) -> None:
    """A fresh key for those on this host who may read the file: the gate, status and smoke tests."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    aside.touch(mode=0o600, exist_ok=False)
    aside.write_text(new_key(), encoding="ascii")
    aside.replace(path)


class Authenticator:
    """Knows the keys of a file and the gate's; sees at once when either file changes."""

    def __init__(self, keys_file: Path, gate_key_file: Path) -> None:
        self._keys_file = keys_file
        self._gate_key_file = gate_key_file
        self._stamp: object = "never read"
        self._keys: tuple[ApiKey, ...] = ()
        self._gate: str | None = None

    def identify(self, key: str) -> Identity | None:
        """None for a key that is unknown, revoked or has expired. Takes as long for a wrong key as for a right one."""
        self._reread()
        digest = hash_key(key)
        found = None
        for candidate in self._keys:
            if hmac.compare_digest(candidate.sha256, digest):
                found = candidate
        if self._gate is not None and hmac.compare_digest(self._gate, digest):
            return THE_GATE
        if found is None or found.state(datetime.now(UTC)) != "active":
            return None
        return Identity(found.name, found.tenant, frozenset(found.roles))

    def _reread(self) -> None:
        stamp = (_stamp(self._keys_file), _stamp(self._gate_key_file))
        if stamp == self._stamp:
            return
        # Before reading: a file that changes meanwhile is read again next time.
        self._stamp = stamp
        if stamp[0] is None:
            self._keys = ()
            log.error("no API key is accepted: there is no %s", self._keys_file)
        else:
            try:
                self._keys = read_keys(self._keys_file)
            except KeysError as error:
                # Someone may be in the midst of writing it: that must not lock everyone out.
                log.error("the API keys stay as they were before: %s", error)
        try:
            self._gate = hash_key(self._gate_key_file.read_text(encoding="ascii").strip())
        except OSError:
            self._gate = None


def _stamp(path: Path) -> object:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
