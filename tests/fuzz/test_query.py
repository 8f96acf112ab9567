"""What a stranger asks for and shows: any query, header or token is understood as documented, or refused."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import socket
import time
from collections.abc import Iterator
from typing import Any, Final, NamedTuple
from urllib.parse import quote, quote_plus

import jwt
import pytest
import uvloop
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.datastructures import Headers

from broadcaster import wire
from broadcaster.auth.access import CAUSES, Access, Denied, Grant
from broadcaster.core.position import Instant, Last, Position
from broadcaster.hub.connections.admission import REFUSALS, AdmissionControl, Admitted
from broadcaster.hub.connections.request import SubscribeRequest, read_query
from broadcaster.redis.server import RedisServer
from broadcaster.settings import ApiKey, AuthTable, JwtKey, Settings
from broadcaster.wire.bearer import token_of
from tests.fuzz import fuzzed, mutated
from tests.hub.house import House
from tests.support import UNIT_S, HubThread, assert_calm, unblocked

DEFAULT: Final = "events.critical"

Pairs = list[tuple[str, str]]


class Wanted(NamedTuple):
    """What an `SubscribeRequest` has to say."""

    channels: dict[str, tuple[str, int] | None]
    types: frozenset[str]
    sources: frozenset[str]
    severities: frozenset[str]


# An oracle, written from docs/contract.md ("Asking for events", "Limits") and nothing else


def is_channel(name: str) -> bool:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:-"
    return 1 <= len(name) <= 128 and set(name) <= set(letters)


def position(text: str) -> tuple[str, int] | None:
    epoch, _, offset = text.partition("-")
    right = epoch.isascii() and epoch.isalnum() and len(epoch) <= 64 and offset.isascii() and offset.isdigit()
    return (epoch, int(offset)) if right and len(offset) <= 16 and int(offset) < 2**53 else None


def instant(value: str) -> tuple[str, int] | None:
    """A duration back from now in microseconds, or all there is; None if it is neither."""
    if value == "all":
        return ("at", 0)
    unit_s = {"s": 1, "m": 60, "h": 3600, "d": 86_400}.get(value[-1:])
    right = unit_s and 1 <= len(value[:-1]) <= 9 and set(value[:-1]) <= set("0123456789")
    return ("ago", int(value[:-1]) * unit_s * 1_000_000) if right and unit_s else None


def number(value: str) -> tuple[str, int] | None:
    """A number of events that may be asked for; None if it is none."""
    right = 1 <= len(value) <= 8 and set(value) <= set("0123456789") and int(value) <= 10_000
    return ("last", int(value)) if right else None


def wanted(pairs: Pairs) -> Wanted | None:
    """What is asked for; None if it is to be refused."""
    names = [value for key, value in pairs if key == "channel"]
    channels: dict[str, tuple[str, int] | None] = dict.fromkeys(names or [DEFAULT])
    current = None if names else DEFAULT
    values: dict[str, set[str]] = {"type": set(), "source": set(), "severity": set()}
    for key, value in pairs:
        if key == "channel":
            current = value
        elif key in ("since", "last") and value:
            begin = (position(value) or instant(value)) if key == "since" else number(value)
            if current is None or channels[current] is not None or begin is None:
                return None
            channels[current] = begin
        elif key in values and 1 <= len(value) <= 256:
            values[key].add(value)
        elif not key.startswith("_") and (key not in ("since", "last") or value):
            return None
    if (
        len(channels) < len(names)
        or not all(map(is_channel, channels))
        or any(len(v) > 32 for v in values.values())
    ):
        return None
    if not values["severity"] <= {"critical", "warning", "info"}:
        return None
    return Wanted(channels, *map(frozenset, values.values()))


def where(since: Position | Last | Instant) -> tuple[str, int]:
    if isinstance(since, Instant):
        return ("ago" if since.ago else "at", since.us)
    return ("last", since.events) if isinstance(since, Last) else (since.epoch, since.offset)


def said(ask: SubscribeRequest) -> Wanted:
    """An `SubscribeRequest` in the words of the oracle."""
    kept = ask.filter
    channels = {name: since and where(since) for name, since in ask.channels}
    return Wanted(channels, kept.types, kept.sources, kept.severities)


def check_complaint(error: ValueError) -> None:
    """A complaint goes into an answer: it is short, and can be encoded."""
    assert len(str(error).encode()) < 2000


def answer(query: tuple[tuple[str, str], ...]) -> Wanted | None:
    """What the product says; any other exception than ValueError fails the test, and so does a long complaint."""
    try:
        return said(read_query(query, DEFAULT))
    except ValueError as error:
        check_complaint(error)
        return None


KEYS: Final = st.sampled_from(
    ["channel", "since", "last", "type", "source", "severity"] * 3 + ["", "Channel", "token", "since ", "_", "_t"]
)
VALUES: Final = st.one_of(
    st.sampled_from(["events.critical", "events.a", "events.b", "e1-5", "e1-0", "critical", "info", "warning"]),
    st.sampled_from(["", "*", "a" * 128, "a" * 129, "x" * 256, "x" * 257, "e1-9007199254740992", "٣-3", "e1-٣"]),
    st.sampled_from(["all", "10m", "0s", "999999999d", "1234567890s", "m", "-1h", "٣m", "2026-11-27", "10M"]),
    st.text(max_size=8),
)
PAIRS: Final = st.lists(st.tuples(KEYS, VALUES), max_size=8)
MANY: Final = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["type", "source"]), st.integers(0, 60).map(str)),
        st.tuples(st.just("severity"), st.sampled_from(["critical", "warning", "info"])),
    ),
    max_size=60,
)


@fuzzed(240)
@given(st.one_of(PAIRS, MANY))
def test_a_query_is_read_as_the_contract_says(pairs: Pairs) -> None:
    """Right parameters in any order, wrong ones, and everything between."""
    assert answer(tuple(pairs)) == wanted(pairs)


@fuzzed(120)
@given(PAIRS, st.sampled_from([quote, quote_plus, functools.partial(quote, safe="")]))
def test_a_query_comes_out_of_a_url_as_it_was_put_in(pairs: Pairs, write: Any) -> None:
    """Every way of escaping means the same; nothing of a value is lost."""
    pairs = [
        (key, value) for key, value in pairs if not any(0xD800 <= ord(letter) < 0xE000 for letter in key + value)
    ]
    target = wire.Target.parse("/ws?" + "&".join(f"{write(key)}={write(value)}" for key, value in pairs))
    assert target.path == "/ws"
    assert list(target.query) == pairs
    assert answer(target.query) == wanted(pairs)


@fuzzed(200)
@given(
    st.one_of(
        st.text(max_size=60),
        st.text(st.characters(categories=("Cs", "Cc", "Lu")), max_size=9),
        st.text("/?#&=%:@[]0Fa;+-.", max_size=40),
        st.text("/?#&=%:@[]0Fa;+-.chanelsi", max_size=60).map("/ws?{}".format),
        st.text(max_size=30).map("/ws?channel=events.a&{}".format),
    )
)
@example("//[")
@example("/ws?channel=%00")
@example("/ws?" + "&" * 1000)
def test_any_path_is_read_or_refused(path: str) -> None:
    """A path is a ValueError, or a query that obeys the rules, or is refused as one that does not."""
    try:
        query = wire.Target.parse(path).query
    except ValueError:
        return
    assert answer(query) == wanted(list(query))


def test_all_that_the_limits_allow_can_be_asked_for_at_once() -> None:
    """16 channels with their positions, and as many values of each filter as there may be."""
    pairs: Pairs = []
    for number in range(16):
        pairs += [("channel", f"events.{number}"), ("since", f"e1-{number}")]
    pairs += [(key, str(number)) for key in ("type", "source") for number in range(32)]
    pairs += [("severity", severity) for severity in ("critical", "warning", "info")]
    assert wanted(pairs) is not None
    target = wire.Target.parse("/ws?" + "&".join(f"{key}={value}" for key, value in pairs))
    assert answer(target.query) == wanted(pairs)


# What is shown: headers and tokens

HEADER_TEXT: Final = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(max_codepoint=0xFF), max_size=12),
    st.sampled_from(
        ["Bearer ", "bearer x", "Bearer  x ", "Basic eDp5", "bearer.", "bearer.eA", "bearer.eA==", "bearer.*"]
    ),
    st.sampled_from(
        ["broadcaster.v1, bearer.eHk", "bearer._-8", "bearer.\ud800", "Bearer \ud800", ",", " , bearer.é"]
    ),
    st.binary(max_size=9).map(lambda data: "bearer." + base64.urlsafe_b64encode(data).decode().rstrip("=")),
)
HEADERS: Final = st.lists(
    st.tuples(
        st.sampled_from(["Authorization", "authorization", "Sec-WebSocket-Protocol", "Host", "Origin", "Cookie"]),
        HEADER_TEXT,
    ),
    max_size=5,
)


def assert_tells_nothing(error: ValueError) -> None:
    """What is shown must not be told: there is only one complaint for each way of showing."""
    assert str(error) in (
        "Authorization has more than one bearer token",
        "a subprotocol bearer. is followed by base64url",
    )


def headers_of(fields: Pairs) -> Headers:
    headers = Headers()
    for name, value in fields:
        headers.set_insecure(name, value)
    return headers


@fuzzed(200)
@given(HEADERS)
def test_a_token_is_found_where_it_may_stand_and_nowhere_else(fields: Pairs) -> None:
    """In one `Authorization: Bearer`, else in a subprotocol; anything else is no token, or is said to be wrong."""
    said = [value.strip().partition(" ") for name, value in fields if name.lower() == "authorization"]
    shown = [token.strip() for scheme, _, token in said if scheme.lower() == "bearer" and token.strip()]
    offered = [
        name.strip() for key, value in fields if key == "Sec-WebSocket-Protocol" for name in value.split(",")
    ]
    hidden = [name.removeprefix("bearer.") for name in offered if name.startswith("bearer.")]
    try:
        token = token_of(headers_of(fields))
    except ValueError as error:
        assert len(shown) > 1 or hidden
        assert_tells_nothing(error)
    else:
        if shown:
            assert shown == [token]
        elif hidden:
            assert token is not None
            assert base64.urlsafe_b64encode(token.encode()).decode().rstrip("=") == hidden[0].rstrip("=")
        else:
            assert token is None


@fuzzed(80)
@given(st.text(max_size=40).filter(lambda text: text.strip() == text != ""), st.booleans())
def test_every_token_can_be_shown_in_a_subprotocol(token: str, first: bool) -> None:
    """Also one that a header could not carry."""
    name = "bearer." + base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")
    offers = [name, "broadcaster.v1"] if first else ["broadcaster.v1", name]
    assert token_of(headers_of([("Sec-WebSocket-Protocol", ", ".join(offers))])) == token


SECRET: Final = "s" * 32
ED25519: Final = Ed25519PrivateKey.generate()
PEM: Final = ED25519.private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
).decode()
TOKENS: Final = AuthTable(
    mode="token",
    api_keys=(ApiKey.model_validate({"name": "wall", "key": "wall-key-0123456789", "subscribe": ["events.*"]}),),
    jwt_keys=(
        JwtKey.model_validate({"algorithm": "HS256", "key": SECRET, "kid": "a"}),
        JwtKey.model_validate({"algorithm": "EdDSA", "key": PEM}),
    ),
    issuer="house",
)
LEEWAY_S: Final = TOKENS.leeway_s


def check_denial(denied: Denied, token: str) -> None:
    """Its cause is out of the fixed set, and nothing of the token is told."""
    assert denied.cause in CAUSES
    assert len(token) < 8 or token not in str(denied)


def grant(token: str | None) -> Grant | None:
    """What the product grants; any other exception than `Denied` fails the test."""
    try:
        return Access(TOKENS).grant(token)
    except Denied as denied:
        check_denial(denied, token or "")
        return None


@fuzzed(160)
@given(
    st.one_of(
        st.none(),
        st.text(max_size=30),
        st.text(st.characters(categories=("Cs", "Cc", "Ll")), max_size=9),
        st.lists(
            st.one_of(st.text(max_size=9), st.sampled_from(["e30", "W10", "bnVsbA", "MQ"])), min_size=3, max_size=3
        ).map(".".join),
    )
)
@example("\ud800")
@example("\0" * 10)
@example("..")
@example("." * 100)
def test_arbitrary_text_opens_no_door(token: str | None) -> None:
    """It is denied, with a cause out of the fixed set."""
    assert grant(token) is None


ODD: Final = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(
        [10**400, -(10**400), "1e400", "9" * 5000, "house", "broadcaster", ["broadcaster"], ["house"]]
    ),
    st.text(max_size=5),
    st.lists(st.text(max_size=4), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
)
NOW: Final = int(time.time())
CLAIMS: Final[dict[str, Any]] = {
    "sub": "wall",
    "exp": NOW + 86_400,
    "nbf": NOW - 60,
    "iat": NOW - 60,
    "aud": "broadcaster",
    "iss": "house",
    "subscribe": ["events.*"],
    "publish": [],
}
TIMES: Final = st.one_of(
    st.integers(NOW - 100, NOW + 100),
    st.floats(),
    st.sampled_from([str(NOW + 50), f"{NOW + 50}.5", "inf", float("inf"), 2**63, 10**30, 1e300, -1, True, None]),
)


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Any]:
    changed = draw(st.dictionaries(st.sampled_from([*CLAIMS, "jti", "crit"]), ODD, max_size=2))
    changed |= draw(st.dictionaries(st.sampled_from(["exp", "nbf", "iat"]), TIMES, max_size=2))
    return {key: value for key, value in (CLAIMS | changed).items() if value is not None}


def segment(value: Any) -> bytes:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")


def signed(header: Any, claims: Any, algorithm: str) -> str:
    """A token with a right signature, whatever it says."""
    signing = segment(header) + b"." + segment(claims)
    if algorithm == "EdDSA":
        signature = ED25519.sign(signing)
    else:
        secret = jwt.get_algorithm_by_name("HS256")
        signature = secret.sign(signing, secret.prepare_key(SECRET))
    return (signing + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


@fuzzed(240)
@given(changes(), st.sampled_from(["HS256", "EdDSA"]))
def test_a_signed_token_is_good_for_what_it_says_and_never_longer(claims: dict[str, Any], algorithm: str) -> None:
    """Whatever types its claims have: it is denied, or all that is required is there, and right."""
    granted = grant(signed({"alg": algorithm, "typ": "JWT"}, claims, algorithm))
    if granted is not None:
        now = time.time()
        assert claims["aud"] == "broadcaster" or "broadcaster" in claims["aud"]
        assert claims["iss"] == "house"
        assert float(claims["exp"]) > now - LEEWAY_S - 1
        assert "nbf" not in claims or float(claims["nbf"]) <= now + LEEWAY_S + 1
        assert list(granted.subscribe) == claims.get("subscribe", [])
        assert list(granted.publish) == claims.get("publish", [])
        assert granted.expires_at is not None
        assert granted.expires_at <= float(claims["exp"]) + LEEWAY_S
        for channel in ("events.a", "", "[", "x" * 128):
            assert not granted.may_publish(channel) or granted.publish
            assert isinstance(granted.may_subscribe(channel), bool)
    else:
        assert claims != CLAIMS, "a good token was refused"


@fuzzed(120)
@given(
    st.one_of(
        ODD, st.dictionaries(st.sampled_from(["alg", "typ", "kid", "crit", "b64", "jwk", "x5c", "zip"]), ODD)
    ),
    st.sampled_from(["HS256", "EdDSA", "none", "HS512", "ES256"]),
    st.sampled_from(["HS256", "EdDSA"]),
)
def test_a_header_chooses_no_algorithm(header: Any, named: str, algorithm: str) -> None:
    """Only the algorithm of the key that has signed is good; odd headers are denied like bad ones."""
    if isinstance(header, dict):
        header = {"alg": named} | header
    if grant(signed(header, CLAIMS, algorithm)) is not None:
        assert header["alg"] == algorithm


@fuzzed(160)
@given(
    mutated(
        st.sampled_from([signed({"alg": name}, CLAIMS, name).encode() for name in ("HS256", "EdDSA")]),
        [b".", b"="],
    )
)
def test_a_damaged_token_is_denied(damaged: bytes) -> None:
    """Whatever was changed: either it says the same still, byte for byte, or it opens nothing."""
    token = damaged.decode("latin-1")
    if grant(token) is not None:
        header, claims, _ = token.split(".")
        assert json.loads(base64.urlsafe_b64decode(claims + "==")) == CLAIMS
        assert json.loads(base64.urlsafe_b64decode(header + "=="))["alg"] in ("HS256", "EdDSA")


UNREADABLE: Final = {"alone": b"\xff", "as a JWT": b"a.\xff.c", "in a good key": b"wall-key-0123456789\xff"}


def test_no_token_is_an_error_of_the_hub() -> None:
    """Bytes that are no text are denied (401) on both ways in, by HTTP and by WebSocket; no traceback."""
    with (
        RedisServer.start() as server,
        HubThread(
            server.url,
            BROADCASTER_AUTH__MODE="token",
            BROADCASTER_AUTH__API_KEYS='[{"name": "wall", "key": "wall-key-0123456789", "publish": ["*"]}]',
        ) as hub,
    ):
        hub.until_ready()
        for token in UNREADABLE.values():
            shown = b"Host: hub\r\nAuthorization: Bearer " + token + b"\r\n"
            page = b"POST /publish HTTP/1.1\r\n" + shown + b"Content-Length: 2\r\n\r\n{}"
            for sent in (page, b"GET /ws HTTP/1.1\r\n" + shown + UPGRADE + b"\r\n"):
                with socket.create_connection(("127.0.0.1", hub.port), timeout=5 * UNIT_S) as stranger:
                    stranger.sendall(sent)
                    assert stranger.recv(65_536).startswith(b"HTTP/1.1 401 "), sent
        assert_calm(hub)


# The gate


class Door(NamedTuple):
    """A gate, and how to ask it something inside of its event loop."""

    runner: asyncio.Runner
    gates: dict[str, AdmissionControl]


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    """Two gates before the same channels: one for everybody, and one for those who have a token."""
    with unblocked(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

        async def build() -> dict[str, AdmissionControl]:
            house = House()
            await house.settle()
            tables = {"none": AuthTable(), "token": TOKENS}
            return {
                mode: AdmissionControl(Settings(auth=table), house.channels, Access(table), house.registry)
                for mode, table in tables.items()
            }

        yield Door(runner, runner.run(build()))


TARGETS: Final = st.builds(
    wire.Target,
    path=st.just("/ws"),
    query=st.one_of(PAIRS, MANY).map(tuple),
    host=st.one_of(st.sampled_from(["hub.example", "hub.example:8765"]), st.text(max_size=9)),
    origin=st.one_of(st.none(), st.sampled_from(["http://hub.example", "null", "https://"]), st.text(max_size=9)),
    token=st.one_of(st.none(), st.just("wall-key-0123456789"), st.text(max_size=20)),
    fault=st.one_of(st.just(""), st.text(max_size=9)),
)
ADDRESSES: Final = st.one_of(
    st.ip_addresses().map(str), st.sampled_from(["", "fe80::1%eth0", "::ffff:192.0.2.1", "::", "2001:db8::1%5"])
)
STATUSES: Final = {400, 401, 403, 404, 503}


@fuzzed(200)
@given(TARGETS, ADDRESSES, st.sampled_from(["none", "token"]))
def test_the_gate_admits_or_says_why_not(door: Door, target: wire.Target, address: str, mode: str) -> None:
    """Whatever is asked for and shown: one documented status, and one count of one cause."""
    gate = door.gates[mode]

    async def ask() -> Admitted | wire.Refusal:
        return gate.admit(target, address)

    before = dict(gate.refused)
    decision = door.runner.run(ask())
    counted = {cause: count - before[cause] for cause, count in gate.refused.items() if count > before[cause]}
    assert set(gate.refused) == set(REFUSALS)
    if isinstance(decision, Admitted):
        assert not counted
        assert not target.fault
        assert said(decision.request) == wanted(list(target.query))
        assert mode == "none" or target.token == "wall-key-0123456789"
    else:
        assert list(counted.values()) == [1]
        assert decision.status in STATUSES
        assert (decision.status == 503) == (decision.retry_after_s is not None)


HEADER_LINES: Final = st.lists(
    st.one_of(
        st.binary(max_size=20).filter(lambda line: b"\n" not in line and b"\r" not in line),
        st.builds(
            lambda name, value: name + b": " + value,
            st.sampled_from([b"Origin", b"Authorization", b"Sec-WebSocket-Protocol", b"Host", b"Cookie"]),
            st.binary(max_size=12).filter(lambda value: b"\n" not in value and b"\r" not in value),
        ),
        HEADERS.map(lambda fields: "\r\n".join(f"{k}: {v}" for k, v in fields).encode("utf-8", "replace")),
    ),
    max_size=3,
)
UPGRADE: Final = (
    b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)


@fuzzed(200)
@given(
    st.one_of(
        st.just(b"/ws"),
        st.binary(max_size=20).map(lambda data: b"/ws?" + data.translate(None, b" \t\n\r\x0b\x0c")),
    ),
    HEADER_LINES,
    st.sampled_from(["none", "token"]),
)
def test_an_upgrade_with_odd_headers_is_answered(door: Door, path: bytes, lines: list[bytes], mode: str) -> None:
    """One answer of a documented kind: never nothing, never an error of the hub's own."""
    head = (
        b"GET " + path + b" HTTP/1.1\r\n" + UPGRADE + b"".join(line + b"\r\n" for line in lines if line) + b"\r\n"
    )

    async def ask() -> wire.Answer[Admitted]:
        return wire.answer_upgrade(head, lambda target: door.gates[mode].admit(target, "192.0.2.1"))

    given_answer = door.runner.run(ask())
    assert given_answer.response.startswith(b"HTTP/1.1 ")
    status = int(given_answer.response[9:12])
    assert status in STATUSES | {101, 405, 426, 431}
    assert (status == 101) == (given_answer.admitted is not None)
    assert b"bearer." not in given_answer.response.partition(b"\r\n\r\n")[0].lower()
