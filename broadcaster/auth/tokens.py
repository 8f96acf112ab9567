"""Creation of signed tokens (JWT) for access control."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from broadcaster.core.errors import ConfigurationError
from broadcaster.core.runtime import CLOCK, Clock
from broadcaster.settings import AuthTable, Settings


def create_token(
    table: AuthTable,
    name: str,
    *,
    subscribe: Sequence[str],
    publish: Sequence[str],
    monitor: bool = False,
    lasts_s: float,
    clock: Clock = CLOCK,
) -> str:
    """Sign a token with the first key that can sign.

    Args:
        table: The keys, audience and issuer.
        name: Its bearer (claim `sub`).
        subscribe: Channels that may be subscribed to.
        publish: Channels that may be published on.
        monitor: Whether the hub's counters, trace and clocks may be read.
        lasts_s: Lifetime in seconds from now.
        clock: For the present time.

    Raises:
        ConfigurationError: No key can sign (an Ed25519 public key can only verify).
    """
    import jwt  # part of an extra, and slow to import: only where there is a key

    now = int(clock.wall_s())
    claims: dict[str, Any] = {"sub": name, "iat": now, "exp": now + round(lasts_s)}
    claims |= {"subscribe": list(subscribe)} if subscribe else {}
    claims |= {"publish": list(publish)} if publish else {}
    claims |= {"monitor": True} if monitor else {}
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


def monitoring_token(settings: Settings, lasts_s: float = 3600.0) -> str:
    """A token that may read the counters of the hub of these settings.

    Signed now if a key can; else the API key of one who may; else `subscriber.token`, which may or may not.
    """
    auth, given = settings.auth, settings.subscriber.token.get_secret_value()
    if auth.mode == "none":
        return given  # the hub may be another one
    with suppress(ConfigurationError):
        return create_token(auth, "monitor", subscribe=(), publish=(), monitor=True, lasts_s=lasts_s)
    return next((key.key.get_secret_value() for key in auth.api_keys if key.monitor), given)
