"""Who may subscribe to what: API keys and signed tokens (JWT, RFC 7519), checked without telling secrets.

Every key is pinned to one algorithm, and a token's header only chooses among keys, never an algorithm: a token
signed with a public key as if it were a secret, or not signed at all, finds no key that fits.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

import jwt

from broadcaster.errors import ConfigurationError
from broadcaster.settings import AuthTable, JwtKey

CAUSES: Final = (
    "missing",
    "malformed",
    "unknown_key",
    "algorithm",
    "signature",
    "expired",
    "not_yet_valid",
    "audience",
    "issuer",
    "claims",
)
"""Every `Denied.cause` there is."""


_NO_TOKEN: Final = (ValueError, TypeError, OverflowError, RecursionError)
"""What the library lets through of tokens that are none: too deep, or with numbers that are none."""

_NEVER: Final = 2**40
"""Seconds since 1970; what expires later (some 30,000 years) expires then."""


class Denied(Exception):
    """A token that lets nobody in; `cause` is one of a small fixed set, and nothing of the token is told."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"access denied: {cause.replace('_', ' ')}")
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Grant:
    """What somebody may do.

    Attributes:
        name: Who it is, for logs and statistics.
        subscribe: Channels that may be subscribed to: names, or patterns with * ? [...].
        publish: Channels that may be published on.
        expires_at: Until when; seconds since 1970, None: for good.
    """

    name: str
    subscribe: tuple[str, ...]
    publish: tuple[str, ...] = ()
    expires_at: float | None = None

    def may_subscribe(self, channel: str) -> bool:
        return any(fnmatchcase(channel, pattern) for pattern in self.subscribe)

    def may_publish(self, channel: str) -> bool:
        return any(fnmatchcase(channel, pattern) for pattern in self.publish)


ANYBODY: Final = Grant("anybody", ("*",), ("*",))
"""What everybody may do when there is no access control."""


class Access:
    """Checks tokens against the keys of the settings."""

    def __init__(self, table: AuthTable) -> None:
        """Read the keys.

        Raises:
            ConfigurationError: There is access control but no key, or a key cannot be read.
        """
        self._table = table
        # Digests are compared, all of them and in constant time: how long it takes tells nothing of a key.
        self._api_keys = [
            (_digest(key.key.get_secret_value()), Grant(key.name, key.subscribe, key.publish))
            for key in table.api_keys
        ]
        self._jwt_keys = [(key, _verifying(key)) for key in table.jwt_keys]
        if table.mode == "token" and not (self._api_keys or self._jwt_keys):
            raise ConfigurationError("auth.mode is token, but there is no auth.api_keys and no auth.jwt_keys")

    def grant(self, token: str | None) -> Grant:
        """What the bearer of a token may do.

        Raises:
            Denied: Nothing.
        """
        if self._table.mode == "none":
            return ANYBODY
        if not token:
            raise Denied("missing")
        if token.count(".") == 2:
            return self._from_jwt(token)
        digest, found = _digest(token), None
        for known, grant in self._api_keys:
            if hmac.compare_digest(known, digest):
                found = grant
        if found is None:
            raise Denied("unknown_key")
        return found

    def _from_jwt(self, token: str) -> Grant:
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, *_NO_TOKEN):
            raise Denied("malformed") from None
        candidates = self._candidates(header)
        for number, (key, secret) in enumerate(candidates):
            try:
                claims = jwt.decode(
                    token,
                    secret,
                    algorithms=[key.algorithm],
                    audience=self._table.audience or None,
                    issuer=self._table.issuer or None,
                    leeway=self._table.leeway_s,
                    options={"require": ["exp"], "verify_aud": bool(self._table.audience)},
                )
            except jwt.InvalidSignatureError:
                if number + 1 < len(candidates):
                    continue  # two keys of one algorithm: one is being replaced by the other
                raise Denied("signature") from None
            except (jwt.PyJWTError, *_NO_TOKEN) as error:
                raise Denied(_cause_of(error)) from None
            return _grant_of(claims, self._table.leeway_s)
        raise Denied("algorithm")

    def _candidates(self, header: Mapping[str, Any]) -> list[tuple[JwtKey, Any]]:
        """The keys that a token may be signed with, by its algorithm and key id."""
        kid = header.get("kid")
        fitting = [(key, secret) for key, secret in self._jwt_keys if key.algorithm == header.get("alg")]
        return [(key, secret) for key, secret in fitting if not (kid and key.kid) or kid == key.kid]


def create_token(
    table: AuthTable,
    name: str,
    *,
    subscribe: Sequence[str],
    publish: Sequence[str],
    lasts_s: float,
) -> str:
    """Sign a token with the first key that can sign.

    Args:
        table: The keys.
        name: Who it is for.
        subscribe: Channels that may be subscribed to.
        publish: Channels that may be published on.
        lasts_s: For how long, in seconds from now.

    Raises:
        ConfigurationError: No key can sign (an Ed25519 public key can only verify).
    """
    now = int(time.time())
    claims: dict[str, Any] = {"sub": name, "iat": now, "nbf": now, "exp": now + round(lasts_s)}
    claims |= {"subscribe": list(subscribe), "publish": list(publish)}
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


def _verifying(key: JwtKey) -> Any:
    """The key as the library verifies with it; of a private key the public half."""
    algorithm = jwt.get_algorithm_by_name(key.algorithm)
    try:
        prepared = algorithm.prepare_key(key.key.get_secret_value())
    except (jwt.PyJWTError, ValueError, TypeError) as error:
        raise ConfigurationError(f"auth.jwt_keys: {key.algorithm} key {key.kid!r}: {error}") from None
    return prepared.public_key() if hasattr(prepared, "public_key") else prepared


def _grant_of(claims: Mapping[str, Any], leeway_s: float) -> Grant:
    name = claims.get("sub", "")
    subscribe, publish = claims.get("subscribe", []), claims.get("publish", [])
    for patterns in (subscribe, publish):
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise Denied("claims")
    if not isinstance(name, str):
        raise Denied("claims")
    expires_at = min(int(claims["exp"]), _NEVER)  # the library has seen that it is a number
    return Grant(name[:64], tuple(subscribe), tuple(publish), expires_at + leeway_s)


def _cause_of(error: Exception) -> str:
    causes = {
        jwt.ExpiredSignatureError: "expired",
        jwt.ImmatureSignatureError: "not_yet_valid",
        jwt.InvalidIssuedAtError: "not_yet_valid",
        jwt.InvalidAudienceError: "audience",
        jwt.InvalidIssuerError: "issuer",
        jwt.InvalidAlgorithmError: "algorithm",
        jwt.MissingRequiredClaimError: "claims",
    }
    return next((cause for kind, cause in causes.items() if isinstance(error, kind)), "malformed")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
