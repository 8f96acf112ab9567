"""Who has gone is forgotten at once, however he came and went: thousands leave no memory behind."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import uvloop

from broadcaster.redis.server import RedisServer
from tests.support import (
    HubProcess,
    RawClient,
    assert_calm,
    client_frame,
    memory_bytes,
    read_to_end,
    server_frames,
    upgrade_request,
)

Peer = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Way = Callable[[int, Peer], Awaitable[None]]

BATCH = 10
THOUSAND = 1000

GROWTH_BYTES = 400 * THOUSAND
"""What a thousand connections may leave: a connection and its transport are 930 bytes each, and a hub that
leaks nothing was never seen to grow by more than 160 each, which are the allocator's."""


def goodbye(path: str = "/ws", subprotocol: str = "", says: bytes = b"", code: int = 1000) -> Way:
    """Is let in, says something, and goodbye; it is closed with this code."""
    close = code.to_bytes(2)

    async def way(port: int, peer: Peer) -> None:
        reader, writer = peer
        writer.write(upgrade_request(port, path=path, subprotocol=subprotocol))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        for piece in (says[:9], says[9:] + client_frame(8, close)):
            writer.write(piece)
            await asyncio.sleep(0)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while more := await reader.read(65_536):
                answer += more
        assert [frame[1][:2] for frame in server_frames(answer) if frame[0] == 8] == [close]

    return way


async def vanish(port: int, peer: Peer) -> None:
    """Is let in, and gone (RST)."""
    reader, writer = peer
    writer.write(upgrade_request(port, subprotocol="broadcaster.v1"))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def half(port: int, peer: Peer) -> None:
    """Goes in the middle of its request."""
    peer[1].write(upgrade_request(port)[:50])
    await asyncio.sleep(0)


def ask(status: int, request: bytes) -> Way:
    """Asks for something, and is answered."""

    async def way(port: int, peer: Peer) -> None:
        reader, writer = peer
        writer.write(request)
        assert (await reader.read(-1)).startswith(b"HTTP/1.1 %d " % status)

    return way


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()


WAYS: dict[str, Way] = {
    "goodbye": goodbye(),
    "goodbye of broadcaster.v1": goodbye(subprotocol="broadcaster.v1"),
    "after a few words": goodbye(says=client_frame(1, b"hello") + client_frame(9)),
    "with a filter": goodbye("/ws?severity=info"),
    "back from a position": goodbye("/ws?since=aaaaaaaaaaaa-1", "broadcaster.v1"),
    "without a mask": goodbye(says=client_frame(1, b"hello", mask=False), code=1002),
    "no UTF-8": goodbye(says=client_frame(1, b"\xff"), code=1007),
    "too long": goodbye(says=client_frame(1, b"x" * 5000), code=1009),
    "two channels": goodbye("/ws?channel=events.critical&channel=events.other"),
    "reset": vanish,
    "half a request": half,
    "refused": ask(404, upgrade_request(1, path="/ws?channel=elsewhere")),
    "nonsense": ask(400, b"NONSENSE\r\n\r\n"),
    "no upgrade": ask(426, get("/ws")),
    "health": ask(200, get("/health")),
    "statistics": ask(200, get("/stats")),
    "wrong key": ask(400, upgrade_request(1, Sec_WebSocket_Key="short")),
    "publishing": ask(403, b"POST /publish HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"),
}


@pytest.fixture
def open_hub(steady_redis: RedisServer) -> Iterator[HubProcess]:
    """A fresh hub, in which no collector has run yet; it takes everybody, however many a second."""
    rates = ("HANDSHAKES_PER_S", "REQUESTS_PER_S", "REQUESTS_PER_ADDRESS")
    limits: dict[str, Any] = {f"BROADCASTER_HUB__{name}": "1000000" for name in rates}
    with HubProcess(steady_redis.url, None, **limits) as hub:
        yield hub.until_ready()


async def _one(port: int, way: Way) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        await way(port, (reader, writer))
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _come_and_go(port: int, way: Way) -> None:
    for _ in range(THOUSAND // BATCH):
        await asyncio.gather(*(_one(port, way) for _ in range(BATCH)))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_who_has_gone_leaves_nothing(open_hub: HubProcess, way: Way) -> None:
    """After a thousand that fill what is kept for reuse, a thousand more leave the memory as it is.

    Also for a while: what waits for the collector of cycles is found by it after ten thousand connections, of
    those that were there when it came after hundreds of thousands, and in one long pause.
    """
    memory = []
    for _ in range(2):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_come_and_go(open_hub.port, way))
        open_hub.until_connected(0)
        memory.append(memory_bytes(open_hub))
    assert memory[1] - memory[0] < GROWTH_BYTES
    assert_calm(open_hub)


def test_who_has_said_too_much_and_answers_the_close_is_not_cut(steady_redis: RedisServer) -> None:
    """1008 is a close like any other: answered, it is complete, and nobody has to wait for its deadline."""
    with (
        HubProcess(steady_redis.url, BROADCASTER_HUB__CLOSE_TIMEOUT_S="60") as hub,
        RawClient(hub.until_ready().port) as babbler,
    ):
        babbler.socket.sendall(client_frame(9) * 500)
        assert babbler.close_code() == 1008
        babbler.send(8, b"\x03\xf0")
        read_to_end(babbler)
        hub.until_connected(0)
        assert hub.stats()["aborted"] == 0
