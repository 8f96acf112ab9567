"""What a hub says of the Redis that it finds, before anything has gone wrong."""

from __future__ import annotations

import pytest

from broadcaster.redis.server import RedisServer
from broadcaster.redis.suitability import ASK_COMMANDS, ASK_SETTINGS, missing_commands, warnings
from tests.support import HubThread, eventually, redis_client

NEEDED = ASK_COMMANDS[2:]


@pytest.mark.parametrize("name", NEEDED)
def test_a_command_that_redis_does_not_have_is_named(name: str) -> None:
    with RedisServer.start(None, "--rename-command", name, "") as server, redis_client(server) as client:
        assert missing_commands(client.command(*ASK_COMMANDS)) == [name]


def test_a_hub_without_xadd_says_so_and_is_not_ready() -> None:
    """Nobody could publish, although the hub itself has everything that it needs; its log says so once, too."""
    with (
        RedisServer.start(None, "--rename-command", "XADD", "") as server,
        HubThread(
            server.url,
            BROADCASTER_HUB__PROVE_INTERVAL_S="0.05",
            BROADCASTER_REDIS__SILENCE_TIMEOUT_S="1",
        ) as hub,
    ):
        eventually(lambda: "no XADD" in hub.get("/health/ready")[1].get("trouble", ""), "not told", within=5.0)
        assert hub.get("/health/ready")[0] == 503
        line = hub.said("not ready: Redis has no XADD, ")
        assert "(take its rename-command out of redis.conf" in line
        before = hub.stats()["uptime_s"]
        eventually(lambda: hub.stats()["uptime_s"] > before + 0.5, "time stands still", within=5.0)
        assert sum("no XADD" in line for line in hub.lines) == 1


SETTINGS = {
    "as it comes": ((), []),
    "without a limit nothing is evicted": (("--maxmemory-policy", "allkeys-lru"), []),
    "nothing is evicted": (("--maxmemory", "100mb", "--maxmemory-policy", "noeviction"), []),
    "all is evicted": (
        ("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"),
        ["is allkeys"],
    ),
    "what expires is evicted": (("--maxmemory", "100mb", "--maxmemory-policy", "volatile-ttl"), ["volatile-ttl"]),
    "hubs are cut off": (("--client-output-buffer-limit", "pubsub 1mb 0 0"), ["pubsub is 1048576 bytes"]),
    "hubs are never cut off": (("--client-output-buffer-limit", "pubsub 0 0 0"), []),
}


@pytest.mark.parametrize(("arguments", "words"), SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_that_cost_events_are_told_with_the_remedy(arguments: tuple[str, ...], words: list[str]) -> None:
    with RedisServer.start(None, *arguments) as server, redis_client(server) as client:
        found = warnings(*(client.command(*command) for command in ASK_SETTINGS))
    assert len(found) == len(words)
    assert all(word in text and "CONFIG SET" in text for word, text in zip(words, found, strict=True))


def test_a_hub_says_it_once() -> None:
    policy = ("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    with (
        RedisServer.start(None, *policy) as server,
        HubThread(server.url, BROADCASTER_HUB__PROVE_INTERVAL_S="0.05") as hub,
    ):
        hub.until_ready()
        rounds = hub.stats()["uptime_s"]
        eventually(lambda: hub.stats()["uptime_s"] > rounds + 1.2, "time stands still", within=5.0)
        assert sum("maxmemory-policy" in line for line in hub.lines) == 1


@pytest.mark.parametrize("reply", [None, b"OK", [], ["x"], RuntimeError("NOPERM"), [b"maxmemory-policy"]])
def test_a_redis_that_does_not_tell_is_taken_as_it_is(reply: object) -> None:
    """A hub need not have the rights to ask."""
    assert missing_commands(reply) == []
    assert warnings(reply, reply) == []
