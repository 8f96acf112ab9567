"""Many pages that open at once and ask for the past, of a hub that has nothing of it in its ring."""

from __future__ import annotations

import asyncio
import json
import urllib.request

import pytest

from broadcaster import Gap, Subscriber
from broadcaster.core.event import draft
from broadcaster.redis import stream
from broadcaster.redis.commands import CommandLink
from broadcaster.redis.server import RedisServer
from broadcaster.settings import HistoryTable, RedisTable, Settings
from tests.support import UNIT_S, Hub, HubThread, opened_by_library, redis_client, run_async

PAGES = 200
STORED = 300
WITHIN_S = 30 * UNIT_S


async def store(redis: RedisServer, channel: str, count: int) -> None:
    """Events as a publisher stores them, 50 in one call."""
    commands = CommandLink(RedisTable(url=redis.url), stream.LOAD)
    events = [draft("SERVER_DOWN", "server-a", number, data={"pad": "." * 100}) for number in range(1, count + 1)]
    batch = [(event.unpublished.event_id, event.stamp(1_795_744_800_000_000)) for event in events]
    try:
        for start in range(0, count, 50):
            await commands.execute(stream.store(channel, batch[start : start + 50], HistoryTable()))
    finally:
        commands.close()


async def opened(hub: Hub, query: str, wanted: int) -> list[int]:
    """A page: what has come when it has so many events."""
    connection = await opened_by_library(f"{hub.url}?{query}", subprotocols=["broadcaster.v1"])
    got: list[int] = []
    try:
        while len(got) < wanted:
            message = json.loads(await connection.recv())
            assert message.get("control") in (None, "welcome", "beat"), message
            if "event_id" in message:
                got.append(message["offset"])
    finally:
        connection.transport.abort()
    return got


@pytest.mark.parametrize(("query", "first"), [("last=50", STORED - 49), ("since=1h", 1), ("since=all", 1)])
def test_many_pages_that_open_at_once_are_served(steady_redis: RedisServer, query: str, first: int) -> None:
    """Each gets all that it has asked for, soon; they are read for all of them, and not once for each."""
    channel = f"events.openings.{query.replace('=', '.')}"

    async def story(hub: Hub) -> None:
        await store(steady_redis, channel, STORED)
        async with asyncio.timeout(WITHIN_S):
            every = [opened(hub, f"channel={channel}&{query}", STORED + 1 - first) for _ in range(PAGES)]
            for got in await asyncio.gather(*every):
                assert got == [*range(first, STORED + 1)]
        assert hub.stats()["pages_read"] < PAGES / 4

    with HubThread(steady_redis.url) as hub:
        run_async(story(hub.until_ready()))


def test_a_subscriber_begins_at_a_time_once(steady_redis: RedisServer, steady_hub: Hub) -> None:
    """What was stored since then, then what comes; after a lost connection it goes on at its position."""

    async def story() -> None:
        channel = "events.openings.subscriber"
        await store(steady_redis, channel, 3)
        numbers = []
        async with Subscriber(steady_hub.url, settings=Settings(), channels=[channel], since="10m") as subscriber:
            async for event in subscriber:
                numbers.append(event.sequence)
                if len(numbers) == 3:
                    connection = subscriber._connector.connection
                    assert connection is not None
                    connection.transport.abort()
                    await store(steady_redis, channel, 2)
                if len(numbers) == 5:
                    break
            assert (numbers, subscriber.reconnects, subscriber.gaps) == ([1, 2, 3, 1, 2], 1, 0)

    run_async(story())


def test_a_subscriber_is_told_what_has_expired(steady_redis: RedisServer, steady_hub: Hub) -> None:
    """A gap without a beginning, before the first event."""

    async def story() -> None:
        channel = "events.openings.expired"
        await store(steady_redis, channel, 10)
        with redis_client(steady_redis) as client:
            client.command("XTRIM", f"{{{channel}}}:log", "MAXLEN", "2")
        async with Subscriber(steady_hub.url, settings=Settings(), channels=[channel], since="all") as subscriber:
            gap, event = await subscriber.receive(), await subscriber.receive()
            assert isinstance(gap, Gap)
            assert (gap.cause, gap.first, gap.last) == ("expired", None, 8)
            assert getattr(event, "sequence", None) == 9

    run_async(story())


def test_a_stream_begins_at_a_time(steady_redis: RedisServer, steady_hub: Hub) -> None:
    """Over `/sse` as over `/ws`; a wrong time is a 400 that names the parameter."""
    channel = "events.openings.sse"
    run_async(store(steady_redis, channel, 3))
    url = f"http://127.0.0.1:{steady_hub.port}/sse?channel={channel}"
    with urllib.request.urlopen(f"{url}&since=30s", timeout=WITHIN_S) as answer:
        lines = [answer.readline() for _ in range(17)]
    assert sum(line.startswith(b'data: {"channel"') for line in lines) == 3
    status, body = steady_hub.get(f"/sse?channel={channel}&since=soon")
    assert (status, body["error"][:20]) == (400, "since is a position,")
