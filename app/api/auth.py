"""Who may ask: API keys for scoring, the admin token for changing what is loaded."""

import hashlib
import hmac
from collections.abc import Iterable
from typing import Final

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import SecretStr

from app.api.dependencies import SettingsOf, settings_of
from app.errors import ForbiddenError, UnauthorizedError

KEY_HEADER: Final = "X-API-Key"

# Declared for the OpenAPI description; the credentials are read below, from either header.
_DECLARED: Final = (
    Depends(HTTPBearer(auto_error=False, description="An API key or the admin token.")),
    Depends(APIKeyHeader(name=KEY_HEADER, auto_error=False)),
)


async def require_api_key(request: Request) -> None:
    """Let those pass who show an API key or the admin token; everybody where no key is set.

    Raises:
        UnauthorizedError: there is no key in the request, or an unknown one.
    """
    settings = settings_of(request)
    if not settings.api_keys:
        return
    accepted = [*settings.api_keys, *filter(None, [settings.admin_token])]
    if not any(_is_among(key, accepted) for key in presented_keys(request)):
        raise UnauthorizedError(f"send a valid API key as {KEY_HEADER} or as a bearer token")


async def require_admin(request: Request, settings: SettingsOf) -> None:
    """Let those pass who show the admin token.

    Raises:
        UnauthorizedError: the request has no credentials.
        ForbiddenError: the credentials are not the admin token.
    """
    keys = presented_keys(request)
    if not keys:
        raise UnauthorizedError(f"send the admin token as {KEY_HEADER} or as a bearer token")
    accepted = list(filter(None, [settings.admin_token]))
    if not any(_is_among(key, accepted) for key in keys):
        raise ForbiddenError("these credentials are not the admin token")


def presented_keys(request: Request) -> list[str]:
    """The credentials in a request's headers."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    return [key for key in (bearer, request.headers.get(KEY_HEADER, "")) if key]


def _is_among(key: str, accepted: Iterable[SecretStr]) -> bool:
    # Hashes are of one length, and all are compared: the time taken tells nothing.
    digest = _digest(key)
    return any([hmac.compare_digest(digest, _digest(one.get_secret_value())) for one in accepted])


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


ApiKeyRequired: Final = [*_DECLARED, Depends(require_api_key)]
"""Dependencies of the routers that score."""

AdminRequired: Final = [*_DECLARED, Depends(require_admin)]
"""Dependencies of the routers that change what is loaded."""
