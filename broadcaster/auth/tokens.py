"""Creation of signed tokens (JWT) for access control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jwt

from broadcaster.core.errors import ConfigurationError
from broadcaster.core.runtime import CLOCK, Clock
from broadcaster.settings import AuthTable


def create_token(
    table: AuthTable,
    name: str,
    *,
    subscribe: Sequence[str],
    publish: Sequence[str],
    lasts_s: float,
    clock: Clock = CLOCK,
) -> str:
    """Sign a token with the first key that can sign.

    Args:
        table: The keys, audience and issuer.
        name: Its bearer (claim `sub`).
        subscribe: Channels that may be subscribed to.
        publish: Channels that may be published on.
        lasts_s: Lifetime in seconds from now.
        clock: For the present time.

    Raises:
        ConfigurationError: No key can sign (an Ed25519 public key can only verify).
    """
    now = int(clock.wall_s())
    claims: dict[str, Any] = {"sub": name, "iat": now, "exp": now + round(lasts_s)}
    claims |= {"subscribe": list(subscribe)} if subscribe else {}
    claims |= {"publish": list(publish)} if publish else {}
    claims |= {"aud": table.audience} if table.audience else {}
    claims |= {"iss": table.issuer} if table.issuer else {}
    for key in table.jwt_keys:
        secret = key.key.get_secret_value()
        if key.algorithm == "HS256" or "PRIVATE KEY" in secret:
            try:
                return jwt.encode(
                    claims, secret, algorithm=key.algorithm, headers={"kid": key.kid} if key.kid else {}
                )
            except (jwt.PyJWTError, ValueError, TypeError) as error:
                raise ConfigurationError(f"auth.jwt_keys: a key cannot sign: {error}") from None
    raise ConfigurationError("auth.jwt_keys has no key that can sign: a secret (HS256) or an Ed25519 private key")
