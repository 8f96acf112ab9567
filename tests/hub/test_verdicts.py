"""Verdicts per channel: what Redis refuses for one channel is that channel's trouble, and nobody else's."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

from broadcaster.core.errors import RedisErrorReply, RedisRefused
from broadcaster.core.runtime import LIMITS
from broadcaster.redis.server import RedisServer
from broadcaster.settings import ChannelsTable
from broadcaster.wire import Refusal, Target
from tests.hub.house import CHANNEL, HASTY, House, store_by_script, turns
from tests.support import (
    ROOT,
    UNIT_S,
    Hub,
    HubThread,
    RawClient,
    RedisClient,
    event_payload,
    eventually,
    in_loop,
    redis_client,
    until,
)

OTHER = "events.other"

ERRORS = [RedisRefused("Redis says: NOPERM"), RedisErrorReply("WRONGTYPE Operation against a key")]


# Without sockets


async def two_channels(**arguments: Any) -> House:
    """A hub that is ready, with two channels open and proven."""
    house = await House.opened(prove_interval_s=0.02, beat_interval_s=0.1, **arguments)
    house.connect(f"channel={OTHER}")
    house.channels.on_confirmed(OTHER)
    await house.prove()
    await until(lambda: not house.channel(OTHER).trouble, "not opened")
    return house


def wait_out(house: House) -> None:
    """It has been refused for long enough."""
    house.channel(OTHER)._refused_at -= LIMITS.unavailable_s
    house.timer.tick()


@pytest.mark.parametrize("word", ["HMGET", "EVALSHA"])
@pytest.mark.parametrize("error", ERRORS, ids=["right", "type"])
@in_loop
async def test_a_channel_that_redis_refuses_costs_only_its_own_clients(word: str, error: Exception) -> None:
    """The hub stays ready, others get heartbeats and events; when it is mended, everybody is let in again."""
    house = await two_channels()
    mine, others = house.connect(f"channel={OTHER}", v1=True), house.connect(v1=True)
    both = house.connect(f"channel={CHANNEL}&channel={OTHER}", v1=True)
    house.redis.errors[OTHER] = {word: error}
    house.hear(house.store(2, channel=OTHER)[1:], OTHER)  # a hole: the log has to be read
    await until(lambda: house.channel(OTHER).refusal is error, "not noticed")
    assert house.probe.healthy
    house.timer.tick()
    assert not mine.connection.closing, "it may be over in a moment"
    wait_out(house)
    assert mine.told[-1] == both.told[-1] == "close 4010"
    refused = house.admission.admit(Target.parse(f"/ws?channel={OTHER}"), "192.0.2.9")
    assert isinstance(refused, Refusal)
    assert (refused.status, refused.retry_after_s) == (503, LIMITS.retry_after_s)
    assert house.admission.refused["channel_unavailable"] == 1
    [event] = house.publish(1)
    for _ in range(2):
        house.timer.tick()
    await turns()
    assert [kind if isinstance(kind, str) else kind == event for kind in others.told] == ["welcome", True, "beat"]
    house.redis.errors.clear()
    await until(lambda: house.channel(OTHER).refusal is None, "never mended")
    assert isinstance(house.connect(f"channel={OTHER}", v1=True).connection.memberships, tuple)


@in_loop
async def test_the_default_channel_that_is_of_a_wrong_type_turns_only_itself_and_the_hub_red() -> None:
    """The hub's readiness is that of its default channel; the beats of the others go on."""
    house = await two_channels()
    default, others = house.connect(v1=True), house.connect(f"channel={OTHER}", v1=True)
    house.redis.errors[CHANNEL] = {"HMGET": ERRORS[1]}
    await until(lambda: not house.probe.healthy, "still green")
    assert house.probe.problem == "Redis says: WRONGTYPE Operation against a key"
    for _ in range(2):
        house.timer.tick()
    await turns()
    assert (default.told[1:], others.told[1:]) == ([], ["beat"])
    house.redis.errors.clear()
    await until(lambda: house.probe.healthy, "never green")


@in_loop
async def test_the_default_channel_that_is_refused_is_told_and_served_again() -> None:
    """Rights and passwords are changed by people, and changed back."""
    house = await two_channels()
    house.redis.errors[CHANNEL] = {"HMGET": ERRORS[0]}
    await until(lambda: "NOPERM" in house.probe.problem, "not told")
    house.redis.errors.clear()
    await until(lambda: house.probe.healthy, "not served again")
    assert not house.tasks.failed.done()


@in_loop
async def test_the_default_channel_that_was_refused_from_the_beginning_ends_the_hub() -> None:
    """Nothing can be served without it, and somebody is there to read why."""
    house = House(2**18, prove_interval_s=0.02)
    house.redis.errors[CHANNEL] = {"HMGET": ERRORS[0]}
    house.channels.on_confirmed(CHANNEL)
    house.redis.on_publish = lambda probe: house.probe.take([probe])
    house.tasks.spawn(house.probe.run, "proofs")
    with pytest.raises(RedisRefused, match="NOPERM"):
        await house.tasks.failed


@in_loop
async def test_one_that_resumes_from_a_log_that_cannot_be_read_is_closed() -> None:
    """Those that are live need no log, and stay."""
    house = await House.opened(ring_bytes=2**18, stored=2000)
    live = house.connect(v1=True)
    house.redis.errors[CHANNEL] = {"XRANGE": ERRORS[1]}
    resuming = house.connect("since=e1-0", v1=True)
    await until(lambda: house.redis.asked > 3, "not asked again")
    assert not resuming.connection.closing
    resuming.connection.memberships[0].behind_since -= LIMITS.unavailable_s
    await until(lambda: resuming.told == ["close 4010"], "not closed")
    [event] = house.publish(1)
    assert live.told == ["welcome", event]
    house.redis.errors.clear()
    again = house.connect("since=e1-0", v1=True)
    await house.until_live(again)
    assert len(again.events()) == 2001


# With a real Redis

ALLOWED: dict[str, Any] = {"BROADCASTER_CHANNELS__ALLOW": '["events.*", "orders.*"]'}


@contextlib.contextmanager
def shipped_rights() -> Iterator[tuple[Hub, RedisClient]]:
    """A hub that logs in with the rights of config/redis.acl, and a client that may do everything."""
    with RedisServer.start() as server, redis_client(server) as client:
        for line in (ROOT / "config" / "redis.acl").read_text().splitlines():
            if words := re.fullmatch(r"user (hub|publisher) (.*)", line):
                assert client.command("ACL", "SETUSER", words[1], *words[2].split()) == b"OK"
        with HubThread(server.url.replace("//", "//hub:change-me-hub@"), **HASTY, **ALLOWED) as hub:
            yield hub.until_ready(), client
            hub.until_ready()  # just now a probe may have been late
            assert "Traceback" not in hub.output


def assert_closed(client: RawClient, *words: str) -> None:
    """The hub closes a client within 5 s, and its reason has these words."""
    client.socket.settimeout(5 * UNIT_S)
    assert client.close_code() == 4010
    reason = client.frames[-1][1][2:].decode()
    assert all(word in reason for word in words), reason


def until_served(hub: Hub, client: RedisClient, channel: str) -> None:
    """Until a channel that is asked for again is served."""

    def served() -> bool:
        with (
            contextlib.suppress(AssertionError, EOFError),
            RawClient(hub.port, path=f"/ws?channel={channel}", subprotocol="broadcaster.v1") as again,
        ):
            if b" 101 " not in again.response:
                return False
            assert again.event()["control"] == "welcome"
            store_by_script(client, event_payload(7), channel)
            return again.event().get("sequence") == 7
        return False

    eventually(served, f"{channel} is not served again:\n{hub.output}")


def test_a_channel_that_the_hub_may_not_subscribe_to_is_told_so_and_served_when_it_may() -> None:
    """The rights as they are shipped, and a channel that is allowed in broadcaster.toml: no silent loss."""
    with shipped_rights() as (hub, client), RawClient(hub.port, subprotocol="broadcaster.v1") as other:
        with RawClient(hub.port, path="/ws?channel=orders.eu", subprotocol="broadcaster.v1") as asking:
            assert_closed(asking, "orders.eu")
        with RawClient(hub.port, path="/ws?channel=orders.eu") as asking:
            assert b" 503 " in asking.response
            assert b"Retry-After: 5" in asking.response
        assert hub.stats()["channels"]["orders.eu"]["trouble"]
        other.beat(CHANNEL)
        client.command("ACL", "SETUSER", "hub", "&orders.*")
        until_served(hub, client, "orders.eu")
        other.beat(CHANNEL)


def test_a_right_that_is_taken_away_closes_the_clients_of_that_channel_only() -> None:
    """Within 5 s; when it is given back, they are served again by themselves."""
    with shipped_rights() as (hub, client), RawClient(hub.port, subprotocol="broadcaster.v1") as other:
        client.command("ACL", "SETUSER", "hub", "&orders.*")
        with RawClient(hub.port, path="/ws?channel=orders.eu") as live:
            until_served(hub, client, "orders.eu")
            client.command("ACL", "SETUSER", "hub", "resetchannels", "&events.*", "&broadcaster.hub.*")
            assert_closed(live, "orders.eu")
        other.beat(CHANNEL)
        client.command("ACL", "SETUSER", "hub", "&orders.*")
        until_served(hub, client, "orders.eu")


def test_keys_that_the_hub_may_not_read_do_not_end_it() -> None:
    """A client named that channel: it must not be able to end the process."""
    with shipped_rights() as (hub, client), RawClient(hub.port, subprotocol="broadcaster.v1") as other:
        keys = [f"~{{{name}}}:{kind}" for name in ("events.*",) for kind in ("meta", "log", "id:*")]
        client.command("ACL", "SETUSER", "hub", "resetkeys", "~broadcaster.hub.*", *keys, "&orders.*")
        with RawClient(hub.port, path="/ws?channel=orders.eu") as asking:
            assert_closed(asking, "orders.eu")
        other.beat(CHANNEL)
        client.command("ACL", "SETUSER", "hub", "~{*}:meta", "~{*}:log", "~{*}:id:*")
        until_served(hub, client, "orders.eu")


@pytest.mark.parametrize("kind", ["meta", "log"])
def test_a_key_of_a_wrong_type_is_the_trouble_of_its_channel(kind: str) -> None:
    """Somebody has written something else there: clients that it concerns are closed, others feel nothing."""
    with shipped_rights() as (hub, client), RawClient(hub.port, subprotocol="broadcaster.v1") as other:
        store_by_script(client, event_payload(1), OTHER)
        [epoch] = client.command("HMGET", f"{{{OTHER}}}:meta", "epoch")
        client.command("DEL", f"{{{OTHER}}}:{kind}")
        client.command("SET", f"{{{OTHER}}}:{kind}", "somebody else's")
        since = f"&since={epoch.decode()}-0"
        with RawClient(hub.port, path=f"/ws?channel={OTHER}{since}", subprotocol="broadcaster.v1") as asking:
            assert_closed(asking, OTHER)
        other.beat(CHANNEL)
        client.command("DEL", f"{{{OTHER}}}:{kind}")
        until_served(hub, client, OTHER)


def test_the_default_channel_of_a_wrong_type_is_red_and_the_others_go_on() -> None:
    """It is told; and mended, it is green by itself."""
    with (
        shipped_rights() as (hub, client),
        RawClient(hub.port, path=f"/ws?channel={OTHER}", subprotocol="broadcaster.v1") as other,
    ):
        other.beat(OTHER)
        client.command("DEL", f"{{{CHANNEL}}}:meta")
        client.command("SET", f"{{{CHANNEL}}}:meta", "somebody else's")
        eventually(lambda: hub.get("/health/ready")[0] == 503, "still green", within=5.0)
        assert "WRONGTYPE" in hub.get("/health/ready")[1]["trouble"]
        other.beat(OTHER)
        store_by_script(client, event_payload(3), OTHER)
        while other.event().get("sequence") != 3:
            pass
        client.command("DEL", f"{{{CHANNEL}}}:meta")
        hub.until_ready()


@in_loop
async def test_an_allowed_channel_is_asked_for_in_vain_only_while_it_is_refused() -> None:
    """Nothing is kept of a refusal once its channel is closed."""
    house = await two_channels(channels=ChannelsTable(linger_s=0.05))
    house.redis.errors[OTHER] = {"HMGET": ERRORS[1]}
    await until(lambda: house.channel(OTHER).refusal is not None, "not noticed")
    wait_out(house)
    for connection in house.registry.everyone():
        connection.connection_lost(None)
    await asyncio.sleep(0.1)
    house.timer.tick()
    assert OTHER not in house.channels.open
    assert not house.channels.is_unavailable(OTHER)
