"""Bearer tokens in an upgrade request: how a client sends one, and how the hub reads it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Final

from websockets.datastructures import Headers

from broadcaster.core.errors import ConfigurationError
from broadcaster.core.redaction import legal_token

BEARER: Final = "bearer."
"""Prefix of a subprotocol name that carries a token (base64url); it is never selected, echoed or logged."""


def authorization(token: str) -> dict[str, str]:
    """The header that sends a token; none if there is no token.

    Raises:
        ConfigurationError: No header can carry it.
    """
    try:
        token = legal_token(token)
    except ValueError as error:
        raise ConfigurationError(f"the token {error} (it is not shown)") from None
    return {"Authorization": f"Bearer {token}"} if token else {}


def token_in(authorizations: Sequence[str]) -> str | None:
    """The token in the values of the `Authorization` headers; None if there is none.

    Another scheme is not the hub's business: a proxy that demands a password passes its header on.

    Raises:
        ValueError: There are several tokens.
    """
    said = (value.strip().partition(" ") for value in authorizations)
    tokens = [token.strip() for scheme, _, token in said if scheme.lower() == "bearer" and token.strip()]
    if len(tokens) > 1:
        raise ValueError("Authorization has more than one bearer token")
    return tokens[0] if tokens else None


def token_of(headers: Headers) -> str | None:
    """The token in the `Authorization` header, or (of a browser, which cannot set one) in a subprotocol; or None.

    Raises:
        ValueError: It is malformed, or there are several.
    """
    if token := token_in(headers.get_all("Authorization")):
        return token
    for offered in headers.get_all("Sec-WebSocket-Protocol"):
        for name in offered.split(","):
            if name.strip().startswith(BEARER):
                encoded = name.strip().removeprefix(BEARER)
                try:
                    return base64.b64decode(encoded + "=" * (-len(encoded) % 4), b"-_", validate=True).decode()
                except ValueError:
                    raise ValueError("a subprotocol bearer. is followed by base64url") from None
    return None
