"""A publisher on another database than the hubs: Pub/Sub knows no databases, so both sides have to say it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from broadcaster import Publisher, Settings
from broadcaster.redis.server import RedisServer
from broadcaster.settings import HistoryTable, RedisTable, redis_database
from tests.support import HubThread, eventually, in_loop, run_async

SAID = "events are stored in database"


def publish(url: str, *, history: bool = True) -> int | None:
    """Publish two events; how many have heard the first one."""

    async def story() -> int | None:
        settings = Settings.model_construct(redis=RedisTable(url=url), history=HistoryTable(enabled=history))
        async with Publisher(settings) as publisher:
            published = await publisher.publish("T", "s")
            await publisher.publish("T", "s")  # nothing is said twice
        return published.heard

    return run_async(story())


def on(redis: RedisServer, database: int) -> str:
    return f"{redis.url.rpartition('/')[0]}/{database}"


@pytest.mark.parametrize("database", [0, 1, 3])
def test_both_sides_say_that_the_database_is_another_one(redis: RedisServer, database: int, caplog: Any) -> None:
    """What is heard by the hub and given to nobody is said, where it is published and where it is heard."""
    with HubThread(on(redis, 2)) as hub:
        hub.until_ready()
        with caplog.at_level(logging.WARNING, "broadcaster.publisher"):
            assert publish(on(redis, database)) == 1
        assert [line for line in caplog.messages if SAID in line] == [
            f"{SAID} {database} of Redis, and hubs read database 2: they are heard, and given to nobody; redis.url"
            " of both has to name the same one"
        ]
        hub.said("does their publisher use another database (redis.url)?")
        status, body = eventually(
            lambda: (found := hub.get("/health/ready"))[1]["trouble"] and found, "no warning"
        )
        assert status == 200
        assert "another database" in body["trouble"]


def test_the_same_database_is_nothing_to_say(redis: RedisServer, caplog: Any) -> None:
    """Also if another hub is on another one; nor is there anything without a hub, or where nothing is stored."""
    publish(on(redis, 1))
    with HubThread(on(redis, 1)) as hub, HubThread(on(redis, 2)) as other:
        hub.until_ready()
        other.until_ready()
        assert publish(on(redis, 1)) == 2
        assert publish(on(redis, 3), history=False) == 2
        assert hub.get("/health/ready")[1]["trouble"] == ""
    assert not [line for line in caplog.messages if SAID in line]


@in_loop
async def test_who_may_not_look_says_nothing(redis: RedisServer, caplog: Any) -> None:
    """Publishing goes on without that right."""
    hub = HubThread(on(redis, 0))
    await asyncio.to_thread(hub.until_ready)
    try:
        settings = Settings.model_construct(redis=RedisTable(url=on(redis, 1)))
        async with Publisher(settings) as publisher:
            await publisher._link._commands.execute(("ACL", "SETUSER", "default", "-pubsub"))
            assert (await publisher.publish("T", "s")).heard == 1
    finally:
        await asyncio.to_thread(hub.__exit__, None, None, None)
    assert not [line for line in caplog.messages if SAID in line]


URLS = {
    "redis://h": 0,
    "redis://h/": 0,
    "redis://h:1/7": 7,
    "rediss://u:p@h/3": 3,
    "redis://h?db=4": 4,
    "unix:///run/r.sock?db=5": 5,
    "unix:///run/6": 0,
}


@pytest.mark.parametrize(("url", "database"), URLS.items())
def test_a_url_names_its_database(url: str, database: int) -> None:
    """In the path, or as an option; a socket's path is none."""
    assert redis_database(url) == database
