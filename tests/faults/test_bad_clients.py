"""Clients that break the protocol, vanish, or flood: each gets what it deserves, and nobody else notices."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from broadcaster.redis.server import RedisServer
from tests.support import (
    UNIT_S,
    HubProcess,
    RawClient,
    RedisClient,
    assert_calm,
    client_frame,
    event_payload,
    eventually,
    memory_bytes,
    next_but_ping,
    read_to_end,
    redis_client,
)


class Scene(NamedTuple):
    """A hub with one well-behaved subscriber, and somebody who publishes."""

    hub: HubProcess
    publish: RedisClient
    bystander: RawClient
    said: int
    """Lines of the hub's log before the test."""

    def assert_nobody_noticed(self) -> None:
        """The bystander is served, and the hub is well."""
        self.assert_served()
        assert_calm(self.hub, self.said)

    def assert_served(self) -> None:
        """The bystander is connected and gets the next event next."""
        payload = event_payload()
        self.publish.publish(payload)
        assert next_but_ping(self.bystander) == (1, payload)


@pytest.fixture(scope="module")
def house() -> Iterator[tuple[HubProcess, RedisClient]]:
    """One hub for all tests of this file: whatever they send must not harm it."""
    with (
        RedisServer.start() as server,
        redis_client(server) as publish,
        HubProcess(
            server.url,
            BROADCASTER_HUB__CLOSE_TIMEOUT_S="0.3",
            BROADCASTER_HUB__BEHIND_MAX_MS="500",
        ) as hub,
    ):
        yield hub.until_ready(), publish


@pytest.fixture
def scene(house: tuple[HubProcess, RedisClient]) -> Iterator[Scene]:
    """A new bystander of it."""
    hub, publish = house
    hub.until_connected(0)
    with RawClient(hub.port) as bystander:
        bystander.socket.settimeout(3 * UNIT_S)  # nobody may be held up for longer
        hub.until_connected(1)
        yield Scene(hub, publish, bystander, len(hub.lines))


BAD_FRAMES: dict[str, tuple[bytes, int]] = {
    "garbage": (b"\xde\xad\xbe\xef" * 100, 1002),
    "zeros": (b"\0" * 100, 1002),
    "text without a frame": (b"SUBSCRIBE events.critical\r\n", 1002),
    "a second HTTP request": (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 1002),
    "unmasked text": (client_frame(1, b"hi", mask=False), 1002),
    "unmasked ping": (client_frame(9, b"hi", mask=False), 1002),
    "unmasked close": (client_frame(8, b"\x03\xe8", mask=False), 1002),
    "reserved bits": (b"\xf1\x80\0\0\0\0", 1002),
    "compressed, though not agreed on": (b"\xc1\x82\0\0\0\0hi", 1002),
    "reserved data opcode": (client_frame(3, b"hi"), 1002),
    "reserved control opcode": (client_frame(15), 1002),
    "continuation of nothing": (client_frame(0, b"hi"), 1002),
    "message within a message": (client_frame(1, b"a", fin=False) + client_frame(2, b"b"), 1002),
    "fragmented ping": (client_frame(9, b"a", fin=False), 1002),
    "ping of 126 bytes": (client_frame(9, b"x" * 126), 1002),
    "close of one byte": (client_frame(8, b"x"), 1002),
    "close 1005": (client_frame(8, b"\x03\xed"), 1002),
    "close 65535": (client_frame(8, b"\xff\xff"), 1002),
    "text that is not UTF-8": (client_frame(1, b"\xff"), 1007),
    "text that is cut within a character": (client_frame(1, b"\xe2\x82"), 1007),
    "fragments that are not UTF-8": (client_frame(1, b"\xe2", fin=False) + client_frame(0, b"x"), 1007),
    "close with a bad reason": (client_frame(8, b"\x03\xe8\xff\xfe"), 1007),
    "oversized text": (client_frame(1, b"x" * 5000), 1009),
    "oversized binary": (client_frame(2, b"\0" * 1_000_000), 1009),
    "oversized in fragments": (client_frame(1, b"x" * 3000, fin=False) + client_frame(0, b"x" * 3000), 1009),
    "an exabyte announced": (b"\x82\xff\x0f" + b"\xff" * 7 + b"\0\0\0\0", 1009),
    "a length with the highest bit": (b"\x82\xff" + b"\xff" * 8 + b"\0\0\0\0", 1009),
    "good, then bad": (client_frame(1, b"hello") + client_frame(9) + client_frame(3), 1002),
}


@pytest.mark.parametrize(("data", "code"), BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_a_broken_frame_is_closed_with_its_code(scene: Scene, data: bytes, code: int) -> None:
    """The client is told by a close code and its connection ends; nobody else is affected."""
    with RawClient(scene.hub.port) as client:
        scene.hub.until_connected(2)
        with contextlib.suppress(ConnectionError):
            client.socket.sendall(data)
        assert client.close_code() == code
        scene.assert_nobody_noticed()
        read_to_end(client)
    scene.hub.until_connected(1)


@pytest.mark.parametrize("seed", range(30))
def test_random_bytes_never_harm_the_hub(scene: Scene, seed: int) -> None:
    """Whatever the bytes mean, after the client is gone everything is as before."""
    chance = random.Random(seed)
    with RawClient(scene.hub.port) as client, contextlib.suppress(ConnectionError):
        for _ in range(chance.randrange(1, 20)):
            opcode = chance.randrange(16)
            payload = chance.randbytes(chance.choice([0, 1, 2, 10, 125, 126, 4000]))
            frame = bytearray(
                client_frame(opcode, payload, fin=chance.random() < 0.8, mask=chance.random() < 0.95)
            )
            if chance.random() < 0.2:
                frame[chance.randrange(len(frame))] = chance.randrange(256)
            client.socket.sendall(frame)
    scene.hub.until_connected(1)
    scene.assert_nobody_noticed()


def test_many_broken_clients_at_once(scene: Scene) -> None:
    """100 clients break the protocol in the same moment; all are told."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(scene.hub.port)) for _ in range(100)]
        for client in clients:
            client.socket.sendall(client_frame(1, b"\xff"))
        assert [client.close_code() for client in clients] == [1007] * 100
        scene.assert_nobody_noticed()
    scene.hub.until_connected(1)


# Gone without a word


def by_reset(client: RawClient) -> None:
    client.vanish()


def by_fin(client: RawClient) -> None:
    client.socket.close()


def by_half_close(client: RawClient) -> None:
    client.socket.shutdown(socket.SHUT_WR)


EXITS: dict[str, Callable[[RawClient], None]] = {"RST": by_reset, "FIN": by_fin, "half a FIN": by_half_close}
MOMENTS: dict[str, bytes] = {
    "when idle": b"",
    "after talking": client_frame(1, b"hello"),
    "within a frame": client_frame(1, b"hello")[:-2],
    "within a message": client_frame(1, b"hello", fin=False),
    "after a ping": client_frame(9, b"hello"),
    "after a close": client_frame(8, b"\x03\xe8"),
    "after a mistake": client_frame(1, b"\xff"),
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
@pytest.mark.parametrize("leave", EXITS.values(), ids=EXITS.keys())
def test_a_subscriber_may_vanish_at_any_moment(
    scene: Scene, leave: Callable[[RawClient], None], moment: bytes
) -> None:
    """Gone without a close: the hub forgets it at once, and nobody else notices."""
    with RawClient(scene.hub.port) as client:
        if moment:
            client.socket.sendall(moment)
        leave(client)
        scene.hub.until_connected(1)
    scene.assert_nobody_noticed()


def test_many_vanish_while_events_flow(scene: Scene) -> None:
    """50 subscribers leave in the middle of 50 events; the one who stays misses none."""
    with contextlib.ExitStack() as stack:
        leavers = [stack.enter_context(RawClient(scene.hub.port)) for _ in range(50)]
        scene.hub.until_connected(51)
        payloads = [event_payload(number) for number in range(50)]
        for number, (payload, leaver) in enumerate(zip(payloads, leavers, strict=True)):
            scene.publish.publish(payload)
            (by_reset if number % 2 else by_fin)(leaver)
        got: list[bytes] = []
        while len(got) < len(payloads):
            opcode, payload = scene.bystander.next_frame()
            if opcode == 1:
                got.append(payload)
        assert got == payloads
    scene.hub.until_connected(1)
    scene.assert_nobody_noticed()


# Floods


LARGE_PINGS = client_frame(9, b"x" * 125) * 1000
FLOODS: dict[str, bytes] = {
    "empty pings": client_frame(9) * 20_000,
    "empty messages": client_frame(1) * 20_000,
    "empty fragments": client_frame(1, fin=False) + client_frame(0, fin=False) * 20_000 + client_frame(0),
    "pongs": client_frame(10, b"x" * 125) * 1000,
}


@contextlib.contextmanager
def flooding(client: RawClient, data: bytes) -> Iterator[threading.Thread]:
    """The client sends it again and again, as fast as it is taken, and never reads; until it is cut."""
    stop = threading.Event()

    def run() -> None:
        rest = data
        with contextlib.suppress(ConnectionError):
            while not stop.is_set():
                if select.select([], [client.socket], [], 0.05)[1]:
                    rest = rest[client.socket.send(rest, socket.MSG_DONTWAIT) :] or data

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("data", FLOODS.values(), ids=FLOODS.keys())
def test_a_talker_that_never_reads_holds_up_nobody(scene: Scene, data: bytes) -> None:
    """Whatever the flood, the hub's memory stays as it is, and everybody else is served meanwhile."""
    scene.bystander.socket.settimeout(1 * UNIT_S)
    before, reconnects = memory_bytes(scene.hub), scene.hub.stats()["redis_reconnects"]
    with RawClient(scene.hub.port, receive_buffer=4096) as client, flooding(client, data):
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            scene.assert_served()
            assert memory_bytes(scene.hub) - before < 8 << 20
            time.sleep(0.01)
        client.vanish()
    scene.hub.until_connected(1)
    scene.assert_nobody_noticed()
    assert scene.hub.stats()["redis_reconnects"] == reconnects, "it cost the hub its Redis"


def test_who_does_not_take_the_answers_to_his_pings_is_closed_as_too_slow(redis: RedisServer) -> None:
    """Where talking is not limited: when his answers fill the socket he is not read any further, and is cut."""
    with HubProcess(
        redis.url,
        BROADCASTER_HUB__INBOUND_MAX_PER_S="1000000",
        BROADCASTER_HUB__BEHIND_MAX_MS="300",
        BROADCASTER_HUB__CLOSE_TIMEOUT_S="0.3",
    ) as hub:
        hub.until_ready()
        before = memory_bytes(hub)
        with (
            RawClient(hub.port, receive_buffer=4096) as client,
            flooding(client, LARGE_PINGS) as flood,
        ):
            eventually(lambda: not flood.is_alive(), "it is neither cut nor read any further")
        hub.until_connected(0)
        assert hub.stats()["slow_closed"] == 1
        assert memory_bytes(hub) - before < 8 << 20
        assert_calm(hub)


def test_a_flood_of_connections_that_leave_at_once(scene: Scene) -> None:
    """300 clients that connect and vanish, one way or another, leave nothing behind."""
    files = len(os.listdir(f"/proc/{scene.hub.process.pid}/fd"))
    for number in range(300):
        with RawClient(scene.hub.port) as client:
            if number % 2:
                client.vanish()
    scene.hub.until_connected(1)
    eventually(
        lambda: len(os.listdir(f"/proc/{scene.hub.process.pid}/fd")) <= files + 2, "connections are kept open"
    )
    scene.assert_nobody_noticed()


def test_one_that_is_closed_and_does_not_answer_is_cut(scene: Scene) -> None:
    """After its mistake it stays, silent: cut at the deadline, and counted."""
    aborted = scene.hub.stats()["aborted"]
    with RawClient(scene.hub.port) as client:
        client.socket.sendall(client_frame(1, b"\xff"))
        started = time.monotonic()
        eventually(lambda: scene.hub.stats()["aborted"] > aborted, "it is kept", within=5.0)
        assert time.monotonic() - started < 5 * UNIT_S
        read_to_end(client)
    scene.assert_nobody_noticed()
