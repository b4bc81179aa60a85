"""Who may call a route: FastAPI dependencies that give the caller's identity, or answer 401 or 403.

async def query(caller: Reader, ...): retriever filters = tenants.within(caller, body.filters)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from ragrack import embedding
from ragrack.auth import Authenticator, Identity, Role
from ragrack.problems import ProblemError
from ragrack.settings import Settings
from ragrack.tokens import ProviderError, TokenError, TokenVerifier

REFUSALS = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.SERVICE_UNAVAILABLE)
"""What every route with a caller may answer, for its OpenAPI."""

_bearer = HTTPBearer(auto_error=False, description="An API key, or a JWT of the site's OIDC provider.")
_header = APIKeyHeader(name="X-API-Key", auto_error=False)


async def _caller(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    header: Annotated[str | None, Depends(_header)],
) -> Identity:
    authenticator: Authenticator = request.app.state.authenticator
    settings: Settings = request.app.state.settings
    key = bearer.credentials if bearer else header
    identity = authenticator.identify(key) if key else None
    if identity is None and bearer is not None:
        identity = await _by_token(request.app.state.tokens, bearer.credentials)
    if identity is None:
        detail = "Give a valid API key: `Authorization: Bearer <key>`, or `X-API-Key: <key>`."
        raise ProblemError(HTTPStatus.UNAUTHORIZED, detail, headers={"WWW-Authenticate": "Bearer"})
    request.state.identity, request.state.tenant = identity.name, identity.tenant
    embedding.tenant.set(identity.tenant)
    return _placed(identity, settings)


async def _by_token(tokens: TokenVerifier | None, token: str) -> Identity | None:
    if tokens is None or token.count(".") != 2:
        return None
    try:
        return await tokens.identify(token)
    except TokenError as error:
        challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
        raise ProblemError(HTTPStatus.UNAUTHORIZED, f"The token is not taken: {error}.", headers=challenge) from error
    except ProviderError as error:
        detail = "Tokens cannot be judged now, as their issuer's keys are not here; GET /readyz says why."
        raise ProblemError(HTTPStatus.SERVICE_UNAVAILABLE, detail, headers={"Retry-After": "10"}) from error


def _placed(identity: Identity, settings: Settings) -> Identity:
    """The identity with what it may see; a 403 where that is nothing."""
    if identity.all_tenants:
        return identity
    apart = settings.tenants != "off"
    if apart == (identity.tenant is not None):
        return dataclasses.replace(identity, all_tenants=not apart)
    detail = (
        "You have no tenant, and this service keeps tenants apart: whoever gave you the key must name its tenant."
        if apart
        else "You are of a tenant, and this service keeps no tenants apart: whoever gave you the key must take it off."
    )
    raise ProblemError(HTTPStatus.FORBIDDEN, detail)


def _with_role(role: Role) -> Callable[[Identity], Awaitable[Identity]]:
    async def caller(identity: Caller) -> Identity:
        if role not in identity.roles:
            raise ProblemError(HTTPStatus.FORBIDDEN, f"This needs the role {role}, which you do not have.")
        return identity

    return caller


Caller = Annotated[Identity, Depends(_caller)]
Reader = Annotated[Identity, Depends(_with_role("reader"))]
Ingester = Annotated[Identity, Depends(_with_role("ingester"))]
Operator = Annotated[Identity, Depends(_with_role("operator"))]
