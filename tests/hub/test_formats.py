"""Clients of several formats on one channel: each event is put into a format once, and all get the same events."""

from __future__ import annotations

import json
import random
import zlib

import pytest

from broadcaster import wire
from broadcaster.core.position import Cause, Gap
from broadcaster.core.runtime import Limits
from broadcaster.hub.fanout.format import Deflate, KeptFrames
from tests.hub.house import House, Peer, turns
from tests.support import in_loop

LARGE = 4096


def inflated(peer: Peer) -> tuple[list[bytes], int]:
    """The events and control frames that a client was sent, and how many of them came compressed."""
    data, found, compressed = b"".join(peer.socket.writes), list[bytes](), 0
    at = 0
    while at < len(data):
        size, length = 2, data[at + 1]
        if length >= 126:
            size = 4 if length == 126 else 10
            length = int.from_bytes(data[at + 2 : at + size])
        payload = data[at + size : at + size + length]
        if data[at] == 0xC1:
            compressed += 1
            payload = zlib.decompressobj(-12).decompress(payload + b"\0\0\xff\xff")
        else:
            assert data[at] in (0x81, 0x88, 0x89)
        if data[at] & 0x0F == 1:
            found.append(payload)
        at += size + length
    return found, compressed


def events_of(peer: Peer) -> list[bytes]:
    return [data for data in inflated(peer)[0] if wire.read_control(data) is None]


@in_loop
async def test_an_event_is_compressed_once_and_the_same_bytes_go_to_all() -> None:
    """However many have agreed, whatever their filters; who has not gets it as it is, in one write."""
    house = await House.opened()
    plain = [house.connect() for _ in range(3)]
    agreed = [house.connect(deflate=True) for _ in range(3)]
    filtered = [house.connect("severity=critical", deflate=True), house.connect("type=OTHER", deflate=True)]
    sent = house.publish(5, LARGE)
    assert house.context.formats.deflate.made == 5
    assert {tuple(peer.socket.writes) for peer in plain} == {(b"".join(map(wire.text_frame, sent)),)}
    assert len({tuple(peer.socket.writes) for peer in [*agreed, filtered[0]]}) == 1
    assert inflated(agreed[0]) == (sent, 5)
    assert filtered[1].socket.writes == []
    assert house.fanout.deliveries == 7 * 5
    assert house.fanout.filtered == 5
    assert house.fanout.sent_bytes == sum(
        len(write) for peer in [*plain, *agreed, *filtered] for write in peer.socket.writes
    )


SMALL = [("just below", 1023, 0), ("just enough", 1024, 1), ("the largest", 5000, 1), ("too large", 5001, 0)]


@pytest.mark.parametrize(("size", "compressed"), [case[1:] for case in SMALL], ids=[case[0] for case in SMALL])
@in_loop
async def test_only_what_is_worth_it_is_compressed(size: int, compressed: int) -> None:
    """From `compress_min_bytes` on, and up to what would hold the others up."""
    house = await House.opened()
    house.context.formats.deflate = Deflate(1024, Limits(compress_bytes=5000))
    peer = house.connect(deflate=True)
    sent = house.publish(1, size)
    assert inflated(peer) == (sent, compressed)


def test_what_does_not_become_shorter_is_sent_as_it_is() -> None:
    """Noise is noise."""
    frame = wire.text_frame(bytes(random.Random(1).randbytes(2000)))
    assert wire.deflated_frame(frame) == frame


@in_loop
async def test_a_slow_client_gets_the_rest_of_the_ring_in_its_format() -> None:
    """It falls behind in a batch and catches up: nothing lost, nothing twice, nothing compressed twice."""
    house = await House.opened()
    slow = [house.connect(deflate=True, reads_along=False) for _ in range(4)]
    quick = house.connect(deflate=True)
    sent: list[bytes] = []
    for _ in range(40):
        sent += house.publish(10, LARGE)
        await turns(2)
    assert all(peer.connection in house.registry.behind for peer in slow)
    for peer in slow:
        peer.socket.read_all()
    await house.until_live(*slow)
    sent += house.publish(1, LARGE)
    for peer in [*slow, quick]:
        assert events_of(peer) == sent
    assert house.context.formats.deflate.made == len(sent)


@in_loop
async def test_pages_of_the_log_are_compressed_once_for_all_who_resume() -> None:
    """From the log, then the ring, then live; a plain client beside them gets the same events."""
    house = await House.opened(1 << 18, stored=0)
    sent = house.publish(200, LARGE)
    since = "since=e1-0"
    resuming = [house.connect(since, deflate=True, v1=number % 2 == 0) for number in range(6)]
    plain = house.connect(since)
    await house.until_live(*resuming, plain)
    sent += house.publish(3, LARGE)
    assert house.pages.read > 0
    assert plain.events() == sent
    for peer in resuming:
        assert events_of(peer) == sent
    assert house.context.formats.deflate.made == len(sent)


@in_loop
async def test_control_frames_and_gaps_stand_where_they_belong() -> None:
    """They are not compressed, and come between the events as for everybody else."""
    house = await House.opened()
    peer, plain = house.connect(v1=True, deflate=True), house.connect(deflate=True)
    first = house.publish(1, LARGE)
    gone = house.redis.next()
    house.store(1)
    gap = Gap(house.fanout.channel, Cause.EXPIRED, gone.epoch, gone.offset, gone.offset, gone)
    house.fanout.announce(gap)
    found = inflated(peer)[0]
    assert [json.loads(data)["control"] for data in (found[0], found[2])] == ["welcome", "gap"]
    assert found[1:2] == first
    assert events_of(plain) == first
    assert plain.socket.writes[-1][:4] == wire.close_frame(wire.CloseCode.GAP, "x")[:1] + plain.socket.writes[-1][
        1:2
    ] + (4009).to_bytes(2)


@in_loop
async def test_who_comes_and_goes_leaves_no_audience_behind() -> None:
    """Audiences are by filter and format, and the last one to leave takes its own along."""
    house = await House.opened()
    peers = [
        house.connect(query, deflate=deflate)
        for query in ("", "type=A", "type=B&severity=info")
        for deflate in (False, True)
        for _ in range(2)
    ]
    audiences = house.fanout._audiences
    assert len(audiences) == len(list(audiences)) == 6
    for peer in peers:
        peer.connection.connection_lost(None)
    assert len(audiences) == len(list(audiences)) == 1


def test_what_is_kept_is_bounded_by_bytes() -> None:
    """The oldest goes first; one alone may be larger."""
    kept = KeptFrames(1000)
    for number in range(20):
        kept[bytes([number]) * 100] = b"." * 50
    assert len(kept) == 6
    assert next(iter(kept)) == bytes([14]) * 100
    kept[b"x" * 5000] = b"."
    assert list(kept) == [b"x" * 5000]
    kept[b"y"] = b"z"
    assert list(kept) == [b"y"]


@in_loop
async def test_a_cache_that_holds_next_to_nothing_costs_time_only() -> None:
    """What was dropped is made again."""
    house = await House.opened()
    house.context.formats.deflate = Deflate(1024, Limits(made_bytes=1))
    slow, quick = house.connect(deflate=True, reads_along=False), house.connect(deflate=True)
    sent = house.publish(100, LARGE)
    slow.socket.read_all()
    await house.until_live(slow)
    assert events_of(slow) == events_of(quick) == sent
