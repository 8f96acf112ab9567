"""Tokens and API keys: who is let in, which check refuses the others, and that no secret is ever said."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import time
import traceback
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
import tomli_w
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from broadcaster.auth.access import CAUSES, UNRESTRICTED, Access, Denied, Grant
from broadcaster.auth.tokens import create_token
from broadcaster.core.errors import ConfigurationError
from broadcaster.settings import AuthTable, load
from tests.support import UNIT_S, CommandLine, clean_environment, eventually

SECRET = "a-secret-of-the-tests-with-32-characters"
OTHER_SECRET = "another-secret-with-32-characters-or-more"
API_KEY = "key-of-the-wall_0123456789"
ISSUER = "https://issuer.example"
HOUR_S = 3600

ED25519 = ed25519.Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
ATTACKER = ed25519.Ed25519PrivateKey.from_private_bytes(b"\x02" * 32)


def private_pem(key: Any) -> str:
    pem: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem.decode()


def public_pem(key: Any) -> str:
    pem: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem.decode()


def hs256(secret: str = SECRET, kid: str = "") -> dict[str, str]:
    return {"algorithm": "HS256", "key": secret, "kid": kid}


def eddsa(pem: str = public_pem(ED25519), kid: str = "") -> dict[str, str]:
    return {"algorithm": "EdDSA", "key": pem, "kid": kid}


def table(*jwt_keys: dict[str, str], **changes: Any) -> AuthTable:
    """Access control with these keys (one HS256 key, if there are none) and one API key."""
    values: dict[str, Any] = {
        "mode": "token",
        "jwt_keys": jwt_keys or (hs256(),),
        "api_keys": ({"name": "wall", "key": API_KEY, "subscribe": ("events.*",), "publish": ("events.info",)},),
    }
    return AuthTable.model_validate(values | changes)


def claims(**changes: Any) -> dict[str, Any]:
    """What is in a good token; a change to `...` (Ellipsis) leaves a claim out."""
    good: dict[str, Any] = {
        "sub": "somebody",
        "exp": int(time.time()) + HOUR_S,
        "aud": "broadcaster",
        "iss": ISSUER,
        "subscribe": ["events.*"],
        "publish": [],
    }
    return {key: value for key, value in (good | changes).items() if value is not ...}


def encoded(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def by_hmac(secret: str = SECRET, name: str = "sha256") -> Callable[[bytes], bytes]:
    return lambda text: hmac.digest(secret.encode(), text, name)


def token(
    header: Any = None,
    body: dict[str, Any] | bytes | None = None,
    sign: Callable[[bytes], bytes] | None = None,
) -> str:
    """A token put together by hand, so that everything in it can be wrong; a header of bytes is taken as it is."""
    header = {"alg": "HS256", "typ": "JWT"} if header is None else header
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    payload = body if isinstance(body, bytes) else json.dumps(claims() if body is None else body).encode()
    signed = f"{encoded(head)}.{encoded(payload)}"
    return f"{signed}.{encoded((sign or by_hmac())(signed.encode()))}"


def holding(**changes: Any) -> str:
    """A well-signed token with other claims."""
    return token(body=claims(**changes))


def headed(sign: Callable[[bytes], bytes] | None = None, **header: Any) -> str:
    """A token with other fields in its header."""
    return token({"alg": "HS256", "typ": "JWT"} | header, sign=sign)


def tampered() -> str:
    head, _, signature = token().split(".")
    return f"{head}.{encoded(json.dumps(claims(subscribe=['*'])).encode())}.{signature}"


def jwk() -> dict[str, str]:
    return {"kty": "OKP", "crv": "Ed25519", "x": encoded(ATTACKER.public_key().public_bytes_raw())}


def denied(access: Access, shown: str | None) -> Denied:
    with pytest.raises(Denied) as caught:
        access.grant(shown)
    return caught.value


NO_NUMBER = ("malformed", "claims")

REFUSED: dict[str, tuple[Callable[[], str], str | tuple[str, ...]]] = {
    # Nothing, and garbage
    "nothing": (lambda: "", "missing"),
    "no key that is known": (lambda: API_KEY + "x", "unknown_key"),
    "a beginning of a key": (lambda: API_KEY[:-1], "unknown_key"),
    "a key in capitals": (API_KEY.upper, "unknown_key"),
    "the digest of a key": (lambda: hashlib.sha256(API_KEY.encode()).hexdigest(), "unknown_key"),
    "the secret itself": (lambda: SECRET, "unknown_key"),
    "one dot": (lambda: "a.b", "unknown_key"),
    "five parts": (lambda: "a.b.c.d.e", "unknown_key"),
    "null bytes": (lambda: "\0" * 20, "unknown_key"),
    "unicode": (lambda: "ключ-к-событиям", ("unknown_key", "malformed")),
    "half of a surrogate pair": (lambda: "\udcff" * 20, ("unknown_key", "malformed")),
    "two dots only": (lambda: "..", "malformed"),
    "garbage in three parts": (lambda: "!!!.???.***", "malformed"),
    "null bytes in three parts": (lambda: "\0.\0.\0", "malformed"),
    "unicode in three parts": (lambda: "é.ü.ß", "malformed"),
    "half of a surrogate pair in three parts": (lambda: "\udcff.\udcff.\udcff", "malformed"),
    "white space around it": (lambda: f" {token()}\n", "malformed"),
    "a megabyte": (lambda: "A" * 2**20, "unknown_key"),
    "a megabyte in three parts": (lambda: ".".join(["A" * 350_000] * 3), "malformed"),
    # The header
    "header is no JSON": (lambda: token(b"{"), "malformed"),
    "header is no UTF-8": (lambda: token(b'{"alg":"HS256","x":"\xff"}'), "malformed"),
    "header is a list": (lambda: token(["HS256"]), "malformed"),
    "header is a text": (lambda: token("HS256"), "malformed"),
    "header is null": (lambda: token(b"null"), "malformed"),
    "header is empty": (lambda: token({}), "algorithm"),
    "header is nested deeply": (lambda: token(b'{"alg":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "malformed"),
    "header with a number of 5,000 digits": (lambda: token(b'{"alg":' + b"9" * 5000 + b"}"), "malformed"),
    "two algorithms, the last is none": (lambda: token(b'{"alg":"HS256","alg":"none"}'), "algorithm"),
    "algorithm is a list": (lambda: headed(alg=["HS256"]), "algorithm"),
    "algorithm is an object": (lambda: headed(alg={"HS256": 1}), "algorithm"),
    "algorithm none, no signature": (lambda: headed(lambda text: b"", alg="none"), "algorithm"),
    "algorithm none, signed": (lambda: headed(alg="none"), "algorithm"),
    "algorithm nOnE": (lambda: headed(lambda text: b"", alg="nOnE"), "algorithm"),
    "algorithm null": (lambda: headed(lambda text: b"", alg=None), "algorithm"),
    "algorithm in small letters": (lambda: headed(alg="hs256"), "algorithm"),
    "a longer HMAC": (lambda: headed(by_hmac(name="sha512"), alg="HS512"), "algorithm"),
    "EdDSA where there is none": (lambda: headed(ATTACKER.sign, alg="EdDSA"), "algorithm"),
    "critical extension nobody knows": (lambda: headed(crit=["tests"], tests=1), "malformed"),
    "critical extension that is a claim": (lambda: headed(crit=["exp"], exp=1), "malformed"),
    "critical extensions are no list": (lambda: headed(crit="exp"), "malformed"),
    "payload not encoded": (lambda: headed(crit=["b64"], b64=False), "malformed"),
    "payload not encoded, not critical": (lambda: headed(b64=False), "malformed"),
    "key id is a number": (lambda: headed(kid=5), "malformed"),
    # The signature
    "no signature": (lambda: headed(lambda text: b""), "signature"),
    "signed with another secret": (lambda: headed(by_hmac(OTHER_SECRET)), "signature"),
    "signed with nothing": (lambda: headed(by_hmac("")), "signature"),
    "half of the signature": (lambda: headed(lambda text: by_hmac()(text)[:16]), "signature"),
    "payload changed": (tampered, "signature"),
    "key in the header": (
        lambda: headed(by_hmac(OTHER_SECRET), jwk={"kty": "oct", "k": OTHER_SECRET}),
        "signature",
    ),
    "key at an address": (lambda: headed(by_hmac(OTHER_SECRET), jku="http://127.0.0.1:1/keys"), "signature"),
    "certificate at an address": (lambda: headed(by_hmac(OTHER_SECRET), x5u="http://127.0.0.1:1/k"), "signature"),
    "key id is a path": (lambda: headed(by_hmac(""), kid="../../../../dev/null"), "signature"),
    # The claims
    "payload is no JSON": (lambda: token(body=b"{"), "malformed"),
    "payload is no UTF-8": (lambda: token(body=b'{"exp":9999999999,"sub":"\xff"}'), "malformed"),
    "payload is a list": (lambda: token(body=b"[]"), "malformed"),
    "payload is nested deeply": (
        lambda: token(body=b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "malformed",
    ),
    "expired": (lambda: holding(exp=int(time.time()) - HOUR_S), "expired"),
    "expired in 1970": (lambda: holding(exp=0), "expired"),
    "expired before 1970": (lambda: holding(exp=-1), "expired"),
    "expired long before 1970": (lambda: holding(exp=-(10**300)), "expired"),
    "never expires": (lambda: holding(exp=...), "claims"),
    "expires null": (lambda: holding(exp=None), "claims"),
    "expires soon": (lambda: holding(exp="soon"), NO_NUMBER),
    "expires empty": (lambda: holding(exp=""), NO_NUMBER),
    "expires in a list": (lambda: holding(exp=[9_999_999_999]), NO_NUMBER),
    "expires in an object": (lambda: holding(exp={}), NO_NUMBER),
    "expires NaN": (lambda: holding(exp=float("nan")), NO_NUMBER),
    "expires never": (lambda: holding(exp=float("inf")), NO_NUMBER),
    "expires at 1e400": (lambda: token(body=b'{"aud":"broadcaster","exp":1e400}'), NO_NUMBER),
    "expires at 5,000 digits": (
        lambda: token(body=b'{"aud":"broadcaster","exp":' + b"9" * 5000 + b"}"),
        NO_NUMBER,
    ),
    "not yet valid": (lambda: holding(nbf=int(time.time()) + HOUR_S), "not_yet_valid"),
    "signed tomorrow": (lambda: holding(iat=int(time.time()) + 24 * HOUR_S), "not_yet_valid"),
    "valid from soon on": (lambda: holding(nbf="soon"), NO_NUMBER),
    "signed at some time": (lambda: holding(iat="some time"), NO_NUMBER),
    "for somebody else": (lambda: holding(aud="another service"), "audience"),
    "for others only": (lambda: holding(aud=["a", "b"]), "audience"),
    "for a number": (lambda: holding(aud=5), "audience"),
    "for numbers": (lambda: holding(aud=[5, None]), "audience"),
    "for nobody": (lambda: holding(aud=...), ("audience", "claims")),
    "for an empty list": (lambda: holding(aud=[]), ("audience", "claims")),
    "of another issuer": (lambda: holding(iss="https://other.example"), "issuer"),
    "of an issuer with more behind it": (lambda: holding(iss=ISSUER + ".other.example"), "issuer"),
    "of several issuers": (lambda: holding(iss=[ISSUER]), "issuer"),
    "of no issuer": (lambda: holding(iss=...), ("issuer", "claims")),
    "its subject is a number": (lambda: holding(sub=5), "claims"),
    "its subject is a list": (lambda: holding(sub=["a"]), "claims"),
    "its channels are a text": (lambda: holding(subscribe="events.*"), "claims"),
    "its channels are numbers": (lambda: holding(subscribe=["events.*", 5]), "claims"),
    "its channels are an object": (lambda: holding(subscribe={"events.*": True}), "claims"),
    "its channels are null": (lambda: holding(subscribe=None), "claims"),
    "its right to monitor is a text": (lambda: holding(monitor="true"), "claims"),
    "its right to monitor is a number": (lambda: holding(monitor=1), "claims"),
    "what it publishes on is a text": (lambda: holding(publish="*"), "claims"),
    "what it publishes on is true": (lambda: holding(publish=True), "claims"),
}


@pytest.mark.parametrize(("make", "cause"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_good_is_refused_by_its_cause_and_not_repeated(
    make: Callable[[], str], cause: str | tuple[str, ...]
) -> None:
    """The check that failed is said; nothing of what was shown stands in the error or in its traceback."""
    shown = make()
    error = denied(Access(table(issuer=ISSUER)), shown)
    assert error.cause in ((cause,) if isinstance(cause, str) else cause)
    assert str(error) == f"access denied: {error.cause.replace('_', ' ')}"
    said = str(error) + repr(error) + "".join(traceback.format_exception(error))
    parts = [part for part in (shown, *shown.split(".")) if len(part) >= 6]
    assert not [part for part in parts if part in said]


def test_every_cause_there_is_can_be_reached() -> None:
    """A counter that never counts would be a promise of nothing."""
    reached = {denied(Access(table(issuer=ISSUER)), make()).cause for make, _ in REFUSED.values()}
    assert reached == set(CAUSES)


def test_who_shows_nothing_is_told_so() -> None:
    """None is no token."""
    assert denied(Access(table()), None).cause == "missing"


# Good ones

GOOD: dict[str, dict[str, Any]] = {
    "as it should be": {},
    "for several": {"aud": ["other", "broadcaster"]},
    "valid since yesterday": {"nbf": int(time.time()) - 24 * HOUR_S, "iat": int(time.time()) - 24 * HOUR_S},
    "expires at a fraction": {"exp": time.time() + HOUR_S + 0.5},
    "with claims of others": {"scope": "a b", "jti": "1", "nested": {"a": [1]}},
    "expires in 10^300 years": {"exp": 10**300},
}


@pytest.mark.parametrize("changes", GOOD.values(), ids=GOOD.keys())
def test_a_good_token_grants_what_it_claims(changes: dict[str, Any]) -> None:
    """Channels and the end come from the token; the end includes the leeway and is a finite number."""
    body = claims(publish=["events.info"], **changes)
    grant = Access(table(issuer=ISSUER)).grant(token(body=body))
    assert (grant.subscribe, grant.publish) == (("events.*",), ("events.info",))
    assert grant.expires_at is not None
    assert grant.expires_at == pytest.approx(min(int(body["exp"]), 2**40) + 5.0)


def test_a_token_without_channels_is_good_for_none() -> None:
    """What is not claimed is not granted."""
    grant = Access(table()).grant(holding(subscribe=..., publish=..., sub=...))
    assert (grant.subscribe, grant.publish) == ((), ())
    assert not grant.may_subscribe("events.critical")
    assert not grant.may_publish("events.critical")


def test_audience_and_issuer_that_are_not_set_are_not_asked_for() -> None:
    """Empty is any, also none at all."""
    access = Access(table(audience="", issuer=""))
    for changes in ({"aud": "whoever"}, {"aud": ...}, {"iss": "whoever"}, {"iss": ...}):
        assert access.grant(holding(**changes)).subscribe == ("events.*",)


LEEWAY: dict[str, tuple[float, dict[str, float], str]] = {
    "expired within it": (300, {"exp": -200}, ""),
    "expired before it": (300, {"exp": -400}, "expired"),
    "expired, and there is none": (0, {"exp": -2}, "expired"),
    "valid soon enough": (300, {"nbf": 200}, ""),
    "valid too late": (300, {"nbf": 400}, "not_yet_valid"),
    "signed in the near future": (300, {"iat": 200}, ""),
}


@pytest.mark.parametrize(("leeway_s", "times", "cause"), LEEWAY.values(), ids=LEEWAY.keys())
def test_clocks_may_differ_by_the_leeway(leeway_s: float, times: dict[str, float], cause: str) -> None:
    """A token is good a little longer, and a little earlier, and what it grants ends accordingly."""
    access = Access(table(leeway_s=leeway_s))
    body = claims(**{name: int(time.time() + after_s) for name, after_s in times.items()})
    if cause:
        assert denied(access, token(body=body)).cause == cause
    else:
        assert access.grant(token(body=body)).expires_at == body["exp"] + leeway_s


# What comes again


def test_a_token_that_comes_again_is_looked_at_as_if_it_came_first() -> None:
    """Who has been let in once opens no door to a token that is like his."""
    access = Access(table(hs256(), eddsa()))
    shown = token()
    first = access.grant(shown)
    head, payload, signature = shown.split(".")
    likes = {
        f"{head}.{payload}.{encoded(bytes(32))}": "signature",
        f"{head}.{payload}.": "signature",
        f"{head}.{encoded(json.dumps(claims(subscribe=['*'])).encode())}.{signature}": "signature",
        f"{encoded(json.dumps({'alg': 'none'}).encode())}.{payload}.{signature}": "algorithm",
        f"{encoded(json.dumps({'alg': 'EdDSA'}).encode())}.{payload}.{signature}": "signature",
    }
    for like, cause in likes.items():
        assert denied(access, like).cause == cause
    assert access.grant(shown) == first
    assert denied(Access(table(hs256(OTHER_SECRET))), shown).cause == "signature"


def test_a_token_that_comes_again_has_expired_meanwhile() -> None:
    """It is good until it expires, and not because it was good once; the same for one that fails at first."""
    access = Access(table(leeway_s=0))
    now = time.time()
    short, early = holding(exp=int(now) + 2), holding(nbf=int(now) + 2)
    assert access.grant(short).subscribe == ("events.*",)
    assert denied(access, early).cause == "not_yet_valid"

    def cause() -> str:
        try:
            access.grant(short)
        except Denied as error:
            return error.cause
        return ""

    assert eventually(cause, "a token never expires", within=5) == "expired"
    assert access.grant(early).subscribe == ("events.*",)


def test_tokens_without_end_fill_no_memory() -> None:
    """However many different headers, unknown keys and good tokens are shown, what is kept of them is bounded."""
    access = Access(table())
    tracemalloc.start()
    try:
        for number in range(2_000):
            denied(access, headed(by_hmac(OTHER_SECRET), pad=f"{number}" * 400))
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown < 1_000_000


# Keys


def test_a_key_is_good_for_its_own_algorithm_only() -> None:
    """Who has the public key cannot sign with it as if it were a secret: algorithm confusion (RFC 8725, 2.1)."""
    confused = headed(by_hmac(public_pem(ED25519)))
    assert denied(Access(table(eddsa())), confused).cause == "algorithm"
    assert denied(Access(table(eddsa(), hs256())), confused).cause == "signature"
    stripped = headed(by_hmac(public_pem(ED25519).strip()))
    assert denied(Access(table(eddsa(), hs256())), stripped).cause == "signature"


@pytest.mark.parametrize("pem", [public_pem(ED25519), private_pem(ED25519)], ids=["public", "private"])
def test_eddsa_is_verified_with_either_half_of_the_key(pem: str) -> None:
    """The hub needs the public one; with the private one it could sign as well."""
    access = Access(table(eddsa(pem)))
    assert access.grant(headed(ED25519.sign, alg="EdDSA")).subscribe == ("events.*",)
    assert denied(access, headed(ATTACKER.sign, alg="EdDSA")).cause == "signature"
    assert denied(access, headed(lambda text: bytes(64), alg="EdDSA")).cause == "signature"


@pytest.mark.parametrize(
    "header", [{"jwk": jwk()}, {"jku": "http://127.0.0.1:1/"}, {"x5c": ["AAAA"]}], ids=["jwk", "jku", "x5c"]
)
def test_a_token_cannot_bring_its_own_key(header: dict[str, Any]) -> None:
    """What the header says of keys is not looked at."""
    assert denied(Access(table(eddsa())), headed(ATTACKER.sign, alg="EdDSA", **header)).cause == "signature"


ROTATION: dict[str, tuple[tuple[dict[str, str], ...], str, str, str]] = {
    # keys of the hub, key id of the token, secret it is signed with, cause
    "the old of two": ((hs256(), hs256(OTHER_SECRET)), "", SECRET, ""),
    "the new of two": ((hs256(), hs256(OTHER_SECRET)), "", OTHER_SECRET, ""),
    "none of two": ((hs256(), hs256(OTHER_SECRET)), "", "x" * 32, "signature"),
    "by its id": ((hs256(kid="a"), hs256(OTHER_SECRET, "b")), "b", OTHER_SECRET, ""),
    "by the id of another": ((hs256(kid="a"), hs256(OTHER_SECRET, "b")), "b", SECRET, "signature"),
    "by an id that nobody has": ((hs256(kid="a"), hs256(OTHER_SECRET, "b")), "c", SECRET, "unknown_key"),
    "without an id": ((hs256(kid="a"), hs256(OTHER_SECRET, "b")), "", OTHER_SECRET, ""),
    "with an id, keys without": ((hs256(), hs256(OTHER_SECRET)), "c", OTHER_SECRET, ""),
    "one key with an id, one without": ((hs256(kid="a"), hs256(OTHER_SECRET)), "c", OTHER_SECRET, ""),
    "same id, another algorithm": ((eddsa(kid="a"), hs256(OTHER_SECRET, "a")), "a", OTHER_SECRET, ""),
}


@pytest.mark.parametrize(("keys", "kid", "secret", "cause"), ROTATION.values(), ids=ROTATION.keys())
def test_keys_can_be_changed_while_tokens_live(
    keys: tuple[dict[str, str], ...], kid: str, secret: str, cause: str
) -> None:
    """While one key is replaced by another, tokens of both are good; an id chooses among them."""
    header = {"kid": kid} if kid else {}
    shown = headed(by_hmac(secret), **header)
    if cause:
        assert denied(Access(table(*keys)), shown).cause == cause
    else:
        assert Access(table(*keys)).grant(shown).subscribe == ("events.*",)


def test_of_two_keys_the_right_one_says_what_is_wrong() -> None:
    """A token of the second key that has expired has expired; its signature is right."""
    access = Access(table(hs256(), hs256(OTHER_SECRET)))
    shown = token(body=claims(exp=int(time.time()) - HOUR_S), sign=by_hmac(OTHER_SECRET))
    assert denied(access, shown).cause == "expired"


NO_KEYS: dict[str, tuple[dict[str, str], ...]] = {
    "a public key as a secret": (hs256(public_pem(ED25519)),),
    "a private key as a secret": (hs256(private_pem(ED25519)),),
    "a secret as an Ed25519 key": (eddsa(SECRET),),
    "a key of an elliptic curve": (eddsa(public_pem(ec.generate_private_key(ec.SECP256R1()))),),
    "an RSA key": (eddsa(private_pem(rsa.generate_private_key(65_537, 2048))),),
    "a broken PEM": (eddsa(public_pem(ED25519).replace("MCow", "AAAA")),),
    "a PEM cut short": (eddsa(private_pem(ED25519)[:60]),),
    "the second one is no key": (hs256(), eddsa(SECRET)),
}


@pytest.mark.parametrize("keys", NO_KEYS.values(), ids=NO_KEYS.keys())
def test_a_key_that_is_none_is_a_wrong_setting(keys: tuple[dict[str, str], ...]) -> None:
    """The hub does not start with a key it could not use, and does not show it."""
    with pytest.raises(ConfigurationError) as caught:
        Access(table(*keys))
    said = str(caught.value) + "".join(traceback.format_exception(caught.value))
    assert "auth.jwt_keys" in str(caught.value)
    for line in (line for key in keys for line in key["key"].splitlines()):
        assert line.startswith("-----") or line not in said


def test_access_control_without_a_key_is_a_wrong_setting() -> None:
    """Nobody could get in, or worse."""
    with pytest.raises(ConfigurationError, match=r"no auth\.api_keys and no auth\.jwt_keys"):
        Access(table(jwt_keys=(), api_keys=()))


def test_a_holder_is_named_in_one_line() -> None:
    """Whoever chooses a name writes no line of the log with it."""
    name = Access(table(hs256())).grant(holding(sub="x\nready: events get through")).name
    assert name == "x?ready: events get through"


OF_SM2 = """\
-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoEcz1UBgi0DQgAEGnmpnwnBKM7Mzidx/GgGN1TVxX2q
lTDbojaDySB65w/nxJsxwlKzI703oA4ieSp0wA+SwNHzd9hZdPxszUPVbA==
-----END PUBLIC KEY-----
"""
"""A key on a curve that the library does not know."""


@pytest.mark.parametrize("pem", [OF_SM2, public_pem(ec.generate_private_key(ec.SECP256R1())), SECRET])
def test_a_key_of_another_kind_is_said_in_words(pem: str) -> None:
    """Which one it is, and what it should be."""
    with pytest.raises(ConfigurationError) as caught:
        Access(table(hs256(), eddsa(pem)))
    assert str(caught.value) == "auth.jwt_keys, item 2: EdDSA key '': is no Ed25519 or Ed448 key in PEM"


def test_without_access_control_everybody_is_somebody() -> None:
    """With mode none whatever is shown is not looked at."""
    access = Access(AuthTable())
    for shown in (None, "", "..", API_KEY, token()):
        assert access.grant(shown) is UNRESTRICTED


# API keys


def test_an_api_key_is_good_for_what_stands_beside_it() -> None:
    """For good, and for its channels."""
    assert Access(table()).grant(API_KEY) == Grant(("events.*",), ("events.info",), None)


@pytest.mark.parametrize("monitor", [False, True])
def test_to_monitor_is_a_right_of_its_own(monitor: bool) -> None:
    """A token has it if it was made with it, and then need not have any other."""
    auth = table()
    made = create_token(auth, "watch", subscribe=[], publish=[], monitor=monitor, lasts_s=HOUR_S)
    grant = Access(auth).grant(made)
    assert (grant.subscribe, grant.publish, grant.monitor) == ((), (), monitor)


def test_how_long_it_takes_tells_nothing_of_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys are compared, found or not, by digests of one length, in constant time."""
    names = ("first", "second", "third")
    keys = {name: f"{name}-{'0' * 20}" for name in names}
    access = Access(
        table(api_keys=tuple({"name": name, "key": key, "subscribe": (name,)} for name, key in keys.items()))
    )
    compared: list[tuple[Any, Any]] = []

    def compare(one: Any, other: Any) -> bool:
        compared.append((one, other))
        return bool(one == other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for shown in (*keys.values(), "unknown" * 4, "x"):
        compared.clear()
        if shown in keys.values():
            [name] = access.grant(shown).subscribe
            assert keys[name] == shown
        else:
            assert denied(access, shown).cause == "unknown_key"
        assert len(compared) == len(names)
        assert {(type(one), len(one)) for pair in compared for one in pair} == {(bytes, 32)}


MATCHES: dict[str, tuple[tuple[str, ...], str, bool]] = {
    "the name": (("events.critical",), "events.critical", True),
    "another name": (("events.critical",), "events.info", False),
    "a beginning": (("events",), "events.critical", False),
    "a dot is a dot": (("events.critical",), "eventsXcritical", False),
    "capitals count": (("events.*",), "Events.critical", False),
    "a star": (("events.*",), "events.critical", True),
    "a star takes dots": (("events.*",), "events.a.b", True),
    "a star takes nothing as well": (("events.*",), "events.", True),
    "a star for all": (("*",), "events.critical", True),
    "a question mark": (("events.?",), "events.a", True),
    "a question mark is one": (("events.?",), "events.ab", False),
    "one of several characters": (("events.[ab]",), "events.b", True),
    "none of several characters": (("events.[!ab]",), "events.b", False),
    "the second of two": (("other", "events.*"), "events.b", True),
    "none": ((), "events.b", False),
    "an empty one": (("",), "events.b", False),
    "nothing before it": (("vents.*",), "events.b", False),
    "nothing after it": (("*.b",), "events.b.c", False),
}


@pytest.mark.parametrize(("patterns", "channel", "matches"), MATCHES.values(), ids=MATCHES.keys())
def test_patterns_name_the_channels(patterns: tuple[str, ...], channel: str, matches: bool) -> None:
    """A pattern has to match the whole name; what is granted for one use is not granted for the other."""
    subscribes, publishes = Grant(patterns), Grant((), patterns)
    assert subscribes.may_subscribe(channel) is matches
    assert publishes.may_publish(channel) is matches
    assert not subscribes.may_publish(channel)
    assert not publishes.may_subscribe(channel)


# Making tokens

SIGNERS: dict[str, tuple[dict[str, str], ...]] = {
    "a secret": (hs256(),),
    "a secret with an id": (hs256(kid="2026"),),
    "an Ed25519 private key": (eddsa(private_pem(ED25519), "ed"),),
    "the first that can": (eddsa(public_pem(ED25519)), hs256(OTHER_SECRET, "x"), hs256()),
}


@pytest.mark.parametrize("keys", SIGNERS.values(), ids=SIGNERS.keys())
@pytest.mark.parametrize(
    "others", [{}, {"issuer": ISSUER, "audience": "wall"}], ids=["default", "audience, issuer"]
)
def test_a_token_that_was_made_here_is_good_here(keys: tuple[dict[str, str], ...], others: dict[str, str]) -> None:
    """What is signed with a key of the settings is let in with them, for as long as it was meant to."""
    auth = table(*keys, **others)
    before = int(time.time())
    made = create_token(auth, "wall", subscribe=["events.*"], publish=["events.info"], lasts_s=HOUR_S)
    grant = Access(auth).grant(made)
    assert (grant.subscribe, grant.publish) == (("events.*",), ("events.info",))
    assert grant.expires_at is not None
    assert before + HOUR_S <= grant.expires_at - auth.leeway_s <= before + HOUR_S + 10 * UNIT_S
    signer = next(key for key in keys if key["algorithm"] == "HS256" or "PRIVATE" in key["key"])
    assert jwt.get_unverified_header(made).get("kid", "") == signer["kid"]
    assert jwt.get_unverified_header(made)["alg"] == signer["algorithm"]


@pytest.mark.parametrize("keys", [(), (eddsa(public_pem(ED25519)),)], ids=["no key", "a public key"])
def test_who_has_no_key_to_sign_with_is_told_so(keys: tuple[dict[str, str], ...]) -> None:
    """A public key can only verify."""
    with pytest.raises(ConfigurationError, match="no key that can sign"):
        create_token(table(jwt_keys=keys), "wall", subscribe=[], publish=[], lasts_s=1)


# Nothing is said of a key

CANARY = "cAnArY-0123456789-0123456789-0123456789"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line in an empty folder."""
    return CommandLine(tmp_path, monkeypatch, capsys)


RIGHT_KEYS: dict[str, dict[str, Any]] = {
    "api_keys": {"auth": {"api_keys": [{"name": "a", "key": CANARY, "subscribe": ["events.*"]}]}},
    "jwt_keys": {"auth": {"jwt_keys": [{"algorithm": "HS256", "key": CANARY, "kid": "2026"}]}},
    "token": {"subscriber": {"token": CANARY}},
}

WRONG_KEYS: dict[str, tuple[str, str, Any]] = {
    "api key too short": ("auth", "api_keys", [{"name": "a", "key": CANARY[:15]}]),
    "api key too long": ("auth", "api_keys", [{"name": "a", "key": CANARY * 20}]),
    "api key with a blank": ("auth", "api_keys", [{"name": "a", "key": f"{CANARY} {CANARY}"}]),
    "api key with a dot": ("auth", "api_keys", [{"name": "a", "key": f"{CANARY}.a.b"}]),
    "api key is a list": ("auth", "api_keys", [{"name": "a", "key": [CANARY]}]),
    "api key is a table": ("auth", "api_keys", [{"name": "a", "key": {"key": CANARY}}]),
    "api key without a name": ("auth", "api_keys", [{"key": CANARY}]),
    "api key with a wrong name": ("auth", "api_keys", [{"name": "a b", "key": CANARY}]),
    "api key with a wrong pattern": ("auth", "api_keys", [{"name": "a", "key": CANARY, "subscribe": ["a b"]}]),
    "api key with a field too many": ("auth", "api_keys", [{"name": "a", "key": CANARY, "keys": CANARY}]),
    "api keys without tables": ("auth", "api_keys", [CANARY]),
    "api keys in a list too many": ("auth", "api_keys", [[{"name": "a", "key": CANARY}]]),
    "jwt key too short": ("auth", "jwt_keys", [{"algorithm": "HS256", "key": CANARY[:31]}]),
    "jwt key of another algorithm": ("auth", "jwt_keys", [{"algorithm": "RS256", "key": CANARY}]),
    "jwt key without an algorithm": ("auth", "jwt_keys", [{"key": CANARY}]),
    "jwt key with a wrong id": ("auth", "jwt_keys", [{"algorithm": "HS256", "key": CANARY, "kid": "a b"}]),
    "jwt key for an id": ("auth", "jwt_keys", [{"algorithm": "HS256", "key": "", "kid": f"{CANARY} "}]),
    "jwt keys without tables": ("auth", "jwt_keys", [CANARY, CANARY]),
    "no list": ("auth", "api_keys", CANARY),
    "a list cut short": ("auth", "jwt_keys", f'[{{"algorithm": "HS256", "key": "{CANARY}"'),
    "a table": ("auth", "api_keys", {"name": "a", "key": CANARY}),
}

PLACES = ("file", "environment", "command line")


def put(place: str, table: str, key: str, value: Any, folder: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """One setting at a place: arguments of the command line, and variables."""
    text = value if isinstance(value, str) else json.dumps(value)
    if place == "file":
        (folder / "broadcaster.toml").write_text(tomli_w.dumps({table: {key: value}}))
        return (), {}
    if place == "environment":
        return (), {f"BROADCASTER_{table}__{key}".upper(): text}
    return ("--set", f"{table}.{key}={text}"), {}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("tables", RIGHT_KEYS.values(), ids=RIGHT_KEYS.keys())
def test_no_key_is_shown_with_the_settings(
    tables: dict[str, dict[str, Any]], place: str, run: CommandLine, tmp_path: Path
) -> None:
    """`config show` strikes keys and tokens out, wherever they come from, and shows that they are there."""
    [(name, keys)] = tables.items()
    [(key, value)] = keys.items()
    arguments, variables = put(place, name, key, value, tmp_path)
    shown = run(*arguments, "config", "show", **variables)
    assert (shown.code, shown.stderr) == (0, "")
    assert CANARY not in shown.stdout
    assert '"***"' in shown.stdout


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("table", "key", "value"), WRONG_KEYS.values(), ids=WRONG_KEYS.keys())
def test_no_key_is_shown_with_a_mistake(
    table: str, key: str, value: Any, place: str, run: CommandLine, tmp_path: Path
) -> None:
    """A wrong setting is named, with the place it comes from, and not shown."""
    arguments, variables = put(place, table, key, value, tmp_path)
    failed = run(*arguments, "config", "show", **variables)
    assert failed.code == 78
    assert CANARY[:12] not in failed.stdout + failed.stderr
    assert f"{table}.{key}" in failed.stderr
    origin = {"file": "broadcaster.toml", "environment": f"BROADCASTER_{table}__{key}".upper()}.get(place, place)
    assert origin in failed.stderr


WRONG_ASSIGNMENTS = {
    "too deep": f"auth.api_keys.key={CANARY}",
    "by number": f"auth.jwt_keys[0].key={CANARY}",
    "no equals sign": f"subscriber.token:{CANARY}",
    "no table": f"token={CANARY}",
    "a table in a table": f"broadcaster.subscriber.token={CANARY}",
    "a blank": f"subscriber.token {CANARY}",
    "an address without an equals sign": f"redis.url redis://:{CANARY}@127.0.0.1/0",
    "an unknown key": f"subscriber.tokn={CANARY}",
    "an unknown table": f"subscribers.token={CANARY}",
}


@pytest.mark.parametrize("assignment", WRONG_ASSIGNMENTS.values(), ids=WRONG_ASSIGNMENTS.keys())
def test_no_key_is_shown_with_a_mistyped_assignment(assignment: str, run: CommandLine) -> None:
    """Who mistypes the name of a setting on the command line may have typed a key behind it."""
    failed = run("--set", assignment, "config", "show")
    assert failed.code == 78
    assert CANARY not in failed.stdout + failed.stderr


BROKEN_FILES = {
    "no quotes": f"[auth]\napi_keys = [{{ name = 'a', key = {CANARY} }}]\n",
    "a quote too few": f"[subscriber]\ntoken = '{CANARY}\n",
    "a token in a list": f"[subscriber]\ntoken = ['{CANARY}']\n",
    "twice": f"[subscriber]\ntoken = '{CANARY}'\ntoken = '{CANARY}'\n",
    "a mistyped key": f"[subscriber]\ntokn = '{CANARY}'\n",
    "a mistyped table": f"[subscribers]\ntoken = '{CANARY}'\n",
    "keys instead of the table": f"auth = '{CANARY}'\n",
    "another key is wrong": f"[subscriber]\ntoken = '{CANARY}'\nqueue_events = 'x'\n",
    "settings contradict": f"[subscriber]\ntoken = '{CANARY}'\n[hub]\ntls_cert = 'x'\n",
}


@pytest.mark.parametrize("text", BROKEN_FILES.values(), ids=BROKEN_FILES.keys())
def test_no_key_is_shown_with_a_broken_file(text: str, run: CommandLine, tmp_path: Path) -> None:
    """A file that is no TOML, or has another mistake in it, is complained about without what stands there."""
    (tmp_path / "broadcaster.toml").write_text(text)
    failed = run("config", "show")
    assert failed.code == 78
    assert failed.stderr
    assert CANARY not in failed.stdout + failed.stderr


def test_no_key_is_in_any_text_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """repr and str of all that holds keys are good to be logged."""
    for variable in set(os.environ) - set(clean_environment()):
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)
    overrides: dict[str, Any] = {"auth": {"mode": "token"}}
    for tables in RIGHT_KEYS.values():
        for name, keys in tables.items():
            overrides.setdefault(name, {}).update(keys)
    loaded = load(overrides=overrides)
    auth = loaded.settings.auth
    access = Access(auth)
    things = (loaded, loaded.settings, auth, *auth.api_keys, *auth.jwt_keys, loaded.settings.subscriber, access)
    assert access.grant(CANARY).expires_at is None
    for thing in (*things, access.grant(CANARY)):
        assert CANARY not in repr(thing)
        assert CANARY not in str(thing)
    assert CANARY not in loaded.settings.model_dump_json()


# `broadcaster token create`


def test_a_token_is_made_on_the_command_line(run: CommandLine) -> None:
    """It is one line, and nothing of the key is in it."""
    keys = json.dumps([hs256(CANARY, "2026")])
    made = run(
        *("--set", f"auth.jwt_keys={keys}", "token", "create", "--name", "wall"),
        *("--subscribe", "events.*", "--subscribe", "other", "--publish", "events.info", "--lasts", "60"),
    )
    assert (made.code, made.stderr) == (0, "")
    [line] = made.stdout.splitlines()
    assert CANARY not in line
    grant = Access(table(hs256(CANARY))).grant(line)
    assert (grant.subscribe, grant.publish) == (("events.*", "other"), ("events.info",))
    assert grant.expires_at is not None
    assert time.time() < grant.expires_at - 5 <= time.time() + 60


TOKEN_MISTAKES: dict[str, tuple[tuple[str, ...], int]] = {
    "no key": (("token", "create", "--name", "a"), 78),
    "a public key": (
        ("--set", f"auth.jwt_keys={json.dumps([eddsa()])}", "token", "create", "--name", "a"),
        78,
    ),
    "a broken key": (
        (
            *("--set", f"auth.jwt_keys={json.dumps([eddsa(private_pem(ED25519)[:60] + CANARY)])}"),
            *("token", "create", "--name", "a"),
        ),
        78,
    ),
    "no name": (("--set", f"auth.jwt_keys={json.dumps([hs256(CANARY)])}", "token", "create"), 2),
    "no time": (
        (
            "--set",
            f"auth.jwt_keys={json.dumps([hs256(CANARY)])}",
            "token",
            "create",
            "--name",
            "a",
            "--lasts",
            "0",
        ),
        2,
    ),
    "an endless time": (
        (
            *("--set", f"auth.jwt_keys={json.dumps([hs256(CANARY)])}"),
            *("token", "create", "--name", "a", "--lasts", "inf"),
        ),
        2,
    ),
}


@pytest.mark.parametrize(("arguments", "code"), TOKEN_MISTAKES.values(), ids=TOKEN_MISTAKES.keys())
def test_who_asks_for_a_token_that_cannot_be_is_told_so(
    arguments: tuple[str, ...], code: int, run: CommandLine
) -> None:
    """Wrong usage and wrong settings are told apart, in a line and without a key."""
    failed = run(*arguments)
    assert failed.code == code, failed
    assert failed.stdout == ""
    assert failed.stderr
    assert "Traceback" not in failed.stderr
    assert CANARY not in failed.stderr
