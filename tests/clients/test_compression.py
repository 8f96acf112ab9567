"""Compression as other people's clients ask for it: it is agreed on, and the events are what was published."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import pytest
from websockets.asyncio.client import connect

from broadcaster import Event
from broadcaster.redis.server import RedisServer
from tests.clients.conftest import Kit, Open
from tests.clients.programs import Happenings, node_has_websocket, until_opened
from tests.clients.publishing import WRITING, as_published, assert_got, of_size, on_the_wire, publish
from tests.support import UNIT_S, Hub, HubThread, assert_calm, in_loop

DATA: list[dict[str, Any]] = [
    {"number": 1},
    {"text": WRITING * 20},
    {"hosts": [f"srv-{number}.example.com" for number in range(300)]},
    of_size(60_000),
    of_size(65_536),
    {"last": True},
]
LARGE = 4
"""So many of them are worth it."""


@pytest.fixture(scope="module")
def hub(steady_redis: RedisServer) -> Iterator[Hub]:
    with HubThread(steady_redis.url) as hub:
        yield hub.until_ready()


@pytest.fixture(scope="module")
def port(way_to: Open, hub: Hub) -> Iterator[int]:
    with way_to(hub.port) as port:
        yield port


@pytest.mark.parametrize("kind", ["ws", "node", "chromium"])
def test_whoever_offers_it_gets_it(kit: Kit, port: int, hub: Hub, steady_redis: RedisServer, kind: str) -> None:
    """Two of a kind: each event is compressed once, and both get all of them intact."""
    if kind == "node" and not node_has_websocket():
        pytest.skip("this node has no WebSocket of its own: version 22 has")
    before = hub.stats()
    with kit.subscribe(kind, port) as one, kit.subscribe(kind, port, ("broadcaster.v1",)) as other:
        until_opened(one, other)
        assert isinstance(one, Happenings)
        assert "permessage-deflate" in one.extensions()
        hub.until_connected(2)
        assert hub.stats()["formats"] == {"plain": 0, "deflate": 2, "sse": 0}
        published = publish(steady_redis.url, *DATA)
        assert_got(one, published)
        assert_got(other, published)
    after = hub.stats()
    assert after["compressed"] - before["compressed"] == LARGE
    assert after["sent_bytes"] - before["sent_bytes"] < sum(len(event.payload) for event in published)
    hub.until_connected(0)
    assert_calm(hub)


async def by_websockets(url: str, count: int, opened: Callable[[], Awaitable[None]]) -> list[str]:
    async with connect(url, proxy=None) as socket:
        assert "permessage-deflate" in str(socket.response and socket.response.headers["Sec-WebSocket-Extensions"])
        await opened()
        texts = [str(await socket.recv()) for _ in range(count)]
        await socket.send("x" * 2000)  # compressed, as it was agreed on
        await (await socket.ping())
        return texts


async def by_aiohttp(url: str, count: int, opened: Callable[[], Awaitable[None]]) -> list[str]:
    async with aiohttp.ClientSession() as session, session.ws_connect(url, compress=15) as socket:
        assert socket.compress
        await opened()
        texts = [(await socket.receive_str(timeout=10 * UNIT_S)) for _ in range(count)]
        await socket.send_str("x" * 2000)
        await socket.ping()
        return texts


@pytest.mark.parametrize("client", [by_websockets, by_aiohttp])
@in_loop
async def test_libraries_get_it_and_may_compress_what_they_say(
    port: int, hub: Hub, steady_redis: RedisServer, client: Callable[..., Awaitable[list[str]]]
) -> None:
    """websockets by its default, aiohttp where it is asked to."""
    published: list[Event] = []

    async def opened() -> None:
        assert hub.stats()["formats"]["deflate"] == 1
        published.extend(await asyncio.to_thread(publish, steady_redis.url, *DATA))

    texts = await client(f"ws://127.0.0.1:{port}/ws", len(DATA), opened)
    assert [as_published(json.loads(text)) for text in texts] == [on_the_wire(event) for event in published]
    assert hub.stats()["closed"] == {}
    assert_calm(hub)
    await asyncio.to_thread(hub.until_connected, 0)
