"""The fan-out with sockets of the test's own, which take as much as the test lets them."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from broadcaster import wire
from broadcaster.hub.connection import Connection
from broadcaster.hub.fanout import WRITE_BYTES, Fanout
from broadcaster.hub.roster import Roster
from broadcaster.settings import HubTable
from tests.support import in_loop, server_frames

HIGH_WATER = 65_536
"""Bytes a transport holds before it asks for a pause, as asyncio's and uvloop's do."""

Told = bytes | str
"""What a client was sent: the payload of an event, or the name of a control frame, or `close 4008`."""


class Socket(asyncio.Transport):
    """A transport whose peer reads only when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.protocol: asyncio.Protocol = asyncio.Protocol()
        self.writes: list[bytes] = []
        self.held = 0
        self.reads_along = True
        self.paused = False
        self.reading = True
        self.closing = False
        self.aborted = False

    def write(self, data: Any) -> None:
        if self.closing:
            raise RuntimeError("the handler is closed")
        self.writes.append(bytes(data))
        if not self.reads_along:
            self.held += len(data)
            if self.held > HIGH_WATER and not self.paused:
                self.paused = True
                self.protocol.pause_writing()

    def read(self, size: int = 1 << 40) -> None:
        """The peer reads so many bytes."""
        self.held = max(0, self.held - size)
        if self.paused and self.held <= HIGH_WATER // 4:
            self.paused = False
            self.protocol.resume_writing()

    def read_all(self) -> None:
        """The peer reads everything, and from now on all that comes."""
        self.reads_along = True
        self.read()

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True


@dataclass
class Peer:
    """A connection and its end of the wire."""

    connection: Connection
    socket: Socket
    expected: list[Told] = field(default_factory=list)

    @property
    def told(self) -> list[Told]:
        told: list[Told] = []
        for opcode, payload in server_frames(b"".join(self.socket.writes)):
            if opcode == 8:
                told.append(f"close {int.from_bytes(payload[:2], 'big')}")
            elif opcode == 10:
                continue
            elif control := wire.read_control(payload):
                told.append(str(control["control"]))
            else:
                told.append(payload)
        return told

    def events(self) -> list[bytes]:
        return [word for word in self.told if isinstance(word, bytes)]


class House:
    """A fan-out, its roster, and peers."""

    def __init__(self, ring_bytes: int = 16 << 20, *, confirmed: bool = True, **settings: Any) -> None:
        self.fanout = Fanout("events.critical", ring_bytes)
        self.roster = Roster(HubTable(**settings), self.fanout)
        self.count = 0
        if confirmed:
            self.fanout.resume()

    def connect(self, *, v1: bool = False) -> Peer:
        socket = Socket()
        connection = Connection(socket, self.roster, wants_control=v1)
        socket.protocol = connection
        self.roster.add(connection)
        return Peer(connection, socket)

    def events(self, count: int, size: int = 200) -> list[bytes]:
        """New payloads, each with its number at its front."""
        first, self.count = self.count, self.count + count
        return [b"%08d" % number + b"." * (size - 8) for number in range(first, self.count)]

    def broadcast(self, payloads: list[bytes]) -> list[bytes]:
        self.fanout.broadcast([wire.text_frame(payload) for payload in payloads])
        return payloads


async def turns(count: int = 200) -> None:
    """Let the loop turn, so that whoever is behind is fed."""
    for _ in range(count):
        await asyncio.sleep(0)


# Live


@in_loop
async def test_a_batch_is_one_write_per_connection() -> None:
    """All events of one read from Redis leave in a single write, the same bytes for everybody."""
    house = House()
    peers = [house.connect() for _ in range(5)]
    sent = house.broadcast(house.events(50))
    expected = b"".join(map(wire.text_frame, sent))
    assert [peer.socket.writes for peer in peers] == [[expected]] * 5
    assert house.fanout.deliveries == 250
    assert house.fanout.sent_bytes == 5 * len(expected)


BATCHES: list[tuple[str, int, int, int]] = [
    ("one small event", 1, 200, 1),
    ("a batch below the limit", 320, 200, 1),
    ("a batch above the limit", 340, 200, 2),
    ("a batch of many pieces", 3000, 200, 10),
    ("one event larger than a piece", 1, 100_000, 1),
    ("three events larger than a piece", 3, 100_000, 3),
]


@pytest.mark.parametrize(("count", "size", "writes"), [c[1:] for c in BATCHES], ids=[c[0] for c in BATCHES])
@in_loop
async def test_a_long_batch_leaves_in_pieces_of_64_kib(count: int, size: int, writes: int) -> None:
    """No write is larger than the limit unless one frame is, and frames are never cut."""
    house = House()
    peer = house.connect()
    sent = house.broadcast(house.events(count, size))
    assert len(peer.socket.writes) == writes
    for write in peer.socket.writes:
        frames = server_frames(write)
        assert sum(len(wire.text_frame(payload)) for _, payload in frames) == len(write)
        assert len(write) <= WRITE_BYTES or len(frames) == 1
    assert peer.events() == sent


@in_loop
async def test_who_joins_gets_what_comes_and_who_left_gets_nothing() -> None:
    """Live from the next frame on, until the end."""
    house = House()
    early = house.connect()
    first = house.broadcast(house.events(2))
    late = house.connect()
    second = house.broadcast(house.events(2))
    house.fanout.leave(early.connection)
    house.fanout.leave(early.connection)
    third = house.broadcast(house.events(2))
    assert early.told == [*first, *second]
    assert late.told == [*second, *third]


@in_loop
async def test_a_socket_that_was_just_closed_disturbs_nobody() -> None:
    """uvloop's write raises on a closed transport; everybody else still gets the frame."""
    house = House()
    peers = [house.connect() for _ in range(3)]
    peers[1].socket.close()
    sent = house.broadcast(house.events(400))
    assert peers[0].told == peers[2].told == sent
    assert peers[1].told == []


# Behind

PAUSES: list[tuple[str, int, int]] = [
    ("of many small events", 5000, 200),
    ("of a few large events", 20, 60_000),
    ("of events larger than a piece", 8, 70_000),
    ("in the last write", 330, 200),
]


@pytest.mark.parametrize(("count", "size"), [case[1:] for case in PAUSES], ids=[case[0] for case in PAUSES])
@in_loop
async def test_a_pause_within_a_batch_continues_at_the_right_frame(count: int, size: int) -> None:
    """Whoever stops reading in the middle of a batch gets the rest of it later: nothing lost, nothing twice."""
    house = House()
    quick, slow = house.connect(), house.connect()
    slow.socket.reads_along = False
    sent = house.broadcast(house.events(count, size))
    assert quick.told == sent
    assert slow.connection in house.fanout.behind
    assert slow.told == sent[: len(slow.told)]
    assert sum(map(len, slow.socket.writes)) <= HIGH_WATER + max(WRITE_BYTES, size + 14)
    slow.socket.read_all()
    await turns()
    assert slow.told == sent
    assert slow.connection not in house.fanout.behind


@in_loop
async def test_who_is_behind_costs_no_write_and_no_memory() -> None:
    """While paused nothing is written to a connection, however much is broadcast."""
    house = House(ring_bytes=1 << 20)
    slow = house.connect()
    slow.socket.reads_along = False
    house.broadcast(house.events(1000))
    before = list(slow.socket.writes)
    for _ in range(100):
        house.broadcast(house.events(100))
    await turns()
    assert slow.socket.writes == before
    assert house.fanout.ring.bytes <= 1 << 20


@in_loop
async def test_several_pauses_on_the_way_back() -> None:
    """A slow way back, with more events coming at every step, still ends live, complete and in order."""
    house = House()
    slow = house.connect()
    slow.socket.reads_along = False
    sent = house.broadcast(house.events(3000))
    pauses = 0
    while slow.connection in house.fanout.behind:
        pauses += slow.socket.paused
        sent += house.broadcast(house.events(5))
        slow.socket.read(100_000)
        await turns(20)
        assert pauses < 200, "never live again"
    assert pauses > 3
    slow.socket.read_all()
    sent += house.broadcast(house.events(5))
    assert slow.told == sent
    assert house.fanout.deliveries == len(sent)
    assert house.fanout.sent_bytes == sum(map(len, slow.socket.writes))


@in_loop
async def test_the_way_back_is_one_piece_per_turn_of_the_loop() -> None:
    """A long way back delays nobody else: at most one piece of the ring is written at a time."""
    house = House()
    slow = house.connect()
    slow.socket.reads_along = False
    sent = house.broadcast(house.events(10_000))
    slow.socket.read_all()
    writes = len(slow.socket.writes)
    while slow.connection in house.fanout.behind:
        await asyncio.sleep(0)
        assert len(slow.socket.writes) <= writes + 1
        assert len(slow.socket.writes[-1]) <= WRITE_BYTES
        writes = len(slow.socket.writes)
    assert slow.told == sent


@in_loop
async def test_live_again_at_the_head_and_fed_at_once() -> None:
    """In the turn in which the cursor meets the head, the next event is written directly again."""
    house = House()
    slow = house.connect()
    slow.socket.reads_along = False
    sent = house.broadcast(house.events(1000))
    slow.socket.read_all()
    await turns()
    writes = len(slow.socket.writes)
    sent += house.broadcast(house.events(1))
    assert len(slow.socket.writes) == writes + 1
    assert slow.told == sent


@in_loop
async def test_who_does_not_read_is_not_read() -> None:
    """Reading stops with the pause, so that a talker cannot pile up answers, and goes on with it."""
    house = House()
    slow = house.connect()
    slow.socket.reads_along = False
    house.broadcast(house.events(1000))
    assert not slow.socket.reading
    slow.socket.read_all()
    assert slow.socket.reading


@in_loop
async def test_who_is_overtaken_by_the_ring_is_closed() -> None:
    """When the next frame of a slow connection is gone, it is closed 4008 and counted, not given a hole."""
    house = House(ring_bytes=1 << 18)
    quick, slow = house.connect(), house.connect()
    slow.socket.reads_along = False
    sent = house.broadcast(house.events(1000))
    sent += house.broadcast(house.events(2000))
    slow.socket.read_all()
    await turns()
    *events, end = slow.told
    assert end == "close 4008"
    assert events == sent[: len(events)]
    assert house.roster.slow_closed == 1
    sent += house.broadcast(house.events(1))
    assert quick.told == sent
    assert slow.told[-1] == "close 4008"


@in_loop
async def test_the_delay_counts_from_the_oldest_frame_that_waits() -> None:
    """Behind means the age of what is awaited: a reader that moves on gets younger."""
    house = House()
    slow = house.connect()
    slow.socket.reads_along = False
    house.broadcast(house.events(1000))
    await asyncio.sleep(0.4)
    old = house.fanout.behind_ms(slow.connection)
    assert old >= 390
    house.broadcast(house.events(1000))
    while slow.connection.cursor < 1001:
        slow.socket.read(65_536)
        await turns(5)
    assert slow.connection in house.fanout.behind
    assert house.fanout.behind_ms(slow.connection) < old


# When Redis was away


@in_loop
async def test_a_v1_client_is_welcomed_and_a_plain_one_hears_nothing() -> None:
    """The welcome is the first frame of a v1 client; a plain client gets events and nothing else."""
    house = House()
    plain, v1 = house.connect(), house.connect(v1=True)
    sent = house.broadcast(house.events(1))
    assert plain.told == sent
    assert v1.told == ["welcome", *sent]
    (_, welcome), _ = server_frames(b"".join(v1.socket.writes))
    assert json.loads(welcome) == {"control": "welcome", "channel": "events.critical", "position": None}


@in_loop
async def test_the_first_confirmation_is_no_gap() -> None:
    """Who came before Redis did is welcomed when it is there, and a plain client is kept."""
    house = House(confirmed=False)
    plain, v1 = house.connect(), house.connect(v1=True)
    assert v1.told == []
    house.fanout.resume()
    sent = house.broadcast(house.events(1))
    assert plain.told == sent
    assert v1.told == ["welcome", *sent]


@in_loop
async def test_a_hole_is_told_between_what_came_before_and_after_it() -> None:
    """v1 gets exactly one gap in its place, plain a close 4009, and a newcomer of the outage a welcome."""
    house = House()
    plain, v1 = house.connect(), house.connect(v1=True)
    before = house.broadcast(house.events(2))
    house.fanout.interrupt()
    house.fanout.interrupt()
    new_plain, new_v1 = house.connect(), house.connect(v1=True)
    assert v1.told == ["welcome", *before], "told before the end of the hole is known"
    house.fanout.resume()
    after = house.broadcast(house.events(2))
    assert v1.told == ["welcome", *before, "gap", *after]
    assert plain.told == [*before, "close 4009"]
    assert new_v1.told == ["welcome", *after]
    assert new_plain.told == after
    gap = json.loads(server_frames(b"".join(v1.socket.writes))[3][1])
    assert gap == {
        "control": "gap",
        "channel": "events.critical",
        "cause": "redis_link_lost",
        "epoch": None,
        "first": None,
        "last": None,
    }


@in_loop
async def test_every_outage_is_a_gap_of_its_own() -> None:
    """Three outages are three gaps, also for who came during the first one."""
    house = House()
    old = house.connect(v1=True)
    house.fanout.interrupt()
    newer = house.connect(v1=True)
    house.fanout.resume()
    for _ in range(2):
        house.fanout.interrupt()
        house.fanout.resume()
    assert old.told == ["welcome", "gap", "gap", "gap"]
    assert newer.told == ["welcome", "gap", "gap"]


@in_loop
async def test_who_is_behind_is_told_of_the_hole_in_its_place() -> None:
    """A slow v1 client reads the gap from the ring, after the events before it and before those after it."""
    house = House()
    slow, plain = house.connect(v1=True), house.connect()
    slow.socket.reads_along = plain.socket.reads_along = False
    before = house.broadcast(house.events(2000))
    house.fanout.interrupt()
    house.fanout.resume()
    after = house.broadcast(house.events(500))
    slow.socket.read_all()
    plain.socket.read_all()
    await turns()
    assert slow.told == ["welcome", *before, "gap", *after]
    *events, end = plain.told
    assert end == "close 4009"
    assert events == before[: len(events)]


@in_loop
async def test_a_plain_client_is_never_given_a_control_frame_of_the_ring() -> None:
    """A newcomer of the outage whose socket is full (of answers to its pings) reads past the mark of its end."""
    house = House()
    house.fanout.interrupt()
    plain = house.connect()
    plain.socket.reads_along = False
    for _ in range(HIGH_WATER // 127 + 1):
        plain.connection.write(b"\x8a\x7d" + b"." * 125)
    assert plain.connection in house.fanout.behind
    house.fanout.resume()
    sent = house.broadcast(house.events(1000))
    plain.socket.read_all()
    await turns()
    assert plain.told == sent


@in_loop
async def test_a_gap_that_fills_the_socket_is_not_told_twice() -> None:
    """A connection that pauses within the very write of the gap goes on after it."""
    house = House()
    slow = house.connect(v1=True)
    slow.socket.reads_along = False
    welcome = len(slow.socket.writes[0])
    filler = HIGH_WATER - welcome - 4  # the next frame fills it to the last byte, one more is too much
    house.fanout.broadcast([wire.text_frame(b"0" * filler)])
    assert slow.connection not in house.fanout.behind
    house.fanout.interrupt()
    house.fanout.resume()
    assert slow.connection in house.fanout.behind
    after = house.broadcast(house.events(3))
    slow.socket.read_all()
    await turns()
    assert slow.told == ["welcome", b"0" * filler, "gap", *after]


@in_loop
async def test_who_leaves_during_an_outage_is_forgotten() -> None:
    """Nothing is written to a connection that is gone, or closed, when Redis comes back."""
    house = House()
    gone, closed = house.connect(v1=True), house.connect(v1=True)
    house.fanout.interrupt()
    gone.connection.connection_lost(None)
    closed.connection.close(wire.CloseCode.RESTART, "")
    house.fanout.resume()
    assert gone.told == ["welcome"]
    assert closed.told == ["welcome", "close 1012"]


# All together


class Story:
    """Everything that can happen, at random, and what each peer must have been told by then."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.house = House(ring_bytes=1 << 28)
        self.peers: list[Peer] = []
        self.cut: list[Peer] = []
        self.interrupted: list[Peer] | None = None

    def arrival(self) -> None:
        peer = self.house.connect(v1=self.chance.random() < 0.5)
        if peer.connection.wants_control and self.interrupted is None:
            peer.expected.append("welcome")
        self.peers.append(peer)

    def batch(self) -> None:
        if self.interrupted is not None:
            return
        count, size = self.chance.choice([1, 1, 2, 30, 400]), self.chance.choice([20, 200, 5000])
        sent = self.house.broadcast(self.house.events(count, size))
        for peer in self.peers:
            peer.expected += sent

    def outage(self) -> None:
        if self.interrupted is None:
            self.interrupted = list(self.peers)
            self.house.fanout.interrupt()
            return
        self.house.fanout.resume()
        for peer in list(self.peers):
            if peer.connection.wants_control:
                peer.expected.append("gap" if peer in self.interrupted else "welcome")
            elif peer in self.interrupted:
                self.peers.remove(peer)
                self.cut.append(peer)
        self.interrupted = None

    def reader(self) -> None:
        if not self.peers:
            return
        peer = self.chance.choice(self.peers)
        peer.socket.reads_along = self.chance.random() < 0.2
        peer.socket.read(self.chance.choice([1000, 50_000, 200_000, 1 << 40]))

    async def run(self, steps: int) -> None:
        self.arrival()
        what = [self.arrival] * 2 + [self.batch] * 8 + [self.outage] + [self.reader] * 8
        for _ in range(steps):
            self.chance.choice(what)()
            await turns(self.chance.choice([0, 1, 1, 5]))
        for peer in self.peers + self.cut:
            peer.socket.read_all()
        await turns(500)


@pytest.mark.parametrize("seed", range(15))
@in_loop
async def test_whatever_happens_everybody_is_told_everything_once_and_in_order(seed: int) -> None:
    """Random batches, readers of all paces, newcomers and outages: nothing lost, doubled or swapped."""
    story = Story(seed)
    await story.run(150)
    assert story.peers
    for peer in story.peers:
        assert peer.told == peer.expected
    for peer in story.cut:
        *told, end = peer.told
        assert end == "close 4009"
        assert told == peer.expected[: len(told)]
    assert story.house.fanout.behind == set()
    everything = [word for peer in story.peers + story.cut for word in peer.events()]
    assert story.house.fanout.deliveries == len(everything)
