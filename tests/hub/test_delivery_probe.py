"""The proof that events get through: what turns the hub red, how soon, and that it is green again after."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broadcaster.core.errors import RedisErrorReply
from broadcaster.redis.server import RedisServer
from broadcaster.settings import HistoryTable
from tests.hub.house import CHANNEL, HASTY, House, payload, store_by_script
from tests.support import (
    UNIT_S,
    Hub,
    HubThread,
    Proxy,
    RawClient,
    RedisClient,
    assert_calm,
    event_payload,
    eventually,
    frozen,
    in_loop,
    redis_client,
    until,
)

OTHER = "events.other"

# Without sockets: what must happen at one moment


async def proving(**hub: Any) -> House:
    house = await House.opened(prove_interval_s=0.02, **hub)
    await house.prove()
    return house


async def after_a_round(house: House) -> str:
    """The trouble after one more round."""
    looks: list[str] = []

    async def seen() -> None:
        looks.append("")

    before, house.link.meanwhile = house.link.meanwhile, seen
    await until(lambda: len(looks) >= 2, "no round")
    house.link.meanwhile = before
    return house.probe.problem


@in_loop
async def test_a_channel_that_is_being_opened_during_a_round_does_not_turn_it_red() -> None:
    """It was asked for before the round, and opened in the middle of it: Redis knew nothing of it when asked."""
    house = await proving()
    troubles: list[str] = []

    async def open_it() -> None:
        house.link.meanwhile = None
        house.channels.on_confirmed(OTHER)
        await until(lambda: house.channel(OTHER).sequencer.caught_up, "not opened")

    async def next_round() -> None:
        house.link.meanwhile = open_it

    house.link.meanwhile = next_round
    house.connect(f"channel={OTHER}")
    for _ in range(40):
        await asyncio.sleep(0.005)
        if house.probe.problem:
            troubles.append(house.probe.problem)
    assert house.channel(OTHER).sequencer.caught_up
    assert troubles == []


@in_loop
async def test_a_channel_that_is_not_opened_is_in_trouble_by_itself() -> None:
    """The hub is ready all the while."""
    house = await proving()
    house.connect(f"channel={OTHER}")
    assert await after_a_round(house) == ""
    said = f"not caught up yet: {OTHER}"  # as soon as its log has been read
    await until(lambda: house.channel(OTHER).trouble == said, "it is not said")
    assert house.channel().trouble == ""
    assert house.probe.healthy
    house.channels.on_confirmed(OTHER)
    await until(lambda: not house.channel(OTHER).trouble, "not opened")


@in_loop
async def test_the_default_channel_is_not_given_any_time() -> None:
    """It is always to be open: a hub that cannot hold it is not ready."""
    house = House(prove_interval_s=0.02)
    house.redis.on_publish = lambda probe: house.probe.take([probe])
    house.tasks.spawn(house.probe.run, "proofs")
    await until(lambda: CHANNEL in house.probe.problem, house.probe.problem)
    assert not house.probe.healthy
    house.channels.on_confirmed(CHANNEL)
    await until(lambda: house.probe.healthy, "never green")


@in_loop
async def test_a_connection_that_leads_to_another_process_is_opened_anew() -> None:
    """A proxy may keep it open through a failover: what was asked for at its beginning is of no use any more."""
    house = await proving()
    problems: list[str] = []
    house.redis.opened_to = house.redis.run + 7

    async def note() -> None:
        problems.append(house.probe.problem)

    house.link.meanwhile = note
    await until(lambda: house.redis.opened_to is None, "it is used on")
    await until(lambda: house.probe.healthy and len(problems) >= 3, "never green again")
    assert "another Redis process answers on the same connection" in problems


@in_loop
async def test_a_doubt_in_the_middle_of_a_round_outlives_it() -> None:
    """The round began before the subscription was lost: its success proves nothing."""
    house = await proving()
    doubted: list[bool] = []

    async def doubt() -> None:
        house.link.meanwhile = look
        house.probe.mark_suspect("lost in the middle")

    async def look() -> None:
        doubted.append(house.probe.healthy)
        house.link.meanwhile = None

    house.link.meanwhile = doubt
    await until(lambda: doubted, "no further round")
    assert doubted == [False]
    await until(lambda: house.probe.healthy, "never green")


@in_loop
async def test_channels_that_open_all_the_time_keep_no_hub_red() -> None:
    """Each asks for another round at once; that is no doubt of the one that goes on."""
    house = await proving()
    house.probe.mark_suspect("something has happened")
    numbers = iter(range(10_000))

    async def open_one() -> None:
        name = f"events.{next(numbers)}"
        house.connect(f"channel={name}").connection.connection_lost(None)
        house.dispatcher.on_confirmed(name)

    house.link.meanwhile = open_one
    await until(lambda: house.probe.healthy, "never green")
    assert next(numbers) > 0


@in_loop
async def test_a_probe_that_does_not_come_back_turns_it_red() -> None:
    """Also when an older one comes: only the last one counts."""
    house = await proving()
    house.probe._timeout_s = 0.05
    probes: list[bytes] = []
    house.redis.on_publish = probes.append
    await until(lambda: "no proof within" in house.probe.problem, "still green")
    house.redis.on_publish = lambda probe: house.probe.take([b"", probes[0]])
    rounds = house.probe.rounds
    await asyncio.sleep(0.3)
    assert not house.probe.healthy
    house.redis.on_publish = lambda probe: house.probe.take([probes[0], probe])
    await until(lambda: house.probe.healthy, "never green")
    assert house.probe.rounds > rounds


@in_loop
async def test_an_event_that_did_not_come_is_a_trouble_with_the_name_of_its_channel() -> None:
    """It is stored, the subscription did not bring it: red until the log has."""
    house = await proving()
    peer = house.connect()
    house.redis.gate.clear()
    sent = house.store(1)
    house.redis.gate.set()
    await until(lambda: house.probe.problem, "still green")
    assert house.probe.problem == f"stored events have not come over the subscription: {CHANNEL}"
    await until(lambda: house.probe.healthy, "never green")
    assert peer.told == sent


@in_loop
async def test_no_open_channel_is_forgotten_however_soon_its_position_expires() -> None:
    """The expiry is renewed three times before it is due, and not in every round."""
    house = await House.opened(prove_interval_s=0.02, history=HistoryTable(idle_expire_s=3))
    house.connect(f"channel={OTHER}")
    house.channels.on_confirmed(OTHER)
    await house.settle()
    looks = house.redis.looks
    house.clock.stop()
    await house.prove()
    for times in (1, 2, 3):
        await after_a_round(house)
        assert house.redis.looks == looks + 2 * times, "each of the two channels"
        house.clock.move(6.9)
        await after_a_round(house)
        assert house.redis.looks == looks + 2 * times
        house.clock.move(0.1)


@in_loop
async def test_an_expiry_that_could_not_be_renewed_is_renewed_in_the_next_round() -> None:
    """What counts is when it was renewed, not when that was tried."""
    house = await proving()
    looks = house.redis.looks
    house.clock.stop().move(60.0)
    house.redis.failures = 3
    await until(lambda: house.redis.looks > looks, "not renewed")
    assert not house.redis.failures


@in_loop
async def test_a_script_that_was_forgotten_is_no_matter_of_a_channel() -> None:
    """It is loaded again with the next connection."""
    house = await proving()
    looks = house.redis.looks
    house.redis.errors = {CHANNEL: {"EVALSHA": RedisErrorReply("NOSCRIPT No matching script.")}}
    house.clock.stop().move(60.0)
    assert await after_a_round(house) == ""
    assert house.probe.healthy
    house.redis.errors = {CHANNEL: {"EVALSHA": RedisErrorReply("WRONGTYPE a key of another type")}}
    house.clock.move(60.0)
    await until(lambda: house.channel().refusal is not None, "not noticed")
    assert house.redis.looks == looks


# With a real Redis


class Ward:
    """A hub whose subscription goes through a proxy, and its Redis."""

    def __init__(self, server: RedisServer, proxy: Proxy, hub: Hub, client: RedisClient) -> None:
        self.server, self.proxy, self.hub, self.client = server, proxy, hub, client

    def until_red(self, *words: str) -> str:
        """Until the hub is not ready, within 5 time units; the trouble, which has one of these words."""

        def red() -> str:
            status, body = self.hub.get("/health/ready")
            if status != 503:
                return ""
            assert body["ready"] is False
            trouble = str(body["trouble"])
            return trouble if not words or any(word in trouble for word in words) else ""

        return eventually(red, f"not red: {self.hub.get('/health/ready')}\n{self.hub.output}", within=5.0)

    def until_green(self) -> None:
        self.hub.until_ready()
        assert (
            self.hub.get("/health/ready")[1].items()
            >= {
                "ready": True,
                "redis": True,
                "stopping": False,
                "trouble": "",
            }.items()
        )

    def publish(self) -> str:
        position, heard = store_by_script(self.client, event_payload())
        assert heard == 1
        return position


@pytest.fixture(scope="module")
def house() -> Iterator[Ward]:
    with (
        RedisServer.start() as server,
        Proxy(server.port) as proxy,
        HubThread(server.url, BROADCASTER_REDIS__SUBSCRIBE_URL=proxy.url, **HASTY) as hub,
        redis_client(server) as client,
    ):
        yield Ward(server, proxy, hub, client)
        assert_calm(hub)


@pytest.fixture
def ward(house: Ward) -> Iterator[Ward]:
    """The hub, green before and after each test; then an event still gets through."""
    house.until_green()
    yield house
    house.until_green()
    with RawClient(house.hub.port) as client:
        eventually(lambda: house.hub.stats()["connected"], "not connected")
        position = house.publish()
        event = client.event()
        assert f"{event['epoch']}-{event['offset']}" == position
    house.hub.until_connected(0)


def test_it_is_proven_again_and_again(ward: Ward) -> None:
    """Each round is counted; the probes are no events, and its key in Redis does not stay."""
    proofs = ward.hub.stats()["proofs"]
    received = ward.hub.stats()["events_received"]
    eventually(lambda: ward.hub.stats()["proofs"] >= proofs + 3, "no further proofs")
    assert ward.hub.stats()["events_received"] == received
    keys = ward.client.command("KEYS", "broadcaster.hub.0.*")  # others announce the hub
    assert len(keys) == 1
    assert 0 < ward.client.command("TTL", keys[0]) <= 60


def test_a_frozen_redis_turns_it_red(ward: Ward) -> None:
    """Connections stay open, nothing is answered: red, no beats, and green again after."""
    with RawClient(ward.hub.port, subprotocol="broadcaster.v1") as client:
        assert client.event()["control"] == "welcome"
        client.beat(CHANNEL)
        with frozen(ward.server):
            ward.until_red()
            client.socket.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                for _ in range(100):
                    client.beat(CHANNEL)
                pytest.fail("it beats on")
        ward.until_green()
        client.socket.settimeout(10 * UNIT_S)
        client.beat(CHANNEL)


def test_a_subscription_that_is_taken_away_turns_it_red(ward: Ward) -> None:
    """Redis itself says so, first of one channel, then of all, that of the probes among them.

    They are subscribed to again, and events get through. (Of each channel it is logged once in a minute.)
    """
    with RawClient(ward.hub.port) as client:
        lines = len(ward.hub.lines)
        for noticed, channels in ((1, (CHANNEL,)), (2, ())):
            ward.proxy.inject("UNSUBSCRIBE", *channels)
            eventually(
                lambda: sum("was taken away" in line for line in ward.hub.lines[lines:]) == noticed,  # noqa: B023
                f"not noticed:\n{ward.hub.output}",
                within=5.0,
            )
            ward.hub.until_ready()
            ward.publish()
            assert client.event()["offset"]


def test_a_subscription_that_says_nothing_turns_it_red(ward: Ward) -> None:
    """Everything that Redis says is dropped on the way: open, and dead."""
    ward.proxy.deaf.set()
    try:
        ward.until_red()
        store_by_script(ward.client, event_payload())
    finally:
        ward.proxy.deaf.clear()


def test_stored_events_that_did_not_come_turn_it_red(ward: Ward) -> None:
    """An event that is in the log, and was not heard: it is red, then delivered, then green."""
    with RawClient(ward.hub.port) as client:
        epoch, _, offset = ward.publish().partition("-")
        assert client.event()["offset"] == int(offset)
        number = int(offset) + 1
        event = payload(number).replace(
            b"{", f'{{"channel":"{CHANNEL}","epoch":"{epoch}","offset":{number},'.encode(), 1
        )
        recovered = ward.hub.stats()["channels"][CHANNEL]["recovered"]
        ward.client.command("XADD", f"{{{CHANNEL}}}:log", f"{number}-0", "e", event)
        ward.client.command("HSET", f"{{{CHANNEL}}}:meta", "offset", number)
        assert CHANNEL in ward.until_red("stored events have not come")
        assert client.event()["offset"] == number
        assert ward.hub.stats()["channels"][CHANNEL]["recovered"] == recovered + 1


def test_a_redis_that_forgets_everything_turns_it_red(ward: Ward) -> None:
    """FLUSHALL: the channel's memory is gone; v1 clients are told, and it goes on in a new epoch."""
    with RawClient(ward.hub.port, subprotocol="broadcaster.v1") as client:
        epoch = client.event()["position"].partition("-")[0]
        ward.client.command("FLUSHALL")
        while (frame := client.event())["control"] != "gap":
            pass
        assert (frame["cause"], frame["epoch"], frame["last"]) == ("redis_restarted", epoch, None)
        assert frame["position"].endswith("-0")


def test_a_script_that_is_flushed_does_no_harm(ward: Ward) -> None:
    """The script is loaded again when it is needed."""
    ward.client.command("SCRIPT", "FLUSH")
    with RawClient(ward.hub.port, path="/ws?since=zz-1", subprotocol="broadcaster.v1") as client:
        while (frame := client.event()).get("control") != "gap":
            pass
        assert frame["epoch"] == "zz"


def test_the_proof_keeps_a_silent_channel_in_memory(ward: Ward) -> None:
    """While a hub listens, Redis does not forget where a channel stands that has had an event."""
    store_by_script(ward.client, event_payload())
    assert ward.client.command("TTL", f"{{{CHANNEL}}}:meta") > 86_400


def test_a_hub_that_seldom_probes_keeps_a_channel_that_is_soon_forgotten(redis: RedisServer) -> None:
    """It probes as often as that needs, whatever `hub.prove_interval_s` says."""
    with (
        HubThread(
            redis.url, BROADCASTER_HUB__PROVE_INTERVAL_S="60", BROADCASTER_HISTORY__IDLE_EXPIRE_S="1"
        ) as hub,
        redis_client(redis) as client,
    ):
        hub.until_ready()
        for _ in range(2):
            client.command("EXPIRE", f"{{{CHANNEL}}}:meta", 6)
            eventually(lambda: client.command("PTTL", f"{{{CHANNEL}}}:meta") > 6000, "not renewed", within=5.0)


# Rights


@contextlib.contextmanager
def rightful(*rights: str) -> Iterator[tuple[Hub, RedisClient]]:
    """A hub that logs in as a user of its own, who has these rights."""
    with RedisServer.start() as server, redis_client(server) as client:
        assert client.command("ACL", "SETUSER", "hub", "on", ">pw", "~*", "&*", "+@all", *rights) == b"OK"
        with HubThread(server.url.replace("//", "//hub:pw@"), **HASTY) as hub:
            yield hub, client


RIGHTS = ["-publish", "-set", "-evalsha", "-subscribe"]


@pytest.mark.parametrize("right", RIGHTS)
def test_a_missing_right_ends_the_hub_with_its_name(right: str) -> None:
    """Redis will not have us, for good: one line says what is missing, and nobody takes it for ready."""
    with rightful(right) as (hub, _):
        assert hub.wait() == 69
        assert hub.lines[-1].startswith("error: Redis says: NOPERM")
        assert right[1:] in hub.lines[-1]
        assert not any("ready: " in line for line in hub.lines)


@pytest.mark.parametrize("right", ["publish", "subscribe", "set"])
def test_a_right_that_is_taken_away_is_told_and_mended(right: str) -> None:
    """Within 5 s nobody takes it for ready any more, and it says why, once; given back, it is ready by itself."""
    with rightful() as (hub, client):
        hub.until_ready()
        client.command("ACL", "SETUSER", "hub", f"-{right}")
        if right == "subscribe":
            client.command("CLIENT", "KILL", "TYPE", "pubsub")
        eventually(lambda: hub.get("/health/ready")[0] == 503, "still ready", within=5.0)
        trouble = eventually(lambda: hub.get("/health/ready")[1]["trouble"], "no reason", within=5.0)
        eventually(lambda: "NOPERM" in hub.get("/health/ready")[1]["trouble"], f"not told: {trouble}", within=5.0)
        time.sleep(0.5)
        client.command("ACL", "SETUSER", "hub", f"+{right}")
        hub.until_ready()
        said = [line for line in hub.lines if "NOPERM" in line]
        assert said
        assert len(said) == len(set(said)), hub.output


# Replicas


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[RedisServer, RedisServer]]:
    """A master and its replica, each with a folder of its own: a replica writes what it is sent into a file."""
    for name in ("master", "replica"):
        (tmp_path / name).mkdir()
    with (
        RedisServer.start(None, "--dir", str(tmp_path / "master"), "--repl-diskless-sync-delay", "0") as master,
        RedisServer.start(
            *(None, "--dir", str(tmp_path / "replica"), "--replicaof", "127.0.0.1", str(master.port))
        ) as replica,
        redis_client(replica) as client,
    ):
        eventually(lambda: b"master_link_status:up" in client.command("INFO", "replication"), "no replication")
        yield master, replica


def test_a_replica_as_redis_url_is_red(pair: tuple[RedisServer, RedisServer]) -> None:
    """Nothing can be stored there; once it is a master, it is green."""
    _, replica = pair
    with HubThread(replica.url, **HASTY) as hub, redis_client(replica) as client:
        eventually(lambda: hub.get("/health/live")[0] == 200, "the hub does not start")
        eventually(lambda: "READONLY" in hub.get("/health/ready")[1]["trouble"], hub.output, within=5.0)
        assert hub.get("/health/ready")[0] == 503
        client.command("REPLICAOF", "NO", "ONE")
        hub.until_ready()
        assert "Traceback" not in hub.output


def test_subscribing_at_a_replica_is_proven_and_red_when_it_is_detached(
    pair: tuple[RedisServer, RedisServer],
) -> None:
    """Its connections are fine and it answers; but what is published does not get there, which turns it red."""
    master, replica = pair
    with (
        HubThread(master.url, BROADCASTER_REDIS__SUBSCRIBE_URL=replica.url, **HASTY) as hub,
        redis_client(replica) as client,
        redis_client(master) as publisher,
    ):
        hub.until_ready()
        with RawClient(hub.port) as subscriber:
            hub.until_connected(1)
            store_by_script(publisher, event_payload(1))
            assert subscriber.event()["sequence"] == 1
            client.command("REPLICAOF", "127.0.0.1", "1")
            eventually(lambda: hub.get("/health/ready")[0] == 503, "still green", within=5.0)
            store_by_script(publisher, event_payload(2))
            client.command("REPLICAOF", "127.0.0.1", str(master.port))
            hub.until_ready(within=20.0)
            assert subscriber.event()["sequence"] == 2
            store_by_script(publisher, event_payload(3))
            assert json.loads(subscriber.text())["sequence"] == 3
        assert_calm(hub)
