"""Who gets in: tokens, origins and TLS on real sockets of a real hub, and what is published over HTTP."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from broadcaster.auth.tokens import create_token
from broadcaster.core.errors import ConfigurationError, HubRefused
from broadcaster.core.event import Event
from broadcaster.publish.publisher import Publisher
from broadcaster.redis.server import RedisServer
from broadcaster.settings import AuthTable, Settings, SubscriberTable
from broadcaster.subscribe.hub_status import statistics
from broadcaster.subscribe.subscriber import Subscriber
from tests.auth.test_access import (
    ATTACKER,
    ED25519,
    HOUR_S,
    OTHER_SECRET,
    SECRET,
    by_hmac,
    claims,
    eddsa,
    encoded,
    headed,
    hs256,
    public_pem,
    token,
)
from tests.certificates import Certificates, make, private_pem
from tests.support import (
    MONITOR_KEY,
    UNIT_S,
    CommandLine,
    Hub,
    HubProcess,
    HubThread,
    RawClient,
    RedisClient,
    assert_calm,
    broadcaster,
    crashed,
    event_payload,
    eventually,
    finished,
    free_port,
    frozen,
    in_loop,
    memory_bytes,
    next_but_ping,
    read_to_end,
    redis_client,
    until,
    upgrade_request,
)

WALL = "wall-key_0123456789"
"""An API key that is good for events.*, and for publishing nowhere."""

DESK = "desk-Token-Basic-key_0123456789"
"""An API key that is good for publishing on events.info, and for receiving from there."""

ROOT_KEY = "root-key_0123456789"
"""An API key that is good for everything."""

API_KEYS = [
    {"name": "wall", "key": WALL, "subscribe": ["events.*"]},
    {"name": "desk", "key": DESK, "subscribe": ["events.info"], "publish": ["events.info"]},
    {"name": "root", "key": ROOT_KEY, "subscribe": ["*"], "publish": ["*"]},
]

ALLOWED = ["https://wall.example", "http://127.0.0.1:3000", "app://desk"]

GUARDED = {
    "BROADCASTER_AUTH__MODE": "token",
    "BROADCASTER_AUTH__API_KEYS": json.dumps(API_KEYS),
    "BROADCASTER_AUTH__JWT_KEYS": json.dumps([hs256(), eddsa()]),
    "BROADCASTER_AUTH__ISSUER": "https://issuer.example",
    "BROADCASTER_AUTH__LEEWAY_S": "0",
    "BROADCASTER_HUB__ALLOWED_ORIGINS": json.dumps(ALLOWED),
}
"""A hub with access control: two keys for tokens, three API keys, no leeway."""


@pytest.fixture(scope="module")
def guarded(steady_redis: RedisServer) -> Iterator[Hub]:
    """A hub with access control, for tests that leave it as it is."""
    with HubThread(steady_redis.url, None, **GUARDED) as hub:
        yield hub.until_ready()


class Guest(RawClient):
    """A client with a request of its own; the bytes of the answer's head are in `response`."""

    def __init__(
        self, port: int, request: bytes, *, tls: ssl.SSLContext | None = None, receive_buffer: int = 0
    ) -> None:
        super().__init__(port, request=request, tls=tls, receive_buffer=receive_buffer)


def ask(port: int, request: bytes, tls: ssl.SSLContext | None = None) -> bytes:
    """Everything that the hub says to a request until it closes the connection."""
    with contextlib.ExitStack() as stack:
        connection: socket.socket = stack.enter_context(
            socket.create_connection(("127.0.0.1", port), timeout=10 * UNIT_S)
        )
        if tls:
            connection = stack.enter_context(tls.wrap_socket(connection, server_hostname="127.0.0.1"))
        connection.sendall(request)
        answer = b""
        while more := connection.recv(65_536):
            answer += more
        return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def header_of(answer: bytes, name: str) -> str | None:
    """The value of a header; None if it is not there."""
    for line in answer.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]:
        key, _, value = line.partition(": ")
        if key.lower() == name.lower():
            return value
    return None


def bearer(shown: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {shown}"}


def offered(shown: str) -> str:
    """A token as a subprotocol, as browsers have to show it."""
    return f"bearer.{encoded(shown.encode())}"


def good(**changes: Any) -> str:
    return token(body=claims(**changes))


def client_settings(**subscriber: Any) -> Settings:
    return Settings(subscriber=SubscriberTable(reconnect_max_s=0.1, **subscriber))


# Ways to show a token

WAYS: dict[str, tuple[Callable[[str], dict[str, str]], str | None]] = {
    "header": (bearer, None),
    "header, scheme in small letters": (lambda shown: {"Authorization": f"bearer {shown}"}, None),
    "header, more blanks": (lambda shown: {"Authorization": f"Bearer   {shown} "}, None),
    "header, with v1": (
        lambda shown: bearer(shown) | {"Sec_WebSocket_Protocol": "broadcaster.v1"},
        "broadcaster.v1",
    ),
    "subprotocol alone": (lambda shown: {"Sec_WebSocket_Protocol": offered(shown)}, None),
    "subprotocol with v1": (
        lambda shown: {"Sec_WebSocket_Protocol": f"broadcaster.v1, {offered(shown)}"},
        "broadcaster.v1",
    ),
    "subprotocol before v1": (
        lambda shown: {"Sec_WebSocket_Protocol": f"{offered(shown)},broadcaster.v1"},
        "broadcaster.v1",
    ),
    "subprotocol with plain": (
        lambda shown: {"Sec_WebSocket_Protocol": f"{offered(shown)}, broadcaster.plain"},
        "broadcaster.plain",
    ),
    "subprotocol with padding": (
        lambda shown: {
            "Sec_WebSocket_Protocol": f"bearer.{base64.urlsafe_b64encode(shown.encode()).decode().rstrip('=')}"
        },
        None,
    ),
    "subprotocol in a second line": (
        lambda shown: {
            "Sec_WebSocket_Protocol": f"broadcaster.v1\r\nSec-WebSocket-Protocol: {offered(shown)}",
        },
        "broadcaster.v1",
    ),
    "header before subprotocol": (
        lambda shown: bearer(shown) | {"Sec_WebSocket_Protocol": offered("not-this-one_01234")},
        None,
    ),
}

SHOWN: dict[str, Callable[[], str]] = {
    "an API key": lambda: WALL,
    "HS256": good,
    "EdDSA": lambda: headed(ED25519.sign, alg="EdDSA"),
}


@pytest.mark.parametrize("make_token", SHOWN.values(), ids=SHOWN.keys())
@pytest.mark.parametrize(("way", "selected"), WAYS.values(), ids=WAYS.keys())
def test_a_good_token_is_let_in_and_never_echoed(
    guarded: Hub,
    client: RedisClient,
    way: Callable[[str], dict[str, str]],
    selected: str | None,
    make_token: Callable[[], str],
) -> None:
    """By header or subprotocol the events come; the answer selects ours or none, and has nothing of the token."""
    shown = make_token()
    with Guest(guarded.port, upgrade_request(guarded.port, **way(shown))) as guest:
        assert guest.response.startswith(b"HTTP/1.1 101 ")
        assert header_of(guest.response, "Sec-WebSocket-Protocol") == selected
        assert b"bearer" not in guest.response
        assert shown.encode() not in guest.response
        payload = event_payload()
        client.publish(payload)
        text = guest.text()
        if selected == "broadcaster.v1":
            assert json.loads(text)["control"] == "welcome"
            text = guest.text()
        assert text.encode() == payload


# Refused before the upgrade

HOUR_AGO, IN_AN_HOUR = int(time.time()) - HOUR_S, int(time.time()) + HOUR_S

REFUSED: dict[str, tuple[dict[str, str], str, int, str]] = {
    # headers, path, status, cause
    "nothing shown": ({}, "/ws", 401, "token_missing"),
    "a token in the query": ({}, f"/ws?token={WALL}", 401, "token_missing"),
    "a key in the query": ({}, f"/ws?access_token={WALL}&channel=events.info", 401, "token_missing"),
    "an empty subprotocol": ({"Sec_WebSocket_Protocol": "bearer."}, "/ws", 401, "token_missing"),
    "an unknown key": (bearer(f"{WALL}x"), "/ws", 401, "token_unknown_key"),
    "an unknown key as subprotocol": (
        {"Sec_WebSocket_Protocol": f"broadcaster.v1, {offered(WALL + 'x')}"},
        "/ws",
        401,
        "token_unknown_key",
    ),
    "garbage": (bearer("garbage.in.parts"), "/ws", 401, "token_malformed"),
    "algorithm none": (bearer(headed(lambda text: b"", alg="none")), "/ws", 401, "token_algorithm"),
    "signed with the public key": (bearer(headed(by_hmac(public_pem(ED25519)))), "/ws", 401, "token_signature"),
    "another secret": (bearer(headed(by_hmac(OTHER_SECRET))), "/ws", 401, "token_signature"),
    "another key": (bearer(headed(ATTACKER.sign, alg="EdDSA")), "/ws", 401, "token_signature"),
    "expired": (bearer(good(exp=HOUR_AGO)), "/ws", 401, "token_expired"),
    "not yet valid": (bearer(good(nbf=IN_AN_HOUR)), "/ws", 401, "token_not_yet_valid"),
    "for somebody else": (bearer(good(aud="other")), "/ws", 401, "token_audience"),
    "of somebody else": (bearer(good(iss="other")), "/ws", 401, "token_issuer"),
    "without an end": (bearer(good(exp=...)), "/ws", 401, "token_claims"),
    "another scheme": ({"Authorization": f"Basic {WALL}"}, "/ws", 401, "token_missing"),
    "no scheme": ({"Authorization": WALL}, "/ws", 401, "token_missing"),
    "a scheme only": ({"Authorization": "Bearer "}, "/ws", 401, "token_missing"),
    "two headers": ({"Authorization": f"Bearer {WALL}\r\nAuthorization: Bearer {WALL}"}, "/ws", 400, "malformed"),
    "subprotocol is no base64": ({"Sec_WebSocket_Protocol": "bearer.~~~"}, "/ws", 400, "malformed"),
    "subprotocol is no text": ({"Sec_WebSocket_Protocol": "bearer._____w"}, "/ws", 400, "malformed"),
    "a foreign channel": (bearer(DESK), "/ws?channel=events.critical", 403, "forbidden_channel"),
    "the default channel, not granted": (bearer(DESK), "/ws", 403, "forbidden_channel"),
    "a foreign channel among several": (
        bearer(DESK),
        "/ws?channel=events.info&channel=events.critical",
        403,
        "forbidden_channel",
    ),
    "a foreign channel of a token": (
        bearer(good(subscribe=["events.info"])),
        "/ws?channel=events.critical",
        403,
        "forbidden_channel",
    ),
    "a token for nothing": (bearer(good(subscribe=[])), "/ws", 403, "forbidden_channel"),
    "a token to publish with": (bearer(good(subscribe=[], publish=["*"])), "/ws", 403, "forbidden_channel"),
    "a foreign channel that is not there": (bearer(WALL), "/ws?channel=other", 403, "forbidden_channel"),
    "a channel that is not there": (bearer(ROOT_KEY), "/ws?channel=other", 404, "unknown_channel"),
    "a channel of hubs": (bearer(ROOT_KEY), "/ws?channel=broadcaster.hub.x", 404, "unknown_channel"),
    "a wrong query": (bearer(WALL), "/ws?chanel=events.info", 400, "query"),
    "a page of another site": (bearer(WALL) | {"Origin": "https://evil.example"}, "/ws", 403, "origin"),
    "a page of another site without a token": ({"Origin": "https://evil.example"}, "/ws", 403, "origin"),
}

_SECRETS = [SECRET, WALL, DESK, ROOT_KEY]


@pytest.mark.parametrize(("headers", "path", "status", "cause"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refusal_says_which_check_failed_and_is_counted(
    guarded: Hub, headers: dict[str, str], path: str, status: int, cause: str
) -> None:
    """One status, one cause, one counter; `WWW-Authenticate` with 401 only, and nothing of what was shown."""
    request = upgrade_request(guarded.port, path=path, **headers)
    before = guarded.stats()
    answer = ask(guarded.port, request)
    after = guarded.stats()
    assert status_of(answer) == status, answer
    counted = {name: count - before["refused"][name] for name, count in after["refused"].items()}
    assert {name: count for name, count in counted.items() if count} == {cause: 1}
    assert header_of(answer, "WWW-Authenticate") == ("Bearer" if status == 401 else None)
    assert header_of(answer, "Sec-WebSocket-Protocol") is None
    body = answer.partition(b"\r\n\r\n")[2].decode()
    if cause.startswith("token_"):
        assert json.loads(body) == {"error": f"access denied: {cause.removeprefix('token_').replace('_', ' ')}"}
    shown = [value.split()[-1] for value in headers.values() if len(value.split()[-1]) > 12]
    assert not [part for part in (*shown, *_SECRETS) if part in body and "Origin" not in headers]


@pytest.mark.parametrize(
    "shown", [b"\xff\xfe\xfd" * 9, b"\xff.\xfe.\xfd", "ключ".encode()], ids=["key", "JWT", "UTF-8"]
)
def test_bytes_that_no_token_can_have_are_no_token(guarded: Hub, shown: bytes) -> None:
    """401, whatever the bytes may mean as text."""
    lines = len(guarded.lines)
    answer = ask(guarded.port, upgrade_request(guarded.port, **bearer("?")).replace(b"r ?", b"r " + shown))
    assert status_of(answer) == 401
    assert shown not in answer
    assert_calm(guarded, lines)


def test_nothing_of_a_token_is_said_by_the_hub(guarded: Hub) -> None:
    """Not in its log, not in /stats, not in /health: of those who are in, and of those who are not."""
    shown = {WALL, DESK, ROOT_KEY, SECRET, good(), offered(WALL)}
    for headers, path, _, _ in REFUSED.values():
        ask(guarded.port, upgrade_request(guarded.port, path=path, **headers))
        shown |= {value.split()[-1] for value in headers.values() if "Origin" not in headers}
    with Guest(guarded.port, upgrade_request(guarded.port, **bearer(WALL))):
        pages = [guarded.get(path) for path in ("/health", "/health/live")]
        said = guarded.output + json.dumps([guarded.stats(), *pages])
    assert not [one for one in shown if len(one) > 12 and one in said]
    assert_calm(guarded)


# Origins

OWN = "127.0.0.1:{port}"

ORIGINS: dict[str, tuple[str | None, str, int]] = {
    # Origin, Host, status
    "none": (None, OWN, 101),
    "the hub's own": (f"http://{OWN}", OWN, 101),
    "the hub's own behind TLS": (f"https://{OWN}", OWN, 101),
    "its name in capitals": ("http://LocalHost:{port}", "localhost:{port}", 101),
    "its name in capitals at the other place": ("http://localhost:{port}", "LOCALHOST:{port}", 101),
    "behind a proxy that keeps the name": ("https://events.example", "events.example", 101),
    "another port": ("http://127.0.0.1:1", OWN, 403),
    "no port": ("http://127.0.0.1", OWN, 403),
    "another name of the same machine": ("http://localhost:{port}", OWN, 403),
    "the hub's own in another scheme": (f"ftp://{OWN}", OWN, 403),
    "the hub's own as a beginning": (f"http://{OWN}.evil.example", OWN, 403),
    "the hub's own as a user": (f"http://{OWN}@evil.example", OWN, 403),
    "the hub's own with a path": (f"http://{OWN}/", OWN, 403),
    "one of the list": ("https://wall.example", OWN, 101),
    "another of the list": ("http://127.0.0.1:3000", OWN, 101),
    "an application of the list": ("app://desk", OWN, 101),
    "one of the list in another scheme": ("http://wall.example", OWN, 403),
    "one of the list at another port": ("https://wall.example:8443", OWN, 403),
    "a part of one of the list": ("https://sub.wall.example", OWN, 403),
    "one of the list as a beginning": ("https://wall.example.evil.example", OWN, 403),
    "one of the list as an end": ("https://evil-wall.example", OWN, 403),
    "foreign": ("https://evil.example", OWN, 403),
    "null": ("null", OWN, 403),
    "empty": ("", OWN, 403),
    "a file": ("file://", OWN, 403),
    "a star": ("*", OWN, 403),
    "two": ("https://wall.example\r\nOrigin: https://evil.example", OWN, 400),
    "two in one": ("https://wall.example, https://evil.example", OWN, 403),
}


def visit(hub: Hub, origin: str | None, host: str) -> int:
    """The status that a page of some site gets, with a good token."""
    headers = bearer(WALL) | {"Host": host.replace("{port}", str(hub.port))}
    if origin is not None:
        headers["Origin"] = origin.replace("{port}", str(hub.port))
    with Guest(hub.port, upgrade_request(hub.port, **headers)) as guest:
        return status_of(guest.response)


@pytest.mark.parametrize(("origin", "host", "status"), ORIGINS.values(), ids=ORIGINS.keys())
def test_a_page_connects_from_the_hubs_own_site_or_a_known_one(
    guarded: Hub, origin: str | None, host: str, status: int
) -> None:
    """Also with a good token: a browser shows it on behalf of whatever page."""
    assert visit(guarded, origin, host) == status


OPEN_ORIGINS: dict[str, tuple[list[str], dict[str | None, int]]] = {
    "everybody": (["*"], {None: 101, "https://evil.example": 101, "null": 101, "": 101}),
    "null": (["null"], {None: 101, "https://evil.example": 403, "null": 101, f"http://{OWN}": 101}),
}


@pytest.mark.parametrize(("allowed", "statuses"), OPEN_ORIGINS.values(), ids=OPEN_ORIGINS.keys())
def test_origins_can_be_opened(
    steady_redis: RedisServer, allowed: list[str], statuses: dict[str | None, int]
) -> None:
    """`*` is every page, `null` is those without a site, such as files; both only if they are in the list."""
    origins = {"BROADCASTER_HUB__ALLOWED_ORIGINS": json.dumps(allowed)}
    with HubThread(steady_redis.url, None, **(GUARDED | origins)) as hub:
        hub.until_ready()
        assert {origin: visit(hub, origin, OWN) for origin in statuses} == statuses


def test_the_log_says_which_origin_and_what_the_proxy_has_made_of_the_host(steady_redis: RedisServer) -> None:
    """Whoever forgets `proxy_set_header Host` finds it there; a stranger cannot fill or forge it."""
    with HubThread(steady_redis.url) as hub:
        hub.until_ready()
        for name in ("wall.example", "other.example", f"{'x' * 300}.example"):
            assert visit(hub, f"https://{name}", "hub") == 403
        [said] = [line for line in hub.lines if "this origin is not allowed" in line]
    assert said.endswith(
        "Origin https://wall.example, Host hub; neither this hub's own site, nor in hub.allowed_origins"
    )


# The end of a token


def test_a_token_that_expires_ends_its_connections(guarded: Hub) -> None:
    """4001, not before it has expired, and within 1.2 s after; whoever has another token stays."""
    expired = guarded.stats()["expired"]
    exp = int(time.time()) + 3
    plain: dict[str, str] = {}
    v1 = {"Sec_WebSocket_Protocol": "broadcaster.v1"}
    path = "/ws?channel=events.critical&channel=events.info"
    with contextlib.ExitStack() as stack:

        def enter(shown: str, more: dict[str, str]) -> RawClient:
            request = upgrade_request(guarded.port, path=path, **bearer(shown), **more)
            return stack.enter_context(Guest(guarded.port, request))

        stays = [enter(shown, more) for shown in (WALL, good(exp=exp + HOUR_S)) for more in (plain, v1)]
        ends = [enter(good(exp=exp), more) for more in (plain, v1, plain, v1)]
        for guest in ends:
            assert guest.close_code() == 4001
            assert exp <= time.time() < exp + 1.2 + 0.5 * UNIT_S
            assert guest.frames[-1][1][2:] == b"the token has expired"
        for guest in ends:
            guest.send(8, b"\x0f\xa1")
            read_to_end(guest)
        assert guarded.stats()["expired"] - expired == len(ends)
        for guest in stays:
            guest.send(9, b"still here")
            while next_but_ping(guest) != (10, b"still here"):
                assert guest.frames[-1][0] == 1


WRONG_CLAIMS: dict[str, tuple[dict[str, Any], str]] = {
    "no aud": ({"aud": ...}, "the claim aud is missing"),
    "no exp": ({"exp": ...}, "the claim exp is missing"),
    "sub is a number": ({"sub": 7}, "sub is no text"),
    "another aud": ({"aud": "other"}, "aud is not auth.audience, 'broadcaster'"),
    "another iss": ({"iss": "other"}, "iss is not auth.issuer, 'https://issuer.example'"),
    "over": ({"exp": HOUR_AGO}, "exp is in the past"),
    "too early": ({"nbf": IN_AN_HOUR}, "nbf or iat is in the future"),
    "rights are no list": ({"subscribe": "events.*"}, "subscribe and publish have to be lists of texts"),
}


def test_the_hubs_log_says_which_claim_is_wrong_and_the_client_is_told_less(steady_redis: RedisServer) -> None:
    """Each claim has its own sentence, with the address; each cause one line a minute."""
    with HubThread(steady_redis.url, None, **GUARDED) as hub:
        hub.until_ready()
        for changes, sentence in list(WRONG_CLAIMS.values()) * 3:
            answer = ask(hub.port, upgrade_request(hub.port, **bearer(good(**changes))))
            assert status_of(answer) == 401
            assert sentence not in answer.decode()
        lines = [line for line in hub.lines if "401" in line]
        assert len(lines) == len(WRONG_CLAIMS)
        for line, (_, sentence) in zip(lines, WRONG_CLAIMS.values(), strict=True):
            assert line.startswith("refused 127.0.0.1: 401 access denied: ")
            assert line.endswith(sentence)


def test_the_log_says_who_was_closed_and_why(steady_redis: RedisServer) -> None:
    """With the name of the token's holder and the address; connections are a matter of debugging."""
    with HubThread(steady_redis.url, None, **GUARDED) as hub:
        hub.until_ready()
        exp = int(time.time()) + 2
        shown = good(exp=exp, sub="wall-7")
        with Guest(hub.port, upgrade_request(hub.port, **bearer(shown))) as guest:
            assert guest.close_code() == 4001
        assert [line for line in hub.lines if line.startswith("closed ")] == [
            "closed wall-7@127.0.0.1: 4001 the token has expired"
        ]
        assert not any("connected: " in line for line in hub.lines)


def sign(lasts_s: float = HOUR_S, **changes: Any) -> str:
    """A token that is made as `broadcaster token create` makes it."""
    auth = AuthTable.model_validate({"jwt_keys": [hs256()], "issuer": "https://issuer.example"})
    grant: dict[str, Any] = {"subscribe": ["events.*"], "publish": []} | changes
    return create_token(auth, "test", lasts_s=lasts_s, **grant)


@in_loop
async def test_a_subscriber_with_fresh_tokens_loses_nothing(guarded: Hub, steady_redis: RedisServer) -> None:
    """Its token expires; it comes back with another one, and has every event once, in order."""
    asked: list[str] = []

    def fresh() -> str:
        asked.append(sign(lasts_s=2))
        return asked[-1]

    settings = Settings.model_validate({"redis": {"url": steady_redis.url}, "event": {"channel": "events.fresh"}})
    got: list[Event] = []
    async with (
        Publisher(settings) as publisher,
        Subscriber(guarded.url, settings=client_settings(), channels=["events.fresh"], token=fresh) as subscriber,
    ):

        async def take() -> None:
            async for event in subscriber:
                got.append(event)

        taking = asyncio.ensure_future(take())
        await until(lambda: subscriber.positions, "never connected")
        published: list[str] = []
        while subscriber.reconnects < 1 or not published:
            published.append((await publisher.publish("T", "s")).event.event_id)
            await asyncio.sleep(0.02)
            assert not taking.done()
        await until(lambda: len(got) >= len(published), "events are missing")
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        assert [event.event_id for event in got] == published
        assert (subscriber.gaps, subscriber.twins) == (0, 0)
        assert len(asked) == len(set(asked)) == subscriber.reconnects + 1


@in_loop
async def test_a_subscriber_whose_token_has_expired_is_refused_for_good(
    guarded: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    """With a token that does not change it says so, and does not try again; also when it expires on the way."""
    old, short = good(exp=HOUR_AGO), sign(lasts_s=1)
    for shown in (old, short):
        async with Subscriber(guarded.url, settings=client_settings(token=shown)) as subscriber:
            with pytest.raises(HubRefused, match="401 access denied: expired") as caught:
                await subscriber.receive()
            assert shown not in str(caught.value)
    assert old not in caplog.text
    assert short not in caplog.text


@in_loop
async def test_a_subscriber_shows_its_token_as_header(guarded: Hub) -> None:
    """The token of the settings, or the one that is given, which goes first; none is refused."""
    for settings, shown in ((client_settings(token=WALL), None), (client_settings(token="wrong" * 5), WALL)):
        async with Subscriber(guarded.url, settings=settings, token=shown) as subscriber:
            waiting = asyncio.ensure_future(subscriber.receive())
            await until(lambda: subscriber.positions, "never connected")
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
    async with Subscriber(guarded.url, settings=client_settings()) as subscriber:
        with pytest.raises(HubRefused, match="401 access denied: missing"):
            await subscriber.receive()


# Publishing over HTTP


def post(
    hub: Hub,
    body: bytes,
    authorization: bytes = b"",
    method: str = "POST",
    tls: ssl.SSLContext | None = None,
) -> tuple[int, bytes]:
    """Status and whole answer."""
    header = b"Authorization: %b\r\n" % authorization if authorization else b""
    head = b"%b /publish HTTP/1.1\r\nHost: a\r\n%bContent-Length: %d\r\n\r\n" % (
        method.encode(),
        header,
        len(body),
    )
    answer = ask(hub.port, head + body, tls)
    return status_of(answer), answer


def as_root() -> bytes:
    return f"Bearer {ROOT_KEY}".encode()


def event_body(**fields: Any) -> bytes:
    return json.dumps({"event_type": "T", "source": "s"} | fields).encode()


TAKEN: dict[str, tuple[bytes, dict[str, Any]]] = {
    "least": (event_body(), {"event_type": "T", "source": "s", "severity": "critical"}),
    "all": (
        event_body(severity="info", data={"a": [1, None, "ü"]}, channel="events.info"),
        {"severity": "info", "data": {"a": [1, None, "ü"]}},
    ),
    "data in data": (event_body(data=json.loads('{"a":' * 200 + "1" + "}" * 200)), {"event_type": "T"}),
    "a large number": (event_body(data={"n": 10**30}), {"data": {"n": 10**30}}),
    "nearly too large": (event_body(data={"a": "x" * 65_000}), {"data": {"a": "x" * 65_000}}),
}


@pytest.mark.parametrize(("body", "fields"), TAKEN.values(), ids=TAKEN.keys())
def test_what_is_published_over_http_arrives(guarded: Hub, body: bytes, fields: dict[str, Any]) -> None:
    """201 says where it is stored, and every subscriber gets it."""
    channel = json.loads(body).get("channel", "events.critical")
    before = guarded.stats()["published"]
    with Guest(
        guarded.port, upgrade_request(guarded.port, path=f"/ws?channel={channel}", **bearer(WALL))
    ) as guest:
        eventually(lambda: guarded.stats()["channels"].get(channel, {}).get("position"), "it was not opened")
        status, answer = post(guarded, body, as_root())
        assert status == 201, answer
        told = json.loads(answer.partition(b"\r\n\r\n")[2])
        event = guest.event()
        assert event | fields == event
        assert (event["event_id"], f"{event['epoch']}-{event['offset']}") == (told["event_id"], told["position"])
        assert event["channel"] == channel
    assert guarded.stats()["published"] == before + 1


NOT_TAKEN: dict[str, tuple[bytes, bytes, int]] = {
    # Authorization, body, status
    "no token": (b"", event_body(), 401),
    "an unknown key": (b"Bearer unknown-key_0123456789", event_body(), 401),
    "an expired token": (b"Bearer " + good(exp=HOUR_AGO, publish=["*"]).encode(), event_body(), 401),
    "another secret": (b"Bearer " + headed(by_hmac(OTHER_SECRET)).encode(), event_body(), 401),
    "bytes that are no text": (b"Bearer \xff\xfe\xfd\xfc" * 5, event_body(), 401),
    "no token, no event": (b"", b"{", 401),
    "a token to subscribe with": (b"Bearer " + WALL.encode(), event_body(), 403),
    "a JWT to subscribe with": (b"Bearer " + good(subscribe=["*"]).encode(), event_body(), 403),
    "a channel that is not granted": (b"Bearer " + DESK.encode(), event_body(), 403),
    "a channel of hubs": (as_root(), event_body(channel="broadcaster.hub.x"), 403),
    "no JSON": (as_root(), b"{", 400),
    "empty": (as_root(), b"", 400),
    "no UTF-8": (as_root(), b'{"event_type":"\xff","source":"s"}', 400),
    "a list": (as_root(), b"[]", 400),
    "null": (as_root(), b"null", 400),
    "nested deeply": (as_root(), b"[" * 20_000, 400),
    "an unknown field": (as_root(), event_body(sequence=5), 400),
    "a position of its own": (as_root(), event_body(epoch="abc"), 400),
    "no type": (as_root(), b'{"source":"s"}', 400),
    "no source": (as_root(), b'{"event_type":"T"}', 400),
    "type is a number": (as_root(), event_body(event_type=5), 400),
    "source is a list": (as_root(), event_body(source=["s"]), 400),
    "severity is unknown": (as_root(), event_body(severity="fatal"), 400),
    "severity is an object": (as_root(), event_body(severity={}), 400),
    "data is a list": (as_root(), event_body(data=[1]), 400),
    "data is a text": (as_root(), event_body(data="x"), 400),
    "data has a number that is none": (as_root(), event_body(data={"a": float("nan")}), 400),
    "data has half of a pair": (as_root(), event_body(data={"a": "\ud800"}), 400),
    "channel is a number": (as_root(), event_body(channel=5), 400),
    "channel is null": (as_root(), event_body(channel=None), 400),
    "channel is a list": (as_root(), event_body(channel=["events.info"]), 400),
    "channel is empty": (as_root(), event_body(channel=""), 400),
    "channel has a blank": (as_root(), event_body(channel="events critical"), 400),
    "event too large": (as_root(), event_body(data={"a": "x" * 65_470}), 413),
    "a key twice": (as_root(), event_body()[:-1] + b',"source":"b"}', 400),
    "a key of data twice": (as_root(), event_body()[:-1] + b',"data":{"a":1,"a":2}}', 400),
}


@pytest.mark.parametrize(("authorization", "body", "status"), NOT_TAKEN.values(), ids=NOT_TAKEN.keys())
def test_what_may_not_be_published_is_refused(
    guarded: Hub, authorization: bytes, body: bytes, status: int
) -> None:
    """The status says whose mistake it is; nothing is published, no token said, and the hub stays calm."""
    before, lines = guarded.stats()["events_received"], len(guarded.lines)
    answered, answer = post(guarded, body, authorization)
    assert answered == status, answer
    assert header_of(answer, "WWW-Authenticate") == ("Bearer" if status == 401 else None)
    shown = authorization.decode("latin-1").partition(" ")[2]
    assert not shown or shown not in answer.decode("latin-1")
    assert guarded.stats()["events_received"] == before
    assert_calm(guarded, lines)


def test_a_body_that_is_too_large_is_refused_before_it_comes(guarded: Hub) -> None:
    """Who announces it is answered at once; what may be published may be as large as the largest event."""
    head = "POST /publish HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\nConnection: close\r\n\r\n"
    answer = ask(guarded.port, head.format(2**20).encode())
    assert status_of(answer) == 413
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


@contextlib.contextmanager
def sending(
    port: int, size: int, tls: ssl.SSLContext | None = None, chunked: bool = False, path: str = "/publish"
) -> Iterator[socket.socket]:
    """A connection over which the head of a request was sent, and then all of a body, whatever is answered."""
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10 * UNIT_S))
        connection: socket.socket = plain
        if tls:
            connection = stack.enter_context(tls.wrap_socket(plain, server_hostname="127.0.0.1"))
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: a\r\n{length}\r\n\r\n".encode())
        piece = b"x" * 65_536
        if chunked:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        for _ in range(size // 65_536):
            connection.sendall(piece)
            time.sleep(0.001)  # long after the answer there is more to come
        yield connection


def all_of(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65_536), b""))


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "in chunks"])
def test_who_goes_on_sending_reads_the_refusal(guarded: Hub, chunked: bool) -> None:
    """The answer to a body beyond the limit is never overtaken by a reset, whenever it is read."""
    with sending(guarded.port, 4 * 2**20, chunked=chunked) as connection:
        answer = all_of(connection)
    assert status_of(answer) == 413
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.parametrize("path", ["/", "/health", "/ws", "/sse"])
def test_who_sends_where_nobody_reads_learns_it(guarded: Hub, path: str) -> None:
    """What is answered without a look at the body is not overtaken by a reset either."""
    with sending(guarded.port, 4 * 2**20, path=path) as connection:
        answer = all_of(connection)
    assert status_of(answer) in (400, 405)


def test_who_goes_on_sending_over_tls_reads_the_refusal(
    steady_redis: RedisServer, certificates: Certificates
) -> None:
    """There a connection cannot be ended in one direction; the answer says how long it is."""
    tls = {"BROADCASTER_HUB__TLS_CERT": certificates.certificate, "BROADCASTER_HUB__TLS_KEY": certificates.key}
    with HubThread(steady_redis.url, None, **GUARDED, **tls) as hub:
        hub.said("events get through")
        context = ssl.create_default_context(cafile=certificates.authority)
        with sending(hub.port, 2**20, context) as connection:
            assert status_of(connection.recv(65_536)) == 413


def test_who_asks_too_much_reads_it_too(steady_redis: RedisServer) -> None:
    """A request that is over its limit is refused at once, and its body may still come."""
    with HubThread(steady_redis.url, None, BROADCASTER_HUB__REQUESTS_PER_ADDRESS="1") as hub:
        hub.until_ready()
        ask(hub.port, b"GET /stats HTTP/1.1\r\nHost: a\r\n\r\n")
        with sending(hub.port, 2**20) as connection:
            answer = all_of(connection)
        assert status_of(answer) == 429


def test_who_sends_without_end_is_cut(steady_redis: RedisServer) -> None:
    """By bytes: 16 MiB; and by time: `hub.handshake_timeout_s`."""
    with HubThread(steady_redis.url, None, **GUARDED, BROADCASTER_HUB__HANDSHAKE_TIMEOUT_S="1") as hub:
        hub.until_ready()
        with pytest.raises(ConnectionError), sending(hub.port, 64 * 2**20):
            pass
        with sending(hub.port, 2**20) as connection:
            assert status_of(connection.recv(65_536)) == 413
            eventually(lambda: is_cut(connection), "it may send for ever")


def is_cut(connection: socket.socket) -> bool:
    """Whether the other end is gone: what is sent is answered by a reset."""
    try:
        connection.send(b"x")
    except ConnectionError:
        return True
    return False


@pytest.mark.parametrize("scheme", ["", "Token ", "XBearer ", "Basic ", "Bearer", "Bearer: "])
def test_another_scheme_shows_no_token_here_either(guarded: Hub, scheme: str) -> None:
    """A token stands behind `Bearer`, as at the upgrade, or there is none."""
    before = guarded.stats()["published"]
    assert post(guarded, event_body(), f"{scheme}{ROOT_KEY}".encode())[0] in (400, 401)
    assert guarded.stats()["published"] == before


def test_the_scheme_may_be_in_small_letters_here_as_well(guarded: Hub) -> None:
    """As at the upgrade (RFC 9110, 11.1)."""
    assert post(guarded, event_body(), b"bearer " + ROOT_KEY.encode())[0] == 201


def test_a_key_may_have_the_name_of_a_scheme_in_it(guarded: Hub) -> None:
    """What stands behind the scheme is the token, whatever it is."""
    assert "Token" in DESK
    assert post(guarded, event_body(channel="events.info"), b"Bearer " + DESK.encode())[0] == 201


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_only_post_publishes(guarded: Hub, method: str) -> None:
    """Another method is 405, and not by somebody who may publish either."""
    before = guarded.stats()["published"]
    assert post(guarded, event_body(), as_root(), method)[0] == 405
    assert guarded.stats()["published"] == before


def test_nobody_publishes_without_access_control(steady_hub: Hub) -> None:
    """With mode none, whoever can reach the hub could: so nobody can, token or not."""
    for authorization in (b"", as_root()):
        status, answer = post(steady_hub, event_body(), authorization)
        assert status == 403
        assert b"auth.mode" in answer


FAULTS: dict[str, Callable[[RedisServer], contextlib.AbstractContextManager[Any]]] = {
    "dead": crashed,
    "frozen": frozen,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_without_redis_a_publish_fails_in_time(
    redis: RedisServer, fault: Callable[[RedisServer], contextlib.AbstractContextManager[Any]]
) -> None:
    """503 before the hub gives up the request, in a word and without a traceback; then it works again."""
    with HubThread(redis.url, None, **GUARDED, BROADCASTER_HUB__HANDSHAKE_TIMEOUT_S="2") as hub:
        hub.until_ready()
        assert post(hub, event_body(), as_root())[0] == 201
        with fault(redis) as revive:
            begun_at = time.monotonic()
            answers: list[tuple[int, bytes]] = []
            threads = [
                threading.Thread(target=lambda: answers.append(post(hub, event_body(), as_root())))
                for _ in range(3)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(10 * UNIT_S)
            assert time.monotonic() - begun_at < 2 + 2 * UNIT_S
            assert [status for status, _ in answers] == [503] * 3, answers
            assert {header_of(answer, "Retry-After") for _, answer in answers} == {"1"}
            if revive is not None:
                revive()
                eventually(lambda: post(hub, event_body(), as_root())[0] == 201, "nothing can be published again")
        if revive is None:
            eventually(lambda: post(hub, event_body(), as_root())[0] == 201, "nothing can be published again")
        assert "Traceback" not in hub.output
        assert ROOT_KEY not in hub.output


def test_a_request_that_is_complete_is_never_said_to_have_come_too_late(redis: RedisServer) -> None:
    """Its body has taken its time, and Redis takes some more: 503, as the event may be published nevertheless."""
    with HubThread(redis.url, None, **GUARDED, BROADCASTER_HUB__HANDSHAKE_TIMEOUT_S="2") as hub:
        hub.until_ready()
        with frozen(redis), socket.create_connection(("127.0.0.1", hub.port), timeout=10 * UNIT_S) as connection:
            head, body = publish_request()
            connection.sendall(head)
            time.sleep(1.5)
            connection.sendall(body)
            answer = all_of(connection)
        assert (status_of(answer), header_of(answer, "Retry-After")) == (503, "1")
        assert hub.stats()["refused"]["too_late"] == 0


def test_who_has_to_make_room_while_redis_is_asked_is_told_that_it_is_not_known(redis: RedisServer) -> None:
    """Of too many unfinished requests the oldest goes, also one whose event may be stored at any moment."""
    with HubThread(redis.url, None, **GUARDED, BROADCASTER_HUB__MAX_HANDSHAKES="1") as hub:
        hub.until_ready()
        with frozen(redis), socket.create_connection(("127.0.0.1", hub.port), timeout=10 * UNIT_S) as connection:
            connection.sendall(b"".join(publish_request()))
            time.sleep(0.3 * UNIT_S)
            with socket.create_connection(("127.0.0.1", hub.port)):
                answer = all_of(connection)
        assert status_of(answer) == 503
        assert b"it is not known whether the event was published" in answer


def publish_request() -> tuple[bytes, bytes]:
    """Head and body of one that is good."""
    body = event_body()
    head = f"POST /publish HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n".encode()
    return head + b"Authorization: " + as_root() + b"\r\n\r\n", body


def test_a_hub_that_is_stopping_publishes_nothing_more(steady_redis: RedisServer) -> None:
    """While it sends its subscribers away it answers 503, with a time to come back."""
    with HubThread(steady_redis.url, None, **(GUARDED | {"BROADCASTER_HUB__DRAIN_S": "2"})) as hub:
        hub.until_ready()
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(Guest(hub.port, upgrade_request(hub.port, **bearer(WALL))))
            hub.signal(signal.SIGTERM)
            eventually(lambda: hub.get("/health/ready")[1].get("stopping"), "it does not stop")
            status, answer = post(hub, event_body(), as_root())
            assert (status, header_of(answer, "Retry-After")) == (503, "1")
            refused = ask(hub.port, upgrade_request(hub.port, **bearer(WALL)))
            assert (status_of(refused), header_of(refused, "Retry-After")) == (503, "1")
        assert hub.wait() == 0
        assert "Traceback" not in hub.output


# From the command line


def test_a_token_of_the_command_line_lets_a_subscriber_in(guarded: Hub, client: RedisClient) -> None:
    """`broadcaster token create`, and `broadcaster subscribe` with it, which does not say it."""
    keys = {name: GUARDED[name] for name in ("BROADCASTER_AUTH__JWT_KEYS", "BROADCASTER_AUTH__ISSUER")}
    made = finished(
        "token", "create", "--name", "me", "--subscribe", "events.*", "--lasts", "60", cwd=None, within=20, **keys
    )
    assert (made.code, made.stderr) == (0, "")
    shown = made.stdout.strip()
    with broadcaster(
        *("subscribe", "--url", guarded.url, "--json"), BROADCASTER_SUBSCRIBER__TOKEN=shown
    ) as subscriber:
        subscriber.said("connected to")
        payload = event_payload()

        def arrives() -> bool:
            client.publish(payload)
            return payload.decode() in subscriber.lines

        eventually(arrives, subscriber.output)
        assert shown not in subscriber.output
    refused = finished("subscribe", "--url", guarded.url, BROADCASTER_SUBSCRIBER__TOKEN=shown + "x")
    assert refused.code == 69
    assert "401 access denied" in refused.complaint
    assert shown not in refused.stdout + refused.stderr


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line, in an empty folder."""
    return CommandLine(tmp_path, monkeypatch, capsys)


UNSAFE: dict[str, tuple[dict[str, str], str]] = {
    "all addresses": ({"BROADCASTER_HUB__HOST": "0.0.0.0"}, "auth.mode"),
    "all addresses of IPv6": ({"BROADCASTER_HUB__HOST": "::"}, "auth.mode"),
    "a name": ({"BROADCASTER_HUB__HOST": "hub.invalid"}, "auth.mode"),
    "no keys": ({"BROADCASTER_AUTH__MODE": "token"}, "auth.api_keys"),
    "a key that is none": (
        {"BROADCASTER_AUTH__MODE": "token", "BROADCASTER_AUTH__JWT_KEYS": json.dumps([eddsa(SECRET)])},
        "auth.jwt_keys",
    ),
    "no keys for all addresses": (
        {"BROADCASTER_AUTH__MODE": "token", "BROADCASTER_HUB__HOST": "0.0.0.0"},
        "auth.api_keys",
    ),
    "a certificate without a key": ({"BROADCASTER_HUB__TLS_CERT": "cert.pem"}, "hub.tls_key"),
    "a key without a certificate": ({"BROADCASTER_HUB__TLS_KEY": "key.pem"}, "hub.tls_cert"),
}


@pytest.mark.parametrize(("variables", "named"), UNSAFE.values(), ids=UNSAFE.keys())
def test_a_hub_that_would_be_open_does_not_start(run: CommandLine, variables: dict[str, str], named: str) -> None:
    """78 and one line that names the setting."""
    ended = run("hub", BROADCASTER_HUB__PORT=str(free_port()), **variables)
    assert ended.code == 78
    assert named in ended.complaint
    assert SECRET not in ended.stderr


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make(tmp_path_factory.mktemp("certificates"))


def over_tls(certificates: Certificates) -> dict[str, str]:
    return {"BROADCASTER_HUB__TLS_CERT": certificates.certificate, "BROADCASTER_HUB__TLS_KEY": certificates.key}


def wss(hub: Hub) -> str:
    return f"wss://127.0.0.1:{hub.port}/ws"


@pytest.fixture(scope="module")
def trusting(certificates: Certificates) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificates.authority)


@contextlib.contextmanager
def encrypted(redis: RedisServer, certificates: Certificates, **variables: str) -> Iterator[Hub]:
    """A hub that speaks TLS, ready."""
    with HubThread(redis.url, None, **over_tls(certificates), **variables) as hub:
        hub.said("ready: ")
        yield hub


@pytest.fixture(scope="module")
def secure(steady_redis: RedisServer, certificates: Certificates) -> Iterator[HubProcess]:
    """A hub with TLS and access control, for tests that leave it as it is."""
    settings = GUARDED | over_tls(certificates) | {"BROADCASTER_HUB__HANDSHAKE_TIMEOUT_S": "1"}
    with HubProcess(steady_redis.url, None, **settings) as hub:
        hub.said("ready: ")
        yield hub


_STATS_REQUEST = (
    f"GET /stats?scope=self HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {MONITOR_KEY}\r\n\r\n".encode()
)


def numbers(hub: Hub, tls: ssl.SSLContext) -> dict[str, Any]:
    """The hub's /stats over https."""
    fields: dict[str, Any] = json.loads(ask(hub.port, _STATS_REQUEST, tls).partition(b"\r\n\r\n")[2])
    return fields


@in_loop
async def test_a_subscriber_comes_over_tls(
    secure: Hub, steady_redis: RedisServer, certificates: Certificates
) -> None:
    """wss:// with `subscriber.tls_ca`: events come, and after a while away those that were missed."""
    settings = client_settings(tls_ca=certificates.authority, token=WALL)
    redis = Settings.model_validate({"redis": {"url": steady_redis.url}, "event": {"channel": "events.tls"}})
    async with Publisher(redis) as publisher:
        async with Subscriber(wss(secure), settings=settings, channels=["events.tls"]) as subscriber:
            waiting = asyncio.ensure_future(anext(subscriber))
            await until(lambda: subscriber.positions, "never connected")
            first = await publisher.publish("T", "s", data={"text": "x" * 60_000})
            assert (await waiting).event_id == first.event.event_id
            since = subscriber.position
        missed = [(await publisher.publish("T", "s")).event.event_id for _ in range(300)]
        async with Subscriber(wss(secure), settings=settings, channels=["events.tls"], since=since) as subscriber:
            assert [(await anext(subscriber)).event_id for _ in missed] == missed
            assert subscriber.gaps == 0
    stats = await statistics(f"https://127.0.0.1:{secure.port}", 5 * UNIT_S, certificates.authority, MONITOR_KEY)
    assert stats["ready"]


@pytest.mark.parametrize("vouched", [False, True], ids=["nobody", "another authority"])
@in_loop
async def test_a_hub_that_nobody_vouches_for_is_not_believed(
    secure: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture, vouched: bool
) -> None:
    """Without the right authority no token is sent; the subscriber says why, and keeps trying."""
    authority = make(tmp_path, "stranger").authority if vouched else ""
    settings = client_settings(tls_ca=authority, token=WALL)
    with caplog.at_level(logging.WARNING):
        async with Subscriber(wss(secure), settings=settings) as subscriber:
            waiting = asyncio.ensure_future(subscriber.receive())
            await until(lambda: "certificate verify failed" in caplog.text, "nothing is said")
            assert "subscriber.tls_ca" in caplog.text
            assert not waiting.done()
            assert subscriber.positions == {}
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
    assert WALL not in caplog.text


@pytest.mark.parametrize("file", ["/no/such/file.pem", "/dev/null", "/"], ids=["missing", "empty", "a folder"])
def test_authorities_that_cannot_be_read_are_a_wrong_setting(file: str) -> None:
    """Named, before anything is connected."""
    with pytest.raises(ConfigurationError, match=file):
        Subscriber("wss://127.0.0.1:1/ws", settings=client_settings(tls_ca=file))


def test_pages_and_refusals_are_the_same_over_tls(secure: Hub, trusting: ssl.SSLContext) -> None:
    """https:// for everything: health, publishing, origins, tokens."""
    for path, status in (("/health", 200), ("/health/live", 200), ("/stats", 401), ("/nowhere", 404)):
        request = f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
        assert status_of(ask(secure.port, request, trusting)) == status
    assert post(secure, event_body(), as_root(), tls=trusting)[0] == 201
    assert post(secure, event_body(), tls=trusting)[0] == 401
    own = {"Origin": f"https://127.0.0.1:{secure.port}"}
    for headers, status in (({}, 401), (bearer(WALL) | {"Origin": "https://evil.example"}, 403)):
        assert status_of(ask(secure.port, upgrade_request(secure.port, **headers), trusting)) == status
    with Guest(secure.port, upgrade_request(secure.port, **bearer(WALL), **own), tls=trusting) as guest:
        assert status_of(guest.response) == 101


def test_a_token_expires_over_tls_as_well(secure: Hub, trusting: ssl.SSLContext) -> None:
    """4001 and the end of the connection."""
    shown = good(exp=int(time.time()) + 3)
    with Guest(secure.port, upgrade_request(secure.port, **bearer(shown)), tls=trusting) as guest:
        assert guest.close_code() == 4001
        guest.send(8, b"\x0f\xa1")
        read_to_end(guest)


NO_TLS: dict[str, bytes] = {
    "http": b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n",
    "ws": upgrade_request(1),
    "garbage": b"\0" * 1000,
    "many bytes": b"\xff" * 300_000,
    "a hello cut short": b"\x16\x03\x01\x02\x00\x01",
    "an old version": b"\x16\x03\x00\x00\x2f\x01\x00\x00\x2b\x03\x00" + b"\0" * 36,
    "nothing": b"",
}


def test_who_does_not_speak_tls_is_cut(secure: Hub, trusting: ssl.SSLContext) -> None:
    """A handshake that does not come about ends within `hub.handshake_timeout_s`, and leaves the hub as it was."""
    lines, left = len(secure.lines), []
    with contextlib.ExitStack() as stack:
        strangers = {}
        for name, said in NO_TLS.items():
            strangers[name] = stack.enter_context(socket.create_connection(("127.0.0.1", secure.port)))
            strangers[name].settimeout(5 * UNIT_S)
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                strangers[name].sendall(said)
        deadline = time.monotonic() + (1 + 3) * UNIT_S
        for name, stranger in strangers.items():
            stranger.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                while answer := stranger.recv(65_536):
                    assert b"HTTP" not in answer
            except ConnectionResetError:
                pass
            except TimeoutError:
                left.append(name)
    assert left == []
    assert status_of(ask(secure.port, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", trusting)) == 200
    said_since = "\n".join(secure.lines[lines:])
    assert not [word for word in ("Traceback", "Error", "exception") if word in said_since], said_since


def test_who_says_nothing_behind_the_handshake_is_cut(secure: Hub, trusting: ssl.SSLContext) -> None:
    """408, as without TLS."""
    with (
        socket.create_connection(("127.0.0.1", secure.port), timeout=(1 + 3) * UNIT_S) as plain,
        trusting.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(b"GET /ws HT")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 408 ")


def test_half_a_handshake_does_not_keep_the_others_waiting(secure: Hub, trusting: ssl.SSLContext) -> None:
    """A hundred that begin and go no further, and somebody who wants to be let in."""
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            half = stack.enter_context(socket.create_connection(("127.0.0.1", secure.port)))
            half.sendall(b"\x16\x03\x01\x02\x00\x01")
        with Guest(secure.port, upgrade_request(secure.port, **bearer(WALL)), tls=trusting) as guest:
            assert status_of(guest.response) == 101


def test_everybody_gets_everything_over_tls_beside_one_who_does_not_read(
    redis: RedisServer, certificates: Certificates, trusting: ssl.SSLContext
) -> None:
    """The fan-out is the same: all in order, the slow one is closed with 4008, at the end everybody with 1012."""
    with (
        encrypted(redis, certificates, BROADCASTER_HUB__BEHIND_MAX_MS="300") as hub,
        redis_client(redis) as publish,
        contextlib.ExitStack() as stack,
    ):
        request = upgrade_request(hub.port)
        slow = stack.enter_context(Guest(hub.port, request, tls=trusting, receive_buffer=4096))
        readers = [stack.enter_context(Guest(hub.port, request, tls=trusting)) for _ in range(8)]
        eventually(lambda: numbers(hub, trusting)["connected"] == 9, "not connected")
        payloads: list[bytes] = []
        while not numbers(hub, trusting)["slow_closed"]:
            assert len(payloads) < 20_000
            batch = [event_payload(len(payloads) + n, data={"text": "x" * 4000}) for n in range(100)]
            for payload in batch:
                publish.publish(payload)
            for reader in readers:
                assert [reader.text().encode() for _ in batch] == batch
            payloads += batch
        assert slow.close_code() == 4008
        *events, (_, close) = [frame for frame in slow.frames if frame[0] != 9]
        assert b"too slow: " in close
        assert [payload for _, payload in events] == payloads[: len(events)]
        hub.signal(signal.SIGTERM)
        for reader in readers:
            assert reader.close_code() == 1012
        assert hub.wait() == 0
        assert "Traceback" not in hub.output


def test_what_is_not_read_over_tls_waits_in_the_ring(
    redis: RedisServer, certificates: Certificates, trusting: ssl.SSLContext
) -> None:
    """A connection holds little more than without TLS, however far behind it is."""
    slow_ones = 20
    with (
        HubProcess(
            redis.url,
            None,
            **over_tls(certificates),
            BROADCASTER_HUB__BEHIND_MAX_MS="60000",
            BROADCASTER_HUB__RING_BYTES=str(2**24),
        ) as hub,
        redis_client(redis) as publish,
        contextlib.ExitStack() as stack,
    ):
        hub.said("ready: ")
        for _ in range(slow_ones):
            stack.enter_context(Guest(hub.port, upgrade_request(hub.port), tls=trusting, receive_buffer=4096))
        with stack.enter_context(Guest(hub.port, upgrade_request(hub.port), tls=trusting)) as reader:
            before, rings = memory_bytes(hub), numbers(hub, trusting)["ring_bytes"]
            payload = event_payload(data={"text": "x" * 16_000})
            for _ in range(400):
                publish.publish(payload)
                reader.text()
            eventually(lambda: numbers(hub, trusting)["behind"] == slow_ones, "they are not behind")
        grown = memory_bytes(hub) - before - (numbers(hub, trusting)["ring_bytes"] - rings)
        assert grown < slow_ones * 6 * 65_536 + 2 * 2**20


def test_connections_over_tls_that_end_leave_nothing_behind(secure: HubProcess, trusting: ssl.SSLContext) -> None:
    """Coming and going costs no memory: buffers of a connection go with it."""
    request = upgrade_request(secure.port, **bearer(WALL))

    def come_and_go(times: int) -> int:
        for _ in range(times):
            with Guest(secure.port, request, tls=trusting):
                pass
        eventually(lambda: numbers(secure, trusting)["connected"] == 0, "somebody is left")
        return memory_bytes(secure)

    before = come_and_go(100)
    assert come_and_go(300) - before < 300 * 15_000


def other_key(folder: Path, certificates: Certificates) -> tuple[str, str]:
    return certificates.certificate, make(folder, "other").key


def no_pem(folder: Path, certificates: Certificates) -> tuple[str, str]:
    (folder / "no.pem").write_text("not a certificate")
    return str(folder / "no.pem"), certificates.key


def cut_short(folder: Path, certificates: Certificates) -> tuple[str, str]:
    (folder / "cut.pem").write_text(Path(certificates.key).read_text()[:80])
    return certificates.certificate, str(folder / "cut.pem")


def encrypted_key(folder: Path, certificates: Certificates) -> tuple[str, str]:
    key = ec.generate_private_key(ec.SECP256R1())
    (folder / "encrypted.pem").write_bytes(private_pem(key, b"password"))
    return certificates.certificate, str(folder / "encrypted.pem")


UNREADABLE: dict[str, Callable[[Path, Certificates], tuple[str, str]]] = {
    "no certificate there": lambda folder, certificates: (str(folder / "missing.pem"), certificates.key),
    "no key there": lambda folder, certificates: (certificates.certificate, str(folder / "missing.pem")),
    "a folder": lambda folder, certificates: (str(folder), certificates.key),
    "no PEM": no_pem,
    "a key cut short": cut_short,
    "a key with a password": encrypted_key,
    "the key of another": other_key,
    "the two exchanged": lambda folder, certificates: (certificates.key, certificates.certificate),
}


@pytest.mark.parametrize("files", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_certificate_that_cannot_be_used_is_a_wrong_setting(
    run: CommandLine,
    certificates: Certificates,
    tmp_path: Path,
    files: Callable[[Path, Certificates], tuple[str, str]],
) -> None:
    """78 and one line that names both settings, before anybody can connect."""
    certificate, key = files(tmp_path, certificates)
    ended = run(
        "hub",
        BROADCASTER_HUB__PORT=str(free_port()),
        BROADCASTER_HUB__TLS_CERT=certificate,
        BROADCASTER_HUB__TLS_KEY=key,
    )
    assert ended.code == 78
    assert "hub.tls_cert, hub.tls_key: " in ended.complaint
    assert "PRIVATE KEY" not in ended.stderr
