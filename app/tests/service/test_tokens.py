"""Tokens of an OIDC provider: which are taken, and what happens while it turns its keys or is down.

The provider is a real HTTP server on a port of this machine; its keys are real and the tokens are really signed.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from ragrack import tokens
from ragrack.api import create_app
from ragrack.auth import Identity
from ragrack.settings import Settings
from ragrack.tokens import KeySet, ProviderError, TokenError, TokenVerifier

from .conftest import running_app

ISSUER = "https://login.example.org/"
AUDIENCE = "ragrack"
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


class Provider:
    """A JWKS server whose keys and whose failures a test decides."""

    def __init__(self) -> None:
        self.keys: dict[str, PrivateKey] = {}
        self.more: list[dict[str, Any]] = []
        self.fetches = 0
        self.broken: tuple[int, bytes] | None = None
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.fetches += 1
                status, body = provider.broken or (200, json.dumps({"keys": provider.jwks()}).encode())
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the base class
                pass

        self._handler = Handler
        self.start()

    def start(self, port: int = 0) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/jwks"

    def jwks(self) -> list[dict[str, Any]]:
        return [public_jwk(kid, key) for kid, key in self.keys.items()] + self.more

    def rsa(self, kid: str, bits: int = 2048) -> None:
        self.keys[kid] = rsa.generate_private_key(65537, bits)

    def ec(self, kid: str) -> None:
        self.keys[kid] = ec.generate_private_key(ec.SECP256R1())

    def token(self, kid: str, algorithm: str | None = None, **claims: Any) -> str:
        key = self.keys[kid]
        algorithm = algorithm or ("RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256")
        return jwt.encode(payload(**claims), key, algorithm, headers={"kid": kid})


def payload(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    whole = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "iat": now, "exp": now + 600, "roles": ["reader"]} | changes
    return {name: value for name, value in whole.items() if value is not None}


def public_jwk(kid: str, key: PrivateKey) -> dict[str, Any]:
    if isinstance(key, rsa.RSAPrivateKey):
        made = jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    else:
        made = jwt.algorithms.ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    return {**made, "kid": kid, "use": "sig"}


def part(value: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


@pytest.fixture
def provider() -> Iterator[Provider]:
    provider = Provider()
    provider.rsa("r1")
    provider.ec("e1")
    yield provider
    provider.stop()


@pytest.fixture
def token_settings(settings: Settings, provider: Provider) -> Settings:
    return changed(settings, jwt_issuer=ISSUER, jwt_audience=AUDIENCE, jwt_jwks_url=provider.url)


def changed(settings: Settings, **changes: Any) -> Settings:
    return Settings.model_validate(settings.model_dump() | changes)


@pytest.fixture
async def keys(provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[KeySet]:
    """Of that provider, asked as often as need be."""
    monkeypatch.setattr(tokens, "COOLDOWN_SECONDS", 0.0)
    async with httpx.AsyncClient() as client:
        yield KeySet(provider.url, client, tmp_path / "jwks.json")


@pytest.fixture
def verifier(token_settings: Settings, keys: KeySet) -> TokenVerifier:
    return TokenVerifier(token_settings, keys)


@pytest.mark.parametrize("kid", ["r1", "e1"])
async def test_a_token_of_the_provider_brings_a_name_and_roles(
    provider: Provider, verifier: TokenVerifier, kid: str
) -> None:
    assert await verifier.identify(provider.token(kid)) == Identity("ada", None, frozenset({"reader"}))
    both = provider.token(kid, roles="operator reader nonsense")
    assert (await verifier.identify(both)).roles == {"reader", "operator"}
    assert (await verifier.identify(provider.token(kid, roles=None))).roles == frozenset()
    assert (await verifier.identify(provider.token(kid, aud=["other", AUDIENCE]))).name == "ada"


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"exp": 1_000_000_000}, "expired"),
        ({"exp": None}, "lacks"),
        ({"sub": None}, "lacks"),
        ({"aud": None}, "lacks"),
        ({"iss": None}, "lacks"),
        ({"aud": "another"}, "audience"),
        ({"aud": ["another", "third"]}, "audience"),
        ({"iss": "https://login.example.org"}, "issuer"),
        ({"nbf": 9_000_000_000}, "not valid yet"),
        ({"exp": "soon"}, "form"),
        ({"sub": 7}, "form"),
    ],
)
async def test_what_the_claims_must_say(
    provider: Provider, verifier: TokenVerifier, claims: dict[str, Any], reason: str
) -> None:
    with pytest.raises(TokenError, match=reason):
        await verifier.identify(provider.token("r1", **claims))


async def test_clocks_may_differ_by_the_leeway_and_no_more(
    provider: Provider, keys: KeySet, token_settings: Settings
) -> None:
    old = provider.token("r1", exp=int(time.time()) - 60)
    assert await TokenVerifier(changed(token_settings, jwt_leeway=120), keys).identify(old)
    with pytest.raises(TokenError, match="expired"):
        await TokenVerifier(changed(token_settings, jwt_leeway=10), keys).identify(old)


async def test_no_other_algorithm_is_taken_whatever_the_token_says(provider: Provider, verifier: TokenVerifier) -> None:
    unsigned = f"{part({'alg': 'none', 'kid': 'r1'})}.{part(payload())}."
    # The classic confusion: the public key, which all know, as the secret of an HMAC.
    public = provider.keys["r1"].public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    signed = f"{part({'alg': 'HS256', 'kid': 'r1'})}.{part(payload())}"
    mac = base64.urlsafe_b64encode(hmac.digest(pem, signed.encode(), hashlib.sha256)).decode().rstrip("=")
    for token in (unsigned, f"{signed}.{mac}", provider.token("r1", "RS512"), provider.token("r1", "PS256")):
        with pytest.raises(TokenError, match="algorithm is not RS256 or ES256"):
            await verifier.identify(token)
    # A key of one kind, named by a token that says to be signed by the other kind.
    renamed = jwt.encode(payload(), provider.keys["e1"], "ES256", headers={"kid": "r1"})
    with pytest.raises(TokenError, match="key is not one"):
        await verifier.identify(renamed)


async def test_an_algorithm_that_the_settings_leave_out_is_not_taken(
    provider: Provider, keys: KeySet, token_settings: Settings
) -> None:
    verifier = TokenVerifier(changed(token_settings, jwt_algorithms=("ES256",)), keys)
    assert await verifier.identify(provider.token("e1"))
    with pytest.raises(TokenError, match="algorithm is not ES256"):
        await verifier.identify(provider.token("r1"))


async def test_a_token_signed_or_changed_by_another_is_refused(provider: Provider, verifier: TokenVerifier) -> None:
    stranger = Provider()
    stranger.rsa("r1")
    head, _, signature = provider.token("r1").split(".")
    for token in (
        stranger.token("r1"),
        f"{head}.{part(payload(sub='root'))}.{signature}",
        f"{head}.{part(payload())}.",
        "a.b.c",
        f"{part({'alg': 'RS256'})}.{part(payload())}.{signature}",
        "x" * 9000,
    ):
        with pytest.raises(TokenError):
            await verifier.identify(token)
    stranger.stop()


async def test_secrets_weak_keys_and_keys_for_encryption_in_a_jwks_are_no_keys(
    provider: Provider, verifier: TokenVerifier
) -> None:
    provider.rsa("weak", 1024)
    provider.rsa("enc")
    encryption = public_jwk("enc", provider.keys["enc"]) | {"use": "enc"}
    secret = {"kty": "oct", "kid": "oct", "k": base64.urlsafe_b64encode(b"s" * 32).decode().rstrip("=")}
    weak = public_jwk("weak", provider.keys["weak"])
    with pytest.warns(jwt.InsecureKeyLengthWarning):
        tokens_made = [provider.token("weak"), provider.token("enc")]
    del provider.keys["weak"], provider.keys["enc"]
    provider.more = [weak, encryption, secret]
    tokens_made.append(jwt.encode(payload(), b"s" * 32, "HS256", headers={"kid": "oct"}))
    assert await verifier.identify(provider.token("r1"))
    for token in tokens_made:
        with pytest.raises(TokenError):
            await verifier.identify(token)


async def test_new_keys_are_found_when_a_token_names_them_and_old_ones_are_forgotten(
    provider: Provider, verifier: TokenVerifier
) -> None:
    old = provider.token("r1")
    assert await verifier.identify(old)
    provider.rsa("r2")
    assert await verifier.identify(provider.token("r2"))
    assert await verifier.identify(old)
    del provider.keys["r1"]
    provider.rsa("r3")
    assert await verifier.identify(provider.token("r3"))
    with pytest.raises(TokenError, match="key is not one"):
        await verifier.identify(old)


async def test_tokens_with_made_up_keys_cannot_make_it_ask_the_provider_again_and_again(
    provider: Provider, token_settings: Settings
) -> None:
    async with httpx.AsyncClient() as client:
        verifier = TokenVerifier(token_settings, KeySet(provider.url, client))
        for number in range(20):
            made_up = jwt.encode(payload(), provider.keys["r1"], "RS256", headers={"kid": f"made-up-{number}"})
            with pytest.raises(TokenError, match="key is not one"):
                await verifier.identify(made_up)
        assert await verifier.identify(provider.token("r1"))
    assert provider.fetches == 1


@pytest.mark.parametrize(
    "broken",
    [(500, b"oops"), (200, b"<html>"), (200, b'{"keys": []}'), (200, b"[]"), (302, b""), (200, b"x" * 300_000), None],
)
async def test_the_last_good_keys_serve_through_an_outage(
    provider: Provider, verifier: TokenVerifier, keys: KeySet, broken: tuple[int, bytes] | None
) -> None:
    assert await verifier.identify(provider.token("r1"))
    provider.broken = broken
    if broken is None:
        provider.stop()
    unknown = jwt.encode(payload(), provider.keys["r1"], "RS256", headers={"kid": "r9"})
    with pytest.raises(TokenError):
        await verifier.identify(unknown)
    assert keys.problem is not None
    assert await verifier.identify(provider.token("r1"))
    # The provider comes back with a new key.
    provider.broken = None
    if broken is None:
        provider.start(provider.port)
    provider.rsa("r2")
    assert await verifier.identify(provider.token("r2"))
    assert keys.problem is None


async def test_a_worker_that_starts_in_an_outage_knows_the_keys_of_the_one_before(
    provider: Provider, verifier: TokenVerifier, token_settings: Settings, tmp_path: Path
) -> None:
    token = provider.token("r1")
    async with httpx.AsyncClient() as client:
        provider.broken = (503, b"")
        nothing_known = TokenVerifier(token_settings, KeySet(provider.url, client, tmp_path / "jwks.json"))
        with pytest.raises(ProviderError):
            await nothing_known.identify(token)
        provider.broken = None
        assert await verifier.identify(token)
        provider.broken = (503, b"")
        again = TokenVerifier(token_settings, KeySet(provider.url, client, tmp_path / "jwks.json"))
        assert await again.identify(token)


async def test_nested_claims_and_values_of_the_sites_own(
    provider: Provider, keys: KeySet, token_settings: Settings
) -> None:
    settings = changed(
        token_settings,
        tenants="by_folder",
        jwt_tenant_claim="https://example.org/tenant",
        jwt_roles_claim="realm_access.roles",
        jwt_roles=(("staff", "reader"), ("platform", "operator")),
    )
    claims: dict[str, Any] = {
        "https://example.org/tenant": "acme",
        "realm_access": {"roles": ["staff", "reader", "ingester"]},
    }
    identity = await TokenVerifier(settings, keys).identify(provider.token("e1", **claims))
    assert identity == Identity("ada", "acme", frozenset({"reader"}))


@pytest.mark.parametrize("tenant", ["", "../beta", "a/b", ["acme"], 7, {"a": 1}, "acme\n", "x" * 65])
async def test_a_claim_that_is_no_tenants_name_is_refused(
    provider: Provider, keys: KeySet, token_settings: Settings, tenant: object
) -> None:
    verifier = TokenVerifier(changed(token_settings, tenants="by_folder"), keys)
    with pytest.raises(TokenError, match="tenant"):
        await verifier.identify(provider.token("r1", tenant=tenant))


async def test_no_subject_makes_anyone_the_gate(provider: Provider, verifier: TokenVerifier) -> None:
    identity = await verifier.identify(provider.token("r1", sub="gate", all_tenants=True))
    assert not identity.all_tenants


async def test_the_service_takes_tokens_beside_keys_and_tells_why_not(
    token_settings: Settings, provider: Provider
) -> None:
    async with running_app(create_app(token_settings), key=None) as client:

        async def ask(token: str, header: str = "Authorization") -> httpx.Response:
            value = f"Bearer {token}" if header == "Authorization" else token
            return await client.post("/query", json={"query": "When was it built?"}, headers={header: value})

        assert (await ask(provider.token("r1"))).status_code == 200
        expired = await ask(provider.token("r1", exp=1_000_000_000))
        assert expired.status_code == 401
        assert "expired" in expired.json()["detail"]
        assert "invalid_token" in expired.headers["www-authenticate"]
        assert (await ask(provider.token("r1", roles=["operator"]))).status_code == 403
        assert (await ask(provider.token("r1"), "X-API-Key")).status_code == 401
        assert (await ask("no.such.token")).status_code == 401
        checks = {check["name"]: check for check in (await client.get("/readyz")).json()["checks"]}
        assert checks["oidc"]["ok"]
        assert not checks["oidc"]["required"]


async def test_without_its_provider_the_service_starts_and_answers_tokens_with_503(
    token_settings: Settings, provider: Provider
) -> None:
    token = provider.token("r1")
    provider.broken = (500, b"")
    async with running_app(create_app(token_settings), key=None) as client:
        answer = await client.get("/version", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
