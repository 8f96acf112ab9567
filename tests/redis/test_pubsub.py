"""A subscription that outlives every fault of Redis and tells each one, and a connection for commands."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import re
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from broadcaster.core.backoff import backoff_s
from broadcaster.core.errors import RedisRefused, RedisUnavailable
from broadcaster.redis.commands import CommandLink, server_version
from broadcaster.redis.pubsub import PubSubLink
from broadcaster.redis.server import RedisServer
from broadcaster.settings import RedisTable
from tests.support import (
    UNIT_S,
    RedisClient,
    connections_taken,
    dead,
    free_port,
    frozen,
    hasty,
    in_loop,
    redis_client,
    stand_in,
    until,
)

CHANNEL = "events.critical"


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """A Redis of the test's own that ends at once when told to: there are many in this file."""
    with RedisServer.start(None, "--hz", "500") as server:
        yield server


class Watch:
    """A subscription that runs, and everything it said, in order; of any but the usual channel with its name."""

    def __init__(self, redis: RedisTable, channels: tuple[str, ...]) -> None:
        self.said: list[str] = []
        self.subscription = PubSubLink(redis)
        for channel in channels:
            self.subscription.subscribe(channel)
        self.task = asyncio.create_task(self.subscription.run(self))

    def on_confirmed(self, channel: str) -> None:
        self._say(channel, "CONFIRMED")

    def on_lost(self, channel: str) -> None:
        self._say(channel, "LOST")

    def on_messages(self, messages: dict[bytes, list[bytes]]) -> None:
        for channel, payloads in messages.items():
            for payload in payloads:
                self._say(channel.decode(), payload.decode())

    def _say(self, channel: str, word: str) -> None:
        self.said.append(word if channel == CHANNEL else f"{channel} {word}")

    async def hears(self, word: str, *, times: int = 1, within: float = 20.0) -> None:
        def look() -> bool:
            assert not self.task.done(), f"the subscription ended: {self.task}"
            return self.said.count(word) >= times

        await until(look, f"{word} was not said {times} times: {self.said}", within)


@contextlib.asynccontextmanager
async def watching(redis: RedisTable, *channels: str) -> AsyncIterator[Watch]:
    """A subscription of these channels, by default the usual one."""
    watch = Watch(redis, channels or (CHANNEL,))
    try:
        yield watch
    finally:
        watch.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, RedisRefused):
            await watch.task


def publish_text(server: RedisServer, *payloads: str, channel: str = CHANNEL) -> list[int]:
    with redis_client(server) as client:
        return [client.publish(payload.encode(), channel) for payload in payloads]


@in_loop
async def test_a_subscription_is_confirmed_and_hears_its_channel_only(redis: RedisServer) -> None:
    """First the confirmation, then the events of this channel, in Redis' order."""
    async with watching(hasty(redis.url)) as watch:
        assert not watch.subscription.confirmed
        await watch.hears("CONFIRMED")
        assert watch.subscription.confirmed == {CHANNEL}
        with redis_client(redis) as client:
            assert await asyncio.to_thread(client.publish, b"elsewhere", "events.other") == 0
        assert await asyncio.to_thread(publish_text, redis, "a", "b", "c") == [1, 1, 1]
        await watch.hears("c")
        assert watch.said == ["CONFIRMED", "a", "b", "c"]
        assert watch.subscription.reconnects == 0


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
        await until(lambda: watch.subscription.reconnects == 5, "a new connection was not counted")


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
    async with watching(hasty(redis.url, ping_interval_s=0.05, silence_timeout_s=0.5 * UNIT_S)) as watch:
        await watch.hears("CONFIRMED")
        await asyncio.sleep(1.5 * UNIT_S)
        assert watch.said == ["CONFIRMED"]


@in_loop
async def test_redis_may_come_late(caplog: pytest.LogCaptureFixture) -> None:
    """A subscription begun without any Redis is confirmed when one starts; nothing is lost before that.

    That is an ordinary start: what is waited for is said once, and where, in words.
    """
    port = free_port()
    caplog.set_level(logging.INFO)
    async with watching(hasty(f"redis://127.0.0.1:{port}/0")) as watch:
        await until(lambda: caplog.messages, "it does not say that it waits")
        await asyncio.sleep(0.3)
        assert caplog.messages == [f"waiting for Redis at redis://127.0.0.1:{port}/0 (connection refused)"]
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


TAKEN_AWAY = b"*3\r\n$11\r\nunsubscribe\r\n$1\r\n%b\r\n:0\r\n"
PONG = b"*2\r\n$4\r\npong\r\n$0\r\n\r\n"
CONFIRMED = b"*3\r\n$9\r\nsubscribe\r\n$1\r\n%b\r\n:1\r\n"
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
    server = await asyncio.start_server(visits.serve, "127.0.0.1", free_port())
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


# Many channels


@in_loop
async def test_every_channel_is_confirmed_for_itself(redis: RedisServer) -> None:
    """Channels that were held before and after `run` began are confirmed, and each hears its own events."""
    async with watching(hasty(redis.url), "a", "b") as watch:
        await watch.hears("b CONFIRMED")
        watch.subscription.subscribe("c")
        assert watch.subscription.confirmed == {"a", "b"}
        await watch.hears("c CONFIRMED")
        assert watch.subscription.confirmed == set(watch.subscription.channels) == {"a", "b", "c"}
        for channel in "cbadc":
            await asyncio.to_thread(publish_text, redis, "x", channel=channel)
        await watch.hears("c x", times=2)
        assert watch.said == ["a CONFIRMED", "b CONFIRMED", "c CONFIRMED", "c x", "b x", "a x", "c x"]
        assert watch.subscription.reconnects == 0


@in_loop
async def test_a_subscription_of_nothing_waits(redis: RedisServer) -> None:
    """Without any channel the link is kept all the same, and the first channel is confirmed on it at once."""
    async with watching(hasty(redis.url, silence_timeout_s=0.3 * UNIT_S)) as watch:
        await watch.hears("CONFIRMED")
        watch.subscription.unsubscribe(CHANNEL)
        await asyncio.sleep(0.5 * UNIT_S)  # longer than a silence: it is pinged
        await watch.subscription.verify()
        watch.subscription.subscribe("a")
        await watch.hears("a CONFIRMED")
        assert watch.said == ["CONFIRMED", "a CONFIRMED"]
        assert watch.subscription.reconnects == 0


@in_loop
async def test_every_channel_is_lost_and_held_again(redis: RedisServer) -> None:
    """When Redis dies each confirmed channel is lost once; the next Redis confirms each of them, and new ones."""
    async with watching(hasty(redis.url), "a", "b") as watch:
        await watch.hears("b CONFIRMED")
        async with dead(redis) as revive:
            await watch.hears("a LOST")
            await watch.hears("b LOST")
            assert watch.subscription.confirmed == set()
            watch.subscription.subscribe("c")
            watch.subscription.unsubscribe("b")
            again = await revive()
            await watch.hears("a CONFIRMED", times=2)
            await watch.hears("c CONFIRMED")
            assert await asyncio.to_thread(publish_text, again, "x", channel="b") == [0]
        assert sorted(watch.said[:2]) == ["a CONFIRMED", "b CONFIRMED"]
        assert sorted(watch.said[2:4]) == ["a LOST", "b LOST"]
        assert sorted(watch.said[4:6]) == ["a CONFIRMED", "c CONFIRMED"]
        assert watch.subscription.reconnects == 1


@in_loop
async def test_what_is_released_is_heard_no_more(redis: RedisServer) -> None:
    """A released channel is neither confirmed nor lost, and Redis knows of no subscription to it."""
    async with watching(hasty(redis.url), "a", "b") as watch:
        await watch.hears("b CONFIRMED")
        watch.subscription.unsubscribe("a")
        assert watch.subscription.confirmed == set(watch.subscription.channels) == {"b"}
        await watch.subscription.verify()
        assert await asyncio.to_thread(publish_text, redis, "x", channel="a") == [0]
        assert await asyncio.to_thread(publish_text, redis, "x", channel="b") == [1]
        await watch.hears("b x")
        assert watch.said == ["a CONFIRMED", "b CONFIRMED", "b x"]


@in_loop
async def test_what_is_released_and_held_again_at_once_is_confirmed_anew(redis: RedisServer) -> None:
    """However fast hold and release follow each other, the last word holds, and a confirmation comes with it."""
    async with watching(hasty(redis.url), "a", "b") as watch:
        await watch.hears("b CONFIRMED")
        for _ in range(3):
            watch.subscription.unsubscribe("a")
            watch.subscription.subscribe("a")
        watch.subscription.subscribe("c")
        watch.subscription.unsubscribe("c")
        await watch.subscription.verify()
        assert watch.subscription.confirmed == {"a", "b"}
        assert await asyncio.to_thread(publish_text, redis, "x", channel="a") == [1]
        assert await asyncio.to_thread(publish_text, redis, "x", channel="c") == [0]
        await watch.hears("a x")
        states = [word for word in watch.said if word.startswith("a ")]
        assert states.pop() == "a x"
        told = states[1:]  # what came after the first confirmation, which `unsubscribe` has ended without a word
        assert told == (["a CONFIRMED", "a LOST"] * len(told))[: len(told)]
        assert told[-1] == "a CONFIRMED"
        assert "c LOST" in watch.said or "c CONFIRMED" not in watch.said


@in_loop
async def test_a_proof_gives_back_what_was_on_its_way(redis: RedisServer) -> None:
    """When `verify` returns, every event that Redis had sent before has been handed over."""
    async with watching(hasty(redis.url), "a", "b") as watch:
        await watch.hears("b CONFIRMED")
        for number in range(20):
            sent = [f"{number}.{part}" for part in range(20)]
            await asyncio.to_thread(publish_text, redis, *sent, channel="ab"[number % 2])
            await watch.subscription.verify()
            assert watch.said[-20:] == [f"{'ab'[number % 2]} {payload}" for payload in sent]
        assert watch.said.count("a CONFIRMED") == watch.said.count("b CONFIRMED") == 1


@in_loop
async def test_a_proof_needs_a_link(redis: RedisServer) -> None:
    """Before the link, on a Redis that dies or freezes, and after the end, `verify` is RedisUnavailable."""
    watch = Watch(hasty(redis.url), (CHANNEL,))
    with pytest.raises(RedisUnavailable):
        await watch.subscription.verify()
    await watch.hears("CONFIRMED")
    await watch.subscription.verify()
    with frozen(redis):
        async with asyncio.timeout(5 * UNIT_S):
            with pytest.raises(RedisUnavailable):
                await watch.subscription.verify()
        await watch.hears("LOST")
    await watch.hears("CONFIRMED", times=2)
    proof = asyncio.create_task(watch.subscription.verify())
    await asyncio.to_thread(redis.kill)
    await watch.hears("LOST", times=2)
    with contextlib.suppress(RedisUnavailable):  # it may have been answered before the end
        await asyncio.wait_for(proof, 5 * UNIT_S)
    watch.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watch.task
    with pytest.raises(RedisUnavailable):
        await watch.subscription.verify()


@contextlib.asynccontextmanager
async def told_by_hand() -> AsyncIterator[tuple[Watch, asyncio.Queue[bytes]]]:
    """A subscription to a and b, both confirmed, and what its Redis says next."""
    steps = asyncio.Queue[bytes]()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\nb\r\n")
        writer.write(CONFIRMED % b"a" + CONFIRMED % b"b")
        while words := await steps.get():
            writer.write(words)

    async with (
        stand_in(talk) as url,
        watching(hasty(url, ping_interval_s=5, silence_timeout_s=9), "a", "b") as watch,
    ):
        await watch.hears("b CONFIRMED")
        yield watch, steps
        steps.put_nowait(b"")


@in_loop
async def test_an_answer_from_before_it_was_released_confirms_nothing() -> None:
    """Asked for, asked for again, released, and asked for anew: only the last answer is of the last request."""
    async with told_by_hand() as (watch, steps):
        proof = asyncio.create_task(watch.subscription.verify())
        await asyncio.sleep(0)
        watch.subscription.unsubscribe("a")
        watch.subscription.subscribe("a")
        steps.put_nowait(PONG + CONFIRMED % b"a" + CONFIRMED % b"b" + PONG)
        await proof
        assert watch.subscription.confirmed == {"b"}
        steps.put_nowait(TAKEN_AWAY % b"a" + CONFIRMED % b"a")
        await watch.hears("a CONFIRMED", times=2)
        assert watch.said == ["a CONFIRMED", "b CONFIRMED", "a CONFIRMED"]


@in_loop
async def test_a_channel_that_is_taken_away_is_told() -> None:
    """A channel whose end Redis reports by itself is lost, once; the others are not, and it can come back."""
    async with told_by_hand() as (watch, steps):
        steps.put_nowait(TAKEN_AWAY % b"a" + TAKEN_AWAY % b"a" + TAKEN_AWAY % b"x")
        await watch.hears("a LOST")
        assert watch.subscription.confirmed == {"b"}
        steps.put_nowait(CONFIRMED % b"a")
        await watch.hears("a CONFIRMED", times=2)
        assert watch.subscription.confirmed == {"a", "b"}
        assert watch.said == ["a CONFIRMED", "b CONFIRMED", "a LOST", "a CONFIRMED"]


@in_loop
async def test_a_channel_without_the_right_does_not_shake_the_others(
    redis: RedisServer, publish: RedisClient
) -> None:
    """A channel that Redis refuses on a live link is not confirmed; the others stay so, and more can be held."""
    rights = ("on", ">p", "resetchannels", "&a", "&b", "+@all")
    await asyncio.to_thread(publish.command, "ACL", "SETUSER", "w", *rights)
    async with watching(hasty(redis.url.replace("redis://", "redis://w:p@")), "a") as watch:
        await watch.hears("a CONFIRMED")
        watch.subscription.subscribe("forbidden")
        watch.subscription.subscribe("b")
        await asyncio.wait([watch.task], timeout=1.2 * UNIT_S)  # more than two silences
        assert watch.said == ["a CONFIRMED", "b CONFIRMED"]
        assert watch.subscription.confirmed == {"a", "b"}
        assert not watch.task.done()


@in_loop
async def test_the_subscription_may_be_at_another_redis(redis: RedisServer) -> None:
    """`redis.subscribe_url` is where the channels are held, such as a replica of `redis.url`."""
    nobody = f"redis://127.0.0.1:{free_port()}/0"
    async with watching(hasty(nobody).model_copy(update={"subscribe_url": redis.url})) as watch:
        await watch.hears("CONFIRMED")
        assert await asyncio.to_thread(publish_text, redis, "x") == [1]
        await watch.hears("x")


# Commands


@contextlib.asynccontextmanager
async def commanding(redis: RedisTable, *greeting: tuple[str | int, ...]) -> AsyncIterator[CommandLink]:
    commands = CommandLink(redis, *greeting)
    try:
        yield commands
    finally:
        commands.close()


@in_loop
async def test_commands_are_answered_in_order_over_one_connection(
    redis: RedisServer, publish: RedisClient
) -> None:
    """Without connecting first, the commands of one call and of many at once get their own replies."""
    before = await asyncio.to_thread(connections_taken, publish)
    async with commanding(hasty(redis.url)) as commands:
        assert commands.link is None
        calls = [commands.execute(("ECHO", number), ("ECHO", number + 1)) for number in range(0, 200, 2)]
        assert await asyncio.gather(*calls) == [[b"%d" % n, b"%d" % (n + 1)] for n in range(0, 200, 2)]
        assert await commands.execute(("SET", "k", b"\0\xff"), ("GET", "k"), ("GET", "none")) == [
            b"OK",
            b"\0\xff",
            None,
        ]
        assert await commands.execute() == []
        assert commands.link is await commands.connect()
    assert await asyncio.to_thread(connections_taken, publish) == before + 1


@in_loop
async def test_every_connection_is_greeted_first(redis: RedisServer, publish: RedisClient) -> None:
    """The greeting is sent once on each new connection, before any command."""
    greeting = (("SELECT", 3), ("INCR", "greetings"))
    async with commanding(hasty(redis.url), *greeting) as commands:
        for number in range(1, 4):
            assert await commands.execute(("GET", "greetings"), ("GET", "greetings")) == [b"%d" % number] * 2
            await asyncio.to_thread(publish.command, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await until(lambda: commands.link is None, "the end of the connection was not seen")


GREETINGS: list[tuple[str, tuple[str, ...], type[Exception]]] = [
    ("that may work later", ("INCR", "text"), RedisUnavailable),
    ("without the right", ("AUTH", "nobody", "nonsense"), RedisRefused),
]


@pytest.mark.parametrize(
    ("greeting", "error"), [case[1:] for case in GREETINGS], ids=[case[0] for case in GREETINGS]
)
@in_loop
async def test_a_greeting_that_fails_is_no_connection(
    redis: RedisServer, publish: RedisClient, greeting: tuple[str, ...], error: type[Exception]
) -> None:
    """Its error is raised, no command is sent, the connection is ended, and the next call tries again."""
    await asyncio.to_thread(publish.command, "SET", "text", "abc")
    async with commanding(hasty(redis.url), greeting) as commands:
        for _ in range(2):
            with pytest.raises(error, match="Redis says: "):
                await commands.execute(("SET", "key", 1))
            assert commands.link is None
        assert await asyncio.to_thread(publish.command, "EXISTS", "key") == 0
        if greeting[0] == "INCR":
            await asyncio.to_thread(publish.command, "SET", "text", 1)
            assert await commands.execute(("SET", "key", 1)) == [b"OK"]


FAILURES: list[tuple[str, tuple[str, ...], type[Exception]]] = [
    ("unknown command", ("NOSUCHCOMMAND",), RedisUnavailable),
    ("wrong type", ("INCR", "text"), RedisUnavailable),
    ("no such user", ("AUTH", "nobody", "nonsense"), RedisRefused),
]


@pytest.mark.parametrize(("command", "error"), [case[1:] for case in FAILURES], ids=[case[0] for case in FAILURES])
@in_loop
async def test_an_error_reply_is_raised_to_its_caller_only(
    redis: RedisServer, publish: RedisClient, command: tuple[str, ...], error: type[Exception]
) -> None:
    """Who calls at the same time has his replies, and who calls later, too."""
    await asyncio.to_thread(publish.command, "SET", "text", "abc")
    async with commanding(hasty(redis.url)) as commands:
        await commands.connect()
        calls = [commands.execute(("ECHO", 3)), commands.execute(("ECHO", 1), command, ("ECHO", 2))]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert results[0] == [b"3"]
        assert isinstance(results[1], error)
        assert await commands.execute(("ECHO", 4)) == [b"4"]


@in_loop
async def test_commands_outlive_their_redis(redis: RedisServer) -> None:
    """Dead, every call is RedisUnavailable; the first call to the next Redis is answered."""
    async with commanding(hasty(redis.url)) as commands:
        assert await commands.execute(("ECHO", 1)) == [b"1"]
        waiting = asyncio.create_task(commands.execute(("BLPOP", "nothing", 0)))
        await asyncio.sleep(0.05)
        async with dead(redis) as revive:
            with pytest.raises(RedisUnavailable):
                await asyncio.wait_for(waiting, 5 * UNIT_S)
            for _ in range(2):
                with pytest.raises(RedisUnavailable):
                    await commands.execute(("ECHO", 2))
            await revive()
            assert await commands.execute(("ECHO", 3)) == [b"3"]


@in_loop
async def test_commands_to_a_frozen_redis_end_by_their_deadline(redis: RedisServer) -> None:
    """No answer in time is RedisUnavailable for everybody who waits; a late reply is nobody's after the thaw."""
    async with commanding(hasty(redis.url)) as commands:
        await commands.execute(("ECHO", 1))
        with frozen(redis):
            calls = [commands.execute(("ECHO", number)) for number in range(3)]
            async with asyncio.timeout(5 * UNIT_S):
                results = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(result, RedisUnavailable) for result in results)
        assert await commands.execute(("ECHO", "after")) == [b"after"]


@in_loop
async def test_a_call_that_is_cancelled_takes_nobodys_reply(redis: RedisServer) -> None:
    """Cancelled while it connects or waits, a call leaves the connection and the other calls whole."""
    async with commanding(hasty(redis.url)) as commands:
        connecting = [asyncio.create_task(commands.execute(("ECHO", number))) for number in range(3)]
        await asyncio.sleep(0)
        connecting[0].cancel()
        assert await asyncio.gather(*connecting[1:]) == [[b"1"], [b"2"]]
        with frozen(redis):
            waiting = [asyncio.create_task(commands.execute(("ECHO", number))) for number in range(3)]
            await asyncio.sleep(0.05)
            waiting[1].cancel()
            await asyncio.sleep(0.05)
        assert await asyncio.gather(*waiting[::2]) == [[b"0"], [b"2"]]
        assert [task.cancelled() for task in (connecting[0], waiting[1])] == [True, True]


@in_loop
async def test_a_connection_that_is_reset_or_closed_is_gone(redis: RedisServer, publish: RedisClient) -> None:
    """After `reset` and `close` Redis has no connection of ours; only after `reset` there can be another."""

    def ours() -> int:
        clients: bytes = publish.command("CLIENT", "LIST")
        return len(clients.splitlines()) - 1

    async with commanding(hasty(redis.url)) as commands:
        await commands.reset()
        assert await asyncio.to_thread(ours) == 0
        await commands.execute(("ECHO", 1))
        assert await asyncio.to_thread(ours) == 1
        await commands.reset()
        assert commands.link is None
        assert await commands.execute(("ECHO", 2)) == [b"2"]
        commands.close()
        commands.close()
        deadline = asyncio.get_running_loop().time() + 5 * UNIT_S
        while await asyncio.to_thread(ours):
            assert asyncio.get_running_loop().time() < deadline, "a connection was left"
        with pytest.raises(RedisUnavailable, match="closed"):
            await commands.execute(("ECHO", 3))


@in_loop
async def test_the_version_of_redis_is_told(redis: RedisServer) -> None:
    """Such as 6.2.14, or 7.2.4 (Valkey 9.1.2)."""
    assert re.fullmatch(r"\d+\.\d+\.\d+( \(Valkey \d+\.\d+\.\d+\))?", await server_version(hasty(redis.url)))
    with pytest.raises(RedisUnavailable):
        await server_version(hasty(f"redis://127.0.0.1:{free_port()}/0"))
    with frozen(redis):  # it can be connected to, and says nothing
        async with asyncio.timeout(5 * UNIT_S):
            with pytest.raises(RedisUnavailable, match="did not answer"):
                await server_version(hasty(redis.url))


@pytest.mark.parametrize(("shortest_s", "longest_s"), [(0.05, 1.0), (0.05, 0.01), (1.0, 86_400.0)])
def test_waits_are_random_under_a_bound_that_doubles(shortest_s: float, longest_s: float) -> None:
    """Full jitter: each wait is between 0 and a bound that doubles up to the longest one, and no two are alike."""
    waits = list(itertools.islice(backoff_s(shortest_s, longest_s), 500))
    for number, wait_s in enumerate(waits):
        assert 0 <= wait_s <= min(shortest_s * 2 ** min(number, 60), longest_s)
    assert len(set(waits)) > 490
    assert max(waits) > 0.9 * longest_s
    assert min(waits[20:]) < 0.1 * longest_s
