"""RFC 7692 (permessage-deflate) on real sockets, in the groups 12 and 13 of the Autobahn test suite.

The suite has a server echo what it is sent; the hub does not. So each case is held in both directions on its own:
what a client sends compressed is taken, and events come compressed, such that a client of any kind can read them.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple

import pytest

from broadcaster.redis.server import RedisServer
from tests.conformance.test_rfc6455 import (
    AGREED,
    BINARY,
    CLOSE,
    CONT,
    LIMIT,
    PING,
    PONG,
    TEXT,
    Case,
    cases,
    fragments,
    frame,
    request,
)
from tests.support import (
    UNIT_S,
    HubThread,
    RawClient,
    RedisClient,
    assert_calm,
    event_payload,
    next_but_ping,
    redis_client,
)

OFFER: Final = "permessage-deflate"
RSV1: Final = 4


def deflate(data: bytes, bits: int = 15) -> bytes:
    """A message as a client compresses it."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, -bits)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


def inflate(data: bytes, bits: int) -> bytes:
    """A message as a client with such a window, and none of earlier messages, inflates it."""
    inflater = zlib.decompressobj(-bits)
    whole = inflater.decompress(data + b"\0\0\xff\xff")
    assert not inflater.unused_data
    return whole


class Client(RawClient):
    """A client that offers compression, and inflates what comes."""

    def __init__(self, port: int, offer: str = OFFER) -> None:
        super().__init__(port, request=request(("Sec-WebSocket-Extensions", offer)))
        self.socket.settimeout(5 * UNIT_S)
        self.inflated = 0

    @property
    def agreed(self) -> str:
        lines = [line.partition(": ") for line in self.response.decode().split("\r\n")]
        return next((value for name, _, value in lines if name == "Sec-WebSocket-Extensions"), "")

    def __enter__(self) -> Client:
        return self

    def next_event(self) -> bytes:
        """The next event."""
        while True:
            while len(self._buffer) < 10 or len(self._buffer) < _length(self._buffer):
                more = self.socket.recv(1 << 20)
                assert more, "the hub closed the connection"
                self._buffer += more
            size = _length(self._buffer)
            sent, self._buffer = self._buffer[:size], self._buffer[size:]
            if sent[0] == 0x89:
                continue
            payload = sent[{126: 4, 127: 10}.get(sent[1], 2) :]
            assert sent[0] in (0x81, 0xC1)
            if sent[0] == 0xC1:
                self.inflated += 1
                return inflate(payload, 12)
            return payload


def _length(buffer: bytes) -> int:
    """Of the frame that a buffer of 10 bytes and more begins with."""
    if buffer[1] < 126:
        return 2 + buffer[1]
    size = 2 if buffer[1] == 126 else 8
    return 2 + size + int.from_bytes(buffer[2 : 2 + size])


class Compressing(NamedTuple):
    """A hub, one who publishes, and one that listens beside the case."""

    hub: HubThread
    publish: RedisClient
    bystander: RawClient


@pytest.fixture(scope="module")
def scene() -> Iterator[Compressing]:
    """One for the whole file: no case may harm it."""
    with (
        RedisServer.start() as server,
        redis_client(server) as publish,
        HubThread(
            server.url, BROADCASTER_HUB__CLOSE_TIMEOUT_S=str(10 * UNIT_S), BROADCASTER_EVENT__MAX_BYTES="200000"
        ) as hub,
        RawClient(hub.until_ready().port) as bystander,
    ):
        hub.until_connected(1)
        yield Compressing(hub, publish, bystander)
        hub.until_connected(1)
        assert hub.stats()["aborted"] == 0
        assert_calm(hub)


# 12 What is compressed

RANDOM: Final = random.Random(12)
HOSTS: Final = [
    {
        "name": f"srv-{number}.example.com",
        "address": f"10.0.{number % 250}.{RANDOM.randrange(250)}",
        "state": state,
    }
    for number, state in enumerate(RANDOM.choices(["down", "up", "degraded"], k=2000))
]
FAUST: Final = "Habe nun, ach! Philosophie, Juristerei und Medizin, und leider auch Theologie durchaus studiert, "
CONTENTS: Final = {
    "12.1 JSON": json.dumps(HOSTS),
    "12.2 what cannot be compressed": "".join(RANDOM.choices("0123456789abcdef", k=140_000)),
    "12.3 German": "".join(RANDOM.choices([*FAUST.split(" "), "mit heißem Bemühn ", "ß€😀"], k=40_000)),
    "12.4 HTML": "".join(f"<tr><td class='host'>{host['name']}</td></tr>\n" for host in HOSTS) * 2,
    "12.5 one letter": "a" * 140_000,
}
SIZES: Final = (16, 64, 256, 1024, 4096, 8192, 16_384, 32_768, 65_536, 131_072)


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_12_events_of_all_sizes_are_what_was_published(scene: Compressing, content: str) -> None:
    """12.x.1 to 12.x.10: from 16 bytes to 128 KiB; compressed from 1,024 bytes on."""
    with Client(scene.hub.port) as client:
        assert client.agreed == AGREED
        scene.hub.until_connected(2)
        for size in SIZES:
            payload = event_payload(data={"text": content[:size].encode()[:size].decode(errors="ignore")})
            scene.publish.publish(payload)
            before = client.inflated
            assert client.next_event() == payload
            assert client.inflated - before == (len(payload) >= 1024)
            assert next_but_ping(scene.bystander) == (TEXT, payload)
    scene.hub.until_connected(1)


FRAGMENTS: Final = (1, 16, 256, 1024, 4096)


def compressed(opcode: int, data: bytes, size: int = 1 << 20, bits: int = 15) -> bytes:
    """A compressed message in frames of at most so many bytes."""
    return cut(opcode, deflate(data, bits), size)


def cut(opcode: int, data: bytes, size: int) -> bytes:
    parts = [data[at : at + size] for at in range(0, len(data), size)] or [b""]
    return b"".join(
        frame(opcode if n == 0 else CONT, part, fin=n == len(parts) - 1, rsv=0 if n else RSV1)
        for n, part in enumerate(parts)
    )


def text(size: int) -> bytes:
    return CONTENTS["12.3 German"][:size].encode()[:size].decode(errors="ignore").encode()


BOMB: Final = deflate(b"\0" * (1 << 20))
HELLO: Final = b"\xf2\x48\xcd\xc9\xc9\x07\x00"

SAID: Final = {
    **{f"12.3 text of {size}": Case(compressed(TEXT, text(size))) for size in (0, 1, 16, 64, 256, 1024, LIMIT)},
    **{f"12.2 binary of {size}": Case(compressed(BINARY, b"\xfe" * size)) for size in (16, 1024, LIMIT)},
    "12.2 binary of 4096 that cannot be compressed": Case(compressed(BINARY, RANDOM.randbytes(LIMIT), 100)),
    **{
        f"12.3 text of {LIMIT} in fragments of {size}": Case(compressed(TEXT, text(LIMIT), size))
        for size in FRAGMENTS[2:]
    },
    "12.3 text of 64 in fragments of 1": Case(compressed(TEXT, text(64), 1)),
    "12.3 a small window": Case(compressed(TEXT, text(LIMIT), bits=9)),
    "12.3 not compressed": Case(frame(TEXT, text(300))),
    "12.3 one after another": Case(compressed(TEXT, text(1000)) * 3),
    "12.3 a ping between fragments": Case(
        frame(TEXT, HELLO[:3], fin=False, rsv=RSV1) + frame(PING, b"in between") + frame(CONT, HELLO[3:]),
        [(PONG, b"in between")],
    ),
    # RFC 7692 7.2.3
    "one block": Case(frame(TEXT, HELLO, rsv=RSV1)),
    "a block without compression": Case(frame(TEXT, b"\0\x05\0\xfa\xffHello\0", rsv=RSV1)),
    "a block with BFINAL": Case(frame(TEXT, b"\xf3\x48\xcd\xc9\xc9\x07\0\0", rsv=RSV1)),
    "two blocks": Case(frame(TEXT, b"\xf2\x48\x05\0\0\0\xff\xff\xca\xc9\xc9\x07\0", rsv=RSV1)),
    "an empty message": Case(frame(TEXT, b"\0", rsv=RSV1)),
    # What is wrong
    "one byte too many": Case(compressed(TEXT, b"a" * (LIMIT + 1)), [], 1009),
    "a bomb": Case(frame(BINARY, BOMB, rsv=RSV1), [], 1009),
    "a bomb in fragments": Case(cut(BINARY, BOMB, 100), [], 1009),
    "a bomb in bombs": Case(frame(BINARY, deflate(deflate(b"\0" * (1 << 25))), rsv=RSV1), [], 1009),
    "many small fragments of a bomb": Case(cut(BINARY, deflate(b"\0" * 200_000), 8), [], 1009),
    "more after its end, which inflates to nothing": Case(
        frame(TEXT, b"\xf3\x48\xcd\xc9\xc9\x07\0", fin=False, rsv=RSV1) + frame(CONT, b"x" * 1000, fin=False) * 6,
        [],
        1009,
    ),
    "empty blocks for ever": Case(
        frame(TEXT, HELLO + b"\0\0\xff\xff", fin=False, rsv=RSV1)
        + frame(CONT, b"\0\0\0\xff\xff" * 200, fin=False) * 6,
        [],
        1009,
    ),
    "no deflate": Case(frame(TEXT, b"\xff\xff\xff\xff", rsv=RSV1), [], 1002),
    "damaged in the middle": Case(frame(TEXT, deflate(text(400))[:40] + b"\xff" * 40, rsv=RSV1), [], 1002),
    "back to before its beginning": Case(frame(TEXT, b"\x4a\x04\x13\0\xff\xff", rsv=RSV1), [], 1002),
    "what it inflates to is not UTF-8": Case(compressed(TEXT, b"\xc3\x28"), [], 1007),
    "a letter that is cut": Case(compressed(TEXT, "é".encode()[:1]), [], 1007),
    "RSV1 on a continuation": Case(
        frame(TEXT, HELLO[:3], fin=False, rsv=RSV1) + frame(CONT, HELLO[3:], rsv=RSV1), [], 1002
    ),
    "RSV1 on a ping": Case(frame(PING, HELLO, rsv=RSV1), [], 1002),
    "RSV1 on a close": Case(frame(CLOSE, b"\x03\xe8", rsv=RSV1), [], 1002),
    "RSV1 and RSV2": Case(frame(TEXT, HELLO, rsv=6), [], 1002),
    "RSV1 on a message that is not compressed": Case(frame(TEXT, b"Hello", rsv=RSV1), [], 1002),
    "a plain message in fragments": Case(fragments(TEXT, text(100), text(100))),
}


@cases(SAID)
def test_12_what_a_client_compresses(scene: Compressing, case: Case) -> None:
    """Messages that are within the limit when inflated are taken in silence; others end the connection."""
    with Client(scene.hub.port) as client:
        scene.hub.until_connected(2)
        client.socket.sendall(case.sent)
        for answer in case.answers:
            assert next_but_ping(client) == answer
        if case.code is None:
            client.socket.sendall(frame(PING, b"still open"))
            assert next_but_ping(client) == (PONG, b"still open")
        else:
            opcode, said = next_but_ping(client)
            assert (opcode, int.from_bytes(said[:2])) == (CLOSE, case.code)
            with pytest.raises(EOFError):
                client.next_frame()
    payload = event_payload(data={"text": "x" * 2000})
    scene.publish.publish(payload)
    assert next_but_ping(scene.bystander) == (TEXT, payload)
    scene.hub.until_connected(1)


# 13 What is agreed on

ANSWERS: Final[dict[str, tuple[str, str]]] = {
    "13.1 nothing demanded": (OFFER, AGREED),
    "13.2 no takeover": (f"{OFFER}; server_no_context_takeover", AGREED),
    "13.3 a window of 9": (f"{OFFER}; server_max_window_bits=9", ""),
    "13.4 a window of 15": (f"{OFFER}; server_max_window_bits=15", AGREED),
    "13.5 no takeover, a window of 9": (f"{OFFER}; server_no_context_takeover; server_max_window_bits=9", ""),
    "13.6 no takeover, a window of 15": (
        f"{OFFER}; server_no_context_takeover; server_max_window_bits=15",
        AGREED,
    ),
    "13.7 one after another": (
        f"{OFFER}; server_no_context_takeover; server_max_window_bits=9, {OFFER}; server_no_context_takeover",
        AGREED,
    ),
    "a window of 8": (f"{OFFER}; server_max_window_bits=8", ""),
    "a window of 11": (f"{OFFER}; server_max_window_bits=11", ""),
    "a window of 12": (f"{OFFER}; server_max_window_bits=12", AGREED),
    "a window in quotes": (f'{OFFER}; server_max_window_bits="12"', AGREED),
    "as Chromium": (f"{OFFER}; client_max_window_bits", AGREED),
    "as Gorilla": (f"{OFFER}; server_no_context_takeover; client_no_context_takeover", AGREED),
    "a window of the client": (f"{OFFER}; client_max_window_bits=10", f"{AGREED}; client_max_window_bits=10"),
    "a window without a number": (f"{OFFER}; server_max_window_bits", ""),
    "a window of 16": (f"{OFFER}; server_max_window_bits=16", ""),
    "a window of 012": (f"{OFFER}; server_max_window_bits=012", ""),
    "a takeover with a value": (f"{OFFER}; server_no_context_takeover=true", ""),
    "a parameter twice": (f"{OFFER}; server_no_context_takeover; server_no_context_takeover", ""),
    "an unknown parameter": (f"{OFFER}; window=12", ""),
    "an unknown parameter, then none": (f"{OFFER}; window=12, {OFFER}", AGREED),
    "another extension before it": (f"x-unknown; a=b, {OFFER}", AGREED),
    "another extension": ("x-webkit-deflate-frame", ""),
    "more than anybody reads": (", ".join([OFFER] * 60), ""),
}


@pytest.mark.parametrize(("offer", "agreed"), ANSWERS.values(), ids=ANSWERS.keys())
def test_13_what_is_agreed_on_holds(scene: Compressing, offer: str, agreed: str) -> None:
    """The hub's own terms, or no compression; the events are right either way."""
    payload = event_payload(data={"text": text(3000).decode()})
    with Client(scene.hub.port, offer) as client:
        assert client.agreed == agreed
        scene.hub.until_connected(2)
        scene.publish.publish(payload)
        assert client.next_event() == payload
        assert client.inflated == bool(agreed)
    assert next_but_ping(scene.bystander) == (TEXT, payload)
    scene.hub.until_connected(1)


def test_a_client_that_offers_nothing_may_not_compress(scene: Compressing) -> None:
    """What was not agreed on may not be used."""
    with RawClient(scene.hub.port) as client:
        client.socket.sendall(frame(TEXT, HELLO, rsv=RSV1))
        opcode, said = next_but_ping(client)
        assert (opcode, int.from_bytes(said[:2])) == (CLOSE, 1002)
    scene.hub.until_connected(1)


def test_a_hub_that_compresses_nothing_accepts_no_offer() -> None:
    """`hub.compress = false`: no extension, and a compressed message is an error."""
    with (
        RedisServer.start() as server,
        HubThread(server.url, BROADCASTER_HUB__COMPRESS="false") as hub,
        Client(hub.until_ready().port) as client,
        redis_client(server) as publish,
    ):
        assert client.agreed == ""
        hub.until_connected(1)
        payload = event_payload(data={"text": "x" * 3000})
        publish.publish(payload)
        assert (client.next_event(), client.inflated) == (payload, 0)
        client.socket.sendall(frame(TEXT, HELLO, rsv=RSV1))
        opcode, said = next_but_ping(client)
        assert (opcode, int.from_bytes(said[:2])) == (CLOSE, 1002)
