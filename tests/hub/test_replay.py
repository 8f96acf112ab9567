"""Whoever comes back with a position gets what came after it, or is told what is gone."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from typing import Any

import pytest

from broadcaster import wire
from broadcaster.core.position import Position
from broadcaster.core.runtime import LIMITS
from broadcaster.hub.fanout.ring import Ring
from broadcaster.wire import CloseCode
from tests.hub.house import CHANNEL, INVALID, House, Peer, turns
from tests.support import in_loop, server_frames, until

P = Position.parse
OTHER = "events.other"


def welcome(peer: Peer) -> tuple[str | None, bool | None]:
    """From where the first channel is delivered, and whether nothing is missing."""
    assert peer.told[0] == "welcome"
    first = peer.controls("welcome")[0]
    return first["position"], first["recovered"]


async def until_welcome(house: House, *peers: Peer) -> None:
    """Until all have been welcomed, and are live."""
    for _ in range(20_000):
        if all(peer.told for peer in peers):
            break
        await asyncio.sleep(0)
    await house.until_live(*peers)


def replace_ring(house: House) -> None:
    """The channel goes on with an empty ring: whatever came before is in the log only."""
    position = house.fanout.position
    assert position is not None
    house.fanout.ring = house.fanout.slow._ring = Ring(1 << 20)
    house.fanout.ring.begin(position)


# From the ring

RING: list[tuple[str, str, int, bool]] = [
    ("the head", "e1-110", 110, True),
    ("one before it", "e1-109", 109, True),
    ("the first place of the ring", "e1-100", 100, True),
]


@pytest.mark.parametrize(("since", "offset", "whole"), [case[1:] for case in RING], ids=[case[0] for case in RING])
@in_loop
async def test_who_was_away_for_a_moment_is_served_from_the_ring(since: str, offset: int, whole: bool) -> None:
    """No page of the log is read, nothing is missing, and the next event follows."""
    house = await House.opened(stored=100)
    house.publish(10)
    peer, plain = house.connect(f"since={since}", v1=True), house.connect(f"since={since}")
    await until_welcome(house, peer)
    [last] = house.publish(1)
    assert welcome(peer) == (since, whole)
    assert peer.story == list(range(offset + 1, 112))
    assert plain.told == peer.events()
    assert plain.told[-1] == last
    assert house.pages.read == 0
    assert (house.channel().replay.resumed, house.channel().replay.recovered) == (2, 2)


@in_loop
async def test_the_ring_is_written_in_pieces_and_a_slow_reader_may_pause() -> None:
    """More than one piece of 64 KiB; with pauses it is the same, in the same order."""
    house = await House.opened()
    sent = house.publish(2000)
    quick, slow = house.connect("since=e1-0", v1=True), house.connect("since=e1-0", reads_along=False)
    while slow.connection in house.registry.behind:
        slow.socket.read(70_000)
        sent += house.publish(1)
        await turns(20)
    slow.socket.read_all()
    await house.until_live(quick, slow)
    assert quick.events() == slow.told == sent
    assert all(len(write) <= LIMITS.write_bytes for write in quick.socket.writes)


@in_loop
async def test_unstored_events_in_the_ring_come_along() -> None:
    """What came without a position after the place is given, too; what came at the place is not known."""
    house = await House.opened()
    house.publish(3)
    house.unstored(2)
    fourth = house.publish(1)
    later = house.unstored(1)
    fifth = house.publish(1)
    peer = house.connect("since=e1-3")
    await house.settle()
    assert peer.told == fourth + later + fifth


@in_loop
async def test_a_gap_in_the_ring_is_told_to_whoever_resumes_before_it() -> None:
    """v1 reads it in its place, plain is closed there, and whoever stands behind it hears nothing of it."""
    house = await House.opened()
    before = house.publish(2)
    house.redis.restart()
    after = house.publish(2)
    await house.settle()
    early, plain = house.connect("since=e1-1", v1=True), house.connect("since=e1-1")
    late = house.connect("since=e2-3", v1=True)
    await house.settle()
    assert early.told == ["welcome", before[1], "gap", *after]
    assert welcome(early) == ("e1-1", True), "what follows joins on"
    assert plain.told == [before[1], "close 4009"]
    assert late.told == ["welcome", after[1]]
    assert welcome(late) == ("e2-3", True)
    assert house.channel().replay.recovered == 3


@in_loop
async def test_a_gap_in_the_ring_begins_at_the_place_of_whoever_has_some_of_it() -> None:
    """Another hub has given it two events that this one has never seen, and Redis has lost."""
    house = await House.opened()
    house.publish(2)
    house.redis.restart()
    [third] = house.publish(1)
    await house.settle()
    peer, plain = house.connect("since=e1-4", v1=True), house.connect("since=e1-4")
    await house.settle()
    assert peer.story == [("e1", 5, None, "redis_restarted"), 3]
    assert welcome(peer) == ("e1-4", False)
    assert plain.told == ["close 4009"]
    [fourth] = house.publish(1)
    assert peer.events() == [third, fourth]


@in_loop
async def test_a_gap_of_the_same_epoch_in_the_ring_is_told_in_its_place() -> None:
    """`recovered`: what follows joins on to the position. For one it does, for the other a gap comes first."""
    house = await House.opened()
    house.publish(2)
    house.redis.store(INVALID)
    house.publish(1)
    await house.settle()
    peer, other = house.connect("since=e1-1", v1=True), house.connect("since=e1-2", v1=True)
    await house.settle()
    assert peer.story == [2, ("e1", 3, 3, "refused"), 4]
    assert welcome(peer) == ("e1-1", True)
    assert other.story == [("e1", 3, 3, "refused"), 4]
    assert welcome(other) == ("e1-2", False)
    assert house.channel().replay.recovered == 1


@in_loop
async def test_who_gives_no_position_is_not_told_that_it_was_recovered() -> None:
    """Not even if the channel was not caught up when it came, so that it begins at an earlier position."""
    house = await House.opened()
    house.publish(2)
    await house.settle()
    house.channel().sequencer.interrupt()
    peer, asking = house.connect(v1=True), house.connect("since=e1-1", v1=True)
    house.store(1)
    house.channels.on_confirmed(CHANNEL)
    await house.settle()
    assert peer.story == [3]
    assert welcome(peer) == ("e1-2", None)
    assert welcome(asking) == ("e1-1", True)
    replay = house.channel().replay
    assert (replay.resumed, replay.recovered) == (1, 1)


@pytest.mark.parametrize("since", ["e1-9", "T1k8c5q46427c26a-1"], ids=["of this epoch", "of a later one"])
@in_loop
async def test_a_position_beyond_the_head_is_not_waited_for(since: str) -> None:
    """It was never given: told as unknown, at once."""
    house = await House.opened()
    house.publish(2)
    await house.settle()
    peer, plain = house.connect(f"since={since}", v1=True), house.connect(f"since={since}")
    await house.settle()
    epoch, _, offset = since.partition("-")
    assert peer.story == [(epoch, int(offset) + 1, None, "position_unknown")]
    assert welcome(peer) == ("e1-2", False)
    assert plain.told == ["close 4009"]


# From the log


@in_loop
async def test_who_was_away_for_long_is_served_from_the_log() -> None:
    """Several pages, many pieces, then the ring, then live: all once, in order, and each page is read once."""
    house = await House.opened(stored=1000)
    sent = [house.redis.shelf().log[offset] for offset in range(1, 1001)]
    sent += house.publish(50)
    v1, plain = house.connect("since=e1-0", v1=True), house.connect("since=e1-0")
    await until_welcome(house, v1, plain)
    sent += house.publish(1)
    assert v1.events() == plain.told == sent
    assert welcome(v1) == ("e1-0", True)
    assert house.pages.read == 4
    assert [first for _, first in house.redis.pages] == [1 + n * LIMITS.page_events for n in range(4)]
    assert all(len(write) <= LIMITS.write_bytes for write in plain.socket.writes)
    assert len(plain.socket.writes) >= sum(map(len, plain.socket.writes)) // LIMITS.write_bytes
    assert house.fanout.deliveries == 2 * len(sent)
    assert house.fanout.filtered == 0


@pytest.mark.parametrize("offset", [1, 255, 256, 257, 700, 999])
@in_loop
async def test_it_may_begin_anywhere_in_a_page(offset: int) -> None:
    """The first event is the one after the position, wherever the pages are cut."""
    house = await House.opened(stored=1000)
    peer = house.connect(f"since=e1-{offset}", v1=True)
    await until_welcome(house, peer)
    assert peer.story == list(range(offset + 1, 1001))
    assert welcome(peer) == (f"e1-{offset}", True)


@in_loop
async def test_large_events_leave_one_by_one() -> None:
    """A frame larger than a piece is a piece of its own."""
    house = await House.opened()
    for _ in range(5):
        house.store(1, 70_000)
    house.channels.on_lost(CHANNEL)
    house.channels.on_confirmed(CHANNEL)
    await house.settle()
    replace_ring(house)
    house.fanout.ring.begin(Position("e1", 5))
    peer = house.connect("since=e1-0")
    await until_welcome(house, peer)
    assert [len(data) for data in peer.events()] == [70_000] * 5
    assert len(peer.socket.writes) == 5


@in_loop
async def test_a_slow_reader_is_served_from_the_log_with_pauses() -> None:
    """While its socket is full nothing is written; it goes on where it was, though events keep coming."""
    house = await House.opened(stored=2000)
    sent = [house.redis.shelf().log[offset] for offset in range(1, 2001)]
    slow = house.connect("since=e1-0", reads_along=False)
    pauses = 0
    await house.settle()
    for _ in range(500):
        if slow.connection not in house.registry.behind:
            break
        pauses += slow.socket.paused
        assert slow.socket.held <= HIGH
        slow.socket.read(60_000)
        sent += house.publish(2)
        await turns(30)
    assert pauses > 3
    slow.socket.read_all()
    await house.until_live(slow)
    assert slow.told == sent


HIGH = 2 * 65_536


@in_loop
async def test_a_page_that_comes_while_the_socket_is_full_is_not_lost() -> None:
    """The answer finds a paused connection: it is asked for again, or at hand, when there is room."""
    house = await House.opened(stored=1000)
    house.redis.gate.clear()
    peer = house.connect("since=e1-0", v1=True)
    await house.settle()
    peer.connection.pause_writing()
    house.redis.gate.set()
    await house.settle()
    assert peer.told == []
    peer.connection.resume_writing()
    await until_welcome(house, peer)
    assert peer.story == list(range(1, 1001))


@in_loop
async def test_many_who_come_back_share_the_pages() -> None:
    """However many were cut at different events: a page is read for all of them, not for each."""
    house = await House.opened(stored=1000)
    peers = [house.connect(f"since=e1-{number}", v1=True) for number in range(100)]
    await until_welcome(house, *peers)
    for number, peer in enumerate(peers):
        assert peer.story == list(range(number + 1, 1001))
    assert 4 <= house.pages.read <= 8, "100 listeners, 4 pages; one may be asked for again just when it comes"


@in_loop
async def test_who_leaves_while_a_page_is_read_is_forgotten() -> None:
    """Gone or closed: nothing is written to it, and the others get theirs."""
    house = await House.opened(stored=300)
    house.redis.gate.clear()
    gone, closed, stays = [house.connect("since=e1-0", v1=True) for _ in range(3)]
    await house.settle()
    gone.connection.connection_lost(None)
    closed.connection.close(wire.CloseCode.RESTART, "")
    house.redis.gate.set()
    await until_welcome(house, stays)
    assert (gone.told, closed.told) == ([], ["close 1012"])
    assert stays.story == list(range(1, 301))
    assert house.fanout.behind == set()


@in_loop
async def test_a_redis_that_is_away_is_waited_for() -> None:
    """It resumes when Redis answers again; whoever waits for a page is not too slow."""
    house = await House.opened(stored=300, behind_max_ms=20)
    house.redis.failures = 2
    peer = house.connect("since=e1-0", v1=True)
    await asyncio.sleep(0.03)
    house.timer.tick()
    await until(lambda: peer.told and not house.registry.behind, "never resumed")
    assert peer.story == list(range(1, 301))
    assert house.registry.closed[CloseCode.SLOW] == 0


@pytest.mark.parametrize("stored", [3000, 0], ids=["from the log", "from the ring"])
@in_loop
async def test_who_resumes_is_held_to_making_progress(stored: int) -> None:
    """Not reading for behind_max_ms is closed 4008; reading on, however far behind, is not."""
    house = await House.opened(stored=stored, behind_max_ms=200)
    house.clock.stop()
    house.publish(3000 - stored)
    lazy = house.connect("since=e1-0", v1=True, reads_along=False)
    steady = house.connect("since=e1-0", v1=True, reads_along=False)
    await house.settle()
    for _ in range(6):
        house.clock.move(0.06)
        steady.socket.read(LIMITS.write_bytes * 2)
        await turns(20)
        house.timer.tick()
    assert lazy.told[-1] == "close 4008"
    assert house.registry.closed[CloseCode.SLOW] == 1
    steady.socket.read_all()
    await house.until_live(steady)
    assert steady.story == list(range(1, 3001))


@in_loop
async def test_a_channel_that_waits_for_another_of_its_client_is_not_slow() -> None:
    """Two are resumed over one connection, which is read all the time: the second has to wait for long."""
    house = await House.opened(behind_max_ms=200)
    house.channels.get(OTHER)
    house.channels.on_confirmed(OTHER)
    await house.settle()
    query = f"channel={CHANNEL}&since=e1-0&channel={OTHER}&since={house.redis.head(OTHER).epoch}-0"
    house.publish(3000)
    house.publish(3000, channel=OTHER)
    await house.settle()
    peer = house.connect(query, v1=True, reads_along=False)
    await house.settle()
    house.clock.stop()
    for _ in range(8):
        house.clock.move(0.06)
        peer.socket.read(LIMITS.write_bytes * 2)
        await turns(20)
        house.timer.tick()
    assert house.registry.closed[CloseCode.SLOW] == 0
    peer.socket.read_all()
    await house.until_live(peer)
    assert len(peer.events()) == 6000


@in_loop
async def test_who_waits_for_its_turn_is_not_slow() -> None:
    """Its socket has room, and the hub has not come to feeding it for longer than a slow one may be behind."""
    house = await House.opened(behind_max_ms=200)
    peer = house.connect(reads_along=False)
    house.clock.stop()
    house.publish(1000)
    assert peer.connection.blocked
    house.clock.move(0.1)
    peer.connection.resume_writing()  # it is fed in its turn, which comes late
    house.clock.move(10.0)
    house.timer.tick()
    assert house.registry.closed[CloseCode.SLOW] == 0
    peer.connection.pause_writing()
    house.timer.tick()
    assert house.registry.closed[CloseCode.SLOW] == 0
    house.clock.move(0.2)
    house.timer.tick()
    assert house.registry.closed[CloseCode.SLOW] == 1


# What is gone


@in_loop
async def test_what_has_left_the_log_is_told_with_its_exact_range() -> None:
    """v1: welcome, gap, the rest; plain: closed 4009 before anything else."""
    house = await House.opened(stored=1000)
    house.redis.trim(501)
    v1, plain = house.connect("since=e1-100", v1=True), house.connect("since=e1-100")
    await until_welcome(house, v1)
    assert v1.told[:2] == ["welcome", "gap"]
    assert welcome(v1) == ("e1-100", False)
    assert v1.story == [("e1", 101, 500, "expired"), *range(501, 1001)]
    assert v1.controls("gap")[0]["position"] == "e1-500"
    assert plain.told == ["close 4009"]
    assert house.fanout.gaps == {}, "the channel has lost nothing, only this listener has"


@in_loop
async def test_a_log_that_is_empty_is_told_up_to_the_ring() -> None:
    """Silence has emptied the log: everything up to where the hub begins is gone; then live."""
    house = await House.opened(stored=1000)
    house.redis.trim(5000)
    sent = house.publish(2)
    house.redis.trim(5000)
    peer = house.connect("since=e1-100", v1=True)
    await until_welcome(house, peer)
    sent += house.publish(1)
    assert peer.story == [("e1", 101, 1000, "expired"), 1001, 1002, 1003]
    assert peer.events() == sent
    assert welcome(peer) == ("e1-100", False)


@in_loop
async def test_a_log_that_is_empty_is_told_up_to_a_ring_that_has_moved_on() -> None:
    """The ring holds only the last events, and the log none: exactly those before the ring are told."""
    house = await House.opened(ring_bytes=1 << 18)
    house.publish(3000)
    house.redis.trim(5000)
    tail = house.fanout.ring.tail
    assert 1000 < tail < 3000
    peer = house.connect("since=e1-5", v1=True)
    await until_welcome(house, peer)
    assert peer.story == [("e1", 6, tail, "expired"), *range(tail + 1, 3001)]


@in_loop
async def test_a_hole_in_the_log_is_told_in_its_place() -> None:
    """Somebody has deleted an event: those before and after it are given."""
    house = await House.opened(stored=400)
    house.redis.delete(50, 51, 300)
    v1, plain = house.connect("since=e1-10", v1=True), house.connect("since=e1-10")
    await until_welcome(house, v1)
    first, second = ("e1", 50, 51, "expired"), ("e1", 300, 300, "expired")
    assert v1.story == [*range(11, 50), first, *range(52, 300), second, *range(301, 401)]
    assert [json.loads(word)["offset"] for word in plain.events()] == list(range(11, 50))
    assert plain.told[-1] == "close 4009"


REFUSED: list[tuple[str, list[range]]] = [
    ("inside of a page", [range(20, 21)]),
    ("two apart", [range(20, 21), range(30, 33)]),
    ("at the end of a page", [range(250, 256)]),
    ("across two pages", [range(250, 260)]),
    ("at the front of a page", [range(256, 258)]),
    ("a whole page", [range(256, 512)]),
    ("more than a whole page", [range(250, 520)]),
    ("the last of all", [range(599, 601)]),
    ("the first of all", [range(1, 3)]),
]


@pytest.mark.parametrize("bad", [case[1] for case in REFUSED], ids=[case[0] for case in REFUSED])
@in_loop
async def test_stored_events_that_are_not_valid_are_told_as_refused(bad: list[range]) -> None:
    """Wherever they stand in their pages: told with their range, everything else is given."""
    house = House()
    refused = {offset for run in bad for offset in run}
    for offset in range(1, 601):
        if offset in refused:
            house.redis.store(INVALID)
        else:
            house.store(1)
    house.channels.on_confirmed(CHANNEL)
    await house.settle()
    peer = house.connect("since=e1-0", v1=True)
    await until_welcome(house, peer)
    told = [word for word in peer.story if isinstance(word, tuple)]
    assert {gap[3] for gap in told} == {"refused"}
    covered = [offset for _, first, last, _ in told for offset in range(first, last + 1)]
    assert covered == sorted(refused)
    assert [word for word in peer.story if isinstance(word, int)] == [
        offset for offset in range(1, 601) if offset not in refused
    ]
    places = [word if isinstance(word, int) else word[2] for word in peer.story]
    assert places == sorted(places), "a gap is not in its place"
    assert welcome(peer) == ("e1-0", 1 not in refused)


@in_loop
async def test_an_epoch_that_nobody_knows_is_told_and_everything_there_is_follows() -> None:
    """Redis has lost its memory since: the rest of that epoch is gone, the new one is given from its start."""
    house = await House.opened(stored=300)
    v1, plain = house.connect("since=zz-77", v1=True), house.connect("since=zz-77")
    await until_welcome(house, v1)
    assert v1.story == [("zz", 78, None, "redis_restarted"), *range(1, 301)]
    assert v1.controls("gap")[0]["position"] == "e1-0"
    assert welcome(v1) == ("zz-77", False)
    assert plain.told == ["close 4009"]


@in_loop
async def test_an_unknown_epoch_where_nothing_is_stored_is_told_and_live() -> None:
    """Nothing can follow the gap; the next event does."""
    house = await House.opened()
    peer = house.connect("since=zz-77", v1=True)
    await until_welcome(house, peer)
    house.publish(1)
    assert peer.story == [("zz", 78, None, "redis_restarted"), 1]


@in_loop
async def test_restarts_since_are_told_each_and_what_survived_is_given() -> None:
    """The end of the old epoch, a gap with an open end, the next epoch, another gap, and so on."""
    house = House()
    house.store(5)
    for count in (3, 0, 2):
        house.redis.restart()
        house.store(count)
        house.redis.shelf()
    house.channels.on_confirmed(CHANNEL)
    await house.settle()
    peer = house.connect("since=e1-3", v1=True)
    await until_welcome(house, peer)
    assert peer.story == [
        *(4, 5, ("e1", 6, None, "redis_restarted")),
        *(6, 7, 8, ("e2", 9, None, "redis_restarted")),
        *(("e3", 9, None, "redis_restarted"), 9, 10),
    ]
    assert welcome(peer) == ("e1-3", True)


@in_loop
async def test_who_stands_in_what_was_rolled_back_gets_the_new_events_of_the_same_offsets() -> None:
    """The offsets are given again in a new epoch: they are new events for everybody."""
    house = House()
    house.store(900)
    house.redis.restart(kept=400)
    house.store(500)
    house.channels.on_confirmed(CHANNEL)
    await house.settle()
    beyond = house.connect("since=e1-480", v1=True)
    far_beyond = house.connect("since=e1-880", v1=True)
    within = house.connect("since=e1-390", v1=True)
    await until_welcome(house, beyond, far_beyond, within)
    assert beyond.story == [("e1", 481, None, "redis_restarted"), *range(401, 901)]
    assert far_beyond.story == [("e1", 881, None, "redis_restarted"), *range(401, 901)]
    assert within.story == [*range(391, 401), ("e1", 401, None, "redis_restarted"), *range(401, 901)]


@pytest.mark.parametrize("in_the_ring", [0, 3])
@in_loop
async def test_who_comes_from_an_epoch_that_this_hub_has_never_seen_is_welcomed_at_once(in_the_ring: int) -> None:
    """Redis was restarted twice, the second time without the epoch between, of which another hub had told."""
    house = House(timed=True)
    house.channels.on_confirmed(CHANNEL)
    await house.settle()
    house.publish(8)
    house.redis.restart()
    seen = house.redis.head()
    house.redis.restart(kept=7)
    house.sequencer.check(None)
    await house.settle()
    house.publish(in_the_ring)
    house.redis.trim(100)
    peer = house.connect(f"since={seen}", v1=True)
    await until_welcome(house, peer)
    assert peer.story == [(seen.epoch, seen.offset + 1, None, "redis_restarted"), *range(8, 8 + in_the_ring)]
    pages = len(house.redis.pages)
    await turns()
    assert len(house.redis.pages) == pages


@in_loop
async def test_who_resumes_while_the_log_cannot_be_read_is_closed_in_the_end() -> None:
    """Not left without a sign: a plain client has no heartbeats to miss."""
    house = await House.opened(stored=1000)
    house.redis.failures = 1_000_000
    house.clock.stop()
    v1, plain = house.connect("since=e1-5", v1=True), house.connect("since=e1-5")
    await turns()
    assert v1.told == plain.told == []
    house.clock.move(LIMITS.page_give_up_s + 1)
    await until(lambda: v1.told and plain.told, "they are kept waiting")
    assert v1.told == plain.told == ["close 4010"]


@in_loop
async def test_a_position_ahead_of_the_hub_is_looked_for() -> None:
    """Another hub was quicker: this one reads on first, and then nothing is missing."""
    house = await House.opened(stored=5)
    house.store(3)
    peer = house.connect("since=e1-8", v1=True)
    assert peer.told == []
    await house.settle()
    assert peer.told == ["welcome"]
    assert welcome(peer) == ("e1-8", True)
    house.publish(1)
    assert peer.story == [9]


@in_loop
async def test_a_position_of_an_epoch_that_the_hub_has_not_seen_is_looked_for() -> None:
    """Redis was restarted, another hub knows it already."""
    house = await House.opened(stored=5)
    house.redis.restart()
    house.store(2)
    peer = house.connect("since=e2-6", v1=True)
    await house.settle()
    assert peer.story == [7]
    assert welcome(peer) == ("e2-6", True)


@in_loop
async def test_a_position_that_nobody_has_given_is_told() -> None:
    """It has been looked for: v1 goes on live from the head, plain is closed."""
    house = await House.opened(stored=5)
    v1, plain = house.connect("since=e1-9", v1=True), house.connect("since=e1-9")
    await house.settle()
    assert v1.told == ["welcome", "gap"]
    assert welcome(v1) == ("e1-5", False)
    assert v1.story == [("e1", 10, None, "position_unknown")]
    assert v1.controls("gap")[0]["position"] == "e1-5"
    assert plain.told == ["close 4009"]
    house.publish(1)
    assert v1.story[-1] == 6
    assert plain.told == ["close 4009"]


@in_loop
async def test_each_position_that_is_ahead_is_looked_for_on_its_own() -> None:
    """The look for the first one says nothing of a second one that was given after it."""
    house = await House.opened(stored=5)
    house.store(1)
    late = [1]
    peers = [house.connect("since=e1-6", v1=True)]

    def meanwhile() -> None:
        """The answer is on its way; an event is stored, another hub gives it to somebody, who comes here."""
        if late and house.redis.pages:
            late.pop()
            house.store(1)
            peers.append(house.connect("since=e1-7", v1=True))

    house.redis.on_the_way = meanwhile
    await house.settle()
    assert [welcome(peer) for peer in peers] == [("e1-6", True), ("e1-7", True)]
    house.publish(1)
    await house.settle()
    assert [peer.story for peer in peers] == [[7, 8], [8]]


@in_loop
async def test_who_waits_for_the_subscription_with_a_position_ahead_is_looked_for() -> None:
    """It comes while the hub catches up; what was stored after that look is not a position nobody knows."""
    house = await House.opened(stored=5)
    house.channels.on_lost(CHANNEL)
    house.redis.gate.clear()
    house.channels.on_confirmed(CHANNEL)
    await house.settle()
    late = house.store(1)
    peer = house.connect("since=e1-6", v1=True)
    house.redis.gate.set()
    await house.settle()
    house.hear(late)
    await house.settle()
    assert welcome(peer) == ("e1-6", True)
    house.publish(1)
    assert peer.story == [7]


@in_loop
async def test_without_history_nobody_can_resume() -> None:
    """v1 is told and live; plain is closed 4009, and comes back without a position."""
    house = await House.opened(history=False)
    v1, plain = house.connect("since=e1-9", v1=True), house.connect("since=e1-9")
    assert v1.told == ["welcome", "gap"]
    assert welcome(v1) == (None, False)
    assert v1.story == [("e1", 10, None, "no_history")]
    assert plain.told == ["close 4009"]
    sent = house.unstored(1)
    assert v1.events() == sent
    assert plain.told == ["close 4009"]


@in_loop
async def test_without_history_nobody_can_go_back_so_many_events() -> None:
    """As with a position: v1 is told and live; plain is closed 4009."""
    house = await House.opened(history=False)
    v1, plain = house.connect("last=5", v1=True), house.connect("last=5")
    assert v1.told == ["welcome", "gap"]
    assert welcome(v1) == (None, False)
    assert plain.told == ["close 4009"]
    assert v1.controls("gap")[0]["cause"] == "no_history"
    assert [house.connect("last=0", v1=True).told, house.connect(v1=True).told] == [["welcome"]] * 2


@in_loop
async def test_who_is_ahead_of_a_hub_that_cannot_ask_waits_no_longer_than_others() -> None:
    """It is closed with 4010 as who waits for a page; or begins as soon as the subscription has got so far."""
    house = await House.opened(stored=10)
    house.redis.failures = 1_000_000
    house.clock.stop()
    ahead, unknown = house.connect("since=e1-11", v1=True), house.connect("since=e1-99", v1=True)
    await house.settle()
    house.clock.move(LIMITS.page_give_up_s - 1)
    house.timer.tick()
    assert ahead.told == unknown.told == []
    house.redis.failures = 0
    stored = house.store(2)
    house.redis.failures = 1_000_000
    house.hear(stored)
    await house.settle()
    assert welcome(ahead) == ("e1-11", True)
    assert ahead.events() == stored[1:]
    house.clock.move(2)
    house.timer.tick()
    assert unknown.told == ["close 4010"]


@pytest.mark.parametrize("history", [True, False], ids=["stored", "not stored"])
@in_loop
async def test_who_is_closed_in_one_channel_hears_nothing_of_the_others(history: bool) -> None:
    """The close is the last frame, also when it comes before the other channels have been joined."""
    house = await House.opened(history=history)
    house.channels.get(OTHER)
    house.channels.on_confirmed(OTHER)
    await house.settle()
    query = f"channel={CHANNEL}&since=e1-99&channel={OTHER}"
    plain, v1 = house.connect(query), house.connect(query, v1=True)
    await house.settle()
    assert plain.told == ["close 4009"]
    house.publish(1, channel=OTHER)
    await house.settle()
    assert plain.told == ["close 4009"]
    assert plain.connection not in house.registry.behind
    assert v1.told.count("welcome") == 2
    assert len(v1.events()) == 1


# Filters


@in_loop
async def test_a_filter_holds_while_resuming() -> None:
    """From the log, from the ring and live: only what is wanted, counted once for each of the rest."""
    house = House()
    for number in range(600):
        house.store(1, event_type="AB"[number % 2])
    house.channels.on_confirmed(CHANNEL)
    await house.settle()
    for number in range(20):
        house.publish(1, event_type="AB"[number % 2])
    peer = house.connect("since=e1-0&type=A", v1=True)
    nothing = house.connect("since=e1-0&type=C", v1=True)
    await until_welcome(house, peer, nothing)
    house.publish(1, event_type="A")
    house.publish(1, event_type="B")
    assert peer.story == list(range(1, 622, 2))
    assert nothing.told == ["welcome"]
    assert welcome(peer) == ("e1-0", True)
    assert house.fanout.deliveries == 311
    assert house.fanout.filtered == 311 + 622


@in_loop
async def test_a_gap_is_told_through_a_filter() -> None:
    """What is gone may have been wanted."""
    house = House()
    for number in range(300):
        house.store(1, event_type="AB"[number % 2])
    house.redis.delete(100)
    house.channels.on_confirmed(CHANNEL)
    await house.settle()
    peer, plain = house.connect("since=e1-0&type=A", v1=True), house.connect("since=e1-0&type=A")
    await until_welcome(house, peer)
    assert peer.story == [*range(1, 100, 2), ("e1", 100, 100, "expired"), *range(101, 301, 2)]
    assert [json.loads(word)["offset"] for word in plain.events()] == list(range(1, 100, 2))
    assert plain.told[-1] == "close 4009"


# On a busy channel


def busy(house: House, sent: list[bytes], count: int = 1) -> None:
    """From now on an event is stored and heard with every answer that Redis gives."""

    def publish() -> None:
        sent.extend(house.publish(count))

    house.redis.on_the_way = publish


@pytest.mark.parametrize("count", [1, 7, 300])
@in_loop
async def test_on_a_busy_channel_there_is_no_hole_and_no_twin(count: int) -> None:
    """Events come with each answer, between the pieces, and while it changes from log to ring to live."""
    house = await House.opened(stored=700, ring_bytes=1 << 22)
    sent = [house.redis.shelf().log[offset] for offset in range(1, 701)]
    busy(house, sent, count)
    v1, slow = house.connect("since=e1-0", v1=True), house.connect("since=e1-0", reads_along=False)
    for _ in range(3000):
        if not house.registry.behind:
            break
        slow.socket.read(50_000)
        sent += house.publish(1)
        await asyncio.sleep(0)
    house.redis.on_the_way = None
    slow.socket.read_all()
    await until_welcome(house, v1, slow)
    sent += house.publish(1)
    assert v1.events() == sent
    assert slow.told == sent
    assert v1.told.count("gap") == 0


@pytest.mark.parametrize("ahead", [1, 3, 300])
@in_loop
async def test_a_log_that_is_ahead_of_the_subscription_makes_no_twin(ahead: int) -> None:
    """The page holds events that the subscription brings only later: nobody gets them twice."""
    house = await House.opened(stored=20)
    late = house.store(ahead)
    v1, plain = house.connect("since=e1-0", v1=True), house.connect("since=e1-0")
    for _ in range(3):
        await house.settle()
    house.hear(late)
    await until_welcome(house, v1, plain)
    house.publish(1)
    assert v1.story == list(range(1, 22 + ahead))
    assert plain.told == v1.events()


@in_loop
async def test_a_log_that_is_an_epoch_ahead_of_the_subscription_makes_no_twin() -> None:
    """Redis was restarted, and the first to read of it is somebody who resumes."""
    house = await House.opened(stored=20)
    house.redis.restart()
    late = house.store(3)
    v1 = house.connect("since=e1-0", v1=True)
    await house.settle()
    house.hear(late)
    await house.settle()
    await until(lambda: not house.registry.behind, "never live")
    house.publish(1)
    assert v1.story == [*range(1, 21), ("e1", 21, None, "redis_restarted"), *range(21, 25)]


@in_loop
async def test_a_ring_that_overtakes_whoever_resumes_sends_him_back_to_the_log() -> None:
    """He reads from the ring, slower than it moves on: the log has what the ring has lost."""
    house = await House.opened(ring_bytes=1 << 18)
    sent = house.publish(900)
    slow = house.connect("since=e1-0", v1=True, reads_along=False)
    await house.settle()
    assert slow.socket.paused
    for _ in range(4):
        sent += house.publish(1000)
        house.timer.tick()
        slow.socket.read(70_000)
        await turns(50)
    assert house.fanout.ring.tail > 3000
    slow.socket.read_all()
    await until_welcome(house, slow)
    sent += house.publish(1)
    assert slow.events() == sent
    assert slow.told.count("gap") == 0
    assert house.pages.read > 0
    assert house.registry.closed[CloseCode.SLOW] == 0


@in_loop
async def test_once_live_it_is_held_to_being_up_to_date() -> None:
    """Who has caught up and is overtaken later is too slow, like everybody."""
    house = await House.opened(ring_bytes=1 << 18)
    house.publish(10)
    peer = house.connect("since=e1-0", v1=True)
    await until_welcome(house, peer)
    peer.socket.reads_along = False
    house.publish(3000)
    house.timer.tick()
    assert peer.told[-1] == "close 4008"


@in_loop
async def test_a_page_from_before_is_not_the_end_of_the_log() -> None:
    """A page is kept for others; whoever finds that it ends too early has it read again."""
    house = await House.opened(stored=300)
    first = house.connect("since=e1-290", v1=True)
    await until_welcome(house, first)
    assert house.pages.read == 1
    replace_ring(house)
    house.publish(0)
    late = house.store(100)
    house.hear(late)
    replace_ring(house)
    house.fanout.ring.begin(Position("e1", 400))
    second = house.connect("since=e1-290", v1=True)
    await until_welcome(house, second)
    assert second.story == list(range(291, 401))
    assert house.pages.read == 2


@in_loop
async def test_a_page_of_a_redis_that_has_forgotten_everything_says_nothing() -> None:
    """A page kept from before Redis lost its memory is no reason to tell somebody of the new epoch of a gap."""
    house = await House.opened(stored=100)
    house.redis.trim(101)
    replace_ring(house)
    house.fanout.ring.begin(Position("e1", 100))
    first = house.connect("since=e1-90", v1=True)
    await until_welcome(house, first)
    house.redis.forget()
    house.channels.on_lost(CHANNEL)
    house.channels.on_confirmed(CHANNEL)
    await house.settle()
    house.publish(180)
    assert str(house.fanout.position) == "e2-180"
    replace_ring(house)
    house.fanout.ring.begin(Position("e2", 180))
    second = house.connect("since=e2-150", v1=True)
    await until_welcome(house, second)
    await house.settle()
    assert second.controls("gap") == []
    assert second.controls("welcome")[0]["recovered"] is True
    assert len(second.events()) == 30


# Several channels


@in_loop
async def test_each_channel_resumes_at_its_own_position() -> None:
    """Two channels of one connection, one from the log, one from the ring, a third one live."""
    house = await House.opened(stored=300)
    for _ in range(20):
        house.store(1, channel=OTHER)
    house.channels.get(OTHER)
    house.channels.get("events.third")
    house.channels.on_confirmed(OTHER)
    house.channels.on_confirmed("events.third")
    await house.settle()
    epoch = house.redis.head(OTHER).epoch
    house.publish(5, channel=OTHER)
    query = f"channel=events.third&channel={OTHER}&since={epoch}-22&channel={CHANNEL}&since=e1-3"
    peer = house.connect(query, v1=True)
    await until_welcome(house, peer)
    await house.settle()
    house.publish(1, channel="events.third")
    events = [json.loads(event) for event in peer.events()]
    by_channel: dict[str, list[int]] = {}
    for event in events:
        by_channel.setdefault(event["channel"], []).append(event["offset"])
    assert by_channel == {CHANNEL: list(range(4, 301)), OTHER: [23, 24, 25], "events.third": [1]}
    welcomes = {w["channel"]: (w["position"], w["recovered"]) for w in peer.controls("welcome")}
    assert welcomes[CHANNEL] == ("e1-3", True)
    assert welcomes[OTHER] == (f"{epoch}-22", True)
    assert welcomes["events.third"][1] is None


@in_loop
async def test_a_channel_that_opens_while_the_socket_is_full_waits_for_room() -> None:
    """Nothing of it is written before the subscriber reads on, and then nothing is missing."""
    house = await House.opened()
    slow = house.connect(f"channel={CHANNEL}&channel={OTHER}", reads_along=False)
    sent = house.publish(300)
    assert slow.socket.paused
    before = len(slow.socket.writes)
    house.channels.on_confirmed(OTHER)
    await house.settle()
    others = house.publish(5, channel=OTHER)
    assert len(slow.socket.writes) == before
    slow.socket.read_all()
    await house.until_live(slow)
    assert slow.events() == sent + others
    assert house.publish(1, channel=OTHER) == slow.events()[-1:]


@in_loop
async def test_a_channel_that_waits_for_a_page_does_not_hold_up_the_others() -> None:
    """The first channel's page is on its way; what the other one has is written."""
    house = await House.opened(stored=300)
    house.channels.get(OTHER)
    house.channels.on_confirmed(OTHER)
    await house.settle()
    house.publish(5, channel=OTHER)
    epoch = house.redis.head(OTHER).epoch
    house.redis.gate.clear()
    peer = house.connect(f"channel={CHANNEL}&since=e1-0&channel={OTHER}&since={epoch}-2", v1=True)
    await house.settle()
    assert [json.loads(event)["channel"] for event in peer.events()] == [OTHER] * 3
    house.redis.gate.set()
    await until_welcome(house, peer)
    assert len(peer.events()) == 303


# At random


class Story:
    """A busy channel with restarts and holes, and many who come back at any position that was ever given."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.house: House
        self.given: list[Position] = []
        self.labels: dict[Position, str] = {}
        self.peers: list[tuple[Peer, Position, str]] = []
        self.unheard: list[bytes] = []

    def publish(self) -> None:
        for _ in range(self.chance.choice([1, 3, 40, 300])):
            self.given.append(self.house.redis.next())
            self.labels[self.given[-1]] = self.chance.choice("AB")
            self.unheard += self.house.store(1, event_type=self.labels[self.given[-1]])
            if self.chance.random() < 0.05:
                self.unheard.pop()

    def hear(self) -> None:
        count = self.chance.choice([1, 50, 1000])
        batch, self.unheard = self.unheard[:count], self.unheard[count:]
        self.house.hear(batch)

    def arrive(self) -> None:
        wanted = self.chance.choice(["", "A"])
        since = self.chance.choice([Position("e1", 0), *self.given])
        query = f"since={since}" + (f"&type={wanted}" if wanted else "")
        peer = self.house.connect(query, v1=True, reads_along=self.chance.random() < 0.5)
        self.peers.append((peer, since, wanted))

    def read(self) -> None:
        for peer, _, _ in self.peers:
            peer.socket.read(self.chance.choice([0, 10_000, 100_000]))

    def restart(self) -> None:
        shelf = self.house.redis.shelf()
        least = max(shelf.epochs[-1].offset - 1, shelf.offset - self.chance.choice([0, 0, 20]))
        self.house.redis.restart(least)
        self.unheard.clear()

    def trim(self) -> None:
        self.house.redis.trim(self.house.redis.shelf().offset - self.chance.choice([0, 10, 500]))

    def cut(self) -> None:
        self.unheard.clear()
        self.house.channels.on_lost(CHANNEL)
        self.house.channels.on_confirmed(CHANNEL)

    async def run(self) -> None:
        self.house = House(ring_bytes=1 << 18)
        self.publish()
        self.unheard.clear()
        self.house.channels.on_confirmed(CHANNEL)
        await self.house.settle()
        likely = [self.publish] * 4 + [self.hear] * 6 + [self.arrive] * 2 + [self.read] * 5
        rare = [self.restart, self.trim, self.cut, self.cut]
        for _ in range(110):
            self.chance.choice(likely + rare)()
            await turns(self.chance.choice([0, 1, 5, 30]))
        for peer, _, _ in self.peers:
            peer.socket.read_all()
        self.house.redis.shelf()
        await until(self.is_over, "not everybody is live")

    def is_over(self) -> bool:
        self.house.sequencer.check(self.house.redis.head())
        return self.house.sequencer.position == self.house.redis.head() and not self.house.registry.behind


@pytest.mark.parametrize("seed", range(6))
@in_loop
async def test_whoever_comes_back_wherever_gets_each_later_event_once_or_is_told(seed: int) -> None:
    """Busy channel, lost messages, cuts, restarts, rollbacks, trims, filters, slow readers: nothing in silence."""
    story = Story(seed)
    await story.run()
    assert len(story.peers) > 3
    order = story.house.sequencer.order
    for peer, since, wanted in story.peers:
        words: list[Any] = []
        for data in server_texts(peer):
            fields = json.loads(data)
            if "event_id" in fields:
                words.append(Position(fields["epoch"], fields["offset"]))
            elif fields["control"] == "gap":
                words.append((fields["epoch"], fields["first"], fields["last"]))
        if peer.told[-1] == "close 4008":
            continue
        got = [word for word in words if isinstance(word, Position)]
        gaps = [word for word in words if not isinstance(word, Position)]
        assert len(got) == len(set(got)), "a twin"
        assert all(order.is_after(two, one) for one, two in itertools.pairwise(got)), "out of order"
        later = [position for position in story.given if order.is_after(position, since)]
        for position in later:
            told = sum(
                epoch == position.epoch and first <= position.offset and (last is None or position.offset <= last)
                for epoch, first, last in gaps
            )
            if not wanted or story.labels[position] == wanted:
                assert (position in got) + min(told, 1) == 1, position
            else:
                assert position not in got
        assert set(got) <= set(later)


def server_texts(peer: Peer) -> list[bytes]:
    """The payloads of all text frames."""
    return [data for opcode, data in server_frames(b"".join(peer.socket.writes)) if opcode == 1]


LAST: list[tuple[str, int, str, list[int]]] = [
    ("some from the ring", 5, "e1-105", [*range(106, 111)]),
    ("from the ring and the log", 30, "e1-80", [*range(81, 111)]),
    ("more than there are", 1_000, "e1-0", [*range(1, 111)]),
    ("none", 0, "e1-110", []),
]


@pytest.mark.parametrize(("back", "position", "got"), [case[1:] for case in LAST], ids=[case[0] for case in LAST])
@in_loop
async def test_the_last_events_are_asked_for_by_their_number(back: int, position: str, got: list[int]) -> None:
    """`last` becomes a position, which the welcome says; nothing is missing after it, and the next one follows."""
    house = await House.opened(stored=100)
    house.publish(10)
    peer = house.connect(f"last={back}", v1=True)
    await until_welcome(house, peer)
    house.publish(1)
    assert welcome(peer) == (position, True if back else None)
    assert peer.story == [*got, 111]
