"""The fan-out with sockets of the test's own, which take as much as the test lets them."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable

import pytest

from broadcaster import wire
from broadcaster.core.position import Cause, Gap, Position
from broadcaster.core.runtime import LIMITS
from broadcaster.settings import ChannelsTable
from broadcaster.wire import CloseCode
from tests.hub.house import CHANNEL, HIGH_WATER, House, Peer, turns
from tests.support import in_loop, server_frames

OTHER = "events.other"


def expired(house: House, count: int) -> Gap:
    """The next so many events are gone, before the subscription has brought them."""
    first = house.redis.next()
    for _ in range(count):
        house.store(1)
    last = house.redis.head()
    return Gap(CHANNEL, Cause.EXPIRED, first.epoch, first.offset, last.offset, last)


# Live


@in_loop
async def test_a_batch_is_one_write_per_connection() -> None:
    """All events of one read from Redis leave in a single write, the same bytes for everybody."""
    house = await House.opened()
    peers = [house.connect() for _ in range(5)]
    sent = house.publish(50)
    expected = b"".join(map(wire.text_frame, sent))
    assert [peer.socket.writes for peer in peers] == [[expected]] * 5
    assert house.fanout.deliveries == 250
    assert house.fanout.sent_bytes == 5 * len(expected)
    assert house.fanout.filtered == 0


BATCHES: list[tuple[str, int, int, int]] = [
    ("one small event", 1, 252, 1),
    ("a batch of exactly the limit", 256, 252, 1),
    ("a batch above the limit", 257, 252, 2),
    ("a batch of many pieces", 2560, 252, 10),
    ("one event larger than a piece", 1, 100_000, 1),
    ("three events larger than a piece", 3, 100_000, 3),
]


@pytest.mark.parametrize(("count", "size", "writes"), [c[1:] for c in BATCHES], ids=[c[0] for c in BATCHES])
@in_loop
async def test_a_long_batch_leaves_in_pieces_of_64_kib(count: int, size: int, writes: int) -> None:
    """No write is larger than the limit unless one frame is, and frames are never cut."""
    house = await House.opened()
    peer = house.connect()
    sent = house.publish(count, size)
    assert len(peer.socket.writes) == writes
    for write in peer.socket.writes:
        frames = server_frames(write)
        assert sum(len(wire.text_frame(data)) for _, data in frames) == len(write)
        assert len(write) <= LIMITS.write_bytes or len(frames) == 1
    assert peer.events() == sent


@in_loop
async def test_who_joins_gets_what_comes_and_who_left_gets_nothing() -> None:
    """Live from the next frame on, until the end."""
    house = await House.opened()
    early = house.connect()
    first = house.publish(2)
    late = house.connect()
    second = house.publish(2)
    [membership] = early.connection.memberships
    house.channel().unsubscribe(membership)
    house.channel().unsubscribe(membership)
    third = house.publish(2)
    assert early.told == [*first, *second]
    assert late.told == [*second, *third]


@in_loop
async def test_a_socket_that_was_just_closed_disturbs_nobody() -> None:
    """uvloop's write raises on a closed transport; everybody else still gets the frame."""
    house = await House.opened()
    peers = [house.connect() for _ in range(3)]
    peers[1].socket.close()
    sent = house.publish(400)
    assert peers[0].told == peers[2].told == sent
    assert peers[1].told == []


@in_loop
async def test_events_without_a_position_reach_everybody() -> None:
    """A plain PUBLISH of somebody else is delivered where it comes, and moves no position."""
    house = await House.opened()
    plain, v1 = house.connect(), house.connect(v1=True)
    sent = house.publish(1) + house.unstored(2) + house.publish(1)
    assert plain.told == sent
    assert v1.told == ["welcome", *sent]
    assert house.fanout.position == Position("e1", 2)


# Behind

PAUSES: list[tuple[str, int, int]] = [
    ("of many small events", 5000, 252),
    ("of a few large events", 20, 60_000),
    ("of events larger than a piece", 8, 70_000),
    ("in the last write", 264, 252),
]


@pytest.mark.parametrize(("count", "size"), [case[1:] for case in PAUSES], ids=[case[0] for case in PAUSES])
@in_loop
async def test_a_pause_within_a_batch_continues_at_the_right_frame(count: int, size: int) -> None:
    """Whoever stops reading in the middle of a batch gets the rest of it later: nothing lost, nothing twice."""
    house = await House.opened()
    quick, slow = house.connect(), house.connect(reads_along=False)
    sent = house.publish(count, size)
    assert quick.told == sent
    assert slow.connection in house.registry.behind
    assert slow.told == sent[: len(slow.told)]
    assert sum(map(len, slow.socket.writes)) <= HIGH_WATER + max(LIMITS.write_bytes, size + 14)
    slow.socket.read_all()
    await house.until_live(slow)
    assert slow.told == sent
    assert house.fanout.behind == set()
    assert house.fanout.deliveries == 2 * count
    assert house.fanout.filtered == 0, "what it was given later was not held back by a filter"


@in_loop
async def test_who_is_behind_costs_no_write_and_no_memory() -> None:
    """While paused nothing is written to a connection, however much is broadcast."""
    house = await House.opened(ring_bytes=1 << 20)
    slow = house.connect(reads_along=False)
    house.publish(1000)
    before = list(slow.socket.writes)
    for _ in range(50):
        house.publish(100)
    await turns()
    assert slow.socket.writes == before
    assert house.fanout.ring.bytes <= 1 << 20


@in_loop
async def test_several_pauses_on_the_way_back() -> None:
    """A slow way back, with more events coming at every step, still ends live, complete and in order."""
    house = await House.opened()
    slow = house.connect(reads_along=False)
    sent = house.publish(3000)
    pauses = 0
    while slow.connection in house.registry.behind:
        pauses += slow.socket.paused
        sent += house.publish(5)
        slow.socket.read(100_000)
        await turns(20)
        assert pauses < 200, "never live again"
    assert pauses > 3
    slow.socket.read_all()
    sent += house.publish(5)
    assert slow.told == sent
    assert house.fanout.deliveries == len(sent)
    assert house.fanout.sent_bytes == sum(map(len, slow.socket.writes))


@in_loop
async def test_the_way_back_is_cut_into_pieces() -> None:
    """A long way back delays nobody for long: pieces of 64 KiB, and no more than a slice of time per turn."""
    house = await House.opened()
    slow = house.connect(reads_along=False)
    sent = house.publish(10_000)
    assert slow.socket.paused
    before = len(slow.socket.writes)
    slow.socket.read_all()
    assert len(slow.socket.writes) == before, "it waits for its turn"
    await house.until_live(slow)
    assert slow.told == sent
    assert all(len(write) <= LIMITS.write_bytes for write in slow.socket.writes[before:])


@in_loop
async def test_live_again_at_the_head_and_fed_at_once() -> None:
    """In the turn in which the cursor meets the head, the next event is written directly again."""
    house = await House.opened()
    slow = house.connect(reads_along=False)
    sent = house.publish(1000)
    slow.socket.read_all()
    await house.until_live(slow)
    writes = len(slow.socket.writes)
    sent += house.publish(1)
    assert len(slow.socket.writes) == writes + 1
    assert slow.told == sent


@in_loop
async def test_who_does_not_read_is_not_read() -> None:
    """Reading stops with the pause, so that a talker cannot pile up answers, and goes on with it."""
    house = await House.opened()
    slow = house.connect(reads_along=False)
    house.publish(1000)
    assert not slow.socket.reading
    slow.socket.read_all()
    assert slow.socket.reading


@in_loop
async def test_who_is_overtaken_by_the_ring_is_closed() -> None:
    """When the next frame of a slow connection is gone, it is closed 4008 and counted, not given a hole."""
    house = await House.opened(ring_bytes=1 << 18)
    quick, slow = house.connect(), house.connect(reads_along=False)
    sent = house.publish(1000)
    sent += house.publish(2000)
    slow.socket.read_all()
    await turns()
    *events, end = slow.told
    assert end == "close 4008"
    assert events == sent[: len(events)]
    assert house.registry.closed[CloseCode.SLOW] == 1
    sent += house.publish(1)
    assert quick.told == sent
    assert slow.told[-1] == "close 4008"


@in_loop
async def test_who_is_overtaken_and_does_not_read_is_closed_by_the_timer() -> None:
    """Nobody has to wait for it to read first; the reason says by how much it was too slow."""
    house = await House.opened(ring_bytes=1 << 18)
    slow = house.connect(reads_along=False)
    house.publish(3000)
    house.timer.tick()
    assert house.registry.closed[CloseCode.SLOW] == 1
    [(_, close)] = [frame for frame in server_frames(b"".join(slow.socket.writes)) if frame[0] == 8]
    assert b"too slow: " in close
    assert b" events, " in close
    assert house.registry.behind == set()


@in_loop
async def test_who_is_behind_for_too_long_is_closed_by_the_timer() -> None:
    """Within the ring, but with an event that has waited for longer than behind_max_ms."""
    house = await House.opened(behind_max_ms=1000)
    slow, idle = house.connect(reads_along=False), house.connect(reads_along=False)
    house.timer.tick()
    assert idle.told == []
    house.publish(300)
    house.timer.tick()
    assert "close 4008" not in slow.told
    await asyncio.sleep(1.1)
    house.timer.tick()
    assert slow.told[-1] == "close 4008"


@in_loop
async def test_the_delay_counts_from_the_oldest_frame_that_waits() -> None:
    """Behind means the age of what is awaited: a reader that moves on gets younger."""
    house = await House.opened()
    slow = house.connect(reads_along=False)
    [listener] = slow.connection.memberships
    house.clock.stop()
    house.publish(1000)
    house.clock.move(0.3)
    old = house.fanout.slow.lag_of(listener).ms
    assert old >= 290
    house.publish(1000)
    while listener.cursor is not None and listener.cursor < 1001:
        slow.socket.read(65_536)
        await turns(5)
    assert listener in house.fanout.behind
    assert house.fanout.slow.lag_of(listener).ms < old
    assert listener.cursor is not None
    assert house.fanout.slow.lag_of(listener).events == 2000 - listener.cursor


# Several channels of one connection


@in_loop
async def test_one_connection_gets_the_events_of_all_its_channels() -> None:
    """And of no other; each channel is welcomed on its own, the first one of the priority list first."""
    house = await House.opened()
    peer = house.connect(f"channel={OTHER}&channel={CHANNEL}", v1=True)
    only = house.connect(f"channel={OTHER}")
    assert [welcome["channel"] for welcome in peer.controls("welcome")] == [CHANNEL]
    house.channels.on_confirmed(OTHER)
    await house.settle()
    assert [welcome["channel"] for welcome in peer.controls("welcome")] == [CHANNEL, OTHER]
    first = house.publish(1)
    second = house.publish(1, channel=OTHER)
    third = house.publish(1)
    assert peer.events() == first + second + third
    assert only.told == second


@in_loop
async def test_a_full_socket_is_full_for_all_channels() -> None:
    """Both channels are fed from their rings; the one of the priority list first, each in its order."""
    house = await House.opened()
    slow = house.connect(f"channel={OTHER}&channel={CHANNEL}", reads_along=False)
    house.channels.on_confirmed(OTHER)
    await house.settle()
    others = house.publish(300, channel=OTHER, note="." * 100)
    assert slow.socket.paused
    others += house.publish(50, channel=OTHER)
    criticals = house.publish(50)
    already = len(slow.events())
    slow.socket.read_all()
    await house.until_live(slow)
    told = slow.events()
    assert [event for event in told if OTHER.encode() in event] == others
    assert told[already : already + 50] == criticals, "it was behind, and is not served first"
    assert slow.connection not in house.registry.behind
    assert house.publish(1, channel=OTHER) == slow.events()[-1:]


@in_loop
async def test_who_is_overtaken_in_one_channel_is_closed_for_all() -> None:
    """One connection, one close; nothing of the other channel comes after it."""
    house = await House.opened(ring_bytes=1 << 18)
    slow = house.connect(f"channel={OTHER}&channel={CHANNEL}", reads_along=False)
    house.channels.on_confirmed(OTHER)
    await house.settle()
    house.publish(1)
    house.publish(4000)
    house.publish(1, channel=OTHER)
    slow.socket.read_all()
    await house.settle()
    assert slow.told[-1] == "close 4008"
    assert house.registry.closed[CloseCode.SLOW] == 1
    house.publish(1, channel=OTHER)
    assert slow.told[-1] == "close 4008"


# Filters

FILTERS: list[tuple[str, str, Callable[[int], bool]]] = [
    ("one type", "type=A", lambda n: n % 2 == 0),
    ("two types", "type=A&type=B", lambda n: True),
    ("none of them", "type=C", lambda n: False),
    ("a severity", "severity=info", lambda n: n % 3 == 0),
    ("a type and a severity", "type=A&severity=info", lambda n: n % 6 == 0),
    ("a source", "source=s7", lambda n: n == 7),
]


def mixed(house: House, count: int = 60) -> list[bytes]:
    """Events of two types, two severities and many sources, stored and heard in one batch."""
    stored = []
    for number in range(count):
        severity = "info" if number % 3 == 0 else "critical"
        stored += house.store(1, event_type="AB"[number % 2], severity=severity, source=f"s{number}")
    house.hear(stored)
    return stored


@pytest.mark.parametrize(("query", "wants"), [case[1:] for case in FILTERS], ids=[case[0] for case in FILTERS])
@in_loop
async def test_a_filter_holds_back_what_is_not_wanted(query: str, wants: Callable[[int], bool]) -> None:
    """Whoever filters gets what matches, in order and in one write; everybody else gets everything."""
    house = await House.opened()
    everything, filtering, twin = house.connect(), house.connect(query), house.connect(query)
    sent = mixed(house)
    wanted = [event for number, event in enumerate(sent) if wants(number)]
    assert everything.told == sent
    assert filtering.told == twin.told == wanted
    assert len(filtering.socket.writes) == bool(wanted)
    assert house.fanout.deliveries == len(sent) + 2 * len(wanted)
    assert house.fanout.filtered == 2 * (len(sent) - len(wanted))


@in_loop
async def test_who_filters_and_falls_behind_gets_what_is_wanted_and_nothing_twice() -> None:
    """Paused in the middle of a batch of which only a part was wanted: it goes on at the right place."""
    house = await House.opened()
    everything = house.connect()
    slow = house.connect("type=A", reads_along=False)
    quick = house.connect("type=A")
    sent = mixed(house, 3000)
    assert slow.connection in house.registry.behind
    sent += mixed(house, 200)
    wanted = [event for event in sent if b'"event_type":"A"' in event]
    slow.socket.read_all()
    await house.until_live(slow)
    assert everything.told == sent
    assert quick.told == slow.told == wanted
    assert house.fanout.deliveries == len(sent) + 2 * len(wanted)
    assert house.fanout.filtered == 2 * (len(sent) - len(wanted))


@in_loop
async def test_everybody_with_a_filter_leaves_and_comes_back() -> None:
    """A filter that nobody has any more costs nothing, and can be asked for again."""
    house = await House.opened()
    for _ in range(3):
        peer = house.connect("type=A")
        sent = mixed(house, 4)
        assert peer.told == sent[::2]
        peer.connection.connection_lost(None)
        mixed(house, 4)
    assert house.fanout.filtered == 6


# When something is missing


@in_loop
async def test_a_v1_client_is_welcomed_and_a_plain_one_hears_nothing() -> None:
    """The welcome is the first frame of a v1 client; a plain client gets events and nothing else."""
    house = await House.opened()
    before = house.publish(3)
    plain, v1 = house.connect(), house.connect(v1=True)
    sent = house.publish(1)
    assert before
    assert plain.told == sent
    assert v1.told == ["welcome", *sent]
    (_, welcome), _ = server_frames(b"".join(v1.socket.writes))
    assert json.loads(welcome) == {
        "control": "welcome",
        "channel": "events.critical",
        "position": "e1-3",
        "recovered": None,
        "beat_interval_s": 2.0,
        "max_bytes": house.settings.event.max_bytes,
    }


@in_loop
async def test_who_comes_before_redis_is_welcomed_when_it_is_there() -> None:
    """Nobody is told that all is well before it is, and a plain client is kept."""
    house = House()
    plain, v1 = house.connect(), house.connect(v1=True)
    await house.settle()
    assert v1.told == []
    house.channels.on_confirmed(CHANNEL)
    await house.settle()
    sent = house.publish(1)
    assert plain.told == sent
    assert v1.told == ["welcome", *sent]


@in_loop
async def test_an_outage_that_can_be_filled_is_no_gap() -> None:
    """What was published while the subscription was lost comes from the log, in its place, to everybody."""
    house = await House.opened()
    plain, v1 = house.connect(), house.connect(v1=True)
    sent = house.publish(2)
    house.channels.on_lost(CHANNEL)
    sent += house.store(300)
    newcomer = house.connect(v1=True)
    await house.settle()
    assert newcomer.told == []
    house.channels.on_confirmed(CHANNEL)
    await house.settle()
    after = house.publish(2)
    assert plain.told == sent + after
    assert v1.told == ["welcome", *sent, *after]
    assert newcomer.told == ["welcome", *sent[2:], *after], "he begins where the hub stood when he came"
    assert newcomer.controls("welcome")[0]["position"] == "e1-2"


@in_loop
async def test_a_hole_is_told_between_what_came_before_and_after_it() -> None:
    """v1 gets exactly one gap in its place; a plain client, who cannot be told, is closed 4009 there."""
    house = await House.opened()
    plain, v1 = house.connect(), house.connect(v1=True)
    before = house.publish(2)
    house.fanout.announce(expired(house, 3))
    newcomer = house.connect()
    after = house.publish(2)
    assert v1.told == ["welcome", *before, "gap", *after]
    assert plain.told == [*before, "close 4009"]
    assert newcomer.told == after
    assert v1.controls("gap") == [
        {
            "channel": "events.critical",
            "cause": "expired",
            "epoch": "e1",
            "first": 3,
            "last": 5,
            "position": "e1-5",
        }
    ]
    assert house.fanout.gaps == {"expired": 1}
    [(_, close)] = [frame for frame in server_frames(b"".join(plain.socket.writes)) if frame[0] == 8]
    assert close[2:] == b"events of events.critical may be missing: expired, from e1-3"


@in_loop
async def test_every_restart_of_redis_is_a_gap_of_its_own() -> None:
    """Three restarts are three gaps, also for who came after the first one."""
    house = await House.opened()
    old = house.connect(v1=True)
    house.publish(1)

    async def restart() -> None:
        house.channels.on_lost(CHANNEL)
        house.redis.restart()
        house.channels.on_confirmed(CHANNEL)
        await house.settle()

    await restart()
    newer = house.connect(v1=True)
    for _ in range(2):
        await restart()
    [last] = house.publish(1)
    assert [word for word in old.told if isinstance(word, str)] == ["welcome", "gap", "gap", "gap"]
    assert newer.told == ["welcome", "gap", "gap", last]
    assert old.story == [
        1,
        *[(f"e{n}", 2, None, "redis_restarted") for n in (1, 2, 3)],
        2,
    ]
    assert house.fanout.gaps == {"redis_restarted": 3}


@in_loop
async def test_who_is_behind_is_told_of_the_hole_in_its_place() -> None:
    """A slow v1 client reads the gap from the ring, after the events before it and before those after it."""
    house = await House.opened()
    slow, plain = house.connect(v1=True, reads_along=False), house.connect(reads_along=False)
    before = house.publish(2000)
    house.fanout.announce(expired(house, 10))
    after = house.publish(500)
    assert "close 4009" not in plain.told, "it is closed at its place in the order"
    slow.socket.read_all()
    plain.socket.read_all()
    await house.settle()
    assert slow.told == ["welcome", *before, "gap", *after]
    assert plain.told == [*before, "close 4009"]
    assert not house.fanout.behind
    assert not house.registry.behind


@in_loop
async def test_who_filters_and_is_behind_is_told_of_the_hole_as_well() -> None:
    """A gap is no event: no filter holds it back, and nobody counts it as a delivery."""
    house = await House.opened()
    slow = house.connect("type=NONE", v1=True, reads_along=False)
    slow.connection.write(b"\x8a\x7d" + b"." * 125)
    slow.socket.held = HIGH_WATER + 1
    slow.connection.pause_writing()
    house.publish(10)
    house.fanout.announce(expired(house, 1))
    slow.socket.paused = True
    slow.socket.read_all()
    await house.settle()
    assert slow.told == ["welcome", "gap"]
    assert (house.fanout.deliveries, house.fanout.filtered) == (0, 10)


@in_loop
async def test_a_gap_that_fills_the_socket_is_not_told_twice() -> None:
    """A connection that pauses within the very write of the gap goes on after it."""
    house = await House.opened()
    slow = house.connect(v1=True, reads_along=False)
    welcome = len(slow.socket.writes[0])
    size = HIGH_WATER - welcome - 4  # the next frame fills it to the last byte, one more is too much
    [filler] = house.publish(1, size)
    assert house.registry.behind == set()
    house.fanout.announce(expired(house, 1))
    house.registry.settle()
    assert slow.connection in house.registry.behind
    after = house.publish(3)
    slow.socket.read_all()
    await house.until_live(slow)
    assert slow.told == ["welcome", filler, "gap", *after]


@in_loop
async def test_who_leaves_during_an_outage_is_forgotten() -> None:
    """Nothing is written to a connection that is gone, or closed, when Redis comes back."""
    house = await House.opened()
    gone, closed = house.connect(v1=True), house.connect(v1=True)
    house.channels.on_lost(CHANNEL)
    waiting, leaver = house.connect(v1=True), house.connect(v1=True)
    gone.connection.connection_lost(None)
    leaver.connection.connection_lost(None)
    closed.connection.close(wire.CloseCode.RESTART, "")
    waiting.connection.close(wire.CloseCode.RESTART, "")
    house.redis.restart()
    house.channels.on_confirmed(CHANNEL)
    await house.settle()
    house.publish(1)
    assert gone.told == ["welcome"]
    assert leaver.told == []
    assert closed.told == ["welcome", "close 1012"]
    assert waiting.told == ["close 1012"]
    assert house.channel().listeners == 2  # who is closed is still connected


# Where events are not stored


@in_loop
async def test_without_history_each_outage_is_a_gap_without_numbers() -> None:
    """v1 is told once per outage, in its place; plain is closed 4009; who came meanwhile is only welcomed."""
    house = await House.opened(history=False)
    plain, v1 = house.connect(), house.connect(v1=True)
    before = house.unstored(2)
    house.channels.on_lost(CHANNEL)
    house.channels.on_lost(CHANNEL)
    new_plain, new_v1 = house.connect(), house.connect(v1=True)
    assert v1.told == ["welcome", *before], "told before the end of the hole is known"
    house.channels.on_confirmed(CHANNEL)
    await house.settle()
    after = house.unstored(2)
    assert v1.told == ["welcome", *before, "gap", *after]
    assert plain.told == [*before, "close 4009"]
    assert new_v1.told == ["welcome", *after]
    assert new_plain.told == after
    assert v1.controls("gap") == [
        {
            "channel": "events.critical",
            "cause": "redis_link_lost",
            "epoch": None,
            "first": None,
            "last": None,
            "position": None,
        }
    ]
    assert v1.controls("welcome")[0]["position"] is None


# All together


class Story:
    """Everything that can happen, at random, and what each peer must have been told by then."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.house: House
        self.peers: list[Peer] = []
        self.cut: list[Peer] = []
        self.queries: dict[int, str] = {}

    def wants(self, peer: Peer, event: bytes) -> bool:
        query = self.queries[id(peer)]
        channel = OTHER if OTHER.encode() in event[:60] else CHANNEL
        listens = f"channel={channel}" in query or (channel == CHANNEL and "channel=" not in query)
        label = query.partition("type=")[2]
        return listens and (not label or b'"event_type":"%b"' % label.encode() in event)

    def arrival(self) -> None:
        v1 = self.chance.random() < 0.5
        query = self.chance.choice(["", "type=A", "type=B", f"channel={OTHER}", f"channel={OTHER}&type=A"])
        both = f"channel={CHANNEL}&channel={OTHER}"
        query = self.chance.choice([query, query, both, f"{both}&type=B"])
        peer = self.house.connect(query, v1=v1)
        if v1:
            peer.expected += ["welcome"] * max(1, query.count("channel="))
        self.queries[id(peer)] = query
        self.peers.append(peer)

    def batch(self) -> None:
        channel = self.chance.choice([CHANNEL, CHANNEL, OTHER])
        count, size = self.chance.choice([1, 1, 2, 30, 400]), self.chance.choice([0, 0, 5000])
        sent = []
        for _ in range(count):
            note = "." * size
            sent += self.house.store(1, channel=channel, event_type=self.chance.choice("AB"), note=note)
        self.house.hear(sent, channel)
        for peer in self.peers:
            peer.expected += [event for event in sent if self.wants(peer, event)]

    def hole(self) -> None:
        """Events of the default channel that are gone, or a restart of Redis for it."""
        gap = expired(self.house, self.chance.choice([1, 7]))
        if self.chance.random() < 0.5:
            self.house.redis.restart()
            head = self.house.redis.head()
            gap = Gap(CHANNEL, Cause.REDIS_RESTARTED, gap.epoch, gap.first, None, head)
        self.house.fanout.announce(gap)
        # The other channel gets its new epoch from the log, as it would.
        other = self.house.channel(OTHER).fanout
        head = self.house.redis.head(OTHER)
        restarted = other.position is not None and head.epoch != other.position.epoch
        if restarted:
            assert other.position is not None
            offset = other.position.offset + 1
            other.announce(Gap(OTHER, Cause.REDIS_RESTARTED, other.position.epoch, offset, None, head))
        for peer in list(self.peers):
            query = self.queries[id(peer)]
            here = "channel=" not in query or CHANNEL in query
            gaps = here + (restarted and OTHER in query)
            if peer.connection.wants_control:
                peer.expected += ["gap"] * gaps
            elif gaps:
                self.peers.remove(peer)
                self.cut.append(peer)

    def reader(self) -> None:
        if not self.peers:
            return
        peer = self.chance.choice(self.peers)
        peer.socket.reads_along = self.chance.random() < 0.2
        peer.socket.read(self.chance.choice([1000, 50_000, 200_000, 1 << 40]))

    async def run(self, steps: int) -> None:
        self.house = await House.opened(ring_bytes=1 << 28, channels=ChannelsTable())
        self.house.channels.get(OTHER)
        self.house.channels.on_confirmed(OTHER)
        await self.house.settle()
        self.arrival()
        what = [self.arrival] * 2 + [self.batch] * 8 + [self.hole] + [self.reader] * 8
        for _ in range(steps):
            self.chance.choice(what)()
            await turns(self.chance.choice([0, 1, 1, 5]))
        for peer in self.peers + self.cut:
            peer.socket.read_all()
        await self.house.settle()
        await turns(500)


def by_channel(words: list[bytes | str]) -> dict[str, list[bytes | str]]:
    """The order between channels is free; within one it is not."""
    return {
        channel: [word for word in words if isinstance(word, bytes) and channel.encode() in word[:60]]
        for channel in (CHANNEL, OTHER)
    }


@pytest.mark.parametrize("seed", range(5))
@in_loop
async def test_whatever_happens_everybody_is_told_everything_once_and_in_order(seed: int) -> None:
    """Random batches, channels, filters, holes, epochs, newcomers and readers of all paces."""
    story = Story(seed)
    await story.run(120)
    house = story.house
    assert story.peers
    for peer in story.peers:
        if OTHER in story.queries[id(peer)]:
            assert by_channel(peer.told) == by_channel(peer.expected)
            assert sorted(w for w in peer.told if isinstance(w, str)) == sorted(
                w for w in peer.expected if isinstance(w, str)
            )
        else:
            assert peer.told == peer.expected
        for channel in (CHANNEL, OTHER):
            # In every channel a gap stands where it belongs: positions only ever rise.
            offsets = [json.loads(e) for e in peer.events()]
            places = [(f["epoch"], f["offset"]) for f in offsets if f["channel"] == channel]
            assert places == sorted(places, key=lambda place: (int(place[0][1:]), place[1]))
            assert len(places) == len(set(places))
    for peer in story.cut:
        *told, end = peer.told
        assert end == "close 4009"
        for channel, events in by_channel(told).items():
            assert events == by_channel(peer.expected)[channel][: len(events)]
        if OTHER not in story.queries[id(peer)]:
            assert told == peer.expected, "closed before its place"
    assert not house.fanout.behind | house.channel(OTHER).fanout.behind
    assert not house.registry.behind
    everything = [word for peer in story.peers + story.cut for word in peer.events()]
    totals = house.channels.totals()
    assert totals["deliveries"] == len(everything)
    assert house.sequencer.duplicates == house.sequencer.recovered == 0
