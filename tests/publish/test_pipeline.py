"""One ordered pipeline of events to Redis: nothing twice, nothing missing, nothing out of order, whatever happens.

Events here are numbers in the order in which they were sent; what Redis has stored is read back with XRANGE.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hiredis
import pytest

from broadcaster.core.errors import RedisRefused, RedisUnavailable
from broadcaster.core.position import Position
from broadcaster.publish.pipeline import Outcome, Pending, PublishPipeline
from broadcaster.redis import stream
from broadcaster.redis.connection import RedisConnection
from broadcaster.redis.server import RedisServer
from broadcaster.redis.stream import Stored
from broadcaster.settings import HistoryTable, PublisherTable, Settings
from tests.support import (
    UNIT_S,
    Proxy,
    RedisClient,
    connections_taken,
    dead,
    free_port,
    frozen,
    hasty,
    in_loop,
    next_reply,
    redis_client,
    stand_in,
    stored_events,
    until,
)

CHANNEL = "events.critical"


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """A Redis of the test's own that ends at once when told to: there are many in this file."""
    with RedisServer.start(None, "--hz", "500") as server:
        yield server


def settings_for(
    url: str,
    *,
    stored: bool = True,
    deadline_s: float = 10.0,
    max_unanswered: int = 10_000,
    **redis: float,
) -> Settings:
    """Settings that notice and retry soon, and by default wait longer than any fault here lasts."""
    return Settings.model_construct(
        redis=hasty(url, **redis),
        history=HistoryTable(enabled=stored, max_events=1_000_000),
        publisher=PublisherTable(publish_deadline_s=deadline_s * UNIT_S, max_unanswered=max_unanswered),
    )


@contextlib.asynccontextmanager
async def publishing(url: str, **settings: Any) -> AsyncIterator[PublishPipeline]:
    """A connected link that is closed with the block."""
    link = PublishPipeline(settings_for(url, **settings))
    await link.connect()
    try:
        yield link
    finally:
        link.close()


def send(link: PublishPipeline, *numbers: int, channel: str = CHANNEL) -> list[Pending]:
    """Send some events in one write."""
    return link.send(channel, [(f"id-{number}", b'{"n":%d}' % number) for number in numbers])


async def publish(link: PublishPipeline, *numbers: int, channel: str = CHANNEL) -> list[Stored | RedisUnavailable]:
    return await link.settle(send(link, *numbers, channel=channel))


def assert_stored(outcomes: Sequence[Outcome]) -> list[Position]:
    """All of them are stored; where."""
    assert all(isinstance(outcome, Stored) for outcome in outcomes), outcomes
    return [outcome.position for outcome in outcomes if isinstance(outcome, Stored) and outcome.position]


def offsets(outcomes: Sequence[Outcome]) -> list[int]:
    return [position.offset for position in assert_stored(outcomes)]


def errors(outcomes: Sequence[Outcome], count: int) -> str:
    """All of them have failed, so many; the first one's words."""
    assert len(outcomes) == count
    assert all(isinstance(outcome, RedisUnavailable) for outcome in outcomes), outcomes
    return str(outcomes[0])


def in_stream(server: RedisServer | int) -> list[int]:
    """The numbers that are stored, in order."""
    with redis_client(server) as client:
        entries = stored_events(client, CHANNEL)
    return [json.loads(payload)["n"] for _, payload in entries]


async def stream_of(server: RedisServer | int) -> list[int]:
    return await asyncio.to_thread(in_stream, server)


async def until_stream(server: RedisServer | int, numbers: list[int]) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + 10 * UNIT_S
    while (found := await stream_of(server)) != numbers:
        assert loop.time() < deadline, f"never stored: {found}"
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def ear(url: str) -> AsyncIterator[list[int]]:
    """The numbers that are heard on the channel, as they come."""
    heard: list[int] = []

    def on_messages(messages: dict[bytes, list[bytes]]) -> None:
        heard.extend(json.loads(payload)["n"] for payloads in messages.values() for payload in payloads)

    link = await RedisConnection.open(url, timeout_s=5 * UNIT_S, on_messages=on_messages)
    await link.subscribe(CHANNEL)[0]
    try:
        yield heard
    finally:
        link.abort()
        await link.lost


@contextlib.asynccontextmanager
async def proxy_to(server: RedisServer) -> AsyncIterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


# In quiet times


@in_loop
async def test_an_event_is_stored_and_heard(redis: RedisServer) -> None:
    """Per event, in order: where it is stored and how many subscriptions heard it."""
    async with publishing(redis.url) as link:
        first = await publish(link, 1, 2)
        assert [outcome.receivers for outcome in first if isinstance(outcome, Stored)] == [0, 0]
        async with ear(redis.url) as heard, ear(redis.url):
            second = await publish(link, 3)
            assert [outcome.receivers for outcome in second if isinstance(outcome, Stored)] == [2]
            assert offsets([*first, *second]) == [1, 2, 3]
            await until(lambda: heard == [3], f"not heard: {heard}")
        other = await publish(link, 4, channel="events.other")
        assert offsets(other) == [1]
    assert await stream_of(redis) == [1, 2, 3]


SIZES: list[tuple[int, int]] = [(1, 10), (63, 10), (64, 10), (65, 10), (1000, 10), (100, 10_000), (3, 500_000)]


@pytest.mark.parametrize(("count", "size"), SIZES, ids=[f"{count} of {size} bytes" for count, size in SIZES])
@in_loop
async def test_batches_of_every_size_are_stored_in_order(redis: RedisServer, count: int, size: int) -> None:
    """However many steps Redis needs for it: one outcome per event, in order, each with the next offset."""
    padding = b"x" * size
    events = [(f"id-{n}", b'{"n":%d,"x":"%b"}' % (n, padding)) for n in range(count)]
    async with publishing(redis.url) as link:
        outcomes = await link.settle(link.send(CHANNEL, events))
        assert offsets(outcomes) == list(range(1, count + 1))
        assert await stream_of(redis) == list(range(count))


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not stored"])
@in_loop
async def test_nothing_to_publish_is_done_at_once(redis: RedisServer, stored: bool) -> None:
    """An empty batch has no outcomes, and nothing behind it waits for it."""
    async with publishing(redis.url, stored=stored) as link:
        async with asyncio.timeout(2 * UNIT_S):
            assert await link.settle([]) == []
            assert await publish(link) == []
            [after] = await publish(link, 1)
        assert isinstance(after, Stored)


@in_loop
async def test_a_user_without_the_right_to_ask_for_the_time_is_told_once(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """With the ACL of an earlier version events are stored all the same; they do not say when."""
    with redis_client(redis) as client:
        client.command("ACL", "SETUSER", "default", "-time")
    async with publishing(redis.url) as link:
        assert offsets([*await publish(link, 1), *await publish(link, 2, 3)]) == [1, 2, 3]
    assert [record.message for record in caplog.records if "TIME" in record.message] == [
        "Redis refuses TIME to this user: events do not say when they were stored (+time)"
    ]


@in_loop
async def test_what_was_stored_before_is_answered_as_it_was(redis: RedisServer) -> None:
    """The same event over another link has its first position; who heard it is not known any more."""
    async with publishing(redis.url) as one, publishing(redis.url) as other:
        [first] = await publish(one, 1)
        mixed = await publish(other, 2, 1, 3)
        assert isinstance(first, Stored)
        assert mixed[1] == Stored(first.position, None)
        assert offsets(mixed) == [2, 1, 3]
    assert await stream_of(redis) == [1, 2, 3]


# Many publishers on one link


@dataclass
class Crowd:
    """Publishers who share a link, and all they have sent, in order."""

    link: PublishPipeline
    numbers: Iterator[int]
    sent: list[int]
    outcomes: dict[int, Outcome]
    stopping: bool = False

    async def publish_on_and_on(self, chance: random.Random) -> None:
        while not self.stopping:
            numbers = list(itertools.islice(self.numbers, chance.choice([1, 1, 1, 2, 70])))
            pending = send(self.link, *numbers)
            self.sent += numbers
            self.outcomes |= zip(numbers, await self.link.settle(pending), strict=True)

    async def until_published(self, more: int) -> None:
        target = len(self.outcomes) + more
        await until(lambda: len(self.outcomes) >= target, f"only {len(self.outcomes)} published")

    def assert_whole(self, found: list[int]) -> None:
        """Everything is stored once and in order, and everybody was told where."""
        assert found == self.sent == list(range(len(self.sent)))
        positions = assert_stored([self.outcomes[number] for number in self.sent])
        assert [position.offset for position in positions] == list(range(1, len(self.sent) + 1))


@contextlib.asynccontextmanager
async def crowd(link: PublishPipeline, size: int = 8) -> AsyncIterator[Crowd]:
    """Some publishers on one link, each with its next event as soon as the last one is answered."""
    people = Crowd(link, itertools.count(), [], {})
    tasks = [asyncio.create_task(people.publish_on_and_on(random.Random(seed))) for seed in range(size)]
    try:
        await people.until_published(100)
        yield people
        await people.until_published(100)
        people.stopping = True
        await asyncio.wait_for(asyncio.gather(*tasks), 15 * UNIT_S)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@in_loop
async def test_many_publishers_on_one_link_keep_their_order(redis: RedisServer) -> None:
    """Events are stored in the order in which `send` was called, whoever called it."""
    async with publishing(redis.url) as link, crowd(link, 30) as people:
        await people.until_published(2000)
    people.assert_whole(await stream_of(redis))


Fault = Callable[[RedisServer, Proxy, Crowd], Awaitable[None]]


async def cut_connections(server: RedisServer, proxy: Proxy, people: Crowd, times: int = 10) -> None:
    for _ in range(times):
        proxy.cut()
        await people.until_published(30)


async def lose_replies(server: RedisServer, proxy: Proxy, people: Crowd, times: int = 10) -> None:
    for _ in range(times):
        proxy.withhold()
        await asyncio.sleep(0.01)
        proxy.cut()
        proxy.let_through()
        await people.until_published(30)


async def kill_clients(server: RedisServer, proxy: Proxy, people: Crowd, times: int = 10) -> None:
    def kill() -> None:
        with redis_client(server) as client:
            client.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    for _ in range(times):
        await asyncio.to_thread(kill)
        await people.until_published(30)


async def freeze(server: RedisServer, proxy: Proxy, people: Crowd) -> None:
    for seconds in (0.1, 0.4, 0.1):  # silent for less and for more than the timeout
        with frozen(server):
            await asyncio.sleep(seconds * UNIT_S)
        await people.until_published(30)


async def flush_scripts(server: RedisServer, proxy: Proxy, people: Crowd, times: int = 10) -> None:
    def flush() -> None:
        with redis_client(server) as client:
            assert client.command("SCRIPT", "FLUSH") == b"OK"

    for _ in range(times):
        await asyncio.to_thread(flush)
        await people.until_published(30)


async def all_at_once(server: RedisServer, proxy: Proxy, people: Crowd) -> None:
    for _ in range(3):
        with frozen(server):
            await asyncio.sleep(0.05)
            proxy.cut()
            await asyncio.sleep(0.05)
        await flush_scripts(server, proxy, people, times=3)
        await lose_replies(server, proxy, people, times=3)


FAULTS: dict[str, Fault] = {
    "connections are cut": cut_connections,
    "replies are lost": lose_replies,
    "Redis hangs up": kill_clients,
    "Redis freezes": freeze,
    "scripts are flushed": flush_scripts,
    "all of it": all_at_once,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
@in_loop
async def test_nothing_twice_nothing_missing_nothing_out_of_order(redis: RedisServer, fault: Fault) -> None:
    """Whatever happens to the connection while many publish: all is stored once, in order, and answered."""
    silence_s = 0.25 * UNIT_S
    async with (
        proxy_to(redis) as proxy,
        publishing(proxy.url, silence_timeout_s=silence_s) as link,
        crowd(link) as people,
    ):
        await fault(redis, proxy, people)
    people.assert_whole(await stream_of(redis))


@in_loop
async def test_a_redis_that_keeps_its_data_is_killed_and_comes_back(tmp_path: Path) -> None:
    """With an append-only file a kill -9 in the middle of it loses nothing and doubles nothing."""
    keep = ("--hz", "500", "--dir", str(tmp_path), "--appendonly", "yes", "--appendfsync", "always")
    async with contextlib.AsyncExitStack() as stack:

        async def start(port: int | None) -> RedisServer:
            server = await asyncio.to_thread(RedisServer.start, port, *keep)
            stack.push_async_callback(asyncio.to_thread, server.stop)
            return server

        server = await start(None)
        async with publishing(server.url) as link, crowd(link) as people:
            for _ in range(3):
                await asyncio.to_thread(server.kill)
                server = await start(server.port)
                await people.until_published(100)
        people.assert_whole(await stream_of(server))
        epochs = [position.epoch for position in assert_stored([people.outcomes[n] for n in people.sent])]
        assert len({*epochs}) == len([*itertools.groupby(epochs)]) == 4


@in_loop
async def test_a_redis_that_forgets_everything_begins_an_epoch(redis: RedisServer) -> None:
    """What was in flight when Redis died is stored in the next one, in order; no position means two events."""
    async with contextlib.AsyncExitStack() as stack:
        async with publishing(redis.url) as link, crowd(link) as people:
            revive = await stack.enter_async_context(dead(redis))
            again = await revive()
            await people.until_published(100)
        found = await stream_of(again)
    positions = assert_stored([people.outcomes[number] for number in people.sent])
    assert len(set(positions)) == len(positions)
    epoch = positions[-1].epoch
    assert found == [number for number, place in zip(people.sent, positions, strict=True) if place.epoch == epoch]
    assert [place.offset for place in positions if place.epoch == epoch] == list(range(1, len(found) + 1))


# The unknown outcome


@in_loop
async def test_what_was_done_before_the_connection_was_cut_is_not_done_again(redis: RedisServer) -> None:
    """It is stored and the reply is lost: the retry has the same position, and nobody hears it twice."""
    async with proxy_to(redis) as proxy, publishing(proxy.url) as link, ear(redis.url) as heard:
        assert offsets(await publish(link, 1)) == [1]
        proxy.withhold()
        sent = [send(link, 2, 3), send(link, 4)]
        await until_stream(redis, [1, 2, 3, 4])
        positions = [position for position, _ in await asyncio.to_thread(places, redis)]
        proxy.cut()
        proxy.let_through()
        outcomes = [outcome for pending in sent for outcome in await link.settle(pending)]
        assert outcomes == [Stored(position, None) for position in positions[1:]]
        assert offsets(await publish(link, 5)) == [5]
        await until(lambda: heard == [1, 2, 3, 4, 5], f"heard: {heard}")
    assert await stream_of(redis) == [1, 2, 3, 4, 5]


def places(server: RedisServer) -> list[tuple[Position, int]]:
    """Position and number of everything that is stored."""
    with redis_client(server) as client:
        entries = stored_events(client, CHANNEL)
    fields = [json.loads(payload) for _, payload in entries]
    return [(Position(each["epoch"], each["offset"]), each["n"]) for each in fields]


@in_loop
async def test_a_retry_in_the_next_life_of_redis_takes_no_position_of_the_first(redis: RedisServer) -> None:
    """A position that somebody has been told never comes to mean another event."""
    async with (
        proxy_to(redis) as proxy,
        publishing(proxy.url) as unlucky,
        publishing(redis.url) as other,
    ):
        proxy.withhold()
        sent = send(unlucky, 1)
        await until_stream(redis, [1])
        [before] = await publish(other, 2)
        async with dead(redis) as revive:
            proxy.cut()
            proxy.let_through()
            again = await revive()
            [retried] = await unlucky.settle(sent)
            [after] = await publish(other, 3)
            assert await stream_of(again) == [1, 3]
    assert_stored([retried])
    assert set(assert_stored([before])).isdisjoint(assert_stored([after]))


@in_loop
async def test_two_publishers_after_a_flush_of_scripts_keep_their_orders(redis: RedisServer) -> None:
    """What a publisher sends stays in order also when another one loads the script in the middle of it."""
    padding = b"x" * 14_000  # two events are more than Redis reads at a time
    async with publishing(redis.url) as link:
        with redis_client(redis) as other:
            for number in range(0, 10, 2):
                assert await asyncio.to_thread(other.command, "SCRIPT", "FLUSH") == b"OK"
                events = [(f"id-{n}", b'{"n":%d,"x":"%b"}' % (n, padding)) for n in (number, number + 1)]
                with frozen(redis):  # so that all three wait for Redis, in this order
                    first = link.send(CHANNEL, events[:1])
                    await asyncio.sleep(0.02)
                    other._socket.sendall(hiredis.pack_command(stream.LOAD))
                    second = link.send(CHANNEL, events[1:])
                    await asyncio.sleep(0.02)
                assert_stored([*await link.settle(first), *await link.settle(second)])
                assert next_reply(other).decode() == stream.SHA
        assert await stream_of(redis) == list(range(10))


# A lost connection


@in_loop
async def test_a_connection_lost_while_idle_costs_nothing(redis: RedisServer, publish: RedisClient) -> None:
    """A link that Redis closed between two publishes costs no event, and nobody notices."""
    async with publishing(redis.url) as link:
        for number in range(1, 4):
            [outcome] = await link.settle(send(link, number))
            assert isinstance(outcome, Stored)
            assert outcome.receivers == 0
            await asyncio.to_thread(publish.command, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await asyncio.sleep(0.05)  # until the loop has seen it
    assert await stream_of(redis) == [1, 2, 3]


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not stored"])
@in_loop
async def test_a_lost_connection_is_made_anew_once(redis: RedisServer, publish: RedisClient, stored: bool) -> None:
    """However many wait for it: one new connection, and no event fails or is sent over two of them."""
    before = await asyncio.to_thread(connections_taken, publish)
    async with ear(redis.url) as heard, publishing(redis.url, stored=stored) as link:
        assert isinstance((await link.settle(send(link, 0)))[0], Stored)
        await asyncio.to_thread(publish.command, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await asyncio.sleep(0.05)  # until the loop has seen it
        outcomes = await asyncio.gather(*(link.settle(send(link, number)) for number in range(1, 301)))
        failed = [outcome for [outcome] in outcomes if isinstance(outcome, RedisUnavailable)]
        await until(lambda: len(heard) >= 301, f"only {len(heard)} were heard")
        assert heard == list(range(301))
        assert failed == []
    assert await asyncio.to_thread(connections_taken, publish) == before + 3


@in_loop
async def test_what_many_callers_wait_for_is_looked_at_a_few_times_each(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many events are unanswered: settling them, each by a caller of its own, takes linear time."""
    looks = 0
    read = PublishPipeline._read

    def counted(link: PublishPipeline, pending: Pending) -> None:
        nonlocal looks
        looks += 1
        read(link, pending)

    monkeypatch.setattr(PublishPipeline, "_read", counted)
    for cut in (False, True):
        looks = 0
        async with proxy_to(redis) as proxy, publishing(proxy.url) as link:
            sent = [send(link, number) for number in range(1000)]
            if cut:
                proxy.cut()
            outcomes = await asyncio.gather(*(link.settle(each) for each in sent))
            assert_stored([outcome for each in outcomes for outcome in each])
            assert looks < 10 * len(sent)
            assert (link._events, link._unsent, len(link._unanswered), link._last) == (0, 0, 0, {})
            await asyncio.to_thread(forget_everything, redis)


def forget_everything(redis: RedisServer) -> None:
    with redis_client(redis) as client:
        client.command("FLUSHALL")


@in_loop
async def test_a_channel_of_a_wrong_type_fails_at_once_and_keeps_no_other_waiting(
    redis: RedisServer, publish: RedisClient
) -> None:
    """Sending again cannot help; what was sent to other channels goes through, and so does what comes later."""
    publish.command("SET", "{events.broken}:meta", "somebody else's")
    async with publishing(redis.url, deadline_s=30.0) as link:
        async with asyncio.timeout(5 * UNIT_S):
            sent = [send(link, n, channel="events.broken" if n % 2 else CHANNEL) for n in range(10)]
            outcomes = [outcome for each in sent for outcome in await link.settle(each)]
        assert all("WRONGTYPE" in str(outcome) for outcome in outcomes[1::2])
        assert_stored(outcomes[::2])
        publish.command("DEL", "{events.broken}:meta")
        assert_stored(await link.settle(send(link, 11, channel="events.broken")))


@in_loop
async def test_an_event_waits_for_the_last_one_of_its_channel_that_may_still_fail(redis: RedisServer) -> None:
    """One between them that has an outcome is no condition, and does not hide the one before it."""
    async with publishing(redis.url) as link:
        with frozen(redis):
            [first], [second], _ = send(link, 1), send(link, 2), send(link, 3, channel="events.other")
            link._fail(second, RedisRefused("NOPERM"))
            assert link._last_of(CHANNEL) is first
            [third] = send(link, 4)
            assert link._last_of(CHANNEL) is third
        assert_stored(await link.settle([first, third]))
        assert link._last_of(CHANNEL) is None


@in_loop
async def test_where_there_is_no_room_for_an_event_there_is_none_for_those_behind_it(redis: RedisServer) -> None:
    """A shorter command would fit: but what was published behind something that failed would be out of order."""
    async with publishing(redis.url, max_unanswered=70) as link, asyncio.timeout(10 * UNIT_S):
        first = send(link, *range(20))
        outcomes = await link.settle(send(link, *range(20, 90)))
        assert_stored(await link.settle(first))
    assert "more than 70" in errors(outcomes, 70)


@in_loop
async def test_without_redis_a_publish_waits_for_the_next(redis: RedisServer) -> None:
    """What is sent while Redis is dead is stored when it is back, in order, if that is within the deadline."""
    async with publishing(redis.url) as link:
        assert offsets(await publish(link, 1)) == [1]
        async with dead(redis) as revive:
            tasks = [asyncio.create_task(publish(link, 2, 3))]
            await asyncio.sleep(0.1)
            tasks.append(asyncio.create_task(publish(link, 4)))
            await asyncio.sleep(0.2)
            assert not any(task.done() for task in tasks)
            again = await revive()
            assert [offsets(outcomes) for outcomes in await asyncio.gather(*tasks)] == [[1, 2], [3]]
            assert await stream_of(again) == [2, 3, 4]


@in_loop
async def test_a_flush_of_scripts_is_survived(redis: RedisServer, publish: RedisClient) -> None:
    """SCRIPT FLUSH on a live connection costs neither an event nor its order nor who heard it."""
    async with publishing(redis.url) as link, ear(redis.url) as heard:
        for number in range(0, 9, 3):
            await asyncio.to_thread(publish.command, "SCRIPT", "FLUSH")
            sent = [send(link, number), send(link, number + 1, number + 2)]
            outcomes = [outcome for pending in sent for outcome in await link.settle(pending)]
            assert [outcome.receivers for outcome in outcomes if isinstance(outcome, Stored)] == [1, 1, 1]
        await until(lambda: heard == list(range(9)), f"heard: {heard}")
    assert await stream_of(redis) == list(range(9))


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not stored"])
@in_loop
async def test_a_standstill_of_our_own_is_no_silence_of_redis(
    redis: RedisServer, publish: RedisClient, stored: bool
) -> None:
    """When this process did not look for longer than the timeout, Redis' answer is read before it is judged."""
    before = await asyncio.to_thread(connections_taken, publish)
    async with publishing(redis.url, stored=stored, silence_timeout_s=0.6 * UNIT_S) as link:
        with frozen(redis):
            task = asyncio.create_task(link.settle(send(link, 1)))
            await asyncio.sleep(0.05)
        time.sleep(0.9 * UNIT_S)  # noqa: ASYNC251 - the loop stands still: this is the scenario
        [outcome] = await task
        assert isinstance(outcome, Stored)
        assert outcome.receivers == 0
    assert await asyncio.to_thread(connections_taken, publish) == before + 1


# Redis says no, for now


@dataclass(frozen=True)
class Trouble:
    """A state of a living Redis in which it refuses to store: how it begins and ends, a word of its complaint."""

    begin: tuple[tuple[str | int, ...], ...]
    end: tuple[tuple[str | int, ...], ...]
    word: str


TROUBLES: dict[str, Trouble] = {
    "a replica": Trouble((("REPLICAOF", "127.0.0.1", 1),), (("REPLICAOF", "NO", "ONE"),), "READONLY"),
    "without its replicas": Trouble(
        (("CONFIG", "SET", "min-replicas-to-write", 1),),
        (("CONFIG", "SET", "min-replicas-to-write", 0),),
        "NOREPLICAS",
    ),
    "out of memory": Trouble(
        (("CONFIG", "SET", "maxmemory", 1),),
        (("CONFIG", "SET", "maxmemory", 0),),
        "OOM",
    ),
}
BUSY: tuple[Any, ...] = ("EVAL", "while true do end", 0)


@contextlib.asynccontextmanager
async def troubled(server: RedisServer, trouble: Trouble) -> AsyncIterator[None]:
    with redis_client(server) as client:

        def say(commands: tuple[tuple[str | int, ...], ...]) -> None:
            for command in commands:
                reply = client.command(*command)
                assert not isinstance(reply, Exception), reply

        await asyncio.to_thread(say, trouble.begin)
        try:
            yield
        finally:
            await asyncio.to_thread(say, trouble.end)


@contextlib.asynccontextmanager
async def busy(server: RedisServer) -> AsyncIterator[None]:
    """Somebody's script does not end: Redis answers everybody else with BUSY."""
    with redis_client(server) as client, redis_client(server) as killer:
        await asyncio.to_thread(client.command, "CONFIG", "SET", "lua-time-limit", 10)
        client._socket.sendall(hiredis.pack_command(BUSY))
        try:
            await asyncio.sleep(0.05)
            yield
        finally:
            assert await asyncio.to_thread(killer.command, "SCRIPT", "KILL") == b"OK"


@pytest.mark.parametrize("name", [*TROUBLES, "busy"])
@in_loop
async def test_what_redis_refuses_for_now_is_tried_again(redis: RedisServer, name: str) -> None:
    """Nothing fails while Redis may come to its senses; afterwards all is stored once and in order."""
    async with publishing(redis.url) as link:
        assert offsets(await publish(link, 1)) == [1]
        async with troubled(redis, TROUBLES[name]) if name in TROUBLES else busy(redis):
            tasks = [asyncio.create_task(publish(link, number, number + 1)) for number in (2, 4, 6)]
            await asyncio.sleep(0.3)
            assert not any(task.done() for task in tasks)
        outcomes = [outcome for task in tasks for outcome in await task]
        assert offsets(outcomes) == [2, 3, 4, 5, 6, 7]
        assert await stream_of(redis) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("name", [*TROUBLES, "busy"])
@in_loop
async def test_what_redis_refuses_until_the_deadline_has_failed(redis: RedisServer, name: str) -> None:
    """The error names the deadline and what Redis said; the next event is stored once Redis will have it."""
    async with publishing(redis.url, deadline_s=0.4) as link:
        assert offsets(await publish(link, 0)) == [1]
        async with troubled(redis, TROUBLES[name]) if name in TROUBLES else busy(redis):
            complaint = errors(await publish(link, 1, 2), 2)
        assert f"within {0.4 * UNIT_S:g} s" in complaint
        assert (TROUBLES[name].word if name in TROUBLES else "BUSY") in complaint
        assert_stored(await publish(link, 3))
        assert await stream_of(redis) == [0, 3]


@in_loop
async def test_a_redis_that_loads_its_data_is_waited_for(tmp_path: Path) -> None:
    """A Redis that is back and still LOADING is no failure: what was sent meanwhile is stored when it is done."""
    keep = ("--hz", "500", "--dir", str(tmp_path), "--rdbcompression", "no", "--dbfilename", "dump.rdb")
    slowly = ("--key-load-delay", "8000")
    server = await asyncio.to_thread(RedisServer.start, None, *keep)
    try:
        async with publishing(server.url) as link:
            assert offsets(await publish(link, 1)) == [1]
            with redis_client(server) as client:
                for number in range(60):  # 12 MB: every 2 MB it looks at its connections
                    await asyncio.to_thread(client.command, "SET", f"key:{number}", b"x" * 200_000)
                assert await asyncio.to_thread(client.command, "SAVE") == b"OK"
            await asyncio.to_thread(server.kill)
            task = asyncio.create_task(publish(link, 2, 3))
            again = await asyncio.to_thread(RedisServer.start, server.port, *keep, *slowly)
            try:
                with redis_client(again) as client:
                    reply = await asyncio.to_thread(client.command, "GET", "x")
                assert "LOADING" in str(reply), "it was too quick for this test"
                assert offsets(await task) == [2, 3]
                assert await stream_of(again) == [1, 2, 3]
            finally:
                await asyncio.to_thread(again.stop)
    finally:
        await asyncio.to_thread(server.stop)


# The deadline


@in_loop
async def test_without_redis_an_event_fails_at_its_deadline(redis: RedisServer) -> None:
    """The error names the deadline and the reason, for each event; later events are stored once Redis is back."""
    async with publishing(redis.url, deadline_s=0.4) as link:
        assert offsets(await publish(link, 1)) == [1]
        async with dead(redis) as revive:
            for numbers in ((2, 3), (4,)):
                complaint = errors(await publish(link, *numbers), len(numbers))
                assert f"within {0.4 * UNIT_S:g} s: Redis " in complaint
            with pytest.raises(RedisUnavailable):
                await link.connect()
            again = await revive()
            assert offsets(await publish(link, 5, 6)) == [1, 2]
            assert await stream_of(again) == [5, 6]


@in_loop
async def test_a_frozen_redis_is_not_waited_for_beyond_the_deadline(redis: RedisServer) -> None:
    """Events to a Redis that stands still fail at their deadline; after the thaw publishing goes on."""
    async with publishing(redis.url, deadline_s=0.8) as link:
        with frozen(redis):
            async with asyncio.timeout(10 * UNIT_S):
                results = await asyncio.gather(*(publish(link, number) for number in range(5)))
            for outcomes in results:
                assert f"within {0.8 * UNIT_S:g} s" in errors(outcomes, 1)
        assert_stored(await publish(link, 7))
        numbers = await stream_of(redis)
        assert numbers[-1] == 7
        assert numbers[:-1] in ([], [0, 1, 2, 3, 4]), "what had failed may have been stored, but in order"


@in_loop
async def test_a_deadline_shorter_than_a_silence_holds_all_the_same(redis: RedisServer) -> None:
    """An event fails at its deadline also if Redis is not yet taken for frozen."""
    async with publishing(redis.url, deadline_s=0.3, silence_timeout_s=4.0 * UNIT_S) as link:
        with frozen(redis):
            async with asyncio.timeout(1.5 * UNIT_S):
                errors(await publish(link, 1), 1)


@in_loop
async def test_every_event_has_its_own_deadline(redis: RedisServer) -> None:
    """One that was sent later is still tried when the one before it has failed, and can be stored."""
    async with publishing(redis.url, deadline_s=4.0) as link, dead(redis) as revive:
        early = asyncio.create_task(publish(link, 1))
        await asyncio.sleep(3.0 * UNIT_S)  # so long Redis may take to be back
        late = asyncio.create_task(publish(link, 2))
        assert f"within {4.0 * UNIT_S:g} s" in errors(await early, 1)
        assert not late.done(), "the failure of the first was not told before the second had failed, too"
        again = await revive()
        assert offsets(await late) == [1]
        assert await stream_of(again) == [2]


@in_loop
async def test_failures_are_told_while_others_go_on_sending(redis: RedisServer) -> None:
    """Redis is dead and there is always somebody new who tries: those whose deadline has passed are told."""
    async with publishing(redis.url, deadline_s=0.4) as link, dead(redis):
        tasks = []
        for number in range(30):
            tasks.append(asyncio.create_task(publish(link, number)))
            await asyncio.sleep(0.05 * UNIT_S)
        told = [task.done() for task in tasks]
        assert all(told[:10]), f"1 s after their deadline: {told}"
        for task in tasks:
            errors(await task, 1)


# How many may wait


@in_loop
async def test_more_than_may_wait_fail_at_once(redis: RedisServer) -> None:
    """What is beyond `publisher.max_unanswered` fails unsent, with that number; those before it are stored."""
    async with publishing(redis.url, max_unanswered=10, silence_timeout_s=5.0 * UNIT_S) as link:
        for start in (0, 100):
            with frozen(redis):
                waiting = [send(link, start + number) for number in range(10)]
                refused = [send(link, start + 50), send(link, start + 51, start + 52)]
                for pending, count in zip(refused, (1, 2), strict=True):
                    async with asyncio.timeout(1 * UNIT_S):
                        assert "more than 10 events" in errors(await link.settle(pending), count)
            outcomes = [outcome for pending in waiting for outcome in await link.settle(pending)]
            assert offsets(outcomes) == list(range(start // 10 + 1, start // 10 + 11))
    assert await stream_of(redis) == [*range(10), *range(100, 110)]


@in_loop
async def test_of_a_batch_that_is_too_large_the_beginning_is_stored(redis: RedisServer) -> None:
    """The events for which there is no room are the last ones, and none of them is stored."""
    async with publishing(redis.url, max_unanswered=100) as link:
        outcomes = await publish(link, *range(300))
        stored = [isinstance(outcome, Stored) for outcome in outcomes]
        count = stored.count(True)
        assert 0 < count <= 100
        assert stored == [True] * count + [False] * (300 - count)
        assert await stream_of(redis) == list(range(count))
        assert_stored(await publish(link, *range(1000, 1064)))


# Redis says no, for good

RIGHTS: dict[str, tuple[str, ...]] = {
    "run scripts": ("~*", "&*", "+@all", "-evalsha"),
    "load scripts": ("~*", "&*", "+@all", "-script"),
    "publish": ("~*", "&*", "+@all", "-publish"),
    "publish on this channel": ("~*", "resetchannels", "&events.other", "+@all"),
    "store": ("~*", "&*", "+@all", "-xadd"),
    "ask which Redis this is": ("~*", "&*", "+@all", "-info"),
    "touch these keys": ("~other", "&*", "+@all"),
}


@pytest.mark.parametrize("rules", RIGHTS.values(), ids=RIGHTS.keys())
@in_loop
async def test_a_missing_right_is_refused(
    redis: RedisServer, publish: RedisClient, rules: tuple[str, ...]
) -> None:
    """It would fail for every event: RedisRefused, each time; with the right the same link stores."""
    await asyncio.to_thread(publish.command, "ACL", "SETUSER", "w", "on", ">p", *rules)
    link = PublishPipeline(settings_for(redis.url.replace("redis://", "redis://w:p@"), deadline_s=0.5))
    with contextlib.closing(link):
        for number in range(2):
            with pytest.raises(RedisRefused):  # noqa: PT012 - wherever it is found out
                await link.connect()
                await link.settle(send(link, number))
        assert await stream_of(redis) == []
        await asyncio.to_thread(publish.command, "ACL", "SETUSER", "w", "~*", "&*", "+@all")
        await link.connect()
        assert offsets(await link.settle(send(link, 7))) == [1]


@pytest.mark.parametrize(
    "rules", [("-publish",), ("resetchannels", "&other")], ids=["publish", "publish on this channel"]
)
@in_loop
async def test_a_missing_right_is_refused_without_history_too(
    redis: RedisServer, publish: RedisClient, rules: tuple[str, ...]
) -> None:
    """Plain PUBLISH without the right is RedisRefused; a right to scripts or keys is not needed."""
    needed = ("on", ">p", "resetkeys", "&*", "+publish", "+select")
    await asyncio.to_thread(publish.command, "ACL", "SETUSER", "w", *needed)
    async with publishing(redis.url.replace("redis://", "redis://w:p@"), stored=False) as link:
        assert await link.settle(send(link, 1)) == [Stored(None, 0)]
        await asyncio.to_thread(publish.command, "ACL", "SETUSER", "w", *rules)
        with pytest.raises(RedisRefused, match="NOPERM"):
            await link.settle(send(link, 2))


@in_loop
async def test_everybody_who_is_refused_is_told_so(redis: RedisServer, publish: RedisClient) -> None:
    """Of many publishers at once each one's call raises RedisRefused, not only that of the first to look."""
    await asyncio.to_thread(publish.command, "ACL", "SETUSER", "w", "on", ">p", "~*", "&*", "+@all")
    async with publishing(redis.url.replace("redis://", "redis://w:p@"), deadline_s=0.5) as link:
        await asyncio.to_thread(publish.command, "ACL", "SETUSER", "w", "-evalsha")
        calls = [link.settle(send(link, number)) for number in range(3)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [RedisRefused] * 3


@in_loop
async def test_a_password_that_was_changed_is_refused(redis: RedisServer, publish: RedisClient) -> None:
    """When the connection is lost and the next one is not let in, publishing raises RedisRefused."""
    await asyncio.to_thread(publish.command, "ACL", "SETUSER", "w", "on", ">p", "~*", "&*", "+@all")
    async with publishing(redis.url.replace("redis://", "redis://w:p@")) as link:
        assert offsets(await link.settle(send(link, 1))) == [1]
        await asyncio.to_thread(publish.command, "ACL", "SETUSER", "w", "resetpass", ">q")
        await asyncio.to_thread(publish.command, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        with pytest.raises(RedisRefused, match="WRONGPASS"):
            await link.settle(send(link, 2))
        await asyncio.to_thread(publish.command, "ACL", "SETUSER", "w", ">p")
        assert_stored(await link.settle(send(link, 3)))
        numbers = await stream_of(redis)
        assert numbers in ([1, 3], [1, 2, 3])


@in_loop
async def test_connecting_fails_at_once_without_redis() -> None:
    """`connect` does not wait for the deadline: it says so when there is no Redis, or it will not have us."""
    with pytest.raises(RedisUnavailable):
        await PublishPipeline(settings_for(f"redis://127.0.0.1:{free_port()}/0")).connect()
    server = await asyncio.to_thread(RedisServer.start, None, "--requirepass", "x")
    try:
        for login in (":y@", ""):
            with pytest.raises(RedisRefused):
                await PublishPipeline(settings_for(server.url.replace("redis://", f"redis://{login}"))).connect()
    finally:
        await asyncio.to_thread(server.stop)


# Giving up waiting


@in_loop
async def test_a_publisher_who_stops_waiting_takes_nobody_along(redis: RedisServer, publish: RedisClient) -> None:
    """Whenever one of three is cancelled while the connection is made anew, the other two are stored in order."""
    chance = random.Random(0)
    async with publishing(redis.url) as link:
        for turn in range(16):
            await asyncio.to_thread(publish.command, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            if turn % 2:
                await asyncio.sleep(0.01)  # until the loop has seen it
            numbers = [3 * turn, 3 * turn + 1, 3 * turn + 2]
            tasks = [asyncio.create_task(link.settle(send(link, number))) for number in numbers]
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
            await asyncio.sleep(chance.choice([0, 0, 0.001, 0.01, 0.03]))
            victim = tasks.pop(turn % 3)
            victim.cancel()
            assert_stored([outcome for outcomes in await asyncio.gather(*tasks) for outcome in outcomes])
            with contextlib.suppress(asyncio.CancelledError):
                await victim
        assert_stored(await link.settle(send(link, 1000)))
        found = await stream_of(redis)
    victims = {3 * turn + turn % 3 for turn in range(16)}
    assert found == sorted(set(found))
    assert set(range(48)) - set(found) <= victims
    assert found[-1] == 1000


@in_loop
async def test_a_publisher_who_stops_waiting_for_a_frozen_redis_takes_nobody_along(redis: RedisServer) -> None:
    """Cancelled while Redis stands still, an event stays in its place; all are stored once, in order."""
    async with publishing(redis.url, silence_timeout_s=0.25 * UNIT_S) as link:
        with frozen(redis):
            tasks = [asyncio.create_task(publish(link, number)) for number in range(4)]
            await asyncio.sleep(0.1 * UNIT_S)
            tasks[1].cancel()
            await asyncio.sleep(0.4 * UNIT_S)  # beyond the silence: the connection is made anew
            tasks[0].cancel()
            await asyncio.sleep(0.1 * UNIT_S)
        assert offsets([outcome for task in tasks[2:] for outcome in await task]) == [3, 4]
        assert offsets(await publish(link, 4)) == [5]
    assert await stream_of(redis) == [0, 1, 2, 3, 4]


@in_loop
async def test_when_everybody_has_stopped_waiting_the_next_one_is_stored(redis: RedisServer) -> None:
    """Events that nobody waits for any more do not block those that come later."""
    async with publishing(redis.url) as link, dead(redis) as revive:
        tasks = [asyncio.create_task(publish(link, number)) for number in range(3)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        again = await revive()
        assert_stored(await publish(link, 7, 8))
        found = await stream_of(again)
        assert found[-2:] == [7, 8]
        assert found == sorted(set(found))


@in_loop
async def test_deadlines_are_kept_though_each_attempt_takes_long(redis: RedisServer) -> None:
    """Redis accepts and does not answer: who waits for the attempt of another one has a deadline of its own."""
    loop, took = asyncio.get_running_loop(), list[float]()
    deadline_s = 2.0
    async with publishing(redis.url, deadline_s=deadline_s, connect_timeout_s=0.4, silence_timeout_s=0.4) as link:

        async def one(number: int) -> None:
            began = loop.time()
            errors(await publish(link, number), 1)
            took.append(loop.time() - began)

        with frozen(redis):
            async with asyncio.TaskGroup() as tasks:
                for number in range(60):
                    tasks.create_task(one(number))
                    await asyncio.sleep(0.1)
        assert len(took) == 60
        assert max(took) < deadline_s + UNIT_S


@in_loop
async def test_a_closed_link_makes_no_new_connection(redis: RedisServer, publish: RedisClient) -> None:
    """Who still waits when the link is closed is told soon, and Redis has no connection of ours any more."""

    def ours() -> int:
        clients: bytes = publish.command("CLIENT", "LIST")
        return len(clients.splitlines()) - 1

    async with publishing(redis.url, deadline_s=60.0) as link:
        with frozen(redis):
            task = asyncio.create_task(link.settle(send(link, 1)))
            await asyncio.sleep(0.05)
            link.close()
            link.close()
            await asyncio.wait([task], timeout=5 * UNIT_S)
            assert task.done()
        assert "closed" in errors(task.result(), 1)
        await asyncio.sleep(0.1)
        assert await asyncio.to_thread(ours) == 0


# Without history


@in_loop
async def test_without_history_events_are_heard_and_have_no_position(
    redis: RedisServer, publish: RedisClient
) -> None:
    """Plain PUBLISH: how many heard each, the bytes as they were given, and no key in Redis."""
    async with publishing(redis.url, stored=False) as link:
        assert await link.settle(send(link, 1, 2)) == [Stored(None, 0)] * 2
        async with ear(redis.url) as heard:
            many = list(range(1000))
            assert await link.settle(send(link, *many)) == [Stored(None, 1)] * 1000
            assert await link.settle(send(link, 0, channel="events.other")) == [Stored(None, 0)]
            await until(lambda: heard == many, f"heard: {len(heard)}")
    assert await asyncio.to_thread(publish.command, "DBSIZE") == 0


@in_loop
async def test_without_history_an_unknown_outcome_is_a_failure_and_is_not_repeated(redis: RedisServer) -> None:
    """Redis has published it, the reply is lost: the event has failed, and nobody hears it a second time."""
    async with proxy_to(redis) as proxy, publishing(proxy.url, stored=False) as link, ear(redis.url) as heard:
        proxy.withhold()
        sent = [send(link, 1, 2), send(link, 3)]
        await until(lambda: heard == [1, 2, 3], f"heard: {heard}")
        proxy.cut()
        proxy.let_through()
        errors([outcome for pending in sent for outcome in await link.settle(pending)], 3)
        for number in (4, 5):
            assert await link.settle(send(link, number)) == [Stored(None, 1)]
        await until(lambda: heard == [1, 2, 3, 4, 5], f"heard: {heard}")


@in_loop
async def test_without_history_a_frozen_redis_fails_what_it_was_told(redis: RedisServer) -> None:
    """Events that a frozen Redis does not answer fail; after the thaw nobody has heard one of them twice."""
    async with ear(redis.url) as heard, publishing(redis.url, stored=False, deadline_s=3.0) as link:
        with frozen(redis):
            async with asyncio.timeout(10 * UNIT_S):
                errors(await publish(link, 1, 2), 2)
        assert await publish(link, 3) == [Stored(None, 1)]
        await until(lambda: heard and heard[-1] == 3, f"heard: {heard}")
        assert heard in ([3], [1, 2, 3])


@in_loop
async def test_without_history_what_was_not_sent_yet_waits_for_redis(redis: RedisServer) -> None:
    """An event that never left is no unknown outcome: it is published once, when Redis is back in time."""
    async with publishing(redis.url, stored=False) as link, dead(redis) as revive:
        await asyncio.sleep(0.05)  # until the loop has seen it
        waiting = [asyncio.create_task(publish(link, number)) for number in (1, 2)]
        await asyncio.sleep(0.2)
        assert not any(task.done() for task in waiting)
        await revive()
        assert [await task for task in waiting] == [[Stored(None, 0)], [Stored(None, 0)]]


@in_loop
async def test_without_history_nothing_in_flight_is_sent_again() -> None:
    """An event whose reply is outstanding is not repeated, whatever becomes of the others."""
    commands: list[list[bytes]] = []
    answer = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = hiredis.Reader()
        first = not commands
        while data := await reader.read(65_536):
            parser.feed(data)
            while (command := parser.gets()) is not False:
                commands.append(command)
                if not first:
                    writer.write(b":1\r\n")
                elif len(commands) == 2:  # the first is refused, the second not answered yet
                    await answer.wait()
                    writer.write(b"-ERR not now\r\n")

    async with stand_in(talk) as url, publishing(url, stored=False) as link:
        first, second = send(link, 1), send(link, 2)
        await until(lambda: len(commands) == 2, "the events did not arrive")
        answer.set()
        await asyncio.sleep(0.05)
        third = send(link, 3)
        await link.settle(third)
        errors(await link.settle(first), 1)
        errors(await link.settle(second), 1)
    published = [json.loads(payload)["n"] for _, _, payload in commands]
    assert published == [1, 2, 3]


# A connection that outlives the Redis behind it


class Switch:
    """A proxy that keeps the connections of its clients while what is behind them becomes another Redis.

    Attributes:
        target: Port of the Redis to which what comes from now on is sent.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self._served: list[asyncio.Task[Any] | None] = []

    async def ended(self) -> None:
        """Wait until all clients have gone."""
        await asyncio.gather(*(task for task in self._served if task is not None))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._served.append(asyncio.current_task())
        upstreams: dict[int, asyncio.StreamWriter] = {}
        answers: list[asyncio.Task[None]] = []
        try:
            while said := await reader.read(65_536):
                if self.target not in upstreams:
                    from_redis, upstreams[self.target] = await asyncio.open_connection("127.0.0.1", self.target)
                    answers.append(asyncio.create_task(self._answer(from_redis, writer)))
                upstreams[self.target].write(said)
        finally:
            for upstream in upstreams.values():
                upstream.close()
            await asyncio.gather(*answers)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while said := await reader.read(65_536):
            writer.write(said)


@contextlib.asynccontextmanager
async def switched(before: RedisServer, after: RedisServer) -> AsyncIterator[tuple[Switch, PublishPipeline]]:
    """A link through a Switch that leads to `before`; `after` has all that `before` had, as a replica would."""
    switch = Switch(before.port)
    server = await asyncio.start_server(switch.serve, "127.0.0.1", 0)
    async with server:
        async with publishing(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0") as link:
            assert_stored(await publish(link, 1))
            with redis_client(before) as source, redis_client(after) as target:
                target.command(*stream.LOAD)
                for key in source.command("KEYS", "*"):
                    assert target.command("RESTORE", key, 0, source.command("DUMP", key)) == b"OK"
            yield switch, link
        await switch.ended()


@pytest.fixture
def other_redis() -> Iterator[RedisServer]:
    with RedisServer.start(None, "--hz", "500") as server:
        yield server


@in_loop
async def test_who_does_not_know_yet_that_it_is_another_redis_begins_no_epoch(
    redis: RedisServer, other_redis: RedisServer
) -> None:
    """Its hub has begun one already. What the connection led to when it was opened is not what it leads to now."""
    async with switched(redis, other_redis) as (switch, link):
        async with publishing(other_redis.url) as another:
            [begun] = assert_stored(await publish(another, 2))
        switch.target = other_redis.port
        positions = assert_stored(await publish(link, 3)) + assert_stored(await publish(link, 4))
        assert [str(position) for position in positions] == [f"{begun.epoch}-{3}", f"{begun.epoch}-{4}"]


@in_loop
async def test_an_epoch_begins_at_another_redis_however_long_the_connection_lives(
    redis: RedisServer, other_redis: RedisServer
) -> None:
    """Or a position that was given to somebody else, and lost, would be given again."""
    async with switched(redis, other_redis) as (switch, link):
        async with publishing(redis.url) as another:
            [before] = assert_stored(await publish(another, 2))
        await asyncio.sleep(1.1)
        switch.target = other_redis.port
        [after] = assert_stored(await publish(link, 3))
        assert after.epoch > before.epoch, (before, after)


@in_loop
async def test_a_publisher_that_has_seen_more_than_a_memory_that_was_set_back_begins_an_epoch(
    redis: RedisServer,
) -> None:
    """The same process, the same connection: only who has been answered a later position can know."""
    async with publishing(redis.url) as link:
        assert_stored(await publish(link, 1))
        with redis_client(redis) as client:
            before = {key: client.command("DUMP", key) for key in client.command("KEYS", "*")}
            [lost] = assert_stored(await publish(link, 2))
            for key, value in before.items():
                client.command("RESTORE", key, 0, value, "REPLACE")
        [after] = assert_stored(await publish(link, 3))
        assert after.epoch > lost.epoch


@in_loop
async def test_the_answer_to_a_retry_counts_as_seen(redis: RedisServer) -> None:
    """It is all that this publisher has been answered: a memory without it begins an epoch all the same."""
    async with publishing(redis.url) as first, publishing(redis.url) as link:
        assert_stored(await publish(first, 1))
        with redis_client(redis) as client:
            before = {key: client.command("DUMP", key) for key in client.command("KEYS", "*")}
            [lost] = assert_stored(await publish(first, 2))
            assert assert_stored(await publish(link, 2)) == [lost]
            for key, value in before.items():
                client.command("RESTORE", key, 0, value, "REPLACE")
        [after] = assert_stored(await publish(link, 3))
        assert after.epoch > lost.epoch
