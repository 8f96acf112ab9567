"""One link to Redis: replies in order, messages in order, every end told."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broadcaster.core.errors import RedisRefused, RedisUnavailable
from broadcaster.redis.connection import RedisConnection
from broadcaster.redis.server import RedisServer
from tests.support import UNIT_S, RedisClient, Talk, free_port, frozen, in_loop, stand_in, until


@contextlib.asynccontextmanager
async def opened(url: str, *, timeout_s: float = 5 * UNIT_S, **callables: Any) -> AsyncIterator[RedisConnection]:
    """A link that is ended with the block, and whose end is awaited."""
    link = await RedisConnection.open(url, timeout_s=timeout_s, **callables)
    try:
        yield link
    finally:
        link.abort()
        await asyncio.wait_for(asyncio.shield(link.lost), 5 * UNIT_S)


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """A Redis of the test's own that ends at once when told to: there are many in this file."""
    with RedisServer.start(None, "--hz", "500") as server:
        yield server


@in_loop
async def test_replies_come_in_the_order_of_their_commands(redis: RedisServer) -> None:
    """Commands of one write are answered one by one, each with its own type."""
    async with opened(redis.url) as link:
        replies = link.send(
            ("SET", "key", b"\0\xff\r\n"),
            ("GET", "key"),
            ("GET", "nothing"),
            ("INCRBY", "count", 41),
            ("RPUSH", "list", "a", b"b", 3),
            ("LRANGE", "list", 0, -1),
            ("LRANGE", "nothing", 0, -1),
            ("EVAL", "return {1, {'deep', {}}}", 0),
        )
        assert await asyncio.gather(*replies) == [
            b"OK",
            b"\0\xff\r\n",
            None,
            41,
            3,
            [b"a", b"b", b"3"],
            [],
            [1, [b"deep", []]],
        ]


@in_loop
async def test_many_commands_in_flight_keep_their_order(redis: RedisServer) -> None:
    """2,000 commands from many writes get 2,000 replies in order."""
    async with opened(redis.url) as link:
        replies = [reply for _ in range(100) for reply in link.send(*(("INCR", "n"),) * 20)]
        assert await asyncio.gather(*replies) == list(range(1, 2001))


@in_loop
async def test_a_reply_nobody_waits_for_shifts_no_other(redis: RedisServer) -> None:
    """A cancelled wait leaves the other replies where they belong."""
    async with opened(redis.url) as link:
        first, second = link.send(("ECHO", "first"), ("ECHO", "second"))
        first.cancel()
        assert await second == b"second"
        assert await link.execute("ECHO", "third") == b"third"


@in_loop
async def test_a_large_value_passes_whole(redis: RedisServer) -> None:
    """A value of 8 MB in and out, in as many reads as it takes."""
    value = bytes(range(256)) * 32_768
    async with opened(redis.url) as link:
        assert await link.execute("SET", "large", value) == b"OK"
        assert await link.execute("GET", "large") == value


@in_loop
async def test_the_database_of_the_url_is_selected(redis: RedisServer, publish: RedisClient) -> None:
    """redis://.../3 speaks to database 3."""
    async with opened(redis.url.removesuffix("/0") + "/3") as link:
        await link.execute("SET", "here", 1)
    await asyncio.to_thread(publish.command, "SELECT", 3)
    assert await asyncio.to_thread(publish.command, "GET", "here") == b"1"


# Errors

ERRORS: list[tuple[str, tuple[str | int, ...], type[Exception]]] = [
    ("unknown command", ("NOSUCHCOMMAND",), RedisUnavailable),
    ("wrong number of words", ("GET",), RedisUnavailable),
    ("wrong type", ("INCR", "text"), RedisUnavailable),
    ("wrong password", ("AUTH", "default", "nonsense"), RedisRefused),
    ("unknown user", ("AUTH", "nobody", "nonsense"), RedisRefused),
]


@pytest.mark.parametrize(("command", "kind"), [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS])
@in_loop
async def test_an_error_reply_is_an_error_of_its_command_only(
    redis: RedisServer, command: tuple[str | int, ...], kind: type[Exception]
) -> None:
    """The error says what Redis said and whether trying again helps; the link goes on."""
    async with opened(redis.url) as link:
        await link.execute("SET", "text", "abc")
        await link.execute("ACL", "SETUSER", "default", ">right")
        before, wrong, after = link.send(("ECHO", "a"), command, ("ECHO", "b"))
        assert await before == b"a"
        with pytest.raises(kind, match="Redis says: "):
            await wrong
        assert await after == b"b"
        assert not link.lost.done()


@pytest.fixture
def guarded() -> Iterator[RedisServer]:
    """A Redis with a password, and a user who may not subscribe to other channels than `allowed`."""
    rules = ("--user", "watcher", "on", ">w:rd/@", "resetchannels", "&allowed", "+@all")
    with RedisServer.start(None, "--hz", "500", "--requirepass", "x", *rules) as server:
        yield server


PASSWORDS: list[tuple[str, str, type[Exception] | None]] = [
    ("right", ":x@", None),
    ("right, with the default user's name", "default:x@", None),
    ("right, of another user, percent-encoded", "watcher:w%3Ard%2F%40@", None),
    ("wrong", ":y@", RedisRefused),
    ("wrong, of another user", "watcher:x@", RedisRefused),
    ("of nobody", "nobody:x@", RedisRefused),
    ("none", "", RedisRefused),
]


@pytest.mark.parametrize(("login", "error"), [case[1:] for case in PASSWORDS], ids=[case[0] for case in PASSWORDS])
@in_loop
async def test_a_password_lets_in_or_is_refused_for_good(
    guarded: RedisServer, login: str, error: type[Exception] | None
) -> None:
    """The right password works; a wrong one or none is RedisRefused, at the latest at the first command."""
    url = guarded.url.replace("redis://", f"redis://{login}")

    async def ping() -> object:
        async with opened(url) as link:
            return await link.execute("PING")

    if error is None:
        assert await ping() == b"PONG"
    else:
        with pytest.raises(error):
            await ping()


@in_loop
async def test_a_password_where_none_is_wanted_is_refused(redis: RedisServer) -> None:
    """A Redis without a password says so, and trying again would not help."""
    with pytest.raises(RedisRefused):
        await RedisConnection.open(redis.url.replace("redis://", "redis://:x@"), timeout_s=5 * UNIT_S)


@in_loop
async def test_a_missing_right_is_refused_for_good(guarded: RedisServer) -> None:
    """A channel the user has no right to is RedisRefused; another one is confirmed."""
    url = guarded.url.replace("redis://", "redis://watcher:w%3Ard%2F%40@")
    async with opened(url) as link:
        with pytest.raises(RedisRefused, match="NOPERM"):
            await link.subscribe("forbidden")[0]
        async with asyncio.timeout(5 * UNIT_S):
            assert await link.subscribe("allowed")[0] == [b"subscribe", b"allowed", 1]


@in_loop
async def test_a_channel_that_is_refused_shifts_no_other_reply(guarded: RedisServer) -> None:
    """Each channel of one `subscribe` has its own answer, and so has every command behind it."""
    told: list[tuple[bytes, bool]] = []
    url = guarded.url.replace("redis://", "redis://watcher:w%3Ard%2F%40@")
    async with opened(url, on_subscribed=lambda *what: told.append(what)) as link:
        forbidden, allowed, given_up = *link.subscribe("forbidden", "allowed"), *link.unsubscribe("allowed")
        echo = link.send(("ECHO", "a"))[0]
        async with asyncio.timeout(5 * UNIT_S):
            with pytest.raises(RedisRefused, match="NOPERM"):
                await forbidden
            assert await allowed == [b"subscribe", b"allowed", 1]
            assert await given_up == [b"unsubscribe", b"allowed", 0]
            assert await echo == b"a"
        assert told == [(b"allowed", True), (b"allowed", False)]


# Where Redis is


@in_loop
async def test_a_unix_socket_is_an_address_too() -> None:
    """unix:// works as redis:// does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "redis.sock")
        server = await asyncio.to_thread(RedisServer.start, None, "--unixsocket", str(path))
        try:
            async with opened(f"unix://{path}") as link:
                assert await link.execute("PING") == b"PONG"
        finally:
            await asyncio.to_thread(server.stop)


NOWHERE: dict[str, Callable[[], str]] = {
    "nobody listens": lambda: f"redis://127.0.0.1:{free_port()}/0",
    "no such host": lambda: "redis://no-such-host.invalid:6379/0",
    "no such socket": lambda: "unix:///no/such/redis.sock",
}


@pytest.mark.parametrize("url", NOWHERE.values(), ids=NOWHERE.keys())
@in_loop
async def test_an_address_without_redis_is_unavailable(url: Callable[[], str]) -> None:
    """Whatever the network says, it is RedisUnavailable: trying again may help."""
    with pytest.raises(RedisUnavailable):
        await RedisConnection.open(url(), timeout_s=5 * UNIT_S)


@in_loop
async def test_tls_to_a_redis_without_it_is_unavailable(redis: RedisServer) -> None:
    """rediss:// at a plain port fails as RedisUnavailable, within the deadline."""
    with pytest.raises(RedisUnavailable):
        await RedisConnection.open(redis.url.replace("redis://", "rediss://"), timeout_s=0.4 * UNIT_S)


async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    await reader.read()


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


STRANGERS: dict[str, Talk] = {"says nothing": silence, "is no Redis": garbage, "hangs up": hang_up}


@pytest.mark.parametrize("talk", STRANGERS.values(), ids=STRANGERS.keys())
@in_loop
async def test_a_stranger_at_the_port_is_unavailable_within_the_deadline(talk: Talk) -> None:
    """Who does not log us in by the deadline, talks nonsense or hangs up is RedisUnavailable."""
    async with stand_in(talk) as url:
        with pytest.raises(RedisUnavailable):
            await RedisConnection.open(url.replace("redis://", "redis://:secret@"), timeout_s=0.3)


@in_loop
async def test_a_server_that_quotes_the_password_is_not_quoted() -> None:
    """One that does not know AUTH (`rename-command AUTH ""`) answers with what it was sent."""

    async def quoting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"Zq7")
        writer.write(b"-ERR unknown command 'AUTH', with args beginning with: 'Zq7' \r\n")
        await reader.read()

    async with stand_in(quoting) as url:
        with pytest.raises(RedisUnavailable) as refused:
            await RedisConnection.open(url.replace("redis://", "redis://:Zq7@"), timeout_s=5 * UNIT_S)
    assert str(refused.value).startswith("Redis says: ERR unknown command 'AUTH' (it is disabled or renamed there")
    assert "Zq7" not in str(refused.value)


@in_loop
async def test_a_frozen_redis_does_not_log_in_within_the_deadline(redis: RedisServer) -> None:
    """A Redis that accepts and does not answer is unavailable when the deadline has passed."""
    with frozen(redis), pytest.raises(RedisUnavailable):
        await RedisConnection.open(redis.url.removesuffix("/0") + "/1", timeout_s=0.3)


# Messages


class Heard:
    """All that a link said of its channels, in order: messages as (channel, payload), the rest as told."""

    def __init__(self) -> None:
        self.all: list[tuple[bytes, bytes | bool]] = []
        self.batches: list[dict[bytes, list[bytes]]] = []

    def on_messages(self, messages: dict[bytes, list[bytes]]) -> None:
        self.batches.append(messages)
        self.all.extend((channel, payload) for channel, payloads in messages.items() for payload in payloads)

    def on_subscribed(self, channel: bytes, held: bool) -> None:
        self.all.append((channel, held))

    @property
    def callables(self) -> dict[str, Any]:
        return {"on_messages": self.on_messages, "on_subscribed": self.on_subscribed}


@in_loop
async def test_messages_and_confirmations_come_in_order(redis: RedisServer, publish: RedisClient) -> None:
    """A subscription is confirmed before its first message; messages keep Redis' order and bytes."""
    heard = Heard()
    async with opened(redis.url, **heard.callables) as link:
        assert await link.subscribe("events")[0] == [b"subscribe", b"events", 1]
        sent = [b"%d \0\xff\r\n" % number for number in range(500)]
        for payload in sent:
            assert await asyncio.to_thread(publish.publish, payload, "events") == 1
        await until(lambda: len(heard.all) == 501, f"messages are missing: {len(heard.all)}")
        assert heard.all == [(b"events", True), *((b"events", payload) for payload in sent)]
        assert await link.execute("PING") == [b"pong", b""]


@in_loop
async def test_each_channel_has_its_own_messages(redis: RedisServer, publish: RedisClient) -> None:
    """Payloads are handed over per channel, each with Redis' order, and no channel hears another's."""
    heard = Heard()
    channels = [b"one", b"two", b"three"]
    async with opened(redis.url, **heard.callables) as link:
        await asyncio.gather(*link.subscribe("one", "two", "three"))
        for number in range(300):
            assert await asyncio.to_thread(publish.publish, b"%d" % number, channels[number % 3].decode()) == 1
        assert await asyncio.to_thread(publish.publish, b"elsewhere", "four") == 0
        await link.execute("PING")
        assert heard.all[:3] == [(channel, True) for channel in channels]
        for first, name in enumerate(channels):
            payloads = [payload for heard_on, payload in heard.all[3:] if heard_on == name]
            assert payloads == [b"%d" % number for number in range(first, 300, 3)]
        assert len(heard.all) == 303


@in_loop
async def test_a_channel_that_is_given_up_is_heard_no_more(redis: RedisServer, publish: RedisClient) -> None:
    """After the confirmed end of one channel the others go on; it can be held again."""
    heard = Heard()
    async with opened(redis.url, **heard.callables) as link:
        await asyncio.gather(*link.subscribe("kept", "given.up"))
        assert await link.unsubscribe("given.up")[0] == [b"unsubscribe", b"given.up", 1]
        assert await asyncio.to_thread(publish.publish, b"a", "given.up") == 0
        assert await asyncio.to_thread(publish.publish, b"b", "kept") == 1
        assert await link.subscribe("given.up")[0] == [b"subscribe", b"given.up", 2]
        assert await asyncio.to_thread(publish.publish, b"c", "given.up") == 1
        await until(lambda: (b"given.up", b"c") in heard.all, f"the message is missing: {heard.all}")
    assert heard.all == [
        (b"kept", True),
        (b"given.up", True),
        (b"given.up", False),
        (b"kept", b"b"),
        (b"given.up", True),
        (b"given.up", b"c"),
    ]


@in_loop
async def test_a_channel_held_twice_is_confirmed_twice_and_heard_once(
    redis: RedisServer, publish: RedisClient
) -> None:
    """To hold again what is held changes nothing and is confirmed; a message still comes once."""
    heard = Heard()
    async with opened(redis.url, **heard.callables) as link:
        replies = await asyncio.gather(*link.subscribe("a", "a"), *link.subscribe("a"))
        assert replies == [[b"subscribe", b"a", 1]] * 3
        assert await asyncio.to_thread(publish.publish, b"x", "a") == 1
        await until(lambda: (b"a", b"x") in heard.all, "the message is missing")
        await link.execute("PING")
        assert heard.all == [(b"a", True)] * 3 + [(b"a", b"x")]


@in_loop
async def test_holding_on_a_link_that_has_ended_fails(redis: RedisServer) -> None:
    """Each channel gets its error; nothing is told as confirmed."""
    heard = Heard()
    async with opened(redis.url, **heard.callables) as link:
        link.abort()
        await asyncio.wait_for(asyncio.shield(link.lost), 5 * UNIT_S)
        for reply in (*link.subscribe("a", "b"), *link.unsubscribe("a")):
            with pytest.raises(RedisUnavailable):
                await reply
    assert heard.all == []


MESSAGE = b"*3\r\n$7\r\nmessage\r\n$1\r\n%b\r\n$1\r\n%b\r\n"
CONFIRMATION = b"*3\r\n$9\r\nsubscribe\r\n$1\r\n%b\r\n:1\r\n"
TAKEN_AWAY = b"*3\r\n$11\r\nunsubscribe\r\n$1\r\n%b\r\n:0\r\n"
PONG = b"*2\r\n$4\r\npong\r\n$0\r\n\r\n"


@pytest.mark.parametrize("step", [0, 1, 7], ids=["one read", "byte by byte", "7 bytes at a time"])
@in_loop
async def test_the_order_of_messages_and_confirmations_is_that_of_the_bytes(step: int) -> None:
    """However the bytes arrive, a message before a confirmation is handed over before it."""
    data = (
        (MESSAGE % (b"c", b"1"))
        + (MESSAGE % (b"d", b"2"))
        + (CONFIRMATION % b"c")
        + (MESSAGE % (b"c", b"3"))
        + PONG
        + (MESSAGE % (b"c", b"4"))
    )

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"PING\r\n")
        for at in range(0, len(data), step or len(data)):
            writer.write(data[at : at + (step or len(data))])
            await writer.drain()
            await asyncio.sleep(0)
        await reader.read()

    heard = Heard()
    async with stand_in(talk) as url, opened(url, **heard.callables) as link:
        subscribed, pong = *link.subscribe("c"), *link.send(("PING",))
        assert await subscribed == [b"subscribe", b"c", 1]
        assert await pong == [b"pong", b""]
        await until(lambda: heard.all and heard.all[-1][1] == b"4", f"the last message is missing: {heard.all}")
    assert heard.all == [(b"c", b"1"), (b"d", b"2"), (b"c", True), (b"c", b"3"), (b"c", b"4")]


@in_loop
async def test_what_nobody_asked_for_is_told_and_answers_nothing() -> None:
    """A subscription that Redis takes away by itself is told; the replies of commands stay with their commands."""
    data = (TAKEN_AWAY % b"c") + PONG + (CONFIRMATION % b"x") + (CONFIRMATION % b"c") + (TAKEN_AWAY % b"c") + PONG

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"PING\r\n")
        writer.write(data)
        await reader.read()

    heard = Heard()
    async with stand_in(talk) as url, opened(url, **heard.callables) as link:
        first, subscribed, second = *link.send(("PING",)), *link.subscribe("c"), *link.send(("PING",))
        async with asyncio.timeout(5 * UNIT_S):
            assert await first == await second == [b"pong", b""]
            assert await subscribed == [b"subscribe", b"c", 1]
    assert heard.all == [(b"c", False), (b"x", True), (b"c", True), (b"c", False)]


@in_loop
async def test_what_one_read_brings_is_one_batch() -> None:
    """Messages that arrive together are handed over together, by channel."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"PING\r\n")
        writer.write(b"".join(MESSAGE % ((b"c", b"d")[number % 2], b"%d" % number) for number in range(10)))
        await reader.read()

    heard = Heard()
    async with stand_in(talk) as url, opened(url, **heard.callables) as link:
        link.send(("PING",))
        await until(lambda: heard.batches, "no message came")
    assert heard.batches == [{b"c": [b"0", b"2", b"4", b"6", b"8"], b"d": [b"1", b"3", b"5", b"7", b"9"]}]


@in_loop
async def test_messages_before_nonsense_are_handed_over_and_the_link_ends() -> None:
    """A stream that turns into nonsense ends the link; what was right before it is not lost."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"PING\r\n")
        writer.write((MESSAGE % (b"c", b"1")) + b"?nonsense\r\n")
        await reader.read()

    heard = Heard()
    async with stand_in(talk) as url, opened(url, **heard.callables) as link:
        pong = link.send(("PING",))[0]
        await asyncio.wait_for(asyncio.shield(link.lost), 5 * UNIT_S)
        assert heard.all == [(b"c", b"1")]
        with pytest.raises(RedisUnavailable):
            await pong


# The end


@in_loop
async def test_every_reply_fails_when_redis_dies(redis: RedisServer) -> None:
    """Replies that are still awaited fail, `lost` is done, and later commands fail at once."""
    async with opened(redis.url) as link:
        blocked, behind = link.send(("BLPOP", "nothing", 0), ("ECHO", "a"))
        await asyncio.to_thread(redis.kill)
        await asyncio.wait_for(asyncio.shield(link.lost), 5 * UNIT_S)
        for reply in (blocked, behind, link.send(("PING",))[0]):
            with pytest.raises(RedisUnavailable):
                await reply
        with pytest.raises(RedisUnavailable):
            await link.execute("PING")


@in_loop
async def test_redis_may_hang_up(redis: RedisServer, publish: RedisClient) -> None:
    """A connection that Redis closes by itself is lost as well."""
    async with opened(redis.url) as link:
        number = await link.execute("CLIENT", "ID")
        assert await asyncio.to_thread(publish.command, "CLIENT", "KILL", "ID", number) == 1
        await asyncio.wait_for(asyncio.shield(link.lost), 5 * UNIT_S)


@in_loop
async def test_a_link_that_was_aborted_takes_no_more_commands(redis: RedisServer) -> None:
    """A command in the very moment of the end fails as RedisUnavailable, and as nothing else."""
    async with opened(redis.url) as link:
        waiting = link.send(("BLPOP", "nothing", 0))[0]
        link.abort()
        for reply in (waiting, *link.send(("PING",), ("PING",))):
            with pytest.raises(RedisUnavailable):
                await reply
        link.abort()


# Silence

SILENCE_S = 0.3 * UNIT_S


def dripping(reply: bytes, every_s: float) -> Talk:
    """A server that answers whatever it is asked with a reply that takes long to come."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        for at in range(0, len(reply), 10):
            await asyncio.sleep(every_s)
            writer.write(reply[at : at + 10])
        await reader.read()

    return talk


@in_loop
async def test_who_owes_a_reply_and_says_nothing_is_left() -> None:
    """Half-open, or frozen: the link ends by itself, and says so to all who wait."""
    async with stand_in(silence) as url, opened(url, silence_s=SILENCE_S) as link:
        replies = link.send(("PING",), ("PING",))
        async with asyncio.timeout(10 * SILENCE_S):
            for reply in replies:
                with pytest.raises(RedisUnavailable, match="did not answer within"):
                    await reply
            await link.lost
        assert link.why.startswith("Redis did not answer within")


@in_loop
async def test_it_is_left_however_soon_those_give_up_who_wait() -> None:
    """Their patience is not the link's: each waits for less than the silence, again and again."""
    async with stand_in(silence) as url, opened(url, silence_s=SILENCE_S) as link, asyncio.timeout(10 * SILENCE_S):
        while not link.lost.done():
            with contextlib.suppress(TimeoutError, RedisUnavailable):
                async with asyncio.timeout(SILENCE_S / 5):
                    await link.execute("PING")


@in_loop
async def test_a_reply_that_takes_long_to_come_is_no_silence() -> None:
    """Silence is counted from the last bytes, not from the question."""
    reply = b"$200\r\n" + b"x" * 200 + b"\r\n"
    talk = dripping(reply, SILENCE_S / 5)  # four times the silence in all
    async with stand_in(talk) as url, opened(url, silence_s=SILENCE_S) as link, asyncio.timeout(20 * SILENCE_S):
        assert await link.execute("GET", "x") == b"x" * 200


@in_loop
async def test_a_link_that_owes_nothing_may_be_silent(redis: RedisServer) -> None:
    """However long it is: only while a reply is due does silence mean anything."""
    async with opened(redis.url, silence_s=SILENCE_S) as link:
        for _ in range(3):
            assert await link.execute("PING") == b"PONG"
            await asyncio.sleep(2 * SILENCE_S)
        assert not link.lost.done()


@in_loop
async def test_a_standstill_of_our_own_is_no_silence(redis: RedisServer) -> None:
    """What has come meanwhile is read before the link is judged."""
    async with opened(redis.url, silence_s=SILENCE_S) as link:
        for _ in range(3):
            reply = link.execute("PING")
            waiting = asyncio.ensure_future(reply)
            await asyncio.sleep(0)
            time.sleep(2 * SILENCE_S)  # noqa: ASYNC251 - the loop stands still: this is the scenario
            assert await waiting == b"PONG"


@in_loop
async def test_two_links_share_nothing(redis: RedisServer) -> None:
    """The end of one link is not the end of another."""
    async with opened(redis.url) as other:
        async with opened(redis.url) as link:
            link.abort()
        assert await other.execute("PING") == b"PONG"
