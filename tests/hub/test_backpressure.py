"""Backpressure inside a write: asyncio's and uvloop's transports call `pause_writing` in the middle of `write`.

Whichever write it is, nothing else may happen within it: each client is sent the same bytes.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from broadcaster.core.position import Cause, Gap
from broadcaster.hub.connections.connection import Connection
from broadcaster.hub.fanout.subscription import State
from broadcaster.settings import ChannelsTable
from tests.hub.house import CHANNEL, House, Peer, Socket, turns
from tests.support import in_loop

OTHER = "events.other"


class Pausing(Socket):
    """A transport that asks for a pause inside one write of all, and takes everything nevertheless."""

    numbers = itertools.count()
    pauses_in: int | None = None

    def write(self, data: Any) -> None:
        super().write(data)
        if next(Pausing.numbers) == Pausing.pauses_in and not self.closing:
            self.paused = True
            self.protocol.pause_writing()
            assert self.reading, "something else happened inside the write"


class Scene:
    """Clients of all kinds, and what comes for them."""

    def __init__(self, pauses_in: int | None, *, resumes_at_once: bool, drop_oldest: bool) -> None:
        Pausing.numbers, Pausing.pauses_in = itertools.count(), pauses_in
        self.resumes_at_once = resumes_at_once
        self.channels = ChannelsTable(drop_oldest=("events.*",) if drop_oldest else ())
        self.peers: dict[str, Peer] = {}

    async def run(self) -> dict[str, bytes]:
        """Per client everything that it was sent."""
        self.house = house = await House.opened(stored=300, channels=self.channels, ring_bytes=1 << 20)
        house.channels.get(OTHER)
        house.channels.on_confirmed(OTHER)
        await house.settle()
        house.socket = Pausing
        for name, query, v1 in (
            ("plain", "", False),
            ("v1", "", True),
            ("filtered", "type=A", False),
            ("filtered v1", "type=A", True),
            ("resumes", "since=e1-10", True),
            ("resumes, filtered", "since=e1-200&severity=info", False),
            ("both channels", f"channel={CHANNEL}&channel={OTHER}", True),
        ):
            self.peers[name] = house.connect(query, v1=v1)
            await self.turn()
        house.publish(1)
        await self.turn()
        house.hear([event for kind in "AABAB" * 5 for event in house.store(1, event_type=kind, note="x" * 3000)])
        await self.turn()
        house.publish(3, 70_000)
        house.unstored(2, event_type="A")
        house.publish(1)
        await self.turn()
        first, second = house.store(40), house.store(20, channel=OTHER)
        house.dispatcher.on_messages({OTHER.encode(): second, CHANNEL.encode(): first})
        await self.turn()
        house.store(2)
        head = house.redis.head()
        lost = Gap(CHANNEL, Cause.EXPIRED, head.epoch, head.offset - 1, head.offset, head)
        house.publish(0)
        house.fanout.announce(lost)
        house.publish(30, event_type="A")
        await self.turn()
        for peer in self.peers.values():
            self.resume(peer)
        await house.until_live(*self.peers.values())
        await turns(20)
        assert not any(peer.connection.blocked for peer in self.peers.values())
        return {name: b"".join(peer.socket.writes) for name, peer in self.peers.items()}

    async def turn(self) -> None:
        await turns(6)
        if self.resumes_at_once:
            for peer in self.peers.values():
                self.resume(peer)
            await turns(6)

    def resume(self, peer: Peer) -> None:
        if peer.socket.paused:
            peer.socket.paused = False
            peer.connection.resume_writing()


@pytest.mark.parametrize(
    ("resumes_at_once", "drop_oldest"),
    [(True, False), (False, True)],
    ids=["resumed at once, closes the slow", "resumed at the end, drops the oldest"],
)
def test_a_pause_inside_any_write_changes_no_byte(resumes_at_once: bool, drop_oldest: bool) -> None:
    """For every k: the k-th write of all asks for a pause; the order between two channels alone is free."""

    sent: dict[int | None, dict[str, bytes]] = {}

    @in_loop
    async def story(pauses_in: int | None) -> None:
        scene = Scene(pauses_in, resumes_at_once=resumes_at_once, drop_oldest=drop_oldest)
        sent[pauses_in] = await scene.run()
        await scene.house.tasks.cancel()

    story(None)
    writes = next(Pausing.numbers)
    assert writes > 50
    assert all(sent[None].values())
    for number in range(writes):
        story(number)
        for name, expected in sent[None].items():
            if resumes_at_once or name != "both channels":
                assert sent[number][name] == expected, f"{name}: a pause inside write {number} of {writes}"


@in_loop
async def test_a_connection_that_pauses_is_behind_at_the_end_of_the_turn_and_not_inside_the_write() -> None:
    """Until then it is live, and whatever else is broadcast in this turn is not written to it."""
    house = await House.opened()
    peer, other = house.connect(), house.connect()
    [membership] = peer.connection.memberships
    states: list[State] = []

    class Watching(Connection):
        __slots__ = ()

        def pause_writing(self) -> None:
            super().pause_writing()
            states.append(membership.state)

    peer.connection.__class__ = Watching
    peer.socket.reads_along = False
    first = house.store(1, 70_000)
    house.dispatcher.on_messages({CHANNEL.encode(): first})
    assert states == [State.LIVE]
    second = house.store(1)
    house.dispatcher.on_messages({CHANNEL.encode(): second})
    assert peer.events() == first
    assert membership.state is State.BEHIND
    assert other.events() == first + second
    await turns(1)
    assert house.registry.behind == {peer.connection}
    peer.socket.read_all()
    await house.until_live(peer)
    assert peer.events() == first + second
    assert not house.registry.behind
