"""One link to Redis: replies in order, messages in order, every end told."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broadcaster.errors import RedisRefused, RedisUnavailable
from broadcaster.redis_link import RedisLink
from broadcaster.redis_server import RedisServer, free_port
from tests.support import UNIT_S, RedisClient, frozen, in_loop, until

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def opened(url: str, *, timeout_s: float = 5 * UNIT_S, **callables: Any) -> AsyncIterator[RedisLink]:
    """A link that is ended with the block, and whose end is awaited."""
    link = await RedisLink.open(url, timeout_s=timeout_s, **callables)
    try:
        yield link
    finally:
        link.abort()
        await asyncio.wait_for(asyncio.shield(link.lost), 5 * UNIT_S)


@contextlib.asynccontextmanager
async def stand_in(talk: Talk) -> AsyncIterator[str]:
    """A server that says what the test wants, for what no real Redis would do on demand; yields its URL."""
    writers = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError):
            await talk(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1")
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    finally:
        for writer in writers:
            writer.transport.abort()
        server.close()
        await server.wait_closed()


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
        await RedisLink.open(redis.url.replace("redis://", "redis://:x@"), timeout_s=5 * UNIT_S)


@in_loop
async def test_a_missing_right_is_refused_for_good(guarded: RedisServer) -> None:
    """A channel the user has no right to is RedisRefused; another one is confirmed."""
    url = guarded.url.replace("redis://", "redis://watcher:w%3Ard%2F%40@")
    async with opened(url) as link:
        with pytest.raises(RedisRefused, match="NOPERM"):
            await link.execute("SUBSCRIBE", "forbidden")
        assert await link.execute("SUBSCRIBE", "allowed") == [b"subscribe", b"allowed", 1]


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
        await RedisLink.open(url(), timeout_s=5 * UNIT_S)


@in_loop
async def test_tls_to_a_redis_without_it_is_unavailable(redis: RedisServer) -> None:
    """rediss:// at a plain port fails as RedisUnavailable, within the deadline."""
    with pytest.raises(RedisUnavailable):
        await RedisLink.open(redis.url.replace("redis://", "rediss://"), timeout_s=0.4 * UNIT_S)


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
            await RedisLink.open(url.replace("redis://", "redis://:secret@"), timeout_s=0.3)


@in_loop
async def test_a_frozen_redis_does_not_log_in_within_the_deadline(redis: RedisServer) -> None:
    """A Redis that accepts and does not answer is unavailable when the deadline has passed."""
    with frozen(redis), pytest.raises(RedisUnavailable):
        await RedisLink.open(redis.url.removesuffix("/0") + "/1", timeout_s=0.3)


# Messages


@in_loop
async def test_messages_and_confirmations_come_in_order(redis: RedisServer, publish: RedisClient) -> None:
    """A subscription is confirmed before its first message; messages keep Redis' order and bytes."""
    heard: list[bytes | str] = []
    async with opened(
        redis.url, on_messages=heard.extend, on_subscribed=lambda: heard.append("confirmed")
    ) as link:
        await link.execute("SUBSCRIBE", "events")
        sent = [b"%d \0\xff\r\n" % number for number in range(500)]
        for payload in sent:
            assert await asyncio.to_thread(publish.publish, payload, "events") == 1
        await until(lambda: len(heard) == 501, f"messages are missing: {len(heard)}")
        assert heard == ["confirmed", *sent]
        assert await link.execute("PING") == [b"pong", b""]


MESSAGE = b"*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\n%b\r\n"
CONFIRMATION = b"*3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n"
PONG = b"*2\r\n$4\r\npong\r\n$0\r\n\r\n"


@pytest.mark.parametrize("step", [0, 1, 7], ids=["one read", "byte by byte", "7 bytes at a time"])
@in_loop
async def test_the_order_of_messages_and_confirmations_is_that_of_the_bytes(step: int) -> None:
    """However the bytes arrive, a message before a confirmation is handed over before it."""
    data = (MESSAGE % b"1") + (MESSAGE % b"2") + CONFIRMATION + (MESSAGE % b"3") + PONG + (MESSAGE % b"4")

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"PING\r\n")
        for at in range(0, len(data), step or len(data)):
            writer.write(data[at : at + (step or len(data))])
            await writer.drain()
            await asyncio.sleep(0)
        await reader.read()

    heard: list[list[bytes] | str] = []
    async with (
        stand_in(talk) as url,
        opened(url, on_messages=heard.append, on_subscribed=lambda: heard.append("confirmed")) as link,
    ):
        subscribed, pong = link.send(("SUBSCRIBE", "c"), ("PING",))
        assert await subscribed == [b"subscribe", b"c", 1]
        assert await pong == [b"pong", b""]
        await until(lambda: heard and heard[-1][-1] == b"4", f"the last message is missing: {heard}")
    flat = [word for item in heard for word in (item if isinstance(item, list) else [item])]
    assert flat == [b"1", b"2", "confirmed", b"3", b"4"]


@in_loop
async def test_what_one_read_brings_is_one_batch() -> None:
    """Messages that arrive together are handed over together."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"PING\r\n")
        writer.write(b"".join(MESSAGE % b"%d" % number for number in range(10)))
        await reader.read()

    batches: list[list[bytes]] = []
    async with stand_in(talk) as url, opened(url, on_messages=batches.append) as link:
        link.send(("PING",))
        await until(lambda: batches, "no message came")
    assert batches == [[b"%d" % number for number in range(10)]]


@in_loop
async def test_messages_before_nonsense_are_handed_over_and_the_link_ends() -> None:
    """A stream that turns into nonsense ends the link; what was right before it is not lost."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"PING\r\n")
        writer.write((MESSAGE % b"1") + b"?nonsense\r\n")
        await reader.read()

    heard: list[bytes] = []
    async with stand_in(talk) as url, opened(url, on_messages=heard.extend) as link:
        pong = link.send(("PING",))[0]
        await asyncio.wait_for(asyncio.shield(link.lost), 5 * UNIT_S)
        assert heard == [b"1"]
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


@in_loop
async def test_any_byte_from_redis_is_a_sign_of_life(redis: RedisServer, publish: RedisClient) -> None:
    """`heard_at` moves with replies and with messages, and with nothing else."""
    heard: list[bytes] = []
    loop = asyncio.get_running_loop()
    async with opened(redis.url, on_messages=heard.extend) as link:
        await link.execute("SUBSCRIBE", "events")
        after_reply = link.heard_at
        assert after_reply <= loop.time()
        await asyncio.sleep(0.05)
        assert link.heard_at == after_reply
        await asyncio.to_thread(publish.publish, b"x", "events")
        await until(lambda: heard, "the message is missing")
        assert link.heard_at > after_reply


@in_loop
async def test_two_links_share_nothing(redis: RedisServer) -> None:
    """The end of one link is not the end of another."""
    async with opened(redis.url) as other:
        async with opened(redis.url) as link:
            link.abort()
        assert await other.execute("PING") == b"PONG"
