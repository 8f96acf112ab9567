"""Beats: a v1 client is told, again and again, up to where it has been given everything."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from broadcaster.core.position import Position
from broadcaster.hub.connections.registry import TICK_S
from broadcaster.wire import CloseCode
from tests.hub.house import CHANNEL, House, Peer
from tests.support import in_loop

OTHER = "events.other"


def positions(peer: Peer) -> list[str | None]:
    return [beat["position"] for beat in peer.controls("beat")]


async def proven(**arguments: object) -> House:
    """A hub that is open, and has proven that events get through."""
    house = await House.opened(**arguments)  # type: ignore[arg-type]
    house.be_proven()
    return house


async def one_round(house: House) -> None:
    """All beats of one interval."""
    for _ in range(round(house.settings.hub.beat_interval_s * 10)):
        house.timer.tick()
    await house.settle()


@in_loop
async def test_a_v1_client_beats_once_per_interval_and_a_plain_one_never() -> None:
    """Each beat has the channel and the position up to which everything was given."""
    house = await proven(beat_interval_s=0.5)
    v1, plain = house.connect(v1=True), house.connect()
    await one_round(house)
    house.publish(3)
    await one_round(house)
    assert v1.controls("beat") == [
        {"channel": CHANNEL, "position": "e1-0"},
        {"channel": CHANNEL, "position": "e1-3"},
    ]
    assert plain.told == plain.events()
    assert v1.told == ["welcome", "beat", *plain.events(), "beat"]


@in_loop
async def test_beats_are_spread_over_the_interval() -> None:
    """A hundred clients do not beat in the same moment."""
    house = await proven(beat_interval_s=1.0)
    peers = [house.connect(v1=True) for _ in range(100)]
    most, before = 0, 0
    for _ in range(10):
        house.timer.tick()
        await house.settle()
        now = sum(len(positions(peer)) for peer in peers)
        most, before = max(most, now - before), now
    assert [len(positions(peer)) for peer in peers] == [1] * 100
    assert most <= 10


@in_loop
async def test_nobody_beats_while_nothing_is_proven() -> None:
    """Silence is the sign: a hub that cannot prove delivery does not say that all is well."""
    house = await proven(beat_interval_s=0.2)
    v1 = house.connect(v1=True)
    house.probe.mark_suspect("the test says so")
    await one_round(house)
    assert positions(v1) == []
    house.be_proven()
    await one_round(house)
    assert positions(v1) == ["e1-0"]
    for _ in range(2):
        house.timer.tick()
    house.probe.mark_suspect("between the tick and the beat")
    await house.settle()
    assert positions(v1) == ["e1-0"]


@in_loop
async def test_nobody_beats_in_a_channel_that_has_lost_its_subscription() -> None:
    """The other channels of the connection still do."""
    house = await proven(beat_interval_s=0.2)
    v1 = house.connect(f"channel={CHANNEL}&channel={OTHER}", v1=True)
    house.channels.on_confirmed(OTHER)
    await house.settle()
    house.channels.on_lost(OTHER)
    await one_round(house)
    assert [beat["channel"] for beat in v1.controls("beat")] == [CHANNEL]
    house.channels.on_confirmed(OTHER)
    await house.settle()
    await one_round(house)
    assert [beat["channel"] for beat in v1.controls("beat")] == [CHANNEL] * 2, "nothing is proven of it yet"
    house.be_proven()
    await one_round(house)
    assert [beat["channel"] for beat in v1.controls("beat")] == [CHANNEL, CHANNEL, CHANNEL, OTHER]


@in_loop
async def test_the_beat_of_a_filter_counts_what_it_held_back() -> None:
    """Everything up to the position was sent, or held back by the filter."""
    house = await proven(beat_interval_s=0.2)
    v1 = house.connect("type=NONE", v1=True)
    house.publish(5)
    await one_round(house)
    assert v1.told == ["welcome", "beat"]
    assert positions(v1) == ["e1-5"]


@in_loop
async def test_the_beat_of_whoever_is_behind_has_his_own_position() -> None:
    """It is not ahead of the events that were written to him."""
    house = await proven(beat_interval_s=0.2)
    slow = house.connect(v1=True, reads_along=False)
    house.publish(2000)
    given = len(slow.events())
    assert 0 < given < 2000
    await one_round(house)
    assert positions(slow) == [f"e1-{given}"]
    assert house.fanout.position == Position("e1", 2000)
    slow.socket.read_all()
    await house.until_live(slow)
    await one_round(house)
    assert positions(slow)[1:] == ["e1-2000"]


@in_loop
async def test_the_beat_of_whoever_resumes_has_his_own_position() -> None:
    """While he reads from the log."""
    house = await proven(beat_interval_s=0.2, stored=2000)
    slow = house.connect("since=e1-0", v1=True, reads_along=False)
    await house.settle()
    given = len(slow.events())
    assert 0 < given < 2000
    await one_round(house)
    assert positions(slow) == [f"e1-{given}"]


@in_loop
async def test_a_beat_never_comes_before_the_welcome() -> None:
    """Neither while the channel is not open, nor while the first page is read."""
    house = await proven(beat_interval_s=0.2, stored=300)
    house.redis.gate.clear()
    resuming = house.connect("since=e1-0", v1=True)
    ahead = house.connect("since=e1-999", v1=True)
    await house.settle()
    await one_round(house)
    assert resuming.told == ahead.told == []
    house.redis.gate.set()
    await house.settle()
    await one_round(house)
    assert resuming.told[0] == ahead.told[0] == "welcome"
    assert "beat" in resuming.told
    assert "beat" in ahead.told


@in_loop
async def test_a_gap_is_behind_a_beat() -> None:
    """What was told as missing counts as given."""
    house = await proven(beat_interval_s=0.2)
    v1 = house.connect(v1=True)
    house.redis.restart()
    house.redis.shelf()
    house.sequencer.check(None)
    await house.settle()
    await one_round(house)
    assert v1.told == ["welcome", "gap", "beat"]
    assert positions(v1) == ["e2-0"]


@in_loop
async def test_without_history_a_beat_has_no_position() -> None:
    """It still says that events get through."""
    house = await proven(history=False, beat_interval_s=0.2)
    v1 = house.connect(v1=True)
    house.unstored(1)
    await one_round(house)
    assert v1.told == ["welcome", *v1.events(), "beat"]
    assert positions(v1) == [None]


@in_loop
async def test_who_was_closed_does_not_beat() -> None:
    """The close is the last frame."""
    house = await proven(beat_interval_s=0.2)
    v1 = house.connect(v1=True)
    for _ in range(2):
        house.timer.tick()
    v1.connection.close(CloseCode.POLICY, "")
    await house.settle()
    await one_round(house)
    assert v1.told == ["welcome", "close 1008"]


@in_loop
async def test_a_tick_that_fails_ends_the_timer() -> None:
    """A hub with a dead timer must not look alive: what ends it is raised, and no tick follows."""
    house = await proven()
    ticks = []

    def fail_at_the_second() -> None:
        ticks.append(0)
        if len(ticks) == 2:
            raise ZeroDivisionError

    house.timer.tick = fail_at_the_second  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        await house.timer.run()
    await asyncio.sleep(2 * TICK_S)
    assert len(ticks) == 2


@in_loop
async def test_a_timer_that_is_cancelled_ticks_no_more() -> None:
    house = await proven()
    ticks: list[int] = []
    house.timer.tick = partial(ticks.append, 0)  # type: ignore[method-assign]
    running = asyncio.create_task(house.timer.run())
    while not ticks:
        await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait([running])
    ticked = len(ticks)
    await asyncio.sleep(2 * TICK_S)
    assert len(ticks) == ticked
