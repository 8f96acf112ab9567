"""How a token is shown in an upgrade request, and how it is found there."""

from __future__ import annotations

import base64
from typing import Final

from websockets.datastructures import Headers

BEARER: Final = "bearer."
"""How the name of a subprotocol begins that is a token (base64url); it is never selected, echoed or logged."""


def authorization(token: str) -> dict[str, str]:
    """The header that shows a token; none if there is none."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def token_in(authorization: str) -> str:
    """The token in the value of an `Authorization` header.

    Raises:
        ValueError: It is of another form.
    """
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise ValueError("Authorization is not of the form: Bearer <token>")
    return token.strip()


def token_of(headers: Headers) -> str | None:
    """A token in the `Authorization` header, or (from a browser, which cannot set one) among the subprotocols.

    Raises:
        ValueError: It is not shown in either of these ways.
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
