"""The first bytes of a connection: whatever they are and however cut, one answer or none, and no trace."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, TypeVar

import pytest
import uvloop
from hypothesis import example, given
from hypothesis import strategies as st

from broadcaster.hub.connections import handshake
from broadcaster.hub.connections.connection import Connection
from broadcaster.hub.connections.event_stream import EventStream
from broadcaster.hub.connections.handshake import HandshakeProtocol
from broadcaster.redis.server import RedisServer
from tests.fuzz import CUTS, cut, fuzzed, mutated
from tests.hub.house import House, Socket, turns
from tests.support import (
    UNIT_S,
    HubProcess,
    RawClient,
    assert_calm,
    client_frame,
    eventually,
    server_frames,
    unblocked,
)

T = TypeVar("T")

HEAD_MAX: Final = 1024
"""`hub.header_max_bytes` of the hub without sockets: as small as it may be, so that it is reached often."""


class Line(Socket):
    """A transport of a stranger: nothing is written after its close, and it is read only while that is wanted."""

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("192.0.2.1", 1234) if name == "peername" else default

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self.protocol = protocol

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        assert not self.closing


class Page(asyncio.Protocol):
    """In place of Sanic: remembers what it is given."""

    def __init__(self, owner: HandshakeProtocol, arguments: dict[str, Any]) -> None:
        self.owner = owner
        self.data = b""
        self.connected = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert not self.connected
        self.connected = True

    def data_received(self, data: bytes) -> None:
        assert self.connected
        self.data += data

    def connection_lost(self, error: Exception | None) -> None:
        self.owner.connection_lost(error)


class Hub(NamedTuple):
    """A front and a hub behind it, inside of their event loop."""

    runner: asyncio.Runner
    house: House
    make: Callable[[], HandshakeProtocol]
    unhandled: list[str]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    unhandled: list[str] = []
    with (
        pytest.MonkeyPatch.context() as patch,
        unblocked(),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        patch.setattr(handshake, "SanicProtocol", Page)

        async def build() -> House:
            asyncio.get_running_loop().set_exception_handler(lambda loop, what: unhandled.append(str(what)))
            return await House.opened(
                header_max_bytes=HEAD_MAX, requests_per_s=1e6, handshakes_per_s=1e6, inbound_max_per_s=1e9
            )

        house = runner.run(build())
        yield Hub(
            runner,
            house,
            HandshakeProtocol.bound(house.admission, house.context, house.channels),
            unhandled,
        )


class Outcome(NamedTuple):
    """What became of a connection."""

    kind: str
    """`answered` (and closed), `waiting`, `upgraded` or `sanic`."""
    status: int
    rest: bytes
    """What Sanic was given."""


def is_done(line: Line) -> bool:
    """Whether it is closed, or all but that."""
    return line.closing or lingers(line)


def lingers(line: Line) -> bool:
    """Whether only what still comes of a body is read and dropped."""
    return isinstance(line.protocol, handshake._Lingering)


def outcome(line: Line) -> Outcome:
    """Fails if it is none, or two of them."""
    written = b"".join(line.writes)
    if isinstance(line.protocol, Page):
        assert not written
        assert line.reading, "Sanic would never hear the rest"
        return Outcome("sanic", 0, line.protocol.data)
    if not written:
        assert not line.closing
        return Outcome("waiting", 0, b"")
    head, end, body = written.partition(b"\r\n\r\n")
    assert end
    assert head.startswith(b"HTTP/1.1 ")
    status = int(head[9:12])
    if status == 200 and isinstance(line.protocol, EventStream):
        return Outcome("streamed", 200, b"")
    if status in (200, 204):  # the head alone, of a stream or of nothing
        assert is_done(line)
        assert body == b""
        return Outcome("answered", status, b"")
    if status == 101:
        assert isinstance(line.protocol, Connection)
        assert len(server_frames(body)) == 0 or line.protocol.close_deadline is not None
        return Outcome("upgraded", 101, b"")
    assert is_done(line), "answered, and left open"
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    assert length is not None
    assert len(body) == int(length[1]), "one answer, and nothing after it"
    return Outcome("answered", status, b"")


def exchange(hub: Hub, parts: list[bytes], *, at_once: bool = True) -> Outcome:
    """Send these parts, each as one read; at once: all come before the loop turns again."""

    async def run() -> Outcome:
        line = Line()
        visitor = line.protocol = hub.make()
        visitor.connection_made(line)
        for part in parts:
            for _ in range(50):
                if line.reading:
                    break
                await asyncio.sleep(0)
            assert line.reading, "it is never read again"
            if part and not line.closing:
                line.protocol.data_received(part)
            if not at_once:
                await turns(3)
        await turns(6)
        found = outcome(line)
        waits = found.kind in ("waiting", "sanic") or lingers(line)
        assert (visitor in hub.house.admission._pending) == waits, (
            "it is held to no deadline, or to one for nothing"
        )
        line.protocol.connection_lost(None)
        assert visitor not in hub.house.admission._pending
        assert hub.house.registry.connected == 0
        return found

    found = hub.runner.run(run())
    assert hub.unhandled == []
    return found


# What strangers begin with

KEY: Final = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
UPGRADE: Final = (
    b"GET /ws HTTP/1.1\r\nHost: hub\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    + KEY
    + b"Sec-WebSocket-Version: 13\r\n\r\n"
)
PAGE: Final = b"GET /health HTTP/1.1\r\nHost: hub\r\n\r\n"
POST: Final = b'POST /publish HTTP/1.1\r\nHost: hub\r\nContent-Length: 9\r\n\r\n{"a": 1}\n'
WITH_QUERY: Final = UPGRADE.replace(b"/ws", b"/ws?channel=events.critical&since=e1-5&type=A&severity=info")
STREAM: Final = b"GET /sse HTTP/1.1\r\nHost: hub\r\nAccept: text/event-stream\r\nLast-Event-ID: e1-5\r\n\r\n"
GOOD: Final = [UPGRADE, UPGRADE, WITH_QUERY, STREAM, STREAM.replace(b"GET", b"OPTIONS"), PAGE, POST]
SNIPPETS: Final = [
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\r\n\r\n",
        b"\r\n ",
        b" ",
        b"\t",
        b"\0",
        b":",
        b",",
        b"\xff",
        b"\x7f",
        "é".encode(),
    ),
    *(
        b"GET",
        b"POST",
        b"get",
        b"/ws",
        b"/wsx",
        b"/ws?",
        b"/ws#",
        b"http://hub/ws",
        b"*",
        b"?",
        b"&",
        b"%",
        b"%00",
    ),
    *(
        b"/sse",
        b"HEAD",
        b"Accept: a/b;q=\r\n",
        b"Last-Event-ID: !\r\n",
        b"HTTP/1.0",
        b"HTTP/1.1",
        b"HTTP/2.0",
        b"Host: a\r\n",
        KEY,
        b"Sec-WebSocket-Version: 8\r\n",
        b"Origin: http://x\r\n",
    ),
    *(
        b"Sec-WebSocket-Protocol: broadcaster.v1\r\n",
        b"Sec-WebSocket-Protocol: bearer.\xff,,\r\n",
        b"Upgrade: h2c\r\n",
    ),
    *(
        b"Sec-WebSocket-Extensions: permessage-deflate\r\n",
        b"Sec-WebSocket-Extensions: ;=\r\n",
        b"Connection: close\r\n",
    ),
    *(
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Authorization: Bearer \xff\r\n",
        b"X" * 300,
        b"channel=x",
    ),
]
TAILS: Final = st.sampled_from([b"", b"", b"", client_frame(9), client_frame(1, b"hi"), b"x", PAGE, UPGRADE])
HEADS: Final = st.one_of(
    st.builds(lambda head, tail: head + tail, mutated(st.sampled_from(GOOD), SNIPPETS), TAILS),
    st.builds(lambda head, tail: head + tail, st.sampled_from(GOOD), TAILS),
    st.builds(lambda head, end: head[:end], st.sampled_from(GOOD), st.integers(0, 400)),
    st.binary(max_size=60),
    st.builds(
        lambda fill, size: fill * size + b"\r\n\r\n",
        st.sampled_from([b"x", b"\r\n", b"a: b\r\n"]),
        st.integers(0, 400),
    ),
    st.builds(
        lambda size: UPGRADE[:-2] + b"X: " + b"x" * size + b"\r\n\r\n",
        st.integers(HEAD_MAX - len(UPGRADE) - 9, HEAD_MAX - len(UPGRADE)),
    ),
)


def assert_documented(found: Outcome, sent: bytes) -> None:
    """What may become of it, by the tables of docs/contract.md."""
    head, end, after = sent.partition(b"\r\n\r\n")
    if not end:
        assert found.kind == "waiting" or (found.status == 431 and len(sent) > HEAD_MAX)
    elif found.kind == "upgraded":
        assert head.startswith(b"GET /ws")
        assert not after
        assert len(head) + 4 <= HEAD_MAX
    elif found.kind == "sanic":
        assert found.rest == sent
        assert not re.match(rb"[A-Z]+ /(ws|sse)[? ]", head)
    elif found.kind == "streamed":
        assert head.startswith((b"GET /sse", b"GET http"))
        assert not after
    else:
        assert found.kind == "answered"
        assert found.status in (200, 204, 400, 401, 403, 404, 405, 406, 426, 431, 503, 505)
        assert found.status != 431 or len(head) + 4 > HEAD_MAX


@fuzzed(320)
@given(HEADS)
@example(UPGRADE)
@example(PAGE + PAGE)
@example(UPGRADE + UPGRADE)
@example(b"\r\n" * 2)
def test_anything_in_one_piece_has_one_outcome(hub: Hub, sent: bytes) -> None:
    """Answered and closed, waiting for the rest, upgraded, or Sanic's with all its bytes; never anything else."""
    assert_documented(exchange(hub, [sent]), sent)


@fuzzed(240)
@given(HEADS, CUTS)
@example(UPGRADE, list(range(len(UPGRADE))))
@example(PAGE + POST, list(range(len(PAGE + POST))))
def test_the_cuts_between_reads_change_nothing(hub: Hub, sent: bytes, places: list[int]) -> None:
    """However many segments bring it, as long as they come together."""
    assert exchange(hub, cut(sent, places)) == exchange(hub, [sent])


@fuzzed(120)
@given(HEADS, CUTS)
def test_a_slow_sender_has_one_outcome_too(hub: Hub, sent: bytes, places: list[int]) -> None:
    """With all that can be done done between two segments, only what comes after a 101 is heard otherwise."""
    found, whole = exchange(hub, cut(sent, places), at_once=False), exchange(hub, [sent])
    assert found == whole or (found.kind == "upgraded" and whole == Outcome("answered", 400, b""))


@fuzzed(40)
@given(HEADS, CUTS)
def test_who_runs_out_of_time_is_answered_once(hub: Hub, sent: bytes, places: list[int]) -> None:
    """At the deadline everybody who is waiting, at whatever byte, is told 408 and closed; nobody else is."""

    async def run() -> None:
        line = Line()
        visitor = line.protocol = hub.make()
        visitor.connection_made(line)
        for part in cut(sent, places):
            if part and line.reading and not line.closing:
                line.protocol.data_received(part)
        before = list(line.writes)
        waited = visitor in hub.house.admission._pending
        answered = lingers(line)
        visitor.deadline = 0.0
        hub.house.admission.evict_overdue()
        assert visitor not in hub.house.admission._pending
        told = b"".join(line.writes[len(before) :])
        assert told.startswith(b"HTTP/1.1 408 ") == (waited and not answered)
        assert told.count(b"HTTP/1.1") == (waited and not answered)
        assert line.closing or not waited
        await turns(6)
        line.protocol.connection_lost(None)

    hub.runner.run(run())
    assert hub.unhandled == []
    assert hub.house.registry.connected == 0


# The same on real sockets

SEED: Final = int(time.time_ns() if os.environ.get("FUZZ_EXAMPLES") else 1)
COUNT: Final = int(os.environ.get("FUZZ_EXAMPLES") or 2000)
BATCH: Final = 50


@pytest.fixture(scope="module")
def real() -> Iterator[HubProcess]:
    """A hub that answers as many as come."""
    with (
        RedisServer.start() as server,
        HubProcess(
            server.url,
            BROADCASTER_HUB__REQUESTS_PER_S="100000",
            BROADCASTER_HUB__HANDSHAKES_PER_S="100000",
        ) as process,
    ):
        yield process.until_ready()


def damaged(chance: random.Random) -> bytes:
    """A beginning with a few things done to it; some have nothing done to them."""
    data = chance.choice([*GOOD, b"", chance.randbytes(chance.randrange(200))])
    for _ in range(chance.randrange(4)):
        start = chance.randrange(len(data) + 1)
        end = start + chance.randrange(8) * chance.randrange(2)
        piece = chance.choice([*SNIPPETS, chance.randbytes(2), data[start:end] * 2])
        data = data[:start] + piece + data[end:]
    return data + (chance.choice([client_frame(9), b"x", PAGE]) if chance.random() < 0.05 else b"")


def talk(chance: random.Random) -> bytes:
    """What an upgraded stranger says, right or wrong."""
    said = b""
    for _ in range(chance.randrange(5)):
        frame = bytearray(
            client_frame(chance.randrange(16), chance.randbytes(chance.choice([0, 1, 2, 125, 126, 4097])))
        )
        if chance.random() < 0.3:
            frame[chance.randrange(len(frame))] = chance.randrange(256)
        said += frame
    return said


def gather(
    strangers: list[socket.socket], heard: dict[socket.socket, bytearray], within_s: float, *, end: bool
) -> None:
    """Read until each has been answered (or, with `end`, until each has been ended), or the time is over."""
    deadline = time.monotonic() + within_s
    with selectors.DefaultSelector() as selector:
        for stranger in strangers:
            selector.register(stranger, selectors.EVENT_READ, stranger)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                speaker = key.data
                try:
                    more = speaker.recv(65_536)
                except ConnectionError:
                    more = b""
                heard[speaker] += more
                if not more or not end:
                    selector.unregister(speaker)
        assert not (end and selector.get_map()), "a connection is never ended"


def visit(hub: HubProcess, chance: random.Random) -> Counter[int]:
    """A batch of strangers: each is answered, or not, and gone; the statuses they were given (0: none)."""
    with contextlib.ExitStack() as stack:
        heard: dict[socket.socket, bytearray] = {}
        for _ in range(BATCH):
            stranger = stack.enter_context(socket.create_connection(("127.0.0.1", hub.port), timeout=10 * UNIT_S))
            stranger.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            heard[stranger] = bytearray()
            with contextlib.suppress(ConnectionError):
                for part in cut(damaged(chance), [chance.randrange(1000) for _ in range(chance.randrange(3))]):
                    stranger.sendall(part)
        gather(list(heard), heard, 0.05, end=False)
        for stranger, answer in heard.items():
            with contextlib.suppress(OSError):
                if answer.startswith(b"HTTP/1.1 101"):
                    stranger.sendall(talk(chance))
                stranger.shutdown(socket.SHUT_WR)
        gather(list(heard), heard, 10 * UNIT_S, end=True)
        return Counter(status_of(bytes(answer)) for answer in heard.values())


def status_of(answer: bytes) -> int:
    """The status of one whole answer; fails if there is more than that."""
    if not answer:
        return 0
    head, end, body = answer.partition(b"\r\n\r\n")
    assert end
    assert head.startswith(b"HTTP/1.1 ")
    status = int(head[9:12])
    if status == 101:
        frames = server_frames(body)
        assert all(opcode in (1, 8, 9, 10) for opcode, _ in frames)
        assert [opcode for opcode, _ in frames].count(8) <= 1
    else:
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        assert length is None or len(body) in (0, int(length[1]))
        assert body.count(b"HTTP/1.1 ") <= answer.count(b"/ws HTTP/1.1 ")
    return status


def test_thousands_of_damaged_beginnings_leave_no_trace(real: HubProcess) -> None:
    """A hub that has met them all is ready, has nobody left, and goes on as if nothing had been."""
    files = len(os.listdir(f"/proc/{real.process.pid}/fd"))
    chance = random.Random(SEED)
    statuses: Counter[int] = Counter()
    with RawClient(real.port) as bystander:
        for _ in range(COUNT // BATCH):
            statuses += visit(real, chance)
        real.until_connected(1)
        bystander.send(9, b"still here")
        while bystander.next_frame() != (10, b"still here"):
            pass
    real.until_connected(0)
    eventually(lambda: len(os.listdir(f"/proc/{real.process.pid}/fd")) <= files + 2, "connections are kept open")
    assert real.get("/health/ready")[0] == 200
    assert {101, 400, 404, 426, 0} <= set(statuses), f"seed {SEED}: {statuses}"
    assert 500 not in statuses, f"seed {SEED}: {statuses}"
    assert_calm(real)


MALFORMED: Final[dict[str, bytes]] = {
    "no request": b"hello?\r\n\r\n",
    "bytes after it": UPGRADE + b"x",
    "no key": UPGRADE.replace(KEY, b""),
    "a broken header": UPGRADE.replace(KEY, KEY + b"nonsense\r\n"),
    "two hosts": UPGRADE.replace(KEY, KEY + b"Host: a\r\n"),
    "a body announced": UPGRADE.replace(KEY, KEY + b"Content-Length: 5\r\n"),
    "a path beyond ASCII": UPGRADE.replace(b"/ws", "/ws?type=ü".encode()),
}


@pytest.mark.parametrize("sent", MALFORMED.values(), ids=MALFORMED.keys())
def test_every_malformed_request_is_counted(real: HubProcess, sent: bytes) -> None:
    """A 400 is one more `malformed` under `refused`, wherever in the hub it was found out."""
    before = real.stats()["refused"]
    with socket.create_connection(("127.0.0.1", real.port), timeout=10 * UNIT_S) as stranger:
        stranger.sendall(sent)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while more := stranger.recv(65_536):
                answer += more
    assert status_of(answer) == 400
    after = real.stats()["refused"]
    assert {cause: after[cause] - before[cause] for cause in after if after[cause] != before[cause]} == {
        "malformed": 1
    }
