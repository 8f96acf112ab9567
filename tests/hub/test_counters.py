"""The counters of /stats add up: over every kind of end, and whatever becomes of a channel."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from collections import Counter
from dataclasses import asdict, fields
from typing import Any

import pytest

from broadcaster import wire
from broadcaster.core.position import Cause, Gap, Position
from broadcaster.hub.stats import ChannelStatistics, HubStatistics
from broadcaster.redis.server import RedisServer
from broadcaster.settings import ChannelsTable
from broadcaster.wire import CloseCode
from tests.hub.house import CHANNEL, House, Peer, turns
from tests.support import (
    ROOT,
    HubProcess,
    RawClient,
    RedisClient,
    event_payload,
    eventually,
    in_loop,
    server_frames,
)

OTHER = "events.other"

# Without sockets: after each step of a random run


def written(peers: list[Peer]) -> Counter[str]:
    """What the sockets of all clients that there ever were have taken."""
    found: Counter[str] = Counter()
    for peer in peers:
        for opcode, data in server_frames(b"".join(peer.socket.writes)):
            if opcode == 1 and wire.read_control(data) is None:
                found["deliveries"] += 1
                found["sent_bytes"] += len(wire.text_frame(data))
    return found


def assert_adds_up(house: House, peers: list[Peer]) -> None:
    totals, registry = house.channels.totals(), house.registry
    assert {name: totals[name] for name in ("deliveries", "sent_bytes")} == {
        "deliveries": 0,
        "sent_bytes": 0,
    } | written(peers)
    assert registry.opened == len(peers)
    assert registry.opened + len(registry.ending) == (
        registry.connected + registry.left + sum(registry.closed.values())
    )
    assert registry.aborted <= sum(registry.closed.values())


QUERIES = [
    "",
    "",
    f"channel={OTHER}",
    f"channel={CHANNEL}&channel={OTHER}",
    "type=A",
    "severity=info",
    "since=e1-0",
]

MASKED_CLOSE = b"\x88\x82\0\0\0\0\x03\xe8"
MASKED_BROKEN = b"\xb3\x80\0\0\0\0"


class Run:
    """A hub, and what may happen to it and its clients."""

    def __init__(self, house: House, chance: random.Random) -> None:
        self.house = house
        self.chance = chance
        self.peers: list[Peer] = []

    @property
    def open(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.connection.memberships]

    def some(self) -> list[Peer]:
        return self.chance.sample(self.open, min(2, len(self.open)))

    def come(self) -> None:
        reads_along = self.chance.random() < 0.7
        query = self.chance.choice(QUERIES)
        self.peers.append(self.house.connect(query, v1=self.chance.random() < 0.5, reads_along=reads_along))
        if OTHER in self.house.channels.open:
            self.house.channels.on_confirmed(OTHER)

    def publish(self) -> None:
        channel = self.chance.choice([name for name in (CHANNEL, OTHER) if name in self.house.channels.open])
        labels = {"severity": self.chance.choice(["info", "critical"]), "event_type": self.chance.choice("AB")}
        self.house.publish(self.chance.choice([1, 3, 200]), 700, channel, **labels)

    def vanish(self) -> None:
        """The transport is closing, and nobody has been told yet."""
        for peer in self.some():
            peer.socket.closing = True

    def say_goodbye(self) -> None:
        for peer in self.some():
            if not peer.socket.closing:
                peer.connection.data_received(MASKED_CLOSE)

    def break_the_protocol(self) -> None:
        for peer in self.some():
            if not peer.socket.closing:
                peer.connection.data_received(MASKED_BROKEN)

    def end_their_side(self) -> None:
        for peer in self.some():
            peer.connection.eof_received()

    def close(self) -> None:
        for peer in self.some():
            peer.connection.close(self.chance.choice([CloseCode.SLOW, CloseCode.EXPIRED]), "")

    def end(self) -> None:
        for peer in self.peers:
            if peer.socket.closing and peer.connection.memberships:
                peer.connection.connection_lost(None)

    def lose_the_memory(self) -> None:
        self.house.redis.restart()
        for name in (CHANNEL, OTHER):
            if name in self.house.channels.open:
                self.house.channels.on_lost(name)
                self.house.channels.on_confirmed(name)

    def read(self) -> None:
        for peer in self.some():
            peer.socket.read(self.chance.choice([1000, 100_000]))

    def tick(self) -> None:
        for _ in range(self.chance.choice([1, 30])):
            self.house.timer.tick()


@pytest.mark.parametrize("seed", range(12))
@in_loop
async def test_they_add_up_after_each_step(seed: int) -> None:
    """What was counted as delivered is what the sockets took; every client has come, and is here, or has gone."""
    chance = random.Random(seed)
    channels = ChannelsTable(linger_s=0.01, drop_oldest=(CHANNEL,) if seed % 2 else ())
    house = await House.opened(stored=20, ring_bytes=2**18, channels=channels, close_timeout_s=0.01)
    run = Run(house, chance)
    steps = [run.come, run.come, run.publish, run.publish, run.read, run.tick, run.vanish, run.end]
    steps += [run.say_goodbye, run.break_the_protocol, run.end_their_side, run.close, run.lose_the_memory]
    for _ in range(150):
        chance.choice(steps)()
        house.registry.settle()
        await turns(chance.choice([0, 2, 40]))
        assert_adds_up(house, run.peers)
    for peer in run.open:
        peer.connection.connection_lost(None)
    assert (house.registry.connected, len(house.registry.ending)) == (0, 0)
    assert_adds_up(house, run.peers)
    ends = {1002, 4001, 4008, 4009}
    assert house.registry.left, "nobody has left by itself"
    assert ends & set(house.registry.closed), "nobody was closed"


@in_loop
async def test_what_a_closed_channel_has_counted_stays_in_the_totals() -> None:
    """By its names, each of them."""
    house = await House.opened(ring_bytes=2**18, channels=ChannelsTable(linger_s=0.0001))
    house.redis.shelf(OTHER)
    first = house.connect(f"channel={OTHER}", v1=True)
    house.channels.on_confirmed(OTHER)
    await house.settle()
    sent = house.publish(3, channel=OTHER)
    house.hear(sent[:1], OTHER)
    house.hear(house.store(2, channel=OTHER)[1:], OTHER)
    await house.settle()
    house.redis.restart()
    house.channels.on_lost(OTHER)
    house.channels.on_confirmed(OTHER)
    await house.settle()
    second = house.connect(f"channel={OTHER}&since=e1-3", v1=True)
    await house.settle()
    before = house.channels.totals()
    assert before["twins"] >= 1
    assert before["recovered"] == 2
    assert (before["received"], before["gap redis_restarted"], before["resumed"]) == (5, 1, 1)
    for peer in (first, second):
        peer.connection.connection_lost(None)
    await asyncio.sleep(0.01)
    house.timer.tick()
    assert OTHER not in house.channels.open
    assert house.channels.totals() == before


@in_loop
async def test_who_leaves_by_itself_is_not_aborted() -> None:
    """Cut it is, when it takes too long; but it had not been asked to answer anything."""
    house = await House.opened(close_timeout_s=0.001)
    leaving, closed = house.connect(), house.connect()
    leaving.connection.eof_received()
    closed.connection.close(CloseCode.SLOW, "")
    await asyncio.sleep(0.01)
    house.timer.tick()
    assert leaving.socket.aborted
    assert closed.socket.aborted
    assert house.registry.aborted == 1
    for peer in (leaving, closed):
        peer.connection.connection_lost(None)
    assert (house.registry.left, dict(house.registry.closed)) == (1, {CloseCode.SLOW: 1})


# Gaps that close many


@in_loop
async def test_a_gap_does_not_close_all_plain_clients_in_one_turn() -> None:
    """They are closed over `hub.drain_s`, so that they do not come back all at once; and get nothing meanwhile."""
    house = await House.opened(drain_s=0.3)
    plain = [house.connect() for _ in range(200)]
    v1 = house.connect(v1=True)
    house.fanout.announce(Gap(CHANNEL, Cause.EXPIRED, "e1", 1, 3, Position("e1", 3)))
    assert v1.told == ["welcome", "gap"]
    assert sum(peer.connection.closing for peer in plain) == 10
    house.unstored(1)
    plain[-1].connection.close(CloseCode.RESTART, "another reason does not hide the first")
    for _ in range(200):
        if all(peer.connection.closing for peer in plain):
            break
        await turns(1)
        await asyncio.sleep(0.005)
    assert [peer.told for peer in plain] == [["close 4009"]] * 200
    assert dict(house.registry.closed) == {CloseCode.GAP: 200}
    assert house.registry.due == {}


@in_loop
async def test_who_waits_to_be_closed_gets_no_heartbeat() -> None:
    """Nothing is delivered to it any more, on any channel: a heartbeat would say that it has everything."""
    house = await House.opened(drain_s=60.0, beat_interval_s=0.1)
    house.channels.get(OTHER)
    house.channels.on_confirmed(OTHER)
    await house.settle()
    clients = [house.connect(f"channel={CHANNEL}&channel={OTHER}", v1=True) for _ in range(20)]
    house.be_proven()
    for subscription in house.channel(OTHER).fanout.subscriptions():
        house.channel(OTHER).fanout.end_unavailable(subscription, "a test")
    waiting = [client for client in clients if not client.connection.closing]
    assert waiting
    house.publish(1)
    house.timer.tick()
    await turns(5)
    for client in waiting:  # its turn may have come meanwhile
        assert [told for told in client.told if told != "close 4010"] == ["welcome", "welcome"]


# With a real hub


def test_every_kind_of_end_is_in_the_ledger(redis: RedisServer, publish: RedisClient) -> None:
    """Come = here + left + closed, each by its code."""
    limits: dict[str, Any] = {
        "BROADCASTER_HUB__INBOUND_MAX_PER_S": "20",
        "BROADCASTER_HUB__PING_INTERVAL_S": "0.3",
        "BROADCASTER_HUB__CLOSE_TIMEOUT_S": "0.3",
    }
    with HubProcess(redis.url, **limits) as hub, contextlib.ExitStack() as stack:
        hub.until_ready()
        clients = {name: stack.enter_context(RawClient(hub.port)) for name in "abcdefgh"}
        hub.until_connected(8)
        clients["a"].send(8, b"\x03\xe8")
        clients["b"].vanish()
        clients["c"].socket.shutdown(1)
        clients["d"].send(3)
        clients["e"].send(1, b"\xff\xff")
        clients["f"].send(1, b"x" * 5000)
        for _ in range(30):
            clients["g"].send(9)
        assert [clients[name].close_code() for name in "defg"] == [1002, 1007, 1009, 1008]
        assert clients["h"].close_code() == 1011  # it has not answered a ping
        stats = eventually(
            lambda: (found := hub.stats())["connected"] == 0 and found, f"somebody is left: {hub.stats()}"
        )
        assert (stats["opened"], stats["left"], stats["ending"]) == (8, 3, 0)
        assert stats["closed"] == {"1002": 1, "1007": 1, "1008": 1, "1009": 1, "1011": 1}
        assert (stats["ping_timeouts"], stats["talkers_closed"], stats["slow_closed"]) == (1, 1, 0)
        assert stats["aborted"] <= 5, "those that did not answer their close"
        publish.publish(event_payload())
        assert hub.stats()["deliveries"] == 0


@in_loop
async def test_they_are_shown_as_they_are() -> None:
    """By a way that copies nothing, the hub's own and those of each channel: all of them, in their order."""
    house = await House.opened()
    channel = ChannelStatistics.of(house.channel())
    numbers: dict[str, Any] = {field.name: index for index, field in enumerate(fields(HubStatistics))}
    statistics = HubStatistics(**numbers | {"closed": {"1000": 2}, "channels": {CHANNEL: channel}})
    assert json.dumps(statistics.as_dict()) == json.dumps(asdict(statistics))


# The docs


def test_the_docs_have_every_counter() -> None:
    """One table for the hub, one for a channel: what each counts, and when it begins anew."""
    text = (ROOT / "docs" / "contract.md").read_text()
    section = text.partition("\n## Counters\n")[2].partition("\n## ")[0]
    for table, statistics in zip(
        section.split("Of each open channel"), (HubStatistics, ChannelStatistics), strict=True
    ):
        rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("|")]
        documented = re.findall(r"`([a-z_]+)`", "".join(rows))
        assert sorted(documented) == sorted(field.name for field in fields(statistics))
