"""The simulated network and processes behave as TCP and an operating system do."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from tests.simulation.loop import Stuck, VirtualLoop, virtual
from tests.simulation.network import Network
from tests.simulation.process import Process

ADDRESS = "10.0.0.9", 80


class Peer(asyncio.Protocol):
    """Keeps what it gets."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self.transport: Any = None
        self.data = b""
        self.pieces: list[int] = []
        self.paused = 0
        self.lost_at: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.pieces.append(len(data))

    def pause_writing(self) -> None:
        self.paused += 1

    def resume_writing(self) -> None:
        self.paused -= 1

    def connection_lost(self, error: Exception | None) -> None:
        self.lost_at = self._loop.now


class Two:
    """A client and a server, connected; each in a process of its own."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.network = self.loop.network = Network(self.loop, random.Random(1))
        self.client, self.server = Process("client", self.loop), Process("server", self.loop)
        self.taken: list[Peer] = []
        self.near: Peer

    @property
    def far(self) -> Peer:
        return self.taken[0]

    def live(self, *steps: Callable[[Two], Any], between_s: float = 1.0) -> None:
        """Connect, then take the steps, a second after each other."""

        async def serve() -> None:
            server = await self.loop.create_server(self._take, *ADDRESS)
            await server.start_serving()

        async def run() -> None:
            self.server.spawn(serve(), "serve")
            await asyncio.sleep(0.01)
            await self.client.spawn(self._connect(), "connect")
            for step in steps:
                await asyncio.sleep(between_s)
                step(self)
            await asyncio.sleep(between_s)

        with virtual(self.loop, random.Random(2)):
            try:
                self.loop.run_until_complete(run())
            finally:
                self.loop.finish()

    def _take(self) -> Peer:
        self.taken.append(Peer(self.loop))
        return self.taken[-1]

    async def _connect(self) -> None:
        _, near = await self.loop.create_connection(lambda: Peer(self.loop), *ADDRESS)
        assert isinstance(near, Peer)
        self.near = near


def test_bytes_arrive_in_order_in_pieces_cut_anywhere() -> None:
    two = Two()
    two.network.usual.splits = True
    sent = bytes(range(256)) * 20
    two.live(lambda two: two.near.transport.write(sent))
    assert two.far.data == sent
    assert len(two.far.pieces) > 3


def test_who_does_not_read_stops_who_writes() -> None:
    two = Two()
    two.network.windows = 1000, 1000
    counted = []
    two.live(
        lambda two: two.far.transport.pause_reading(),
        lambda two: two.near.transport.write(b"x" * 100_000),
        lambda two: counted.append(
            (two.near.paused, len(two.far.data), two.near.transport.get_write_buffer_size())
        ),
        lambda two: two.far.transport.resume_reading(),
    )
    assert counted == [(1, 0, 99_000)]
    assert (two.near.paused, len(two.far.data)) == (0, 100_000)


def test_a_close_comes_after_what_was_written() -> None:
    two = Two()
    two.live(lambda two: (two.near.transport.write(b"last"), two.near.transport.close()))
    assert two.far.data == b"last"
    assert two.far.lost_at is not None
    assert two.near.lost_at is not None


def test_a_black_hole_holds_and_then_lets_through() -> None:
    two = Two()
    counted = []

    def block(two: Two, blocked: bool) -> None:
        two.network.link("client", "server").blocked = blocked
        two.network.pump()

    two.live(
        lambda two: block(two, True),
        lambda two: two.near.transport.write(b"late"),
        lambda two: counted.append(two.far.data),
        lambda two: block(two, False),
    )
    assert counted == [b""]
    assert two.far.data == b"late"


@pytest.mark.parametrize(("lost_at", "other"), [("client", "server"), ("server", "client")])
def test_a_half_open_connection_ends_for_one_side_only(lost_at: str, other: str) -> None:
    two = Two()
    two.live(lambda two: two.network.half_open(lost_at, other), between_s=60.0)
    ends = {"client": two.near.lost_at, "server": two.far.lost_at}
    assert ends[lost_at] is not None
    assert ends[other] is None


def test_a_cut_ends_both_sides() -> None:
    two = Two()
    two.live(lambda two: two.network.cut("client", "server"))
    assert two.near.lost_at is not None
    assert two.far.lost_at is not None


def test_a_killed_process_runs_nothing_more_and_its_peers_learn_of_it() -> None:
    two = Two()
    ran = []

    async def work() -> None:
        try:
            await asyncio.sleep(1.5)
        finally:
            ran.append("finally")

    two.live(lambda two: two.server.spawn(work(), "work"), lambda two: two.server.kill(), between_s=1.0)
    assert two.near.lost_at is not None
    assert two.far.lost_at is None
    assert ran in ([], ["finally"])  # the latter when the seed was over


def test_a_stopped_process_does_everything_later_and_in_order() -> None:
    two = Two()
    counted = []
    two.live(
        lambda two: two.server.pause(3.5),
        lambda two: two.near.transport.write(b"first "),
        lambda two: two.near.transport.write(b"second"),
        lambda two: counted.append(two.far.data),
    )
    assert counted == [b""]
    assert two.far.data == b"first second"


def test_nobody_listens() -> None:
    two = Two()

    async def connect() -> str:
        with suppress(ConnectionRefusedError):
            await two.loop.create_connection(lambda: Peer(two.loop), "10.0.0.9", 81)
            return "connected"
        return "refused"

    said: list[asyncio.Task[Any]] = []
    two.live(lambda two: said.append(two.client.spawn(connect(), "connect")))
    assert said[0].result() == "refused"


def test_what_turns_without_end_is_noticed() -> None:
    two = Two()

    def again() -> None:
        two.loop.call_soon(again)

    two.loop.now = 1.0
    with pytest.raises(Stuck, match="within a second"):
        two.live(lambda two: again())
