"""Who is asking, by a token of the site's OIDC provider: a JWT, signed with a key of the provider's JWKS.

What a token may be is pinned by the settings, never by the token: its issuer, its audience, and algorithms of public
keys alone. The provider's keys are fetched now and then and when a token names one that is not known; while it is
down the last good ones are used.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import jwt

from ragrack.auth import TENANT_PATTERN, Identity
from ragrack.health import Check
from ragrack.settings import Settings
from ragrack.snapshot import write_file

log = logging.getLogger(__name__)

MAX_TOKEN_CHARACTERS = 8192
MAX_JWKS_BYTES = 256 * 1024
FETCH_SECONDS = 5.0
COOLDOWN_SECONDS = 10.0
"""Between two fetches, however many tokens name keys that nobody knows."""
REFRESH_SECONDS = 300.0
CACHE = "jwks.json"
# A kind of key for each algorithm: an `oct` key, which would be a secret, is never taken.
_KINDS = {"RS256": {"kty": "RSA"}, "ES256": {"kty": "EC", "crv": "P-256"}}


class TokenError(Exception):
    """The token is not taken; the message says why and may be shown to who sent it."""


class ProviderError(Exception):
    """No token can be judged: the provider's keys were never had. A 503, not a 401."""


class KeySet:
    """The provider's public keys. `cache` outlives the worker, so that one that is replaced in an outage knows them."""

    def __init__(self, url: str, client: httpx.AsyncClient, cache: Path | None = None) -> None:
        self._url = url
        self._client = client
        self._cache = cache
        self._lock = asyncio.Lock()
        self._not_before = 0.0
        self._keys: dict[str, jwt.PyJWK] = {}
        self.problem: str | None = "its keys were not fetched yet"
        self._recall()

    async def find(self, kid: str) -> jwt.PyJWK | None:
        """None for a key that the provider does not have, as far as it can be asked. Raises ProviderError."""
        if kid not in self._keys:
            await self._refresh(unless=kid)
        if not self._keys:
            raise ProviderError(self.problem)
        return self._keys.get(kid)

    async def watch(self) -> None:
        """Fetches the keys again every five minutes, so that one withdrawn is not believed for long."""
        while True:
            await self._refresh()
            await asyncio.sleep(REFRESH_SECONDS)

    async def _refresh(self, unless: str | None = None) -> None:
        async with self._lock:
            if unless in self._keys or time.monotonic() < self._not_before:
                return
            self._not_before = time.monotonic() + COOLDOWN_SECONDS
            try:
                async with asyncio.timeout(FETCH_SECONDS):
                    keys, document = await self._fetch()
            except (httpx.HTTPError, TimeoutError, ValueError) as error:
                self.problem = f"its keys cannot be fetched ({error or type(error).__name__})"
                log.warning("the OIDC provider: %s; %d known keys are kept", self.problem, len(self._keys))
                return
            self.problem = None
            if keys.keys() != self._keys.keys():
                log.info("the OIDC provider's keys are now %s", ", ".join(sorted(keys)))
            self._keys = keys
            self._remember(document)

    async def _fetch(self) -> tuple[dict[str, jwt.PyJWK], bytes]:
        body = bytearray()
        async with self._client.stream("GET", self._url) as response:
            if response.status_code != httpx.codes.OK:
                raise ValueError(f"it answers {response.status_code}")
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > MAX_JWKS_BYTES:
                    raise ValueError(f"they are more than {MAX_JWKS_BYTES} bytes")
        return _read_keys(body), bytes(body)

    def _remember(self, document: bytes) -> None:
        if self._cache is None:
            return
        try:
            write_file(self._cache, document)
        except OSError as error:
            log.warning("the OIDC provider's keys cannot be kept in %s: %s", self._cache, error.strerror)

    def _recall(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self._cache is not None:
                self._keys = _read_keys(self._cache.read_bytes())


def _read_keys(document: bytes | bytearray) -> dict[str, jwt.PyJWK]:
    """The keys that sign by an algorithm of ours, by their kid. Raises ValueError where there is none."""
    try:
        entries = json.loads(document)["keys"]
        candidates = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("kid"), str)]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError("they are no JWKS") from error
    keys = {}
    for entry in candidates:
        for algorithm, kind in _KINDS.items():
            of_kind = kind.items() <= {name: entry.get(name) for name in kind}.items()
            if of_kind and entry.get("alg", algorithm) == algorithm and entry.get("use", "sig") == "sig":
                with contextlib.suppress(jwt.PyJWTError):
                    keys[entry["kid"]] = jwt.PyJWK(entry, algorithm)
    if not keys:
        raise ValueError("none of them is an RSA or P-256 key for signatures with a kid")
    return keys


class TokenVerifier:
    """Make it with `running`."""

    def __init__(self, settings: Settings, keys: KeySet) -> None:
        self._settings = settings
        self._keys = keys
        self._jwt = jwt.PyJWT({"enforce_minimum_key_length": True})

    async def identify(self, token: str) -> Identity:
        """Raises TokenError, ProviderError."""
        settings = self._settings
        if len(token) > MAX_TOKEN_CHARACTERS:
            raise TokenError("it is longer than any token that this service reads")
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError as error:
            raise TokenError("it is no JWT") from error
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in settings.jwt_algorithms:
            raise TokenError(f"its algorithm is not {' or '.join(settings.jwt_algorithms)}")
        if not isinstance(kid, str):
            raise TokenError("it does not name its key (kid)")
        key = await self._keys.find(kid)
        if key is None or key.algorithm_name != algorithm:
            raise TokenError("its key is not one of the provider's for this algorithm")
        try:
            claims = self._jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                issuer=settings.jwt_issuer,
                audience=settings.jwt_audience,
                leeway=settings.jwt_leeway,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWTError as error:
            raise TokenError(_REASONS.get(type(error), "its signature or its form is wrong")) from error
        return _identity(claims, settings)

    def checks(self) -> list[Check]:
        """For /readyz; not required, as keys of our own go on and so do tokens of the provider's known keys."""

        async def provider() -> str | None:
            return self._keys.problem

        return [Check("oidc", provider, required=False)]


_REASONS: dict[type[Exception], str] = {
    jwt.ExpiredSignatureError: "it has expired",
    jwt.ImmatureSignatureError: "it is not valid yet",
    jwt.InvalidIssuedAtError: "it was issued in the future",
    jwt.InvalidAudienceError: "it is for another audience",
    jwt.InvalidIssuerError: "it is by another issuer",
    jwt.MissingRequiredClaimError: "it lacks one of exp, iss, aud and sub",
}


def _identity(claims: Mapping[str, Any], settings: Settings) -> Identity:
    tenant = _claim(claims, settings.jwt_tenant_claim) if settings.tenants != "off" else None
    if tenant is not None and not (isinstance(tenant, str) and re.fullmatch(TENANT_PATTERN, tenant)):
        raise TokenError(f"its claim {settings.jwt_tenant_claim} is no tenant's name")
    given = _claim(claims, settings.jwt_roles_claim)
    values = given.split() if isinstance(given, str) else given if isinstance(given, list) else []
    roles = frozenset(role for value, role in settings.jwt_roles if value in values)
    name = "".join(character for character in claims["sub"] if character.isprintable())[:64]
    return Identity(name or "a token", tenant, roles)


def _claim(claims: Mapping[str, Any], name: str) -> Any:
    """The claim of that name; else, for `a.b`, the claim b of the claim a. None where there is none."""
    if name in claims:
        return claims[name]
    value: Any = claims
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[TokenVerifier | None]:
    """None where the settings name no provider. Does not wait for it, nor need it."""
    if settings.jwt_jwks_url is None:
        yield None
        return
    async with httpx.AsyncClient(verify=ssl.create_default_context(), timeout=FETCH_SECONDS) as client:
        keys = KeySet(str(settings.jwt_jwks_url), client, settings.runtime_dir / CACHE)
        watch = asyncio.create_task(keys.watch())
        try:
            yield TokenVerifier(settings, keys)
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
