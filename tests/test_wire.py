"""The wire: handshakes, frames and close codes, byte by byte and without a socket."""

from __future__ import annotations

import base64
import gc
import hashlib
import json
import random
import weakref
from typing import Any

import pytest
from websockets.frames import Close

from broadcaster import wire
from broadcaster.core.position import Gap
from broadcaster.wire import CloseCode, Inbound, Outbound, Refusal, Target
from tests.support import client_frame, upgrade_request

KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # the example of RFC 6455, with its answer
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def let_in(target: Target) -> Target | Refusal:
    return target


def request(*, subprotocol: str = "", path: str = "/ws", **headers: str) -> bytes:
    fields = {"Sec_WebSocket_Key": KEY} | headers
    return upgrade_request(8765, path=path, subprotocol=subprotocol, **fields)


def status_of(answer: wire.Answer[Any]) -> int:
    version, status, _ = answer.response.split(b" ", 2)
    assert version == b"HTTP/1.1"
    return int(status)


def header_of(answer: wire.Answer[Any], name: str) -> str | None:
    head = answer.response.partition(wire.HEAD_END)[0].decode("latin-1")
    fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:])
    return {key.lower(): value for key, value in fields.items()}.get(name.lower())


# The handshake

OFFERS: list[tuple[str, str | None]] = [
    ("", None),
    ("broadcaster.plain", "broadcaster.plain"),
    ("broadcaster.v1", "broadcaster.v1"),
    ("broadcaster.plain, broadcaster.v1", "broadcaster.v1"),
    ("broadcaster.v1, broadcaster.plain", "broadcaster.v1"),
    ("chat, superchat", None),
    ("chat, broadcaster.v1", "broadcaster.v1"),
    ("BROADCASTER.V1", None),
    ("bearer.c2VjcmV0", None),
    ("bearer.c2VjcmV0, broadcaster.v1", "broadcaster.v1"),
    ("broadcaster.plain, bearer.c2VjcmV0", "broadcaster.plain"),
]


@pytest.mark.parametrize(("offered", "selected"), OFFERS, ids=[offer or "none" for offer, _ in OFFERS])
def test_a_subprotocol_of_ours_is_selected_and_nobody_is_refused(offered: str, selected: str | None) -> None:
    """v1 before plain, else none; a token offered beside them is neither selected nor echoed."""
    answer = wire.answer_upgrade(request(subprotocol=offered), let_in)
    assert answer.admitted is not None
    assert answer.subprotocol == selected
    assert status_of(answer) == 101
    assert header_of(answer, "Sec-WebSocket-Protocol") == selected
    assert b"bearer" not in answer.response
    assert b"c2VjcmV0" not in answer.response


def test_the_answer_is_the_one_of_the_rfc() -> None:
    """An accepted upgrade is a 101 with the proof of the key, and no extension, whatever was offered."""
    offer = "permessage-deflate; client_max_window_bits"
    answer = wire.answer_upgrade(request(Sec_WebSocket_Extensions=offer), let_in)
    assert answer.response.startswith(b"HTTP/1.1 101 ")
    assert answer.response.endswith(wire.HEAD_END)
    assert header_of(answer, "Sec-WebSocket-Accept") == ACCEPT.decode()
    assert header_of(answer, "Upgrade") == "websocket"
    assert header_of(answer, "Connection") == "Upgrade"
    assert header_of(answer, "Sec-WebSocket-Extensions") is None


HARMLESS = {
    "a browser's origin": {"Origin": "https://elsewhere.example"},
    "names in other case": {"Upgrade": "WebSocket", "Connection": "keep-alive, UPGRADE"},
    "an empty body announced": {"Content_Length": "0"},
    "latin-1 in a header": {"X_Name": "Zoë"},
}


@pytest.mark.parametrize("headers", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_clients_send_beside_it_does_no_harm(headers: dict[str, str]) -> None:
    """Headers that real clients add do not refuse them."""
    assert wire.answer_upgrade(request(**headers), let_in).admitted


NO_UPGRADE = b"GET /ws HTTP/1.1\r\nHost: a\r\n\r\n"

REFUSED: dict[str, tuple[bytes, int]] = {
    "plain GET": (NO_UPGRADE, 426),
    "upgrade to something else": (request(Upgrade="h2c"), 426),
    "no Connection: upgrade": (request(Connection="keep-alive"), 426),
    "POST": (request().replace(b"GET", b"POST"), 405),
    "HEAD": (request().replace(b"GET", b"HEAD"), 405),
    "HTTP/1.0": (request().replace(b"HTTP/1.1", b"HTTP/1.0"), 505),
    "no key": (request().replace(b"Sec-WebSocket-Key", b"X-Key"), 400),
    "key too short": (request(Sec_WebSocket_Key="c2hvcnQ="), 400),
    "key that is no base64": (request(Sec_WebSocket_Key="????"), 400),
    "two keys": (request(Sec_WebSocket_Key=f"{KEY}\r\nSec-WebSocket-Key: {KEY}"), 400),
    "old version": (request(Sec_WebSocket_Version="8"), 400),
    "no version": (request().replace(b"Sec-WebSocket-Version", b"X-Version"), 400),
    "empty Upgrade": (request(Upgrade=""), 400),
    "header without a colon": (request(Host="a\r\nnonsense"), 400),
    "header name with a space": (request(Host="a\r\nBad Name: x"), 400),
    "continued header": (request(Host="a\r\n folded"), 400),
    "NUL in a header": (request(X_Note="a\0b"), 400),
    "body announced": (request(Content_Length="5"), 400),
    "chunked body announced": (request(Transfer_Encoding="chunked"), 400),
    "path beyond ASCII": (request(path="/ws?channel=\u00fc"), 400),
    "200 headers": (request(Host="a\r\n" + "\r\n".join(f"X-{n}: 1" for n in range(200))), 431),
    "a header line of 10,000 bytes": (request(X_Long="x" * 10_000), 431),
}


@pytest.mark.parametrize(("head", "status"), REFUSED.values(), ids=REFUSED.keys())
def test_a_request_that_is_no_upgrade_is_told_why(head: bytes, status: int) -> None:
    """Every request that cannot become a WebSocket is answered with a status, and never admitted."""
    asked: list[Target] = []

    def note(target: Target) -> Target:
        asked.append(target)
        return target

    answer = wire.answer_upgrade(head, note)
    assert answer.admitted is None
    assert answer.subprotocol is None
    assert asked == []
    assert answer.response, "the client is left without any answer"
    assert status_of(answer) == status


@pytest.mark.parametrize(
    ("refusal", "retry_after"),
    [
        (Refusal(404, "no such channel here"), None),
        (Refusal(400, "unknown query parameter 'x\u00fc'"), None),
        (Refusal(503, "too many subscribers", retry_after_s=5), "5"),
        (Refusal(503, "the hub is stopping", retry_after_s=0), "0"),
    ],
    ids=["404", "400", "503", "503 at once"],
)
def test_who_is_not_admitted_is_told_the_status_and_the_reason(refusal: Refusal, retry_after: str | None) -> None:
    """The hub's refusal becomes a whole HTTP answer that ends the connection."""
    answer: wire.Answer[Target] = wire.answer_upgrade(
        request(subprotocol="broadcaster.v1"), lambda target: refusal
    )
    assert answer.admitted is None
    assert answer.subprotocol is None
    assert status_of(answer) == refusal.status
    body = answer.response.partition(wire.HEAD_END)[2]
    assert json.loads(body) == {"error": refusal.reason}
    assert header_of(answer, "Content-Type") == "application/json"
    assert header_of(answer, "Content-Length") == str(len(body))
    assert header_of(answer, "Connection") == "close"
    assert header_of(answer, "Retry-After") == retry_after
    assert header_of(answer, "Sec-WebSocket-Protocol") is None


TARGETS: dict[str, tuple[tuple[str, str], ...]] = {
    "/ws": (),
    "/ws?": (),
    "/ws?channel=events.critical": (("channel", "events.critical"),),
    "/ws?channel=a&channel=b": (("channel", "a"), ("channel", "b")),
    "/ws?channel=a%2Eb&type=": (("channel", "a.b"), ("type", "")),
    "/ws?channel=%C3%A9": (("channel", "\u00e9"),),
    "/ws?flag": (("flag", ""),),
}


@pytest.mark.parametrize(("path", "query"), TARGETS.items(), ids=TARGETS.keys())
def test_the_hub_is_asked_with_what_the_client_wants(path: str, query: tuple[tuple[str, str], ...]) -> None:
    """The query is handed over in its order, decoded, repeated and empty values kept."""
    target = wire.answer_upgrade(request(path=path), let_in).admitted
    assert target == Target("/ws", query, host="127.0.0.1:8765")


def test_the_hub_is_told_what_cannot_be_read() -> None:
    """More than 256 query parameters, a query that is no text, or two tokens are a fault for the hub to refuse."""
    for head in (
        request(path="/ws?" + "a=1&" * 257),
        request(path="/ws?source=%zz"),
        request(path="/ws?source=%FF"),
        request(path="/ws?%"),
        request(Authorization="Bearer a\r\nAuthorization: Bearer b"),
        request(subprotocol="broadcaster.v1, bearer.!!"),
        request(subprotocol="bearer.A"),
    ):
        target = wire.answer_upgrade(head, let_in).admitted
        assert target is not None
        assert target.fault
        assert target.token is None


@pytest.mark.parametrize("authorization", ["Basic dXNlcjpwYXNz", "Bearer", "Bearer ", "secret", "Digest a=b, c=d"])
def test_what_is_shown_to_somebody_else_is_no_token(authorization: str) -> None:
    """A proxy that asks for a password of its own passes it on."""
    for shown, token in (("broadcaster.v1", None), ("broadcaster.v1, bearer.c2VjcmV0", "secret")):
        target = wire.answer_upgrade(request(subprotocol=shown, Authorization=authorization), let_in).admitted
        assert target is not None
        assert not target.fault
        assert target.token == token


def test_a_whole_url_says_where_the_request_goes() -> None:
    """Not the Host header (RFC 9112 3.2.2)."""
    target = wire.answer_upgrade(request(path="http://hub.example:80/ws?channel=a"), let_in).admitted
    assert target == Target("/ws", (("channel", "a"),), host="hub.example:80")


def test_a_refusal_is_complete() -> None:
    """Without a parser it still is a whole HTTP response."""
    expected = (
        b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: 22\r\n\r\n"
    )
    assert wire.refusal(431, "too large") == expected + b'{"error": "too large"}'


# Frames

SIZES = {
    0: b"\x81\x00",
    1: b"\x81\x01",
    125: b"\x81\x7d",
    126: b"\x81\x7e\x00\x7e",
    200: b"\x81\x7e\x00\xc8",
    65_535: b"\x81\x7e\xff\xff",
    65_536: b"\x81\x7f\x00\x00\x00\x00\x00\x01\x00\x00",
    200_000: b"\x81\x7f\x00\x00\x00\x00\x00\x03\x0d\x40",
}


@pytest.mark.parametrize(("size", "head"), SIZES.items(), ids=map(str, SIZES))
def test_an_event_is_one_final_unmasked_text_frame(size: int, head: bytes) -> None:
    """The frame is the shortest form RFC 6455 allows for its length, and the payload untouched."""
    payload = random.Random(size).randbytes(size)
    assert wire.text_frame(payload) == head + payload


def test_a_control_frame_is_json_that_read_control_knows() -> None:
    """A control frame is a text frame whose message begins with its kind and names its channel."""
    frame = wire.gap_frame(Gap("events.critical", "redis_link_lost"))
    message = frame[4:]
    assert frame == wire.text_frame(message)
    unknown = dict.fromkeys(("epoch", "first", "last", "position"))
    expected = {"control": "gap", "channel": "events.critical", "cause": "redis_link_lost", **unknown}
    assert json.loads(message) == expected
    assert wire.read_control(message) == expected


NO_CONTROL = {
    "an event": b'{"event_id": "1", "event_type": "A"}',
    "an event with a field control": b'{"control": "gap", "event_id": "1"}',
    "an event with a field control at its end": b'{"event_id": "1", "control": "gap"}',
    "text": b"control",
    "a list": b'["control"]',
    "broken JSON": b'{"control": "gap"',
    "deep JSON": b'{"control": ' + b"[" * 100_000,
    "bad text": b'{"control": "\xff"}',
    "nothing": b"",
}


@pytest.mark.parametrize("message", NO_CONTROL.values(), ids=NO_CONTROL.keys())
def test_no_other_message_is_taken_for_a_control_frame(message: bytes) -> None:
    """A foreign event may have a field `control`; its event_id tells it from a control frame."""
    assert wire.read_control(message) is None


REASONS = {
    "short": "too slow",
    "none": "",
    "of 123 bytes": "x" * 123,
    "long": "x" * 5000,
    "two bytes a character": "ü" * 100,
    "four bytes a character, not in step": "x" + "🔥" * 60,
}


@pytest.mark.parametrize("reason", REASONS.values(), ids=REASONS.keys())
def test_a_close_frame_fits_the_protocol_whatever_the_reason(reason: str) -> None:
    """A reason is cut to the 123 bytes a control frame can hold, between characters."""
    frame = wire.close_frame(CloseCode.SLOW, reason)
    assert frame[0] == 0x88
    assert frame[1] == len(frame) - 2 <= 125
    close = Close.parse(frame[2:])
    assert close.code == 4008
    assert reason.startswith(close.reason)
    assert len(close.reason.encode()) >= min(len(reason.encode()), 116)


WHOLE_CONTROL_FRAMES = {
    "empty pong": client_frame(10),
    "pong with payload": client_frame(10, b"abcd"),
    "largest pong": client_frame(10, b"x" * 125),
    "empty ping": client_frame(9),
    "ping with payload": client_frame(9, b"abcd"),
    "close": client_frame(8, b"\x03\xe8"),
}

NOT_WHOLE_CONTROL_FRAMES = {
    "nothing": b"",
    "one byte": b"\x8a",
    "head only": b"\x8a\x80",
    "one byte missing": client_frame(10, b"abcd")[:-1],
    "one byte more": client_frame(10, b"abcd") + b"\x8a",
    "two pongs": client_frame(10) * 2,
    "unmasked pong": client_frame(10, b"abcd", mask=False),
    "unmasked pong of mask's length": b"\x8a\x04abcd",
    "not final": client_frame(10, fin=False),
    "reserved bit": bytes([0xCA]) + client_frame(10)[1:],
    "text": client_frame(1, b"abcd"),
    "empty text": client_frame(1),
    "continuation": client_frame(0, b"abcd"),
    "too long for a control frame": client_frame(10, b"x" * 126),
    "126 given in two bytes": b"\x8a\xfe\x00\x78" + b"\0" * 124,
    "127 given in eight bytes": b"\x8a\xff" + b"\0" * 131,
    "unknown opcode": client_frame(11),
}


@pytest.mark.parametrize("data", WHOLE_CONTROL_FRAMES.values(), ids=WHOLE_CONTROL_FRAMES.keys())
def test_a_whole_control_frame_is_recognised(data: bytes) -> None:
    """One masked ping, pong or close of legal length, no more and no less."""
    assert wire.is_whole_control_frame(data)
    assert wire.is_pong(data) == (data[0] == 0x8A)


@pytest.mark.parametrize("data", NOT_WHOLE_CONTROL_FRAMES.values(), ids=NOT_WHOLE_CONTROL_FRAMES.keys())
def test_nothing_else_passes_for_a_whole_control_frame(data: bytes) -> None:
    """Whatever leaves state behind, or is wrong, goes to the parser that is kept."""
    assert not wire.is_whole_control_frame(data)


# What a subscriber sends

TALK: dict[str, tuple[bytes, bytes, int]] = {
    "nothing": (b"", b"", 0),
    "an empty text": (client_frame(1), b"", 1),
    "a text": (client_frame(1, "héllo".encode()), b"", 1),
    "binary that is no text": (client_frame(2, b"\xff\xfe"), b"", 1),
    "a ping": (client_frame(9), b"\x8a\x00", 1),
    "a ping with payload": (client_frame(9, b"abc"), b"\x8a\x03abc", 1),
    "an unasked pong": (client_frame(10, b"abc"), b"", 1),
    "two pings": (client_frame(9, b"a") + client_frame(9, b"b"), b"\x8a\x01a\x8a\x01b", 2),
    "fragments": (
        client_frame(1, b"a", fin=False) + client_frame(0, b"b", fin=False) + client_frame(0, b"c"),
        b"",
        3,
    ),
    "a ping between fragments": (
        client_frame(1, b"a", fin=False) + client_frame(9, b"p") + client_frame(0, b"c"),
        b"\x8a\x01p",
        3,
    ),
    "a character split between fragments": (
        client_frame(1, "ü".encode()[:1], fin=False) + client_frame(0, "ü".encode()[1:]),
        b"",
        2,
    ),
    "binary fragments that are no text": (client_frame(2, b"\xff", fin=False) + client_frame(0, b"\xc3"), b"", 2),
    "text after binary": (client_frame(2, b"\xff") + client_frame(1, b"a"), b"", 2),
    "exactly the limit": (client_frame(1, b"x" * 128), b"", 1),
    "exactly the limit, in fragments": (
        client_frame(1, b"x" * 64, fin=False) + client_frame(0, b"x" * 64),
        b"",
        2,
    ),
    "1,000 small messages": (client_frame(1, b"x" * 128) * 1000, b"", 1000),
}


@pytest.mark.parametrize("piece", [0, 1, 3], ids=["whole", "byte by byte", "3 bytes at a time"])
@pytest.mark.parametrize(("data", "reply", "frames"), TALK.values(), ids=TALK.keys())
def test_what_a_client_may_say_is_drained(data: bytes, reply: bytes, frames: int, piece: int) -> None:
    """Pings are answered, messages are read and dropped, however the bytes are cut."""
    inbound = Inbound(128)
    parts = [data[at : at + piece] for at in range(0, len(data), piece)] if piece else [data]
    assert b"".join(inbound.feed(part) for part in parts) == reply
    assert inbound.frames == frames
    assert not inbound.ended
    assert not inbound.closed_by_client


WRONG_TALK: dict[str, tuple[bytes, int]] = {
    "unmasked": (client_frame(1, b"hi", mask=False), 1002),
    "reserved bit 1": (bytes([0xC1]) + client_frame(1, b"hi")[1:], 1002),
    "reserved bit 2": (bytes([0xA1]) + client_frame(1, b"hi")[1:], 1002),
    "reserved bit 3": (bytes([0x91]) + client_frame(1, b"hi")[1:], 1002),
    "opcode 3": (client_frame(3, b"hi"), 1002),
    "opcode 11": (client_frame(11), 1002),
    "garbage": (b"GET / HTTP/1.1\r\n\r\n", 1002),
    "continuation of nothing": (client_frame(0, b"hi"), 1002),
    "text within fragments": (client_frame(1, b"a", fin=False) + client_frame(1, b"b"), 1002),
    "fragmented ping": (client_frame(9, fin=False), 1002),
    "ping of 126 bytes": (client_frame(9, b"x" * 126), 1002),
    "close of one byte": (client_frame(8, b"\x03"), 1002),
    "close with a code nobody may send": (client_frame(8, b"\x03\xed"), 1002),
    "close with code 0": (client_frame(8, b"\0\0"), 1002),
    "bad text": (client_frame(1, b"caf\xe9"), 1007),
    "overlong text": (client_frame(1, b"\xc0\xaf"), 1007),
    "encoded surrogate": (client_frame(1, b"\xed\xa0\x80"), 1007),
    "text that ends within a character": (client_frame(1, b"\xe2\x82"), 1007),
    "bad text in the second fragment": (client_frame(1, b"a", fin=False) + client_frame(0, b"\xff"), 1007),
    "a character never finished": (client_frame(1, b"\xc3", fin=False) + client_frame(0, b"a"), 1007),
    "fragments that end within a character": (client_frame(1, b"a", fin=False) + client_frame(0, b"\xc3"), 1007),
    "bad first fragment, no second": (client_frame(1, b"\xff", fin=False), 1007),
    "close with a bad reason": (client_frame(8, b"\x03\xe8\xff"), 1007),
    "one byte too long": (client_frame(1, b"x" * 129), 1009),
    "announced, never sent": (b"\x81\xff" + (1 << 40).to_bytes(8, "big") + b"\0\0\0\0", 1009),
    "announced with the highest bit": (b"\x81\xff" + b"\xff" * 8 + b"\0\0\0\0", 1009),
    "too long in fragments": (client_frame(1, b"x" * 100, fin=False) + client_frame(0, b"x" * 29), 1009),
    "too long binary": (client_frame(2, b"x" * 5000), 1009),
}


@pytest.mark.parametrize("piece", [0, 1], ids=["whole", "byte by byte"])
@pytest.mark.parametrize(("data", "code"), WRONG_TALK.values(), ids=WRONG_TALK.keys())
def test_what_a_client_may_not_say_ends_the_conversation(data: bytes, code: int, piece: int) -> None:
    """Each mistake is answered by one close frame with its code, and nothing after it is read."""
    inbound = Inbound(128)
    parts = [data[at : at + 1] for at in range(len(data))] if piece else [data]
    reply = b"".join(inbound.feed(part) for part in parts)
    assert reply[0] == 0x88
    assert reply[1] == len(reply) - 2
    assert int.from_bytes(reply[2:4], "big") == code
    assert inbound.ended
    assert inbound.feed(client_frame(9, b"still there?") + client_frame(1, b"\xff")) == b""


CLOSES = {
    "1000": (client_frame(8, b"\x03\xe8bye"), b"\x88\x05\x03\xe8bye"),
    "1001": (client_frame(8, b"\x03\xe9"), b"\x88\x02\x03\xe9"),
    "3000": (client_frame(8, b"\x0b\xb8"), b"\x88\x02\x0b\xb8"),
    "4999": (client_frame(8, b"\x13\x87"), b"\x88\x02\x13\x87"),
    "no code": (client_frame(8), b"\x88\x00"),
    "after a message": (client_frame(1, b"a") + client_frame(8, b"\x03\xe8"), b"\x88\x02\x03\xe8"),
    "with a ping after it": (client_frame(8, b"\x03\xe8") + client_frame(9), b"\x88\x02\x03\xe8"),
}


@pytest.mark.parametrize(("data", "reply"), CLOSES.values(), ids=CLOSES.keys())
def test_a_clients_close_is_answered_in_kind(data: bytes, reply: bytes) -> None:
    """A close is answered with the same code, and is known as the client's."""
    inbound = Inbound(128)
    assert inbound.feed(data) == reply
    assert inbound.ended
    assert inbound.closed_by_client


def test_a_close_in_the_middle_of_a_message_ends_it() -> None:
    """Whoever closes before his message is complete is let go as well."""
    inbound = Inbound(128)
    reply = inbound.feed(client_frame(1, b"a", fin=False) + client_frame(8, b"\x03\xe8"))
    assert reply[0] == 0x88
    assert inbound.ended
    assert inbound.closed_by_client


def test_endless_small_fragments_are_bounded_by_the_message_limit() -> None:
    """A message that never ends is cut at the limit, empty fragments cost nothing."""
    inbound = Inbound(128)
    assert inbound.feed(client_frame(1, b"x", fin=False)) == b""
    for _ in range(1000):
        assert inbound.feed(client_frame(0, b"", fin=False)) == b""
    for _ in range(127):
        assert inbound.feed(client_frame(0, b"x", fin=False)) == b""
    reply = inbound.feed(client_frame(0, b"x", fin=False))
    assert int.from_bytes(reply[2:4], "big") == 1009


def test_a_talker_that_is_ignored_is_not_answered() -> None:
    """From then on nothing is read, whatever it is."""
    inbound = Inbound(128)
    assert inbound.feed(client_frame(9)) == b"\x8a\x00"
    inbound.ignore()
    assert inbound.feed(client_frame(9) + client_frame(1, b"\xff") + b"garbage") == b""


# The client's side


def accepting(asked: bytes, *extra: str) -> bytes:
    """What a hub answers to this very request, written by hand."""
    key = next(line for line in asked.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key:"))
    guid = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    proof = base64.b64encode(hashlib.sha1(key.split(b":")[1].strip() + guid).digest()).decode()
    lines = [
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {proof}",
        *extra,
    ]
    return "\r\n".join(lines).encode() + wire.HEAD_END


def connected() -> Outbound:
    outbound = Outbound("ws://127.0.0.1:8765/ws")
    outbound.feed(accepting(outbound.request()))
    assert outbound.connected
    return outbound


def test_outbound_asks_for_an_upgrade_and_knows_when_it_has_it() -> None:
    """The request names path, host and subprotocol; the hub's 101 connects."""
    outbound = Outbound("ws://127.0.0.1:8765/ws?channel=a", "broadcaster.v1")
    asked = outbound.request()
    assert asked.startswith(b"GET /ws?channel=a HTTP/1.1\r\n")
    assert b"Host: 127.0.0.1:8765\r\n" in asked
    assert b"Sec-WebSocket-Protocol: broadcaster.v1\r\n" in asked
    assert b"Sec-WebSocket-Extensions" not in asked
    assert not outbound.connected
    assert outbound.feed(accepting(asked, "Sec-WebSocket-Protocol: broadcaster.v1")) == []
    assert outbound.connected
    assert outbound.failure is None
    assert outbound.close_code is None


def test_outbound_and_answer_upgrade_understand_each_other() -> None:
    """The two sides of this file complete a handshake."""
    outbound = Outbound("ws://127.0.0.1:8765/ws", wire.V1)
    answer = wire.answer_upgrade(outbound.request(), let_in)
    assert answer.subprotocol == wire.V1
    assert outbound.feed(answer.response + wire.text_frame(b"first")) == [b"first"]
    assert outbound.connected


NO_CONNECTION = {
    "503": (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 5\r\n\r\nfull\n", "503"),
    "404 without a body": (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "404"),
    "not HTTP": (b"+PONG\r\n\r\n", ""),
    "wrong proof": (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\n\r\n",
        "",
    ),
}


@pytest.mark.parametrize(("response", "word"), NO_CONNECTION.values(), ids=NO_CONNECTION.keys())
def test_outbound_tells_why_it_was_not_connected(response: bytes, word: str) -> None:
    """Any other answer is a failure with its reason, not an exception."""
    outbound = Outbound("ws://127.0.0.1:8765/ws")
    outbound.request()
    assert outbound.feed(response) == []
    assert not outbound.connected
    assert outbound.failure
    assert word in outbound.failure


@pytest.mark.parametrize("piece", [1, 2, 7, 1000])
def test_outbound_gives_messages_whole_and_in_order_however_they_are_cut(piece: int) -> None:
    """Frames of all sizes and fragments come out as messages, once each is complete."""
    outbound = connected()
    sent = [b"", b"a", b"x" * 125, b"y" * 126, b"z" * 3000]
    stream = b"".join(map(wire.text_frame, sent)) + b"\x01\x02fr" + b"\x89\x00" + b"\x80\x05agmts"
    got: list[bytes] = []
    for at in range(0, len(stream), piece):
        got += outbound.feed(stream[at : at + piece])
    assert got == [*sent, b"fragmts"]


def test_outbound_answers_a_ping() -> None:
    """A ping is answered by a masked pong with the same payload."""
    outbound = connected()
    assert outbound.feed(b"\x89\x02hi") == []
    pong = outbound.to_send()
    assert pong[:2] == b"\x8a\x82"
    assert bytes(byte ^ pong[2 + at % 4] for at, byte in enumerate(pong[6:])) == b"hi"
    assert outbound.to_send() == b""


def test_outbound_can_answer_a_ping_before_it_is_parsed() -> None:
    """`pong` is one masked empty pong, and nothing before the handshake."""
    early = Outbound("ws://127.0.0.1:8765/ws")
    assert early.pong() == b""
    pong = connected().pong()
    assert wire.is_whole_control_frame(pong)
    assert wire.is_pong(pong)


def test_outbound_closes_once() -> None:
    """The first close is a close frame (1000), the second nothing."""
    outbound = connected()
    frame = outbound.close()
    inbound = Inbound(128)
    assert inbound.feed(frame) == b"\x88\x02\x03\xe8"
    assert inbound.closed_by_client
    assert outbound.close() == b""


def test_outbound_is_connected_though_the_hub_closes_in_the_same_read() -> None:
    """The answer, a message and the close come at once: it was connected, got the message, and knows the code."""
    outbound = Outbound("ws://127.0.0.1:8765/ws")
    answer = accepting(outbound.request())
    assert outbound.feed(answer + wire.text_frame(b"a") + wire.close_frame(CloseCode.RESTART, "")) == [b"a"]
    assert outbound.connected
    assert outbound.failure is None
    assert outbound.close_code == 1012
    assert outbound.to_send()


@pytest.mark.parametrize(("extra", "speaks"), [(["Sec-WebSocket-Protocol: broadcaster.v1"], True), ([], False)])
def test_outbound_knows_whether_the_hub_speaks_v1(extra: list[str], speaks: bool) -> None:
    """Only if the hub has selected it; offering it is not enough."""
    outbound = Outbound("ws://127.0.0.1:8765/ws", wire.V1)
    assert not outbound.speaks_v1
    outbound.feed(accepting(outbound.request(), *extra))
    assert outbound.connected
    assert outbound.speaks_v1 == speaks
    assert outbound.status == 101


FOR_GOOD = {400: True, 403: True, 404: True, 408: False, 429: False, 500: False, 503: False}


@pytest.mark.parametrize(("status", "for_good"), FOR_GOOD.items(), ids=map(str, FOR_GOOD))
def test_outbound_knows_a_refusal_for_good(status: int, for_good: bool) -> None:
    """4xx will be the same next time, but for a timeout and too many requests."""
    outbound = Outbound("ws://127.0.0.1:8765/ws")
    outbound.request()
    assert not outbound.is_final_refusal
    outbound.feed(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode())
    assert not outbound.connected
    assert (outbound.status, outbound.is_final_refusal) == (status, for_good)


def test_outbound_leaves_no_garbage_when_it_is_let_go() -> None:
    """It is freed at once, also with the garbage collector off; its close code can still be read."""
    outbound = connected()
    outbound.feed(wire.close_frame(CloseCode.SLOW, "too slow"))
    gc.disable()
    try:
        protocol = weakref.ref(outbound._protocol)
        outbound.dispose()
        assert outbound.close_code == 4008
        del outbound
        assert protocol() is None
    finally:
        gc.enable()


def test_outbound_keeps_the_code_it_was_closed_with() -> None:
    """A close of the hub is answered and its code is kept; what follows is not read."""
    outbound = connected()
    data = wire.text_frame(b"last") + wire.close_frame(CloseCode.SLOW, "too slow") + wire.text_frame(b"late")
    assert outbound.feed(data) == [b"last"]
    assert outbound.close_code == 4008
    answer = outbound.to_send()
    assert wire.is_whole_control_frame(answer)
    assert answer[0] == 0x88
