"""A subscriber that does not read, or reads slowly: bounded, told, cut, and noticed by nobody else."""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import hiredis

from broadcaster import wire
from broadcaster.redis.server import RedisServer
from tests.support import (
    UNIT_S,
    Hub,
    HubProcess,
    HubThread,
    RawClient,
    RedisClient,
    assert_calm,
    event_payload,
    eventually,
    memory_bytes,
    read_to_end,
    server_frames,
)

MIB = 1 << 20
SMALL = 4096
"""Receive buffer of a client that is to be slow, in bytes."""


class Readers:
    """Reads for many clients at once, from a thread of its own, and parses nothing before it is asked."""

    def __init__(self, *clients: RawClient) -> None:
        self._bytes = {client: bytearray(client._buffer) for client in clients}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for client in self._bytes:
                selector.register(client.socket, selectors.EVENT_READ, client)
            while not self._stop.is_set():
                for key, _ in selector.select(0.05):
                    if more := key.data.socket.recv(MIB):
                        self._bytes[key.data] += more
                    else:
                        selector.unregister(key.fileobj)

    def least(self) -> int:
        """Bytes that the one with the fewest has."""
        return min(map(len, self._bytes.values()))

    def events(self, client: RawClient) -> list[bytes]:
        """All events that one client was sent."""
        frames = server_frames(bytes(self._bytes[client]))
        return [payload for opcode, payload in frames if opcode == 1 and not wire.read_control(payload)]

    def take_all(self, load: Load) -> None:
        """Wait until each of them has as many events as were published."""
        eventually(lambda: self.least() >= load.bytes, "events are missing")
        for client in self._bytes:
            eventually(lambda client=client: len(self.events(client)) >= len(load.payloads), "events are missing")  # type: ignore[misc]

    def __enter__(self) -> Readers:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


class Load:
    """Many large events, published in batches; `payloads` are those published so far."""

    def __init__(self, publish: RedisClient, size: int = 4000) -> None:
        self._publish = publish
        self._size = size
        self.payloads: list[bytes] = []
        self.bytes = 0

    def batch(self, count: int = 50) -> None:
        """Publish so many in one write and wait until Redis has taken them."""
        first = len(self.payloads)
        new = [event_payload(first + n, data={"text": "x" * self._size}) for n in range(count)]
        commands: list[tuple[Any, ...]] = [("PUBLISH", "events.critical", payload) for payload in new]
        self._publish._socket.sendall(b"".join(map(hiredis.pack_command, commands)))
        for _ in new:
            while self._publish._reader.gets() is False:
                self._publish._reader.feed(self._publish._socket.recv(65_536))
        self.payloads += new
        self.bytes += sum(map(len, new))

    def at_the_pace_of(self, readers: Readers, total: int, ahead: int = MIB // 4) -> Iterator[None]:
        """Publish `total` bytes, never more than `ahead` bytes before the readers; yields after each batch."""
        while self.bytes < total:
            self.batch()
            eventually(lambda: readers.least() >= self.bytes - ahead, "a reader is held up")
            yield


def sequences(payloads: list[bytes]) -> list[int]:
    return [json.loads(payload)["sequence"] for payload in payloads]


@contextlib.contextmanager
def sleeping(hub: Hub, count: int = 1, subprotocol: str = "") -> Iterator[list[RawClient]]:
    """Subscribers that have stopped reading."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(RawClient(hub.port, receive_buffer=SMALL, subprotocol=subprotocol))
            for _ in range(count)
        ]


def fall_behind(hub: Hub, load: Load, count: int = 1) -> None:
    """Publish until so many subscribers are behind, or have been closed for it already."""
    deadline = time.monotonic() + 20 * UNIT_S
    while (stats := hub.stats())["behind"] + stats["slow_closed"] < count:
        assert time.monotonic() < deadline, f"nobody falls behind: {stats}"
        load.batch(200)


def test_one_that_does_not_read_holds_up_nobody(redis: RedisServer, publish: RedisClient) -> None:
    """Ten readers get everything in order beside one that never reads; it is closed 4008, then aborted."""
    with (
        HubThread(
            redis.url,
            BROADCASTER_HUB__RING_BYTES=str(MIB),
            BROADCASTER_HUB__BEHIND_MAX_MS="300",
            BROADCASTER_HUB__CLOSE_TIMEOUT_S="0.3",
        ) as hub,
        contextlib.ExitStack() as stack,
    ):
        hub.until_ready()
        clients = [stack.enter_context(RawClient(hub.port)) for _ in range(10)]
        stack.enter_context(sleeping(hub))
        hub.until_connected(11)
        readers = stack.enter_context(Readers(*clients))
        load = Load(publish)
        for _ in load.at_the_pace_of(readers, 10 * MIB):
            pass
        eventually(lambda: hub.stats()["slow_closed"] == 1, f"not closed: {hub.stats()}")
        eventually(lambda: hub.stats()["aborted"] == 1, f"not aborted: {hub.stats()}")
        hub.until_connected(10)
        load.batch()
        readers.take_all(load)
        for client in clients:
            assert readers.events(client) == load.payloads
        stats = hub.stats()
        assert (stats["slow_closed"], stats["aborted"], stats["ping_timeouts"]) == (1, 1, 0)
        assert_calm(hub)


def test_the_memory_of_the_hub_does_not_grow_with_what_is_not_read(
    redis: RedisServer, publish: RedisClient
) -> None:
    """40 MB for five that do not read, none cut by time: the hub keeps its ring and little more."""
    with (
        HubProcess(
            redis.url,
            BROADCASTER_HUB__RING_BYTES=str(MIB),
            BROADCASTER_HUB__BEHIND_MAX_MS="60000",
            BROADCASTER_HUB__CLOSE_TIMEOUT_S="60",
        ) as hub,
        RawClient(hub.until_ready().port) as reader,
        sleeping(hub, 5),
        Readers(reader) as readers,
    ):
        hub.until_connected(6)
        load = Load(publish)
        for _ in load.at_the_pace_of(readers, MIB):
            pass
        before = most = memory_bytes(hub)
        for _ in load.at_the_pace_of(readers, 40 * MIB):
            most = max(most, memory_bytes(hub))
        assert most - before < MIB + 10 * MIB
        stats = hub.stats()
        assert stats["slow_closed"] == 5
        assert stats["connected"] == 6
        assert stats["ring_bytes"] <= MIB


def test_the_slow_one_is_told_in_order_and_with_its_reason(redis: RedisServer, publish: RedisClient) -> None:
    """Cut by time, also when nothing more comes, and within the bounds of the ring.

    Who reads after all finds an unbroken beginning of the events, then a 4008 that says how far behind.
    """
    with HubThread(redis.url, BROADCASTER_HUB__BEHIND_MAX_MS="300", BROADCASTER_HUB__CLOSE_TIMEOUT_S="10") as hub:
        hub.until_ready()
        with sleeping(hub) as (slow,):
            load = Load(publish)
            fall_behind(hub, load)
            eventually(lambda: hub.stats()["slow_closed"] == 1, "not closed", within=3.0)
            assert slow.close_code() == 4008
            *events, (_, close) = slow.frames
            assert b"too slow: " in close
            assert b" ms behind" in close
            got = [payload for opcode, payload in events if opcode == 1]
            assert got
            assert got == load.payloads[: len(got)]
            slow.send(8, close[:2])
            read_to_end(slow)
            hub.until_connected(0)
            assert hub.stats()["aborted"] == 0
            assert_calm(hub)


def read_slowly(client: RawClient, until: float) -> None:
    """Take a little now and then."""
    while time.monotonic() < until:
        client._buffer += client.socket.recv(2000)
        time.sleep(0.005)


def test_a_slow_one_that_catches_up_has_missed_nothing(redis: RedisServer, publish: RedisClient) -> None:
    """Reading slowly while events come, then fast: every event exactly once, in order, and live again."""
    with (
        HubThread(redis.url, BROADCASTER_HUB__BEHIND_MAX_MS="30000") as hub,
        sleeping(hub.until_ready(), subprotocol="broadcaster.v1") as (slow,),
    ):
        load = Load(publish)
        fall_behind(hub, load)
        for _ in range(5):
            load.batch()
            read_slowly(slow, time.monotonic() + 0.1)
        assert hub.stats()["behind"] == 1
        slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
        with Readers(slow) as readers:
            eventually(lambda: hub.stats()["behind"] == 0, f"it never catches up: {hub.stats()}")
            load.batch()
            readers.take_all(load)
            assert readers.events(slow) == load.payloads
        stats = hub.stats()
        assert (stats["slow_closed"], stats["deliveries"]) == (0, len(load.payloads))
        assert_calm(hub)


def test_many_slow_ones_of_different_pace_all_get_everything(redis: RedisServer, publish: RedisClient) -> None:
    """Each continues from a place of its own in the same ring."""
    with (
        HubThread(redis.url, BROADCASTER_HUB__BEHIND_MAX_MS="30000") as hub,
        sleeping(hub.until_ready(), 5) as slow,
    ):
        hub.until_connected(5)
        load = Load(publish, size=400)
        fall_behind(hub, load, 5)
        for place, client in enumerate(slow):
            for _ in range(place * 20):
                client._buffer += client.socket.recv(20_000)
            load.batch(20)
        with Readers(*slow) as readers:
            readers.take_all(load)
            for client in slow:
                assert readers.events(client) == load.payloads
        assert hub.stats()["slow_closed"] == 0
        assert_calm(hub)


def test_one_that_leaves_while_it_is_behind_is_forgotten(redis: RedisServer, publish: RedisClient) -> None:
    """A subscriber that vanishes with a full socket leaves nothing behind, and nobody is affected."""
    with HubThread(redis.url, BROADCASTER_HUB__BEHIND_MAX_MS="30000") as hub:
        hub.until_ready()
        with RawClient(hub.port) as reader, Readers(reader) as readers, sleeping(hub, 2) as (first, second):
            hub.until_connected(3)
            load = Load(publish)
            fall_behind(hub, load, 2)
            first.vanish()
            second.socket.close()
            hub.until_connected(1)
            assert hub.stats()["behind"] == 0
            load.batch()
            readers.take_all(load)
            assert sequences(readers.events(reader)) == list(range(len(load.payloads)))
            assert hub.stats()["slow_closed"] == 0
        assert_calm(hub)
