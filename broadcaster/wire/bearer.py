"""Bearer tokens in an upgrade request: how a client sends one, and how the hub reads it."""

from __future__ import annotations

import base64
from typing import Final

from websockets.datastructures import Headers

BEARER: Final = "bearer."
"""Prefix of a subprotocol name that carries a token (base64url); it is never selected, echoed or logged."""


def authorization(token: str) -> dict[str, str]:
    """The header that sends a token; none if there is no token."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def token_in(authorization: str) -> str:
    """The token in the value of an `Authorization` header.

    Raises:
        ValueError: It has another form.
    """
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise ValueError("Authorization is not of the form: Bearer <token>")
    return token.strip()


def token_of(headers: Headers) -> str | None:
    """The token in the `Authorization` header, or (of a browser, which cannot set one) in a subprotocol; or None.

    Raises:
        ValueError: It is malformed.
        MultipleValuesError: There are several `Authorization` headers.
    """
    if authorization := headers.get("Authorization"):
        return token_in(authorization)
    for offered in headers.get_all("Sec-WebSocket-Protocol"):
        for name in offered.split(","):
            if name.strip().startswith(BEARER):
                encoded = name.strip().removeprefix(BEARER)
                try:
                    return base64.b64decode(encoded + "=" * (-len(encoded) % 4), b"-_", validate=True).decode()
                except ValueError:
                    raise ValueError("a subprotocol bearer. is followed by base64url") from None
    return None
