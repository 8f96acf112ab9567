"""Publishing, and a subscription that outlives every fault of Redis and tells each one."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from broadcaster.bus import PublishLink, Subscription, server_version
from broadcaster.errors import RedisRefused, RedisUnavailable
from broadcaster.redis_server import RedisServer, free_port
from broadcaster.settings import RedisTable
from tests.support import UNIT_S, RedisClient, crashed, frozen, in_loop, redis_client, until

CHANNEL = "events.critical"


def hasty(url: str, **changes: float) -> RedisTable:
    """Settings that notice and retry soon."""
    times = {
        "connect_timeout_s": 1.0 * UNIT_S,
        "ping_interval_s": 0.1,
        "silence_timeout_s": 0.5 * UNIT_S,
        "reconnect_max_s": 0.1,
    }
    return RedisTable.model_validate({"url": url, **times, **changes})


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """A Redis of the test's own that ends at once when told to: there are many in this file."""
    with RedisServer.start(None, "--hz", "500") as server:
        yield server


class Watch:
    """A subscription that runs, and everything it said, in order."""

    def __init__(self, redis: RedisTable) -> None:
        self.said: list[str] = []
        self.subscription = Subscription(
            redis,
            CHANNEL,
            on_events=lambda payloads: self.said.extend(payload.decode() for payload in payloads),
            on_confirmed=lambda: self.said.append("CONFIRMED"),
            on_lost=lambda: self.said.append("LOST"),
        )
        self.task = asyncio.create_task(self.subscription.run())

    async def hears(self, word: str, *, times: int = 1, within: float = 10.0) -> None:
        def look() -> bool:
            assert not self.task.done(), f"the subscription ended: {self.task}"
            return self.said.count(word) >= times

        await until(look, f"{word} was not said {times} times: {self.said}", within)


@contextlib.asynccontextmanager
async def watching(redis: RedisTable) -> AsyncIterator[Watch]:
    watch = Watch(redis)
    try:
        yield watch
    finally:
        watch.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, RedisRefused):
            await watch.task


def publish_text(server: RedisServer, *payloads: str) -> list[int]:
    with redis_client(server) as client:
        return [client.publish(payload.encode(), CHANNEL) for payload in payloads]


@in_loop
async def test_a_subscription_is_confirmed_and_hears_its_channel_only(redis: RedisServer) -> None:
    """First the confirmation, then the events of this channel, in Redis' order."""
    async with watching(hasty(redis.url)) as watch:
        assert not watch.subscription.confirmed
        await watch.hears("CONFIRMED")
        assert watch.subscription.confirmed
        with redis_client(redis) as client:
            assert await asyncio.to_thread(client.publish, b"elsewhere", "events.other") == 0
        assert await asyncio.to_thread(publish_text, redis, "a", "b", "c") == [1, 1, 1]
        await watch.hears("c")
        assert watch.said == ["CONFIRMED", "a", "b", "c"]
        assert watch.subscription.reconnects == 0


@contextlib.asynccontextmanager
async def dead(server: RedisServer) -> AsyncIterator[Callable[[], Awaitable[RedisServer]]]:
    """`crashed`, for a coroutine."""
    with contextlib.ExitStack() as stack:
        revive = await asyncio.to_thread(stack.enter_context, crashed(server))
        try:
            yield lambda: asyncio.to_thread(revive)
        finally:
            await asyncio.to_thread(stack.close)


@in_loop
async def test_a_killed_redis_is_told_and_the_next_one_is_held(redis: RedisServer) -> None:
    """Lost when Redis dies, confirmed when it is back, and what it then publishes is heard."""
    async with watching(hasty(redis.url)) as watch:
        await watch.hears("CONFIRMED")
        await asyncio.to_thread(publish_text, redis, "before")
        await watch.hears("before")
        async with dead(redis) as revive:
            await watch.hears("LOST")
            assert not watch.subscription.confirmed
            again = await revive()
            await watch.hears("CONFIRMED", times=2)
            await asyncio.to_thread(publish_text, again, "after")
            await watch.hears("after")
        assert watch.said[:5] == ["CONFIRMED", "before", "LOST", "CONFIRMED", "after"]
        assert watch.subscription.reconnects == 1


@in_loop
async def test_a_connection_that_redis_kills_is_made_anew(redis: RedisServer, publish: RedisClient) -> None:
    """Each CLIENT KILL is a loss and a confirmation, in turn, however often it comes."""
    async with watching(hasty(redis.url)) as watch:
        for time in range(1, 6):
            await watch.hears("CONFIRMED", times=time)
            assert await asyncio.to_thread(publish.command, "CLIENT", "KILL", "TYPE", "pubsub") == 1
            await watch.hears("LOST", times=time)
        await watch.hears("CONFIRMED", times=6)
        assert watch.said == ["CONFIRMED", "LOST"] * 5 + ["CONFIRMED"]
        assert watch.subscription.reconnects == 5


@in_loop
async def test_a_frozen_redis_is_noticed_within_three_seconds(redis: RedisServer) -> None:
    """With the default settings a Redis that stands still is lost within 3 s, and held again once it thaws."""
    async with watching(RedisTable(url=redis.url)) as watch:
        await watch.hears("CONFIRMED")
        with frozen(redis):
            await watch.hears("LOST", within=3.0)
            assert not watch.subscription.confirmed
        await watch.hears("CONFIRMED", times=2)
        await asyncio.to_thread(publish_text, redis, "after")
        await watch.hears("after")
        assert watch.said == ["CONFIRMED", "LOST", "CONFIRMED", "after"]


@in_loop
async def test_a_short_silence_is_no_loss(redis: RedisServer) -> None:
    """A Redis that stands still for less than the timeout loses nothing and is not left."""
    async with watching(hasty(redis.url, silence_timeout_s=5.0 * UNIT_S)) as watch:
        await watch.hears("CONFIRMED")
        with frozen(redis):
            await asyncio.sleep(0.3)
        await asyncio.to_thread(publish_text, redis, "after")
        await watch.hears("after")
        assert watch.said == ["CONFIRMED", "after"]


@in_loop
async def test_a_standstill_of_our_own_is_no_silence_of_redis(redis: RedisServer) -> None:
    """When this process did not look for longer than the timeout, Redis' answers are read before it is judged."""
    async with watching(hasty(redis.url)) as watch:
        await watch.hears("CONFIRMED")
        time.sleep(0.8 * UNIT_S)  # noqa: ASYNC251 - the loop stands still: this is the scenario
        await asyncio.sleep(0.2)
        await asyncio.to_thread(publish_text, redis, "after")
        await watch.hears("after")
        assert watch.said == ["CONFIRMED", "after"]


@in_loop
async def test_an_idle_subscription_is_kept(redis: RedisServer) -> None:
    """Without any event the pings alone keep the link, for many silence timeouts."""
    async with watching(hasty(redis.url, ping_interval_s=0.02, silence_timeout_s=0.2 * UNIT_S)) as watch:
        await watch.hears("CONFIRMED")
        await asyncio.sleep(0.6 * UNIT_S)
        assert watch.said == ["CONFIRMED"]


@in_loop
async def test_redis_may_come_late() -> None:
    """A subscription begun without any Redis is confirmed when one starts; nothing is lost before that."""
    port = free_port()
    async with watching(hasty(f"redis://127.0.0.1:{port}/0")) as watch:
        await asyncio.sleep(0.3)
        assert watch.said == []
        assert not watch.task.done()
        server = await asyncio.to_thread(RedisServer.start, port)
        try:
            await watch.hears("CONFIRMED")
            assert watch.subscription.reconnects == 0
        finally:
            await asyncio.to_thread(server.stop)


class Visits:
    """A stand-in for Redis that lets everybody in, says something, and hangs up; it counts."""

    def __init__(self, words: bytes) -> None:
        self.words = words
        self.count = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.count += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(CHANNEL.encode() + b"\r\n")
            writer.write(self.words)
            await writer.drain()
        writer.transport.abort()


CONFIRMATION = b"*3\r\n$9\r\nsubscribe\r\n$15\r\nevents.critical\r\n:1\r\n"
REVOLVING: dict[str, bytes] = {
    "hangs up": b"",
    "is still loading": b"-LOADING Redis is loading the dataset in memory\r\n",
    "is no Redis": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "confirms and hangs up": CONFIRMATION,
}


@pytest.mark.parametrize("words", REVOLVING.values(), ids=REVOLVING.keys())
@in_loop
async def test_a_redis_that_will_not_keep_us_is_tried_again_and_again(words: bytes) -> None:
    """Many attempts, with a wait before each one: neither giving up nor spinning."""
    visits = Visits(words)
    server = await asyncio.start_server(visits.serve, "127.0.0.1")
    url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    async with watching(hasty(url)) as watch:
        await until(lambda: visits.count >= 6, "it gave up")
        before = visits.count
        await asyncio.sleep(0.25)
        assert visits.count - before < 100
        assert not watch.task.done()
    server.close()
    await server.wait_closed()
    told = [word for word in watch.said if word in ("CONFIRMED", "LOST")]
    assert told == ["CONFIRMED", "LOST"] * (len(told) // 2)
    assert bool(told) == (words == CONFIRMATION)


REFUSALS: list[tuple[str, tuple[str, ...], str]] = [
    ("wrong password", ("--requirepass", "x"), ":y@"),
    ("no password given", ("--requirepass", "x"), ""),
    ("a password where none is wanted", (), ":y@"),
    ("no right to the channel", ("--user", "w", "on", ">p", "resetchannels", "+@all"), "w:p@"),
]


@pytest.mark.parametrize(
    ("arguments", "login"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS]
)
@in_loop
async def test_a_refusal_for_good_ends_the_subscription(arguments: tuple[str, ...], login: str) -> None:
    """Where trying again would not help, `run` raises RedisRefused and has not confirmed anything."""
    server = await asyncio.to_thread(RedisServer.start, None, *arguments)
    try:
        async with watching(hasty(server.url.replace("redis://", f"redis://{login}"))) as watch:
            with pytest.raises(RedisRefused):
                await asyncio.wait_for(watch.task, 5 * UNIT_S)
            assert watch.said == []
    finally:
        await asyncio.to_thread(server.stop)


@in_loop
async def test_a_cancelled_subscription_leaves_redis(redis: RedisServer, publish: RedisClient) -> None:
    """After the end of `run` Redis has no subscriber."""
    async with watching(hasty(redis.url)) as watch:
        await watch.hears("CONFIRMED")
        assert await asyncio.to_thread(publish.publish, b"a", CHANNEL) == 1
    assert not watch.subscription.confirmed
    deadline = asyncio.get_running_loop().time() + 5 * UNIT_S
    while await asyncio.to_thread(publish.publish, b"b", CHANNEL):
        assert asyncio.get_running_loop().time() < deadline, "Redis still has a subscriber"


# Publishing


async def published(link: PublishLink, *payloads: bytes, channel: str = CHANNEL) -> list[int | RedisUnavailable]:
    """Publish in one write over a connected link, and wait for what becomes of it."""
    await link.connect()
    return await link.settle(link.send(channel, payloads))


def assert_failed(results: list[int | RedisUnavailable], count: int) -> None:
    assert len(results) == count
    assert all(isinstance(result, RedisUnavailable) for result in results)


@in_loop
async def test_publish_says_how_many_heard_each(redis: RedisServer) -> None:
    """One number per payload, in order: how many subscriptions heard it."""
    async with PublishLink(hasty(redis.url)) as link:
        assert await published(link, b"a", b"b") == [0, 0]
        async with watching(hasty(redis.url)) as first, watching(hasty(redis.url)) as second:
            await first.hears("CONFIRMED")
            await second.hears("CONFIRMED")
            assert await published(link, b"c") == [2]
            assert await published(link, b"x", channel="events.other") == [0]
            many = [b"%d" % number for number in range(1000)]
            assert await published(link, *many) == [2] * 1000
            await first.hears("999")
            await second.hears("999")
            assert first.said == second.said == ["CONFIRMED", "c", *(number.decode() for number in many)]


@in_loop
async def test_a_publish_without_redis_is_a_result_and_redis_may_come_back(redis: RedisServer) -> None:
    """While Redis is away each payload gets its error; once it is back the same link publishes again."""
    async with PublishLink(hasty(redis.url)) as link:
        assert await published(link, b"a") == [0]
        async with dead(redis) as revive:
            for _ in range(3):
                assert_failed(await link.settle(link.send(CHANNEL, [b"b", b"c"])), 2)
            with pytest.raises(RedisUnavailable):
                await link.connect()
            await revive()
            assert await published(link, b"d") == [0]


@in_loop
async def test_a_connection_lost_while_idle_is_made_anew(redis: RedisServer, publish: RedisClient) -> None:
    """A link that Redis closed between two publishes costs no event."""
    async with PublishLink(hasty(redis.url)) as link:
        assert await published(link, b"a") == [0]
        assert await asyncio.to_thread(publish.command, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes") == 1
        await asyncio.sleep(0.1)  # until the loop has seen it
        assert await published(link, b"b") == [0]


@in_loop
async def test_a_publish_that_redis_did_not_answer_is_told_as_failed(redis: RedisServer) -> None:
    """What was in flight when the link ended gets its error; it may have been published."""
    async with PublishLink(hasty(redis.url)) as link:
        with frozen(redis):
            replies = link.send(CHANNEL, [b"a", b"b"])
            await asyncio.to_thread(redis.kill)
        assert_failed(await link.settle(replies), 2)


@in_loop
async def test_a_publish_to_a_frozen_redis_ends_by_its_deadline(redis: RedisServer) -> None:
    """Without an answer in time each payload gets its error, and the link publishes again after the thaw."""
    async with PublishLink(hasty(redis.url)) as link:
        with frozen(redis):
            assert_failed(await asyncio.wait_for(published(link, b"a", b"b"), 5 * UNIT_S), 2)
        await asyncio.sleep(0.1)  # until the loop has seen the end of the old link
        assert await published(link, b"c") == [0]


@in_loop
async def test_entering_without_redis_raises() -> None:
    """`async with` fails at once when there is no Redis, and for good when it will not have us."""
    with pytest.raises(RedisUnavailable):
        async with PublishLink(hasty(f"redis://127.0.0.1:{free_port()}/0")):
            pytest.fail("there is no Redis")
    server = await asyncio.to_thread(RedisServer.start, None, "--requirepass", "x")
    try:
        with pytest.raises(RedisRefused):
            async with PublishLink(hasty(server.url.replace("redis://", "redis://:y@"))):
                pytest.fail("the password is wrong")
    finally:
        await asyncio.to_thread(server.stop)


@in_loop
async def test_a_publish_without_the_right_is_refused(redis: RedisServer, publish: RedisClient) -> None:
    """A missing right is raised: it would fail for every event."""
    rights = ("on", ">p", "resetchannels", "&allowed", "+@all")
    await asyncio.to_thread(publish.command, "ACL", "SETUSER", "w", *rights)
    async with PublishLink(hasty(redis.url.replace("redis://", "redis://w:p@"))) as link:
        assert await published(link, b"a", channel="allowed") == [0]
        with pytest.raises(RedisRefused, match="NOPERM"):
            await published(link, b"a", channel="forbidden")


@in_loop
async def test_the_version_of_redis_is_told(redis: RedisServer) -> None:
    """Such as 6.2.14."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", await server_version(hasty(redis.url)))
    with pytest.raises(RedisUnavailable):
        await server_version(hasty(f"redis://127.0.0.1:{free_port()}/0"))
    with frozen(redis):  # it can be connected to, and says nothing
        async with asyncio.timeout(5 * UNIT_S):
            with pytest.raises(RedisUnavailable, match="did not answer"):
                await server_version(hasty(redis.url))
