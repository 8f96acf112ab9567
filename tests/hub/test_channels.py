"""The channels of a hub: which may be asked for, which are open, for how long, and which goes first."""

from __future__ import annotations

import json
import random

import pytest

from broadcaster.settings import ChannelsTable
from broadcaster.wire import CloseCode
from tests.hub.house import CHANNEL, House, Peer
from tests.support import in_loop

ALLOWED: list[tuple[str, tuple[str, ...], str, bool]] = [
    ("as given", ("events.*",), "events.audit", True),
    ("nothing behind the dot", ("events.*",), "events.", True),
    ("another beginning", ("events.*",), "audit.events", False),
    ("the dot is a dot", ("events.*",), "eventsXaudit", False),
    ("other case", ("events.*",), "Events.audit", False),
    ("the default one always", (), "events.critical", True),
    ("nothing else then", (), "events.audit", False),
    ("a name", ("audit",), "audit", True),
    ("not what begins like it", ("audit",), "audit2", False),
    ("one character", ("rack-?",), "rack-7", True),
    ("two characters", ("rack-?",), "rack-12", False),
    ("a range", ("rack-[0-9]",), "rack-7", True),
    ("outside of the range", ("rack-[0-9]",), "rack-x", False),
    ("any of several", ("a", "b*"), "bc", True),
    ("everything", ("*",), "whatever", True),
    ("but what is a hub's own", ("*",), "broadcaster.hub.0123456789abcdef", False),
    ("by its very name", ("broadcaster.hub.x",), "broadcaster.hub.x", False),
    ("what only looks alike", ("*",), "broadcaster.hubs", True),
]


@pytest.mark.parametrize(("allow", "name", "allowed"), [c[1:] for c in ALLOWED], ids=[c[0] for c in ALLOWED])
@in_loop
async def test_what_may_be_asked_for(allow: tuple[str, ...], name: str, allowed: bool) -> None:
    """Names and patterns; the default channel always, channels of hubs themselves never."""
    house = House(channels=ChannelsTable(allow=allow))
    assert house.channels.is_allowed(name) is allowed


@in_loop
async def test_the_probes_of_this_hub_cannot_be_asked_for() -> None:
    """Whatever is allowed."""
    house = House(channels=ChannelsTable(allow=("*",)))
    assert not house.channels.is_allowed(house.probe.channel)


@in_loop
async def test_no_more_channels_are_open_than_allowed() -> None:
    """Those that are open count as room for whoever asks for them; the default one is one of them."""
    house = House(channels=ChannelsTable(max_open=3))
    has_room = house.channels.has_room_for
    assert has_room(CHANNEL, "events.a", "events.b")
    assert not has_room(CHANNEL, "events.a", "events.b", "events.c")
    house.connect("channel=events.a&channel=events.b")
    assert set(house.channels.open) == {CHANNEL, "events.a", "events.b"}
    assert not has_room("events.c")
    assert has_room("events.a", CHANNEL)
    assert not has_room("events.a", "events.c")


@in_loop
async def test_more_open_channels_than_allowed_still_serve_those_they_have() -> None:
    """A limit of one: only the default channel."""
    house = House(channels=ChannelsTable(max_open=1))
    assert house.channels.has_room_for(CHANNEL)
    assert not house.channels.has_room_for("events.a")


@in_loop
async def test_a_channel_is_opened_when_it_is_asked_for_and_closed_when_nobody_listens_for_long() -> None:
    """Subscribed once for all; not given up while somebody listens, nor before its time."""
    house = await House.opened(channels=ChannelsTable(linger_s=60.0))
    house.clock.stop()
    assert list(house.link.channels) == [CHANNEL]
    one, two = house.connect("channel=events.a"), house.connect("channel=events.a", v1=True)
    assert list(house.link.channels) == [CHANNEL, "events.a"]
    house.channels.on_confirmed("events.a")
    await house.settle()
    house.publish(2, channel="events.a")
    house.clock.move(61)
    one.connection.connection_lost(None)
    house.timer.tick()
    assert "events.a" in house.channels.open
    two.connection.connection_lost(None)
    house.timer.tick()
    assert "events.a" in house.channels.open, "it lingers"
    house.clock.move(61)
    house.timer.tick()
    await house.settle()
    assert list(house.channels.open) == [CHANNEL]
    assert list(house.channels.by_key) == [CHANNEL.encode()]
    assert house.link.released == ["events.a"]
    assert house.channels.totals()["deliveries"] == 4, "what it has done still counts"
    assert house.channels.totals()["received"] == 2
    house.channels.on_lost("events.a")
    house.channels.on_confirmed("events.a")
    house.hear([b"late"], "events.a")
    await house.settle()


@in_loop
async def test_the_default_channel_is_never_closed() -> None:
    """Whether somebody listens or not."""
    house = await House.opened(channels=ChannelsTable(linger_s=60.0))
    house.clock.stop()
    house.clock.move(61)
    house.timer.tick()
    assert house.link.released == []
    assert CHANNEL in house.channels.open


@in_loop
async def test_who_comes_back_in_time_keeps_a_channel_open() -> None:
    """The time begins anew when the last one leaves."""
    house = await House.opened(channels=ChannelsTable(linger_s=60.0))
    house.clock.stop()
    for _ in range(3):
        peer = house.connect("channel=events.a")
        house.clock.move(59)
        peer.connection.connection_lost(None)
        house.timer.tick()
        assert "events.a" in house.channels.open
    assert house.link.released == []


@in_loop
async def test_a_channel_that_is_opened_again_begins_anew() -> None:
    """It knows nothing of before but what stands in Redis: positions go on, and one can resume."""
    house = await House.opened(channels=ChannelsTable(linger_s=60.0))
    house.clock.stop()
    first = house.connect("channel=events.a")
    house.channels.on_confirmed("events.a")
    await house.settle()
    [event] = house.publish(1, channel="events.a")
    first.connection.connection_lost(None)
    house.clock.move(61)
    house.timer.tick()
    assert "events.a" not in house.channels.open
    house.store(2, channel="events.a")
    epoch = house.redis.head("events.a").epoch
    second = house.connect(f"channel=events.a&since={epoch}-1", v1=True)
    house.channels.on_confirmed("events.a")
    await house.settle()
    house.publish(1, channel="events.a")
    assert first.events() == [event]
    assert [json.loads(data)["offset"] for data in second.events()] == [2, 3, 4]


# Who goes first

RANKS: list[tuple[str, tuple[str, ...], list[str], list[str]]] = [
    (
        "by name",
        ("events.critical", "events.audit"),
        ["events.x", "events.audit", "events.critical"],
        ["events.critical", "events.audit", "events.x"],
    ),
    (
        "by pattern",
        ("*.alarm", "events.*"),
        ["audit.x", "events.x", "site.alarm"],
        ["site.alarm", "events.x", "audit.x"],
    ),
    ("the first pattern that matches", ("events.a*", "*"), ["x", "events.ab"], ["events.ab", "x"]),
    ("without a list: as they came", (), ["events.b", "events.a"], ["events.b", "events.a"]),
]


@pytest.mark.parametrize(
    ("priority", "asked", "first"), [case[1:] for case in RANKS], ids=[case[0] for case in RANKS]
)
@in_loop
async def test_one_read_of_several_channels_is_delivered_by_priority(
    priority: tuple[str, ...], asked: list[str], first: list[str]
) -> None:
    """Whichever came first from Redis: the channel that stands first in channels.priority is written first."""
    house = await House.opened(channels=ChannelsTable(allow=("*",), priority=priority))
    peer = house.connect("&".join(f"channel={name}" for name in asked))
    for name in asked:
        house.channels.on_confirmed(name)
    await house.settle()
    stored = {name.encode(): house.store(2, channel=name) for name in asked}
    house.dispatcher.on_messages(stored)
    order = [json.loads(event)["channel"] for event in peer.events()]
    assert order == [name for name in first for _ in range(2)]
    assert [listener.channel.name for listener in peer.connection.memberships] == first


@in_loop
async def test_what_no_channel_is_open_for_is_dropped() -> None:
    """A message of a channel that was just closed, or of none of ours."""
    house = await House.opened()
    peer = house.connect()
    house.dispatcher.on_messages({b"events.gone": [b"{}"], CHANNEL.encode(): house.store(1), b"\xff": [b"x"]})
    assert len(peer.events()) == 1
    assert sum(house.dispatcher.invalid.values()) == 0


# Clients that are closed while they wait


@in_loop
async def test_a_client_that_is_closed_in_the_turn_in_which_its_channel_catches_up_is_not_welcomed() -> None:
    """Its close frame is the last one, and those that wait behind it begin as if it had not been there."""
    house = await House.opened()
    house.channels.on_lost(CHANNEL)
    waiting = [house.connect(v1=True) for _ in range(4)]

    def close() -> bool:
        """In the same turn of the scheduler, just before the first of those that wait is started."""
        if not house.sequencer.caught_up:
            return True
        waiting[0].connection.close(CloseCode.POLICY, "")
        return False

    house.scheduler.add(close)
    house.channels.on_confirmed(CHANNEL)
    await house.settle()
    assert waiting[0].told == ["close 1008"]
    assert [peer.told for peer in waiting[1:]] == [["welcome"]] * 3
    [event] = house.publish(1)
    assert [peer.events() for peer in waiting] == [[], [event], [event], [event]]


@in_loop
async def test_a_client_that_is_closed_for_one_channel_does_not_resume_in_another() -> None:
    """Nothing of it is counted there."""
    other = "events.other"
    house = await House.opened(stored=3)
    house.channels.get(other)
    house.channels.on_confirmed(other)
    await house.settle()
    peer = house.connect(f"channel={CHANNEL}&since=e1-99&channel={other}&since=e1-0")
    await house.settle()
    assert peer.told == ["close 4009"]
    assert [house.channel(name).replay.resumed for name in (CHANNEL, other)] == [1, 0]
    assert [house.channel(name).listeners for name in (CHANNEL, other)] == [1, 1]


@in_loop
async def test_no_channel_closes_to_make_room_for_another_of_the_same_client() -> None:
    """The one to which nobody has listened for longest is one of those that are asked for: another one goes."""
    first, second = "events.first", "events.second"
    house = await House.opened(channels=ChannelsTable(max_open=4))
    house.clock.stop()
    for name in (first, "events.idle"):
        peer = house.connect(f"channel={name}")
        peer.connection.connection_lost(None)
        house.clock.move(1)
    house.connect("channel=events.listened")
    peer = house.connect(f"channel={first}&channel={second}", v1=True)
    for name in (first, second):
        house.channels.on_confirmed(name)
    await house.settle()
    assert sorted(house.channels.open) == sorted([CHANNEL, first, second, "events.listened"])
    events = [*house.publish(1, channel=first), *house.publish(1, channel=second)]
    await house.settle()
    assert peer.events() == events


@pytest.mark.parametrize("seed", range(5))
@in_loop
async def test_whoever_is_subscribed_gets_everything_however_few_channels_may_be_open(seed: int) -> None:
    """Clients of one to three of eight channels come and go, and there is room for four."""
    chance = random.Random(seed)
    house = await House.opened(channels=ChannelsTable(max_open=4, linger_s=5.0))
    house.clock.stop()
    names = [f"events.{letter}" for letter in "abcdefg"] + [CHANNEL]
    peers: list[tuple[Peer, list[str]]] = []
    events: dict[int, list[bytes]] = {}
    for _ in range(120):
        house.clock.move(chance.uniform(0, 2))
        wanted = chance.sample(names, chance.choice((1, 1, 2, 3)))
        if chance.random() < 0.5 and house.channels.has_room_for(*wanted):
            peers.append((house.connect("&".join(f"channel={name}" for name in wanted)), wanted))
            events[len(peers) - 1] = []
        elif peers:
            chance.choice(peers)[0].connection.connection_lost(None)
        house.timer.tick()
        for name in house.channels.open:
            house.channels.on_confirmed(name)
        await house.settle()
        name = chance.choice(list(house.channels.open))
        published = house.publish(1, channel=name)
        await house.settle()
        for number, (peer, wanted) in enumerate(peers):
            if name in wanted and not peer.connection.closing:
                events[number] += published
    assert any(len(wanted) > 1 and events[number] for number, (_, wanted) in enumerate(peers))
    assert [peer.events() for peer, _ in peers] == list(events.values())


@in_loop
async def test_nothing_is_written_behind_the_close_frame() -> None:
    """Whoever writes: a heartbeat, a warning, an event that was on its way."""
    house = await House.opened()
    peer = house.connect(v1=True)
    peer.connection.close(CloseCode.RESTART, "")
    peer.connection.write(b"\x81\x01x")
    house.publish(1)
    await house.settle()
    assert peer.told == ["welcome", "close 1012"]
