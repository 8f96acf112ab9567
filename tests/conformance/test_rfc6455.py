"""RFC 6455 on real sockets, in the groups of the Autobahn test suite, for a server that mostly sends.

A case says what a client sends and what the hub has to answer. After each case somebody who is connected beside it
goes on receiving events.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import pytest

from broadcaster.redis.server import RedisServer
from tests.support import (
    UNIT_S,
    Frame,
    Hub,
    HubThread,
    RawClient,
    RedisClient,
    assert_calm,
    event_payload,
    next_but_ping,
    redis_client,
)

LIMIT: Final = 4096
"""`hub.inbound_max_bytes`"""

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
CONT = 0


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    masked: bool = True,
    mask: bytes = b"\xa1\x00\xff\x5b",
    length: bytes | None = None,
) -> bytes:
    """A frame as a client sends it, really masked; `length` replaces the whole encoding of its length."""
    first = bytes([(0x80 if fin else 0) | rsv << 4 | opcode])
    bit = 0x80 if masked else 0
    if length is None:
        if len(payload) < 126:
            length = bytes([len(payload)])
        elif len(payload) < 65_536:
            length = b"\x7e" + struct.pack("!H", len(payload))
        else:
            length = b"\x7f" + struct.pack("!Q", len(payload))
    head = first + bytes([bit | length[0]]) + length[1:]
    if not masked:
        return head + payload
    return head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


def close(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, struct.pack("!H", code) + reason)


def fragments(opcode: int, *parts: bytes) -> bytes:
    """One message in so many frames."""
    last = len(parts) - 1
    return b"".join(frame(opcode if n == 0 else CONT, part, fin=n == last) for n, part in enumerate(parts))


class Client(RawClient):
    """A client that waits for the end."""

    def __enter__(self) -> Client:
        return self

    def until_closed(self) -> Frame:
        """The next frame that is no ping; it must be a close, after which the hub ends the connection itself."""
        last = next_but_ping(self)
        assert last[0] == CLOSE, f"expected a close, got {last}"
        with pytest.raises(EOFError):
            self.next_frame()
        return last


class Scene(NamedTuple):
    """A hub, somebody who publishes, and somebody who listens beside the case."""

    hub: Hub
    publish: RedisClient
    bystander: Client

    def assert_goes_on(self, *others: RawClient) -> None:
        """The next event reaches everybody who is there, at once and as it was published."""
        payload = event_payload()
        self.publish.publish(payload)
        for client in (self.bystander, *others):
            assert next_but_ping(client) == (TEXT, payload)


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """One of it for the whole file: no case may harm it, or keep it waiting for a deadline."""
    with (
        RedisServer.start() as server,
        redis_client(server) as publish,
        HubThread(server.url, BROADCASTER_HUB__CLOSE_TIMEOUT_S=str(10 * UNIT_S)) as hub,
        Client(hub.until_ready().port) as bystander,
    ):
        bystander.socket.settimeout(5 * UNIT_S)
        hub.until_connected(1)
        yield Scene(hub, publish, bystander)
        hub.until_connected(1)
        assert hub.stats()["aborted"] == 0
        assert_calm(hub)


class Case(NamedTuple):
    """What is sent, what is answered before anything else, and the code of the close; None: it stays open."""

    sent: bytes
    answers: Sequence[Frame] = ()
    code: int | None = None
    chopped: bool = False
    """Sent byte by byte."""


def run(scene: Scene, case: Case) -> None:
    with Client(scene.hub.port) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.socket.settimeout(5 * UNIT_S)
        with contextlib.suppress(ConnectionError):
            for part in [bytes([byte]) for byte in case.sent] if case.chopped else [case.sent]:
                client.socket.sendall(part)
        for answer in case.answers:
            assert next_but_ping(client) == answer
        if case.code is None:
            client.socket.sendall(frame(PING, b"still open"))
            assert next_but_ping(client) == (PONG, b"still open")
            scene.assert_goes_on(client)
        else:
            assert int.from_bytes(client.until_closed()[1][:2], "big") == case.code
    scene.assert_goes_on()


def cases(table: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", table.values(), ids=table.keys())


# 1 Framing

SIZES: Final = {
    **{f"1.1 text of {size}": Case(frame(TEXT, b"*" * size)) for size in (0, 125, 126, 127, 128, LIMIT)},
    **{f"1.2 binary of {size}": Case(frame(BINARY, b"\xfe" * size)) for size in (0, 125, 126, 127, 128, LIMIT)},
    **{f"1.1 text of {size}": Case(frame(TEXT, b"*" * size), [], 1009) for size in (LIMIT + 1, 65_535, 65_536)},
    **{f"1.2 binary of {size}": Case(frame(BINARY, b"\xfe" * size), [], 1009) for size in (65_535, 65_536)},
    "1.1 text of 125, chopped": Case(frame(TEXT, b"*" * 125), chopped=True),
    "1.1 text of 128, chopped": Case(frame(TEXT, b"*" * 128), chopped=True),
    "1.2 binary of 126, chopped": Case(frame(BINARY, b"\xfe" * 126), chopped=True),
    "1.3 unmasked text": Case(frame(TEXT, b"hi", masked=False), [], 1002),
    "1.3 unmasked binary": Case(frame(BINARY, b"hi", masked=False), [], 1002),
    "1.3 unmasked ping": Case(frame(PING, b"hi", masked=False), [], 1002),
    "1.3 unmasked pong": Case(frame(PONG, b"hi", masked=False), [], 1002),
    "1.3 unmasked close": Case(frame(CLOSE, b"\x03\xe8", masked=False), [], 1002),
    "1.3 unmasked continuation": Case(frame(TEXT, b"h", fin=False) + frame(CONT, b"i", masked=False), [], 1002),
    "1.3 masked with zeros": Case(frame(PING, b"hi", mask=b"\0\0\0\0"), [(PONG, b"hi")]),
    "1.3 masked with ones": Case(frame(PING, b"hi", mask=b"\xff" * 4), [(PONG, b"hi")]),
    "1.4 64-bit length with the highest bit": Case(
        frame(BINARY, length=b"\x7f\x80" + b"\0" * 7) + b"x" * 100, [], 1009
    ),
    "1.4 64-bit length of all ones": Case(frame(BINARY, length=b"\x7f" + b"\xff" * 8) + b"x" * 100, [], 1009),
}


@cases(SIZES)
def test_1_framing(scene: Scene, case: Case) -> None:
    """Messages within the limit are taken in silence, larger and broken ones end the connection."""
    run(scene, case)


LONG_WINDED: Final = {
    "16 bits for 5": frame(PING, b"hello", length=b"\x7e\0\x05"),
    "64 bits for 5": frame(PING, b"hello", length=b"\x7f" + b"\0" * 7 + b"\x05"),
    "64 bits for 125": frame(PING, b"x" * 125, length=b"\x7f" + b"\0" * 7 + b"\x7d"),
}


@pytest.mark.parametrize("sent", LONG_WINDED.values(), ids=LONG_WINDED.keys())
def test_1_a_length_that_is_not_minimal_is_never_misread(scene: Scene, sent: bytes) -> None:
    """RFC 6455 5.2 forbids it to the sender: it is understood as it is meant, or ends the connection (1002)."""
    with Client(scene.hub.port) as client:
        client.socket.sendall(sent)
        answer = next_but_ping(client)
        assert answer[0] == PONG or answer[1][:2] == b"\x03\xea"
        assert answer[0] == CLOSE or set(answer[1]) in (set(b"hello"), set(b"x"))
    scene.assert_goes_on()


# 2 Pings and pongs

PINGS: Final = {
    "2.1 ping without payload": Case(frame(PING), [(PONG, b"")]),
    "2.2 ping with text": Case(frame(PING, b"Hello, world!"), [(PONG, b"Hello, world!")]),
    "2.3 ping with bytes": Case(
        frame(PING, b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff"), [(PONG, b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff")]
    ),
    "2.4 ping of 125": Case(frame(PING, b"\xfe" * 125), [(PONG, b"\xfe" * 125)]),
    "2.5 ping of 126": Case(frame(PING, b"\xfe" * 126), [], 1002),
    "2.6 ping of 125, chopped": Case(frame(PING, b"\xfe" * 125), [(PONG, b"\xfe" * 125)], chopped=True),
    "2.7 unsolicited pong without payload": Case(frame(PONG)),
    "2.8 unsolicited pong": Case(frame(PONG, b"unsolicited pong payload")),
    "2.9 unsolicited pong, then ping": Case(frame(PONG, b"unsolicited") + frame(PING, b"ping"), [(PONG, b"ping")]),
    "2.9 pong of 126": Case(frame(PONG, b"x" * 126), [], 1002),
    "2.10 ten pings": Case(
        b"".join(frame(PING, b"payload-%d" % n) for n in range(10)), [(PONG, b"payload-%d" % n) for n in range(10)]
    ),
    "2.11 ten pings, chopped": Case(
        b"".join(frame(PING, b"payload-%d" % n) for n in range(10)),
        [(PONG, b"payload-%d" % n) for n in range(10)],
        chopped=True,
    ),
}


@cases(PINGS)
def test_2_pings_and_pongs(scene: Scene, case: Case) -> None:
    """Every ping is answered with its payload, in order; a pong is answered with nothing."""
    run(scene, case)


# 3 Reserved bits

KINDS: Final = {"text": TEXT, "binary": BINARY, "continuation": CONT, "close": CLOSE, "ping": PING, "pong": PONG}
RESERVED: Final = {
    f"3.{rsv} RSV {rsv:03b} in a {name}": Case(
        (frame(TEXT, b"a", fin=False) if opcode == CONT else b"")
        + frame(opcode, b"\x03\xe8" if opcode == CLOSE else b"hi", rsv=rsv),
        [],
        1002,
    )
    for rsv in range(1, 8)
    for name, opcode in KINDS.items()
}


@cases(RESERVED)
def test_3_reserved_bits(scene: Scene, case: Case) -> None:
    """No extension was agreed on: each of the bits, in each kind of frame, is an error."""
    run(scene, case)


def test_3_reserved_bits_after_good_frames(scene: Scene) -> None:
    """What was right before is answered; what comes after is not."""
    sent = frame(TEXT, b"hi") + frame(PING, b"before") + frame(TEXT, b"hi", rsv=4) + frame(PING, b"after")
    run(scene, Case(sent, [(PONG, b"before")], 1002))
    run(scene, Case(sent, [(PONG, b"before")], 1002, chopped=True))


# 4 Opcodes

OPCODES: Final = {
    f"4.{1 if opcode < 8 else 2} opcode {opcode}{name}": Case(
        before + frame(opcode, payload) + frame(PING, b"after"), answers, 1002
    )
    for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
    for name, before, payload, answers in (
        ("", b"", b"", list[Frame]()),
        (" with payload", b"", b"reserved", list[Frame]()),
        (" after a ping", frame(TEXT, b"hi") + frame(PING, b"before"), b"", [(PONG, b"before")]),
    )
}


@cases(OPCODES)
def test_4_opcodes(scene: Scene, case: Case) -> None:
    """The reserved ones are errors, with or without payload."""
    run(scene, case)


# 5 Fragmentation

PARTS: Final = [b"fragment%d" % number for number in range(5)]
FRAGMENTS: Final = {
    "5.1 ping in two fragments": Case(frame(PING, b"a", fin=False) + frame(CONT, b"b"), [], 1002),
    "5.2 pong in two fragments": Case(frame(PONG, b"a", fin=False) + frame(CONT, b"b"), [], 1002),
    "5.2 close that is not final": Case(frame(CLOSE, b"\x03\xe8", fin=False), [], 1002),
    "5.3 text in two fragments": Case(fragments(TEXT, *PARTS[:2])),
    "5.4 text in two fragments, chopped": Case(fragments(TEXT, *PARTS[:2]), chopped=True),
    "5.5 binary in five fragments": Case(fragments(BINARY, *PARTS)),
    "5.6 ping between two fragments": Case(
        frame(TEXT, b"a", fin=False) + frame(PING, b"between") + frame(CONT, b"b"), [(PONG, b"between")]
    ),
    "5.7 the same, chopped": Case(
        frame(TEXT, b"a", fin=False) + frame(PING, b"between") + frame(CONT, b"b"),
        [(PONG, b"between")],
        chopped=True,
    ),
    "5.8 pong between two fragments": Case(frame(TEXT, b"a", fin=False) + frame(PONG, b"x") + frame(CONT, b"b")),
    "5.9 continuation of nothing": Case(frame(CONT, b"a") + frame(TEXT, b"hi"), [], 1002),
    "5.10 continuation of a complete message": Case(frame(TEXT, b"hi") + frame(CONT, b"a"), [], 1002),
    "5.11 the same, chopped": Case(frame(TEXT, b"hi") + frame(CONT, b"a"), [], 1002, chopped=True),
    "5.12 unfinished continuation of nothing": Case(frame(CONT, b"a", fin=False) + frame(TEXT, b"hi"), [], 1002),
    "5.15 text, then continuation of nothing": Case(
        fragments(TEXT, *PARTS[:2]) + frame(CONT, b"a", fin=False) + frame(TEXT, b"hi"), [], 1002
    ),
    "5.16 continuation of nothing, thrice": Case(frame(CONT, b"a", fin=False) * 3, [], 1002),
    "5.18 text within a text": Case(frame(TEXT, b"a", fin=False) + frame(TEXT, b"b"), [], 1002),
    "5.18 binary within a text": Case(frame(TEXT, b"a", fin=False) + frame(BINARY, b"b", fin=False), [], 1002),
    "5.19 pings between five fragments": Case(
        b"".join(frame(CONT if n else TEXT, part, fin=n == 4) + frame(PING, part) for n, part in enumerate(PARTS)),
        [(PONG, part) for part in PARTS],
    ),
    "5.20 the same, chopped": Case(
        b"".join(frame(CONT if n else TEXT, part, fin=n == 4) + frame(PING, part) for n, part in enumerate(PARTS)),
        [(PONG, part) for part in PARTS],
        chopped=True,
    ),
    "5.21 empty fragments": Case(fragments(TEXT, b"", b"", b"")),
    "5.21 longest ping within the largest message": Case(
        frame(BINARY, b"x" * (LIMIT - 1), fin=False) + frame(PING, b"y" * 125) + frame(CONT, b"x"),
        [(PONG, b"y" * 125)],
    ),
    "5.22 two messages in fragments": Case(fragments(TEXT, *PARTS) + fragments(BINARY, *PARTS)),
}


@cases(FRAGMENTS)
def test_5_fragmentation(scene: Scene, case: Case) -> None:
    """Messages may come in fragments, control frames between them and never in fragments."""
    run(scene, case)


# 6 Text

GREETING: Final = "Hello-µ@ßöäüàá-UTF-8!! κόσμε 🔥"
EDGES: Final = [
    "\0",
    "\x7f",
    "\x80",
    "\u07ff",
    "\u0800",
    "\ud7ff",
    "\ue000",
    "\ufffd",
    "\uffff",
    "\U00010000",
    "\U0010ffff",
]
BAD: Final[dict[str, bytes]] = {
    "no beginning": b"\x80",
    "a lone beginning": b"\xc3",
    "the impossible": b"\xfe\xff",
    "an overlong slash": b"\xc0\xaf",
    "an overlong slash of three": b"\xe0\x80\xaf",
    "an overlong slash of four": b"\xf0\x80\x80\xaf",
    "an overlong NUL": b"\xc0\x80",
    "a surrogate": b"\xed\xa0\x80",
    "a surrogate pair": b"\xed\xa0\x80\xed\xb0\x80",
    "beyond the last": b"\xf4\x90\x80\x80",
    "five bytes": b"\xf8\x88\x80\x80\x80",
    "cut in the middle": "κ".encode()[:1] + b"x",
    "a good beginning": "κόσμε".encode() + b"\xed\xa0\x80" + b"edited",
}
VALID: Final = {
    "6.1 empty": Case(frame(TEXT)),
    "6.1 three empty fragments": Case(fragments(TEXT, b"", b"", b"")),
    "6.1 text between two empty fragments": Case(fragments(TEXT, b"", b"middle", b"")),
    "6.2 whole": Case(frame(TEXT, GREETING.encode())),
    "6.2 a fragment per byte": Case(fragments(TEXT, *(bytes([byte]) for byte in GREETING.encode()))),
    "6.2 chopped": Case(frame(TEXT, GREETING.encode()), chopped=True),
    "6.2 cut within a character, with a ping": Case(
        frame(TEXT, "κ".encode()[:1], fin=False) + frame(PING, b"?") + frame(CONT, "κ".encode()[1:]),
        [(PONG, b"?")],
    ),
    "6.5 edges": Case(frame(TEXT, "".join(EDGES).encode())),
    "6.5 edges, a fragment per byte": Case(fragments(TEXT, *(bytes([byte]) for byte in "".join(EDGES).encode()))),
    "6.5 binary may be anything": Case(frame(BINARY, b"\xfe\xff") + fragments(BINARY, b"\xc3", b"\xff")),
    "6.5 a ping may be anything": Case(frame(PING, b"\xfe\xff"), [(PONG, b"\xfe\xff")]),
}
INVALID: Final = {
    **{f"6.3 {name}": Case(frame(TEXT, b"ok" + data), [], 1007) for name, data in BAD.items()},
    **{
        f"6.3 {name}, a fragment per byte": Case(
            fragments(TEXT, *(bytes([byte]) for byte in data), b"."), [], 1007
        )
        for name, data in BAD.items()
    },
    "6.4 at once, not at the end": Case(frame(TEXT, b"\xed\xa0\x80", fin=False), [], 1007),
    "6.4 in a later fragment": Case(frame(TEXT, b"ok", fin=False) + frame(CONT, b"\xf4\x90", fin=False), [], 1007),
    "6.4 unfinished at the end": Case(fragments(TEXT, "κ".encode(), "κ".encode()[:1]), [], 1007),
    "6.4 in the same segment as a ping": Case(frame(TEXT, b"\xff") + frame(PING, b"after"), [], 1007),
    "6.4 in the same segment as a close": Case(frame(TEXT, b"\xff") + close(1000), [], 1007),
    "6.4 in the same segment as another mistake": Case(frame(TEXT, b"\xff") + frame(3), [], 1007),
    "6.4 chopped": Case(frame(TEXT, b"\xff") + frame(PING, b"after"), [], 1007, chopped=True),
}


@cases(VALID | INVALID)
def test_6_text(scene: Scene, case: Case) -> None:
    """Text is UTF-8, also across fragments; what is not ends the connection with the frame that shows it."""
    run(scene, case)


# 7 Closing

GOOD_CODES: Final = [1000, 1001, 1002, 1003, *range(1007, 1015), 3000, 3999, 4000, 4001, 4008, 4999]
BAD_CODES: Final = [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65_535]
ENDS: Final[dict[str, tuple[bytes, bytes]]] = {
    "7.1 goodbye": (close(1000), b"\x03\xe8"),
    "7.1 two goodbyes": (close(1000) * 2, b"\x03\xe8"),
    "7.1 a ping after it": (close(1000) + frame(PING, b"?"), b"\x03\xe8"),
    "7.1 text after it": (close(1000) + frame(TEXT, b"late"), b"\x03\xe8"),
    "7.1 a mistake after it": (close(1000) + b"\xff" * 20, b"\x03\xe8"),
    "7.1 within a message": (frame(TEXT, b"a", fin=False) + close(1000) + frame(CONT, b"b"), b"\x03\xe8"),
    "7.1 after large messages": (frame(BINARY, b"x" * LIMIT) * 9 + close(1000), b"\x03\xe8"),
    "7.3 empty": (frame(CLOSE), b""),
    "7.3 with a reason": (close(1000, b"Hello World!"), b"\x03\xe8Hello World!"),
    "7.3 with a reason that is not ASCII": (close(1000, "Tschüß 🔥".encode()), b"\x03\xe8" + "Tschüß 🔥".encode()),
    "7.3 with the longest reason": (close(1000, b"*" * 123), b"\x03\xe8" + b"*" * 123),
    **{f"7.7 code {code}": (close(code, b"bye"), struct.pack("!H", code) + b"bye") for code in GOOD_CODES},
}


@pytest.mark.parametrize("chopped", [False, True], ids=["whole", "chopped"])
@pytest.mark.parametrize(("sent", "echo"), ENDS.values(), ids=ENDS.keys())
def test_7_a_close_is_echoed_and_the_hub_ends_the_connection(
    scene: Scene, sent: bytes, echo: bytes, chopped: bool
) -> None:
    """Its code and reason come back, once, and nothing follows; the hub is the first to end the TCP connection."""
    with Client(scene.hub.port) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.socket.settimeout(3 * UNIT_S)  # less than `hub.close_timeout_s`
        with contextlib.suppress(ConnectionError):
            for part in [bytes([byte]) for byte in sent] if chopped and len(sent) < 400 else [sent]:
                client.socket.sendall(part)
        assert client.until_closed() == (CLOSE, echo)
    scene.assert_goes_on()


BAD_ENDS: Final = {
    "7.3 of one byte": Case(frame(CLOSE, b"\x03"), [], 1002),
    "7.3 of 126 bytes": Case(close(1000, b"*" * 124), [], 1002),
    "7.5 reason that is not UTF-8": Case(close(1000, b"\xed\xa0\x80"), [], 1007),
    "7.5 reason cut in a character": Case(close(1000, "κ".encode()[:1]), [], 1007),
    **{f"7.9 code {code}": Case(close(code), [], 1002) for code in BAD_CODES},
    **{f"7.9 code {code} with a reason": Case(close(code, b"bye"), [], 1002) for code in BAD_CODES},
}


@cases(BAD_ENDS)
def test_7_a_broken_close_is_a_mistake_like_others(scene: Scene, case: Case) -> None:
    """Codes that may not stand on the wire, and reasons that are no text."""
    run(scene, case)


MISTAKES: Final = {
    "1002": frame(3),
    "1007": frame(TEXT, b"\xff"),
    "1008": frame(TEXT) * 300,
    "1009": frame(TEXT, b"x" * 5000),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_7_who_answers_the_hubs_close_is_let_go_at_once(scene: Scene, mistake: bytes) -> None:
    """With a close from each side the hub ends the TCP connection without waiting for its deadline."""
    with Client(scene.hub.port) as client:
        client.socket.settimeout(3 * UNIT_S)  # less than `hub.close_timeout_s`
        client.socket.sendall(mistake)
        code = client.close_code()
        with contextlib.suppress(ConnectionError):
            client.socket.sendall(close(code))
        with pytest.raises(EOFError):
            client.next_frame()
    scene.assert_goes_on()


# 9 Limits

LIMITS: Final = {
    "9.1 text of the limit": Case(frame(TEXT, b"x" * LIMIT)),
    "9.1 one more": Case(frame(TEXT, b"x" * (LIMIT + 1)), [], 1009),
    "9.2 binary of the limit": Case(frame(BINARY, b"x" * LIMIT)),
    "9.2 one more": Case(frame(BINARY, b"x" * (LIMIT + 1)), [], 1009),
    "9.3 the limit in 64 fragments": Case(fragments(TEXT, *[b"x" * 64] * 64)),
    "9.3 one more": Case(fragments(TEXT, *[b"x" * 64] * 64, b"x"), [], 1009),
    "9.3 one more, never ended": Case(fragments(TEXT, *[b"x" * 64] * 64, b"x", b"")[:-6], [], 1009),
    "9.4 the limit in two fragments": Case(fragments(BINARY, b"x" * (LIMIT - 1), b"x")),
    "9.4 one more": Case(fragments(BINARY, b"x" * LIMIT, b"x"), [], 1009),
    "9.4 the limit, then nothing": Case(fragments(BINARY, b"x" * LIMIT, b"")),
    "9.5 the limit, ten times": Case(frame(TEXT, b"x" * LIMIT) * 10),
    "9.5 a large one, chopped": Case(frame(TEXT, b"x" * 1000), chopped=True),
    "9.7 80 small messages": Case(frame(TEXT, b"x") * 80),
    "9.7 80 pings": Case(frame(PING, b"x") * 80, [(PONG, b"x")] * 80),
    "9.7 80 pings, chopped": Case(frame(PING, b"x") * 80, [(PONG, b"x")] * 80, chopped=True),
    "9.8 300 small messages": Case(frame(TEXT, b"x") * 300, [], 1008),
}


@cases(LIMITS)
def test_9_limits(scene: Scene, case: Case) -> None:
    """`hub.inbound_max_bytes` of one message, whole or in fragments; `hub.inbound_max_per_s` frames."""
    if case.code != 1008:
        run(scene, case)
        return
    with Client(scene.hub.port) as client:
        client.socket.sendall(case.sent)
        assert client.close_code() == 1008
    scene.assert_goes_on()


def test_9_pings_one_by_one_are_frames_too(scene: Scene) -> None:
    """Whoever waits for each pong and asks again at once says as much as whoever sends them together."""
    with Client(scene.hub.port) as client:
        with contextlib.suppress(ConnectionError):
            for _ in range(2000):
                client.socket.sendall(frame(PING, b"?"))
                answer = next_but_ping(client)
                if answer[0] == CLOSE:
                    break
        assert answer[0] == CLOSE, "2000 pings as fast as they are answered, and no close"
        assert answer[1][:2] == b"\x03\xf0"
    scene.assert_goes_on()


# The opening handshake (RFC 6455 4.2)

KEY: Final = "dGhlIHNhbXBsZSBub25jZQ=="
FIELDS: Final = {
    "Host": "hub.example",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": KEY,
    "Sec-WebSocket-Version": "13",
}

AGREED: Final = (
    "permessage-deflate; server_no_context_takeover; client_no_context_takeover; server_max_window_bits=12"
)
"""What the hub answers to an offer of compression (RFC 7692; test_rfc7692.py has the rest of it)."""

Header = tuple[str, str]


def request(
    *headers: Header,
    without: str = "",
    line: str = "GET /ws HTTP/1.1",
    edit: Callable[[list[str]], list[str]] = list,
) -> bytes:
    """A handshake with other headers instead of, or without, those of the same name; `edit` has the last word."""
    replaced = {name for name, _ in headers} | {without}
    lines = [f"{name}: {value}" for name, value in FIELDS.items() if name not in replaced]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([line, *edit(lines), "", ""]).encode("latin-1")


def lower(lines: list[str]) -> list[str]:
    return [name.lower() + colon + value for name, colon, value in (line.partition(":") for line in lines)]


def spaced(lines: list[str]) -> list[str]:
    return [line.replace(": ", ": \t  ") + " \t" for line in lines]


def tight(lines: list[str]) -> list[str]:
    return [line.replace(": ", ":") for line in lines]


def backwards(lines: list[str]) -> list[str]:
    return lines[::-1]


WELCOME: Final[dict[str, bytes]] = {
    "as in the RFC": request(),
    "lower-case names": request(edit=lower),
    "upper-case names": request(
        edit=lambda lines: [line.replace("Sec-WebSocket", "SEC-WEBSOCKET") for line in lines]
    ),
    "spaces around the values": request(edit=spaced),
    "no spaces": request(edit=tight),
    "other order": request(edit=backwards),
    "Connection: keep-alive, Upgrade": request(("Connection", "keep-alive, Upgrade")),
    "Connection: upgrade": request(("Connection", "upgrade")),
    "Connection twice": request(("Connection", "keep-alive"), ("Connection", "Upgrade")),
    "Upgrade: WebSocket": request(("Upgrade", "WebSocket")),
    "an origin of its own": request(("Host", "127.0.0.1"), ("Origin", "http://127.0.0.1")),
    "a user agent and cookies": request(("User-Agent", "x"), ("Cookie", "a=b; c=d"), ("Cookie", "e=f")),
    "an empty header": request(("X-Note", "")),
    "a header beyond ASCII": request(("X-Note", "é")),
    "an unknown header twice": request(("X-Note", "a"), ("X-Note", "b")),
    "Content-Length: 0": request(("Content-Length", "0")),
    "a header of 8,000 bytes": request(("Cookie", "x" * 8000)),
    "100 headers": request(*[(f"X-{number}", "x") for number in range(95)]),
    "30 values of 256 characters": request(
        line="GET /ws?" + "&".join(f"type={number:0256}" for number in range(30)) + " HTTP/1.1"
    ),
    "an unknown extension": request(("Sec-WebSocket-Extensions", "x-unknown; a=b")),
    "compression": request(
        ("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits, permessage-deflate")
    ),
    "compression twice": request(
        ("Sec-WebSocket-Extensions", "permessage-deflate"), ("Sec-WebSocket-Extensions", "x-webkit-deflate-frame")
    ),
}


def handshake(port: int, sent: bytes) -> tuple[int, dict[str, list[str]], socket.socket]:
    """The status and headers (by lower-case name) of an answer, and the connection, to be closed by the caller."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=5 * UNIT_S)
    answer = b""
    try:
        connection.sendall(sent)
        while b"\r\n\r\n" not in answer:
            more = connection.recv(65_536)
            assert more, f"no answer but {answer!r}"
            answer += more
    except BaseException:
        connection.close()
        raise
    head = answer.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    assert head[0].startswith("HTTP/1.1 ")
    headers: dict[str, list[str]] = {}
    for line in head[1:]:
        name, _, value = line.partition(":")
        headers.setdefault(name.lower(), []).append(value.strip())
    return int(head[0][9:12]), headers, connection


def assert_open(connection: socket.socket) -> None:
    """It is a WebSocket, and what is said uncompressed is heard and answered uncompressed."""
    connection.sendall(frame(PING, b"open"))
    answer = b""
    while len(answer) < 6:
        more = connection.recv(100)
        assert more
        answer += more
    assert answer[:6] == b"\x8a\x04open"


@pytest.mark.parametrize("sent", WELCOME.values(), ids=WELCOME.keys())
def test_handshakes_that_are_right(scene: Scene, sent: bytes) -> None:
    """However they are written: 101, the right accept key, no extension or subprotocol that was not offered."""
    status, headers, connection = handshake(scene.hub.port, sent)
    with connection:
        assert status == 101
        assert [value.lower() for value in headers["upgrade"]] == ["websocket"]
        assert [value.lower() for value in headers["connection"]] == ["upgrade"]
        assert headers["sec-websocket-accept"] == ["s3pPLMBiTxaQ9kYGzzhZRbK+xOo="]
        assert headers.get("sec-websocket-extensions", []) == ([AGREED] if b"permessage-deflate" in sent else [])
        assert "sec-websocket-protocol" not in headers
        assert "content-length" not in headers
        assert_open(connection)
    scene.assert_goes_on()


def test_the_accept_key_is_that_of_the_key(scene: Scene) -> None:
    """For any key."""
    for _ in range(5):
        key = base64.b64encode(os.urandom(16)).decode()
        status, headers, connection = handshake(scene.hub.port, request(("Sec-WebSocket-Key", key)))
        connection.close()
        expected = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()
        assert (status, headers["sec-websocket-accept"]) == (101, [base64.b64encode(expected).decode()])


REFUSED: Final[dict[str, tuple[bytes, set[int]]]] = {
    "POST": (request(line="POST /ws HTTP/1.1"), {405}),
    "HEAD": (request(line="HEAD /ws HTTP/1.1"), {405}),
    "HTTP/1.0": (request(line="GET /ws HTTP/1.0"), {400, 426, 505}),
    "HTTP/2.0": (request(line="GET /ws HTTP/2.0"), {400, 505}),
    "no version of HTTP": (request(line="GET /ws"), {400}),
    "no Host": (request(without="Host"), {400}),
    "two Hosts": (request(("Host", "a"), ("Host", "b")), {400}),
    "no Upgrade": (request(without="Upgrade"), {426}),
    "another Upgrade": (request(("Upgrade", "h2c")), {426}),
    "no Connection": (request(without="Connection"), {426}),
    "Connection: keep-alive": (request(("Connection", "keep-alive")), {426}),
    "Connection: close": (request(("Connection", "close")), {426}),
    "no key": (request(without="Sec-WebSocket-Key"), {400}),
    "empty key": (request(("Sec-WebSocket-Key", "")), {400}),
    "two keys": (request(("Sec-WebSocket-Key", KEY), ("Sec-WebSocket-Key", KEY)), {400}),
    "key of 15 bytes": (request(("Sec-WebSocket-Key", base64.b64encode(b"x" * 15).decode())), {400}),
    "key of 17 bytes": (request(("Sec-WebSocket-Key", base64.b64encode(b"x" * 17).decode())), {400}),
    "key that is not base64": (request(("Sec-WebSocket-Key", "?" * 24)), {400}),
    "key without padding": (request(("Sec-WebSocket-Key", KEY.rstrip("="))), {400}),
    "key beyond ASCII": (request(("Sec-WebSocket-Key", "é" * 24)), {400}),
    "no version": (request(without="Sec-WebSocket-Version"), {400, 426}),
    "two versions": (request(("Sec-WebSocket-Version", "13"), ("Sec-WebSocket-Version", "8")), {400, 426}),
    "version 8": (request(("Sec-WebSocket-Version", "8")), {400, 426}),
    "version 14": (request(("Sec-WebSocket-Version", "14")), {400, 426}),
    "version 013": (request(("Sec-WebSocket-Version", "013")), {400, 426}),
    "version of no number": (request(("Sec-WebSocket-Version", "x")), {400, 426}),
    "space before the colon": (request(edit=lambda lines: [*lines, "X-Note : a"]), {400}),
    "folded line": (request(edit=lambda lines: [*lines, "X-Note: a", " b"]), {400}),
    "line without a colon": (request(edit=lambda lines: [*lines, "nonsense"]), {400}),
    "empty name": (request(edit=lambda lines: [*lines, ": a"]), {400}),
    "bare CR in a value": (request(("X-Note", "a\rb")), {400}),
    "bare LF in a value": (request(("X-Note", "a\nX-Other: b")), {400}),
    "NUL in a value": (request(("X-Note", "a\0b")), {400}),
    "a body": (request(("Content-Length", "5")), {400}),
    "a body in chunks": (request(("Transfer-Encoding", "chunked")), {400}),
    "broken list of extensions": (request(("Sec-WebSocket-Extensions", "a;;b=")), {101, 400}),
    "broken list of subprotocols": (request(("Sec-WebSocket-Protocol", "a b")), {400}),
    "another site's page": (request(("Origin", "http://evil.example")), {403}),
    "page of no site": (request(("Origin", "null")), {403}),
    "two origins": (request(("Origin", "http://127.0.0.1"), ("Origin", "http://127.0.0.1")), {400}),
    "bytes after it": (request() + frame(PING), {400}),
}


@pytest.mark.parametrize(("sent", "statuses"), REFUSED.values(), ids=REFUSED.keys())
def test_handshakes_that_are_wrong(scene: Scene, sent: bytes, statuses: set[int]) -> None:
    """One answer that says so, and the end; never a WebSocket."""
    status, headers, connection = handshake(scene.hub.port, sent)
    with connection:
        assert status in statuses
        assert "sec-websocket-accept" not in headers or status == 101
        if status == 426:
            assert "upgrade" in headers or "sec-websocket-version" in headers
        if status != 101:
            assert "close" in headers["connection"]
            with contextlib.suppress(ConnectionError):
                while connection.recv(65_536):
                    pass
    scene.assert_goes_on()


@pytest.mark.parametrize("version", ["0", "7", "8", "12", "14", "255"])
def test_another_version_is_told_the_right_one(scene: Scene, version: str) -> None:
    """RFC 6455 4.2.2 and 4.4: the answer has a `Sec-WebSocket-Version` that says what the hub speaks."""
    status, headers, connection = handshake(scene.hub.port, request(("Sec-WebSocket-Version", version)))
    connection.close()
    assert status in (400, 426)
    assert headers.get("sec-websocket-version") == ["13"]


V1, PLAIN = "broadcaster.v1", "broadcaster.plain"
OFFERS: Final[dict[str, tuple[list[Header], str | None]]] = {
    "none": ([], None),
    "plain": ([("Sec-WebSocket-Protocol", PLAIN)], PLAIN),
    "v1": ([("Sec-WebSocket-Protocol", V1)], V1),
    "both": ([("Sec-WebSocket-Protocol", f"{PLAIN}, {V1}")], V1),
    "both, without a space": ([("Sec-WebSocket-Protocol", f"{V1},{PLAIN}")], V1),
    "in two headers": ([("Sec-WebSocket-Protocol", PLAIN), ("Sec-WebSocket-Protocol", V1)], V1),
    "lower-case header": ([("sec-websocket-protocol", V1)], V1),
    "among others": ([("Sec-WebSocket-Protocol", f"chat, mqtt, {V1}, graphql-ws")], V1),
    "others only": ([("Sec-WebSocket-Protocol", "chat, superchat")], None),
    "in other case": ([("Sec-WebSocket-Protocol", "Broadcaster.V1")], None),
    "a longer name": ([("Sec-WebSocket-Protocol", "broadcaster.v10, broadcaster")], None),
    "a token beside it": ([("Sec-WebSocket-Protocol", f"bearer.c2VjcmV0, {V1}")], V1),
    "a token only": ([("Sec-WebSocket-Protocol", "bearer.c2VjcmV0")], None),
}


@pytest.mark.parametrize(("headers", "selected"), OFFERS.values(), ids=OFFERS.keys())
def test_a_subprotocol_is_selected_only_if_it_was_offered(
    scene: Scene, headers: list[Header], selected: str | None
) -> None:
    """The richer one of the hub's own two; no other, and never a token."""
    status, answered, connection = handshake(scene.hub.port, request(*headers))
    with connection:
        assert status == 101
        assert answered.get("sec-websocket-protocol", [None]) == [selected]
    scene.assert_goes_on()
