"""Access control: API keys and signed tokens (JWT, RFC 7519), checked without disclosing secrets.

Every key is pinned to one algorithm, and a token's header only selects among keys, never an algorithm: a token
signed with a public key as if it were a secret, or not signed at all, matches no key.

The library for signed tokens takes 70 ms to import, and is part of an extra: only where there are keys for them.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from hashlib import blake2b, sha256
from typing import TYPE_CHECKING, Any, Final

from broadcaster.core.bounded import BoundedDict
from broadcaster.core.errors import ConfigurationError
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.core.text import printable
from broadcaster.settings import AuthTable, JwtKey

if TYPE_CHECKING:
    import jwt

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
"""Every value of `Denied.cause`."""

_NO_TOKEN: Final = (ValueError, TypeError, OverflowError, RecursionError)
"""Errors that the library passes on for malformed tokens: nested too deeply, or with invalid numbers."""

_KNOWN_HEADS: Final = 64
_LONGEST_NAME: Final = 64

_NEVER: Final = 2**40
"""Seconds since 1970 (some 30,000 years); a later expiry counts as this one."""


class Denied(Exception):
    """A token that grants no access; nothing of the token is disclosed.

    Attributes:
        cause: One of `CAUSES`; what the client is told.
        detail: Which claim is wrong, for the hub's own log; empty if the cause says all.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"access denied: {cause.replace('_', ' ')}")
        self.cause = cause
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Grant:
    """What the bearer of a token may do.

    Attributes:
        subscribe: Channels that may be subscribed to: names, or patterns with * ? [...].
        publish: Channels that may be published on.
        expires_at: Time of expiry in seconds since 1970; None: never.
        name: The bearer's, for logs: that of the API key, or the claim `sub`; empty: not known.
        monitor: Whether the hub's counters, trace and clocks may be read.
        key: Of an API key: its digest.
    """

    subscribe: tuple[str, ...]
    publish: tuple[str, ...] = ()
    expires_at: float | None = None
    name: str = field(default="", compare=False)
    monitor: bool = False
    key: bytes = field(default=b"", compare=False, repr=False)

    def has_expired(self, now: float) -> bool:
        """Whether it is over; `now` in seconds since 1970."""
        return self.expires_at is not None and self.expires_at <= now

    def may_subscribe(self, channel: str) -> bool:
        return any(fnmatchcase(channel, pattern) for pattern in self.subscribe)

    def may_publish(self, channel: str) -> bool:
        return any(fnmatchcase(channel, pattern) for pattern in self.publish)


UNRESTRICTED: Final = Grant(("*",), ("*",), monitor=True)
"""What every client may do when there is no access control."""


class Access:
    """Checks tokens against the keys of the settings."""

    def __init__(self, table: AuthTable, runtime: Runtime = RUNTIME) -> None:
        """Read the keys; see `use`."""
        self._most_tokens = runtime.limits.known_tokens
        self._secret = runtime.chance.bytes(32)
        self._clock = runtime.clock
        self.use(table)

    def use(self, table: AuthTable) -> None:
        """Go by other settings from now on; if they are wrong, nothing has changed.

        Raises:
            ConfigurationError: There is access control but no key, or a key cannot be read.
        """
        if table.mode == "token" and not (table.api_keys or table.jwt_keys):
            raise ConfigurationError("auth.mode is token, but there is no auth.api_keys and no auth.jwt_keys")
        self._jwt_keys = [(key, _verifying(key, number)) for number, key in enumerate(table.jwt_keys, 1)]
        self._table = table
        # Digests are compared, all of them and in constant time: the time it takes discloses nothing of a key.
        self._api_keys = [
            Grant(key.subscribe, key.publish, None, key.name, key.monitor, _digest(key.key.get_secret_value()))
            for key in table.api_keys
        ]
        # All tokens of one issuer begin with the same segment, and reading it costs as much as the rest.
        self._candidates = lru_cache(_KNOWN_HEADS)(self._find_candidates)
        # By a keyed digest: the token itself is not kept, and a token of equal digest cannot be searched for.
        self._verified = BoundedDict[bytes, Grant](self._most_tokens)

    def still_gives(self, grant: Grant) -> bool:
        """Whether a grant still holds: its API key is there, with these rights. A JWT is good until its `exp`."""
        if self._table.mode == "none" or grant.expires_at is not None:
            return True
        same = [known for known in self._api_keys if known.key == grant.key]
        return any(grant == known and grant.name == known.name for known in same)

    def grant(self, token: str | None) -> Grant:
        """What the bearer of a token may do.

        Raises:
            Denied: It grants no access; the cause says why.
        """
        if self._table.mode == "none":
            return UNRESTRICTED
        if not token:
            raise Denied("missing")
        if not token.isascii():
            raise Denied("malformed")
        if self._jwt_keys and token.count(".") == 2:
            mark = blake2b(token.encode(), digest_size=12, key=self._secret).digest()
            return self._verified_before(mark) or self._remember(mark, self._from_jwt(token))
        digest, found = _digest(token), None
        for grant in self._api_keys:
            if hmac.compare_digest(grant.key, digest):
                found = grant
        if found is None:
            raise Denied("unknown_key")
        return found

    def _verified_before(self, mark: bytes) -> Grant | None:
        """The grant of a token verified before (clients return after a lost network) that has not expired yet."""
        grant = self._verified.get(mark)
        return (
            grant if grant and grant.expires_at is not None and self._clock.wall_s() < grant.expires_at else None
        )

    def _remember(self, mark: bytes, grant: Grant) -> Grant:
        self._verified[mark] = grant
        return grant

    def _from_jwt(self, token: str) -> Grant:
        import jwt

        try:
            candidates = self._candidates(token.partition(".")[0])
        except (jwt.PyJWTError, *_NO_TOKEN):
            raise Denied("malformed") from None
        for key, verifying in candidates:
            try:
                claims = jwt.decode(
                    token,
                    verifying,
                    algorithms=[key.algorithm],
                    audience=self._table.audience or None,
                    issuer=self._table.issuer or None,
                    leeway=self._table.leeway_s,
                    options={"require": ["exp"], "verify_aud": bool(self._table.audience)},
                )
            except jwt.InvalidSignatureError:
                continue  # two keys of one algorithm: one is being rotated out
            except (jwt.PyJWTError, *_NO_TOKEN) as error:
                raise Denied(_cause_of(error), self._detail_of(error)) from None
            return _grant_of(claims, self._table.leeway_s)
        raise Denied("signature")

    def _detail_of(self, error: Exception) -> str:
        """Which claim is wrong; nothing that the token says about itself."""
        import jwt

        if isinstance(error, jwt.MissingRequiredClaimError):
            return f"the claim {error.claim} is missing"
        table = self._table
        sentences = {
            jwt.ExpiredSignatureError: "exp is in the past",
            jwt.ImmatureSignatureError: "nbf or iat is in the future",
            jwt.InvalidIssuedAtError: "iat is no number",
            jwt.exceptions.InvalidSubjectError: "sub is no text",
            jwt.exceptions.InvalidJTIError: "jti is no text",
            jwt.InvalidAudienceError: f"aud is not auth.audience, {table.audience!r}",
            jwt.InvalidIssuerError: f"iss is not auth.issuer, {table.issuer!r}",
        }
        return next((sentence for kind, sentence in sentences.items() if isinstance(error, kind)), "")

    def _find_candidates(self, head: str) -> list[tuple[JwtKey, jwt.PyJWK]]:
        """The keys that a token may be signed with, by algorithm and key id in its first segment."""
        import jwt

        header = jwt.get_unverified_header(f"{head}.e30.")  # with an empty claim set: only the head matters
        kid = header.get("kid")
        fitting = [(key, verifying) for key, verifying in self._jwt_keys if key.algorithm == header.get("alg")]
        known = [(key, verifying) for key, verifying in fitting if not (kid and key.kid) or kid == key.kid]
        if not known:
            raise Denied("unknown_key" if fitting else "algorithm")
        return known


def _verifying(key: JwtKey, number: int) -> jwt.PyJWK:
    """The key bound to its algorithm, as the library verifies with it; of a private key the public half."""
    import jwt

    algorithm = jwt.get_algorithm_by_name(key.algorithm)
    try:
        prepared = algorithm.prepare_key(key.key.get_secret_value())
        if hasattr(prepared, "public_key"):
            prepared = prepared.public_key()
        return jwt.PyJWK.from_dict(algorithm.to_jwk(prepared, as_dict=True), key.algorithm)
    except Exception as error:  # whatever the libraries say of a key: of an unknown curve it is no ValueError
        why = str(error) if key.algorithm == "HS256" else "is no Ed25519 or Ed448 key in PEM"
        raise ConfigurationError(f"auth.jwt_keys, item {number}: {key.algorithm} key {key.kid!r}: {why}") from None


def _grant_of(claims: Mapping[str, Any], leeway_s: float) -> Grant:
    subscribe, publish = claims.get("subscribe", []), claims.get("publish", [])
    for patterns in (subscribe, publish):
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise Denied("claims", "subscribe and publish have to be lists of texts")
    monitor = claims.get("monitor", False)
    if not isinstance(monitor, bool):
        raise Denied("claims", "monitor has to be true or false")
    expires_at = min(int(claims["exp"]), _NEVER)  # the library has seen that it is a number
    name = printable(claims.get("sub", "")[:_LONGEST_NAME])  # the library has seen that it is a text
    return _shared_grant(tuple(subscribe), tuple(publish), expires_at + leeway_s, name, monitor)


@lru_cache(1024)
def _shared_grant(
    subscribe: tuple[str, ...], publish: tuple[str, ...], expires_at: float, name: str, monitor: bool
) -> Grant:
    """One `Grant` for all tokens with the same rights, holder and second of expiry: there may be many."""
    return Grant(subscribe, publish, expires_at, name, monitor)


def _cause_of(error: Exception) -> str:
    import jwt

    causes = {
        jwt.ExpiredSignatureError: "expired",
        jwt.ImmatureSignatureError: "not_yet_valid",
        jwt.InvalidIssuedAtError: "claims",
        jwt.exceptions.InvalidSubjectError: "claims",
        jwt.exceptions.InvalidJTIError: "claims",
        jwt.InvalidAudienceError: "audience",
        jwt.InvalidIssuerError: "issuer",
        jwt.InvalidAlgorithmError: "algorithm",
        jwt.MissingRequiredClaimError: "claims",
    }
    return next((cause for kind, cause in causes.items() if isinstance(error, kind)), "malformed")


def _digest(text: str) -> bytes:
    return sha256(text.encode()).digest()
