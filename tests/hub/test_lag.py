"""How far somebody is behind: measured of a reader of the ring or the log, and held against what is allowed."""

from __future__ import annotations

import random

import pytest

from broadcaster import wire
from broadcaster.core.position import Position
from broadcaster.hub.fanout.fanout import Fanout
from broadcaster.hub.fanout.filters import Labels
from broadcaster.hub.fanout.message import Message
from broadcaster.hub.fanout.ring import Ring
from broadcaster.hub.fanout.slow import Lag
from broadcaster.hub.fanout.subscription import Subscription
from broadcaster.settings import ChannelsTable, HubTable
from tests.hub.house import CHANNEL, House, Peer, turns
from tests.support import in_loop

LABELS = Labels("SERVER_DOWN", "server-a", "critical")
DROPS = ChannelsTable(drop_oldest=("events.*",))


def ear(peer: Peer) -> Subscription:
    [listener] = peer.connection.memberships
    return listener


# What is allowed

SHARES = [
    ("nothing", Lag(0, 0, 0), 0.0),
    ("half of the time", Lag(500, 0, 0), 0.5),
    ("all of the events", Lag(0, 200, 0), 1.0),
    ("twice the bytes", Lag(0, 0, 8000), 2.0),
    ("the time is worst", Lag(900, 100, 400), 0.9),
    ("the events are worst", Lag(250, 150, 400), 0.75),
    ("the bytes are worst", Lag(250, 40, 3000), 0.75),
    ("all the same", Lag(100, 20, 400), 0.1),
]


@pytest.mark.parametrize(("lag", "share"), [case[1:] for case in SHARES], ids=[case[0] for case in SHARES])
def test_the_worst_of_the_three_counts(lag: Lag, share: float) -> None:
    """How much is used up of what is allowed is said by time, events or bytes, whichever is worst."""
    assert lag.share_of(Lag(1000, 200, 4000)) == share


def test_what_is_allowed_is_in_the_settings() -> None:
    """`hub.behind_max_*`, in this order."""
    table = HubTable(behind_max_ms=1, behind_max_events=2, behind_max_bytes=65_536)
    assert Lag.allowed(table) == (1, 2, 65_536)


WORDS = [
    ("whole numbers", Lag(300, 12, 3456), "12 events, 3456 bytes, 300 ms behind"),
    ("rounded", Lag(300.4999, 12, 3456), "12 events, 3456 bytes, 300 ms behind"),
    ("nothing", Lag(0.0, 0, 0), "0 events, 0 bytes, 0 ms behind"),
    ("without exponents", Lag(1e12, 1e12, 1e12), " ".join(["1000000000000 events, 1000000000000 bytes,",
                                                           "1000000000000 ms behind"])),
]  # fmt: skip


@pytest.mark.parametrize(("lag", "words"), [case[1:] for case in WORDS], ids=[case[0] for case in WORDS])
def test_all_three_are_said(lag: Lag, words: str) -> None:
    """Events, bytes and milliseconds, in plain numbers that fit into the reason of a close."""
    assert str(lag) == words
    assert wire.close_frame(wire.CloseCode.SLOW, f"too slow: {lag}")[4:].decode() == f"too slow: {words}"


LONG = [
    ("short", "x" * 10, 10),
    ("exactly as long as may be", "x" * 123, 123),
    ("one byte too long", "x" * 124, 123),
    ("far too long", "x" * 5000, 123),
    ("cut within a character", "x" * 122 + "ü", 122),
    ("cut within many", "€" * 200, 123),
]


@pytest.mark.parametrize(("reason", "size"), [case[1:] for case in LONG], ids=[case[0] for case in LONG])
def test_a_reason_is_at_most_123_bytes(reason: str, size: int) -> None:
    """Longer ones are cut, never within a character."""
    frame = wire.close_frame(wire.CloseCode.SLOW, reason)
    said = frame[4:].decode()
    assert frame[1] == len(frame) - 2 == size + 2
    assert reason.startswith(said)


# Bytes in the ring


def filled(max_bytes: int, *sizes: int) -> Ring:
    ring = Ring(max_bytes)
    for number, size in enumerate(sizes):
        ring.extend([Message(b"." * size, LABELS, Position("e1", number + 1))], float(number))
    return ring


BYTES = [
    ("everything", 1000, [10, 20, 30], 0, 60),
    ("from the middle", 1000, [10, 20, 30], 1, 50),
    ("the last", 1000, [10, 20, 30], 2, 30),
    ("at the head", 1000, [10, 20, 30], 3, 0),
    ("at the tail of a ring that has moved on", 60, [10, 20, 30, 25], 2, 55),
    ("before the tail", 60, [10, 20, 30, 25], 0, 55),
    ("behind the tail", 60, [10, 20, 30, 25], 3, 25),
    ("of an empty ring", 60, [], 0, 0),
]


@pytest.mark.parametrize(
    ("max_bytes", "sizes", "cursor", "size"), [case[1:] for case in BYTES], ids=[case[0] for case in BYTES]
)
def test_bytes_are_those_that_are_still_to_come(max_bytes: int, sizes: list[int], cursor: int, size: int) -> None:
    """Of the frames from the cursor on, or from the oldest that is left."""
    assert filled(max_bytes, *sizes).bytes_from(cursor) == size


@pytest.mark.parametrize("seed", range(8))
def test_bytes_are_right_however_far_the_ring_has_moved(seed: int) -> None:
    """Anywhere in the ring and before it, after thousands of frames that have come and gone."""
    chance = random.Random(seed)
    bound = chance.choice([200, 3000, 20_000])
    ring, sizes = Ring(bound), list[int]()
    for number in range(6000):
        sizes.append(chance.randrange(1, 80))
        ring.extend([Message(b"." * sizes[-1], LABELS, Position("e1", number))], float(number))
        assert ring.bytes_from(ring.tail) == ring.bytes, f"at the tail, after frame {number}"
        assert ring.bytes_from(0) == ring.bytes, f"before the tail, after frame {number}"
        assert ring.bytes_from(ring.head) == 0
        if number % 97 == 0:
            cursor = chance.randint(ring.tail, ring.head)
            assert ring.bytes_from(cursor) == sum(sizes[cursor:])


# Of a listener


async def fallen_behind(house: House, v1: bool) -> tuple[Peer, Subscription]:
    """Somebody who does not read, and has been given everything: his socket is full."""
    peer = house.connect(v1=v1, reads_along=False)
    house.publish(2, 40_000)
    assert peer.socket.paused
    return peer, ear(peer)


@pytest.mark.parametrize(("sheds", "v1"), [(False, False), (False, True), (True, False), (True, True)])
@in_loop
async def test_a_full_socket_alone_is_a_delay(sheds: bool, v1: bool) -> None:
    """Nothing waits for it, but what it was given last does: the time counts, and no event does."""
    house = await House.opened(channels=DROPS if sheds else ChannelsTable())
    clock = house.clock.stop()
    _, listener = await fallen_behind(house, v1)
    clock.move(2.5)
    assert house.fanout.slow.lag_of(listener) == (2500, 0, 0)


@pytest.mark.parametrize(("sheds", "v1"), [(False, False), (False, True), (True, False), (True, True)])
@in_loop
async def test_a_lag_is_what_waits_in_the_ring(sheds: bool, v1: bool) -> None:
    """Events and bytes from the cursor on; the time since the oldest of them came."""
    house = await House.opened(channels=DROPS if sheds else ChannelsTable())
    clock = house.clock.stop()
    _, listener = await fallen_behind(house, v1)
    clock.move(5.0)
    first = house.publish(3, 300)
    clock.move(1.0)
    second = house.publish(4, 500)
    clock.move(0.25)
    frames = [wire.text_frame(event) for event in first + second]
    assert house.fanout.slow.lag_of(listener) == (1250, 7, sum(map(len, frames)))


@pytest.mark.parametrize(("sheds", "v1"), [(False, False), (False, True), (True, False), (True, True)])
@in_loop
async def test_who_moves_on_is_less_behind(sheds: bool, v1: bool) -> None:
    """After a piece was written, the lag is that of the first event that still waits."""
    house = await House.opened(channels=DROPS if sheds else ChannelsTable(), behind_max_ms=10**9)
    clock = house.clock.stop()
    peer, listener = await fallen_behind(house, v1)
    house.publish(60, 2000)
    clock.move(3.0)
    house.publish(60, 2000)
    clock.move(1.0)
    while listener.cursor is not None and listener.cursor < 2 + 60:
        peer.socket.read(70_000)
        await turns(5)
    assert listener.cursor is not None
    lag = house.fanout.slow.lag_of(listener)
    assert (lag.ms, lag.events) == (1000, house.fanout.ring.head - listener.cursor)
    assert lag.bytes == lag.events * 2004


@in_loop
async def test_who_is_overtaken_is_behind_by_all_that_came() -> None:
    """All events since count, the bytes and the time of those that are left."""
    house = await House.opened(ring_bytes=1 << 18)
    clock = house.clock.stop()
    _, listener = await fallen_behind(house, v1=False)
    house.publish(200, 1020)
    clock.move(1.0)
    house.publish(300, 1020)
    clock.move(0.5)
    assert house.fanout.slow.is_overtaken(listener)
    lag = house.fanout.slow.lag_of(listener)
    assert lag == (500, 500, house.fanout.ring.bytes)


@in_loop
async def test_the_bytes_of_whoever_is_overtaken_are_never_more_than_the_ring() -> None:
    """However much has come and gone, at every single event."""
    house = await House.opened(ring_bytes=1 << 18)
    _, listener = await fallen_behind(house, v1=False)
    most = 0.0
    for _ in range(3000):
        house.publish(1)
        most = max(most, house.fanout.slow.lag_of(listener).bytes)
    assert house.fanout.slow.is_overtaken(listener)
    assert most <= house.fanout.ring.bytes + 300 < 1 << 19


@in_loop
async def test_who_reads_the_log_is_behind_by_its_positions() -> None:
    """The events between his place and the channel's; the time since his last progress, not their age."""
    house = await House.opened(stored=600)
    slow = house.connect("since=e1-0", v1=True, reads_along=False)
    await house.settle()
    listener = ear(slow)
    given = len(slow.events())
    assert listener.cursor is None
    assert 0 < given < 600
    house.clock.now = listener.behind_since + 0.75
    assert house.fanout.slow.lag_of(listener) == (750, 600 - given, 0)


@in_loop
async def test_between_two_epochs_events_cannot_be_counted() -> None:
    """Who reads the log of an epoch before the last restart is behind by an unknown number, said as none."""
    house = await House.opened(stored=600)
    slow = house.connect("since=e1-0", v1=True, reads_along=False)
    await house.settle()
    listener = ear(slow)
    house.redis.restart()
    house.redis.shelf()
    house.sequencer.check(None)
    await house.settle()
    assert listener.cursor is None
    assert listener.position is not None
    assert listener.position.epoch == "e1"
    assert house.fanout.position == ("e2", 600)
    lag = house.fanout.slow.lag_of(listener)
    assert (lag.events, lag.bytes) == (0, 0)


@in_loop
async def test_the_time_of_whoever_resumes_from_the_ring_is_since_its_last_progress() -> None:
    """It is held to making progress, however old the events are, also where the oldest are shed."""
    house = await House.opened(channels=DROPS)
    clock = house.clock.stop()
    house.publish(600, 1000)
    clock.move(60.0)
    slow = house.connect("since=e1-0", v1=True, reads_along=False)
    await house.settle()
    listener = ear(slow)
    assert listener.is_replaying
    assert listener.cursor is not None
    clock.move(0.5)
    assert house.fanout.slow.lag_of(listener).ms == 500
    slow.socket.read()
    await house.settle()
    assert listener.is_replaying
    assert house.fanout.slow.lag_of(listener).ms == 0


# Positions before the first look


UNSTORED = [("none", 0), ("one", 1), ("many", 50)]


@pytest.mark.parametrize("count", [case[1] for case in UNSTORED], ids=[case[0] for case in UNSTORED])
@in_loop
async def test_what_comes_before_the_first_look_hides_nothing_from_whoever_resumes(count: int) -> None:
    """Events without a position that a channel hears before it knows its own position are not its history."""
    house = House()
    house.store(10)
    if count:
        house.unstored(count)
    house.channels.on_confirmed(CHANNEL)
    await house.settle()
    house.publish(2)
    peer = house.connect("since=e1-5", v1=True)
    await house.settle()
    await house.until_live(peer)
    assert [offset for offset in peer.story if offset is not None] == [6, 7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize("count", [case[1] for case in UNSTORED], ids=[case[0] for case in UNSTORED])
@in_loop
async def test_what_comes_before_the_first_look_moves_no_place(count: int) -> None:
    """Who is behind since the first event after it stands where the channel stood."""
    house = House()
    house.store(10)
    if count:
        house.unstored(count)
    house.channels.on_confirmed(CHANNEL)
    await house.settle()
    peer = house.connect(v1=True)
    fanout: Fanout = house.fanout
    fanout.fall_behind(ear(peer))
    assert fanout.position_of(ear(peer)) == fanout.position == ("e1", 10)
    assert fanout.ring.position_at(fanout.ring.tail) == ("e1", 10)
