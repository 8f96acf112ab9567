"""Redis behind TLS, with the users of config/redis.acl: each part works with exactly its own rights."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broadcaster.core.errors import RedisRefused, RedisUnavailable, RedisUnreachable
from broadcaster.core.event import Event
from broadcaster.core.position import Gap, Position
from broadcaster.publish.publisher import Publisher
from broadcaster.redis import stream
from broadcaster.redis.commands import CommandLink
from broadcaster.redis.connection import Command, RedisConnection
from broadcaster.redis.pubsub import PubSubLink
from broadcaster.redis.server import RedisServer
from broadcaster.redis.suitability import ASK_COMMANDS, ASK_SETTINGS
from broadcaster.settings import HistoryTable, PublisherTable, RedisTable, Settings
from broadcaster.subscribe.subscriber import Subscriber
from tests.certificates import Certificates, make
from tests.support import (
    ROOT,
    UNIT_S,
    Hub,
    HubThread,
    Proxy,
    assert_calm,
    broadcaster,
    dead,
    finished,
    free_port,
    hasty,
    in_loop,
    until,
)

ACL = ROOT / "config" / "redis.acl"

ADMIN = "admin:of-the-tests"
HUB = "hub:change-me-hub"
PUBLISHER = "publisher:change-me-publisher"


# A Redis with users, behind TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make(tmp_path_factory.mktemp("certificates"))


def users(*more: str) -> str:
    """The users of config/redis.acl, one who may do everything, and others; without comments."""
    lines = [line for line in ACL.read_text().splitlines() if line.startswith("user ")]
    name, _, password = ADMIN.partition(":")
    return "\n".join([*lines, f"user {name} on >{password} allkeys allchannels +@all", *more]) + "\n"


@pytest.fixture(scope="module")
def acl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of users for Redis."""
    path = tmp_path_factory.mktemp("users") / "users.acl"
    path.write_text(users(*POOR_USERS))
    return path


@pytest.fixture
def guarded(acl: Path) -> Iterator[RedisServer]:
    """A Redis with users, of the test's own."""
    with RedisServer.start(None, "--aclfile", str(acl)) as server:
        yield server


@pytest.fixture(scope="module")
def steady(acl: Path) -> Iterator[RedisServer]:
    """A Redis with users, for tests that leave it as it is."""
    with RedisServer.start(None, "--aclfile", str(acl)) as server:
        yield server


@pytest.fixture
def proxy(guarded: RedisServer, certificates: Certificates) -> Iterator[Proxy]:
    with Proxy(guarded.port, certificates) as proxy:
        yield proxy


@pytest.fixture
def address(proxy: Proxy, certificates: Certificates) -> Callable[[str], str]:
    """The rediss:// address for a user."""
    return lambda user: f"rediss://{user}@127.0.0.1:{proxy.port}/0?ssl_ca_certs={certificates.authority}"


def plain(server: RedisServer, user: str) -> str:
    """The redis:// address for a user."""
    return server.url.replace("redis://", f"redis://{user}@")


def settings(redis_url: str, publish_deadline_s: float = 10 * UNIT_S) -> Settings:
    """Settings that notice and retry soon."""
    return Settings(redis=hasty(redis_url), publisher=PublisherTable(publish_deadline_s=publish_deadline_s))


@contextlib.asynccontextmanager
async def running(redis_url: str, **variables: str) -> AsyncIterator[Hub]:
    """A ready hub."""
    hub = await asyncio.to_thread(
        HubThread, redis_url, None, BROADCASTER_REDIS__RECONNECT_MAX_S="0.1", **variables
    )
    try:
        await asyncio.to_thread(hub.until_ready)
        yield hub
    finally:
        await asyncio.to_thread(hub.__exit__, None, None, None)


@contextlib.asynccontextmanager
async def commands(redis_url: str) -> AsyncIterator[CommandLink]:
    """Commands as some user, with the script loaded."""
    link = CommandLink(settings(redis_url).redis, stream.LOAD)
    try:
        yield link
    finally:
        link.close()


@contextlib.asynccontextmanager
async def restarted(server: RedisServer, acl: Path) -> AsyncIterator[None]:
    """Redis dies at once, and another one, with the same users, takes its place."""
    server.kill()
    another = await asyncio.to_thread(RedisServer.start, server.port, "--aclfile", str(acl))
    try:
        yield
    finally:
        await asyncio.to_thread(another.stop)


async def next_event(subscriber: Subscriber) -> Event:
    async with asyncio.timeout(10 * UNIT_S):
        return await anext(subscriber)


# The file


def test_the_file_of_users_is_ready_to_use() -> None:
    """`redis-server --aclfile config/redis.acl`, as it says itself."""
    with RedisServer.start(None, "--aclfile", str(ACL)) as server:
        assert server.pid


# What the parts do, they may do


@in_loop
async def test_everything_works_with_exactly_these_rights(
    address: Callable[[str], str], guarded: RedisServer, acl: Path
) -> None:
    """The first event of an empty Redis, many at once, probes, a page of the log, and another Redis process."""
    async with (
        running(address(HUB)) as hub,
        Publisher(settings(address(PUBLISHER))) as publisher,
        Subscriber(hub.url, settings=settings("redis://127.0.0.1:1/0")) as subscriber,
    ):
        waiting = asyncio.ensure_future(next_event(subscriber))
        await until(lambda: subscriber.positions, "never connected")
        first = await publisher.publish("T", "s")
        assert first.position is not None
        assert (first.position.offset, first.heard) == (1, 1)
        assert (await waiting).event_id == first.event.event_id
        many = await asyncio.gather(*(publisher.publish("T", "s") for _ in range(20)))
        assert [result.position for result in many] == [Position(first.position.epoch, 2 + n) for n in range(20)]
        assert [(await next_event(subscriber)).event_id for _ in many] == [one.event.event_id for one in many]

        async with Subscriber(hub.url, settings=settings("redis://127.0.0.1:1/0"), since=first.position) as late:
            assert [(await next_event(late)).event_id for _ in many] == [one.event.event_id for one in many]
            assert late.gaps == 0

        proofs = (await asyncio.to_thread(hub.stats))["proofs"]
        async with restarted(guarded, acl):
            again = await publisher.publish("T", "s")
            assert again.position is not None
            assert again.position.epoch != first.position.epoch
            assert (await next_event(subscriber)).event_id == again.event.event_id
            assert subscriber.gaps == 1
            await asyncio.to_thread(hub.until_ready)
            assert (await asyncio.to_thread(hub.stats))["proofs"] > proofs
        await asyncio.to_thread(assert_calm, hub)
        assert "change-me" not in hub.output


@in_loop
async def test_the_hub_may_publish_what_comes_over_http(address: Callable[[str], str]) -> None:
    """POST /publish stores and publishes over the hub's own user."""
    keys = json.dumps([{"name": "a", "key": "k" * 20, "subscribe": ["events.*"], "publish": ["events.*"]}])
    async with (
        running(address(HUB), BROADCASTER_AUTH__MODE="token", BROADCASTER_AUTH__API_KEYS=keys) as hub,
        Subscriber(hub.url, settings=settings("redis://127.0.0.1:1/0"), token="k" * 20) as subscriber,
    ):
        waiting = asyncio.ensure_future(next_event(subscriber))
        await until(lambda: subscriber.positions, "never connected")
        body = b'{"event_type":"T","source":"s"}'
        reader, writer = await asyncio.open_connection("127.0.0.1", hub.port)
        writer.write(
            b"POST /publish HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b"
            % (b"k" * 20, len(body), body)
        )
        answer = await reader.read()
        writer.close()
        assert b" 201 " in answer.partition(b"\r\n")[0], answer
        assert (await waiting).event_type == "T"


UNSUITABLE: dict[str, tuple[tuple[str, ...], str]] = {
    "XADD is disabled": (("--rename-command", "XADD", ""), "not ready: Redis has no XADD"),
    "XADD is renamed": (("--rename-command", "XADD", "other-xadd"), "not ready: Redis has no XADD"),
    "it evicts": (("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"), "its maxmemory-policy is"),
    "it cuts hubs off": (("--client-output-buffer-limit", "pubsub 1mb 0 0"), "its client-output-buffer-limit"),
}


@pytest.mark.parametrize(("arguments", "words"), UNSUITABLE.values(), ids=UNSUITABLE.keys())
def test_a_hub_may_ask_what_is_wrong_with_its_redis(arguments: tuple[str, ...], words: str) -> None:
    """Which commands there are, and what may cost events: with the file as it is, the log says so."""
    with (
        RedisServer.start(None, "--aclfile", str(ACL), *arguments) as server,
        HubThread(plain(server, HUB), BROADCASTER_REDIS__SILENCE_TIMEOUT_S="1") as hub,
    ):
        hub.said(words)


@pytest.mark.parametrize("arguments", [(), UNSUITABLE["it evicts"][0]], ids=["a good one", "one that evicts"])
def test_a_hub_that_may_not_ask_works(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Without these rights it says nothing, and is ready."""
    file = tmp_path / "users.acl"
    file.write_text(users().replace(" +command|info +config|get", ""))
    with (
        RedisServer.start(None, "--aclfile", str(file), *arguments) as server,
        HubThread(plain(server, HUB)) as hub,
    ):
        hub.until_ready()
        assert_calm(hub)
        assert "may cost events" not in hub.output


TABLE = HistoryTable()

DO: dict[str, tuple[str, tuple[Command, ...]]] = {
    "the hub looks": (HUB, (stream.ensure_epoch("events.critical", TABLE),)),
    "the hub looks at another channel": (
        HUB,
        (stream.ensure_epoch("events.a", TABLE), stream.peek_head("events.a")),
    ),
    "the hub reads a page": (
        HUB,
        (
            stream.LOAD_PAGE,
            stream.page("events.critical", 1, 10, 10**6),
        ),
    ),
    "the hub probes": (
        HUB,
        (("SET", "broadcaster.hub.0", "", "EX", 60), ("PUBLISH", "broadcaster.hub.0", "1"), ("INFO", "server")),
    ),
    "the hub asks what there is": (HUB, (ASK_COMMANDS, *ASK_SETTINGS)),
    "a publisher stores": (PUBLISHER, (stream.store("events.do", [("a", b'{"a":1}')], TABLE),)),
    "a publisher stores after another": (
        PUBLISHER,
        (
            stream.store("events.do", [("b", b'{"a":1}')], TABLE),
            stream.store("events.do", [("c", b'{"a":1}')], TABLE, after="b"),
        ),
    ),
    "a publisher stores again": (PUBLISHER, (stream.store("events.do", [("b", b'{"a":1}')], TABLE),)),
    "a publisher looks for hubs": (PUBLISHER, (("PUBSUB", "CHANNELS", "broadcaster.hub.*"),)),
    "a publisher without history": (PUBLISHER, (("PUBLISH", "events.critical", "{}"), ("PING",))),
}


@pytest.mark.parametrize(("user", "asked"), DO.values(), ids=DO.keys())
@in_loop
async def test_each_command_of_a_part_is_allowed(
    steady: RedisServer, user: str, asked: tuple[Command, ...]
) -> None:
    """Command by command, so that a right that is missing has a name."""
    async with commands(plain(steady, user)) as link:
        assert len(await link.execute(*asked)) == len(asked)


@in_loop
async def test_a_counter_that_was_set_back_begins_an_epoch_with_these_rights(guarded: RedisServer) -> None:
    """The script's way out of a log that is ahead of its counter needs no further right."""
    async with commands(plain(guarded, PUBLISHER)) as link, commands(plain(guarded, ADMIN)) as admin:
        [reply] = await link.execute(stream.ensure_epoch("events.a", TABLE))
        began = stream.read_head(reply)
        await link.execute(stream.store("events.a", [("1", b'{"a":1}'), ("2", b'{"a":2}')], TABLE))
        await admin.execute(("HSET", "{events.a}:meta", "offset", "0"))
        [reply] = await link.execute(stream.store("events.a", [("3", b'{"a":3}')], TABLE))
        [stored] = stream.read_stored(reply)
        assert stored.position is not None
        assert stored.position.epoch > began.position.epoch


@pytest.mark.parametrize("user", [HUB, PUBLISHER], ids=["hub", "publisher"])
@in_loop
async def test_an_event_that_may_not_be_published_is_not_stored_either(guarded: RedisServer, user: str) -> None:
    """Who may write to a channel's keys, and not publish on it, is refused and leaves nothing behind.

    But for the place that Valkey does not give again (`taken_back`).
    """
    async with commands(plain(guarded, user)) as link, commands(plain(guarded, ADMIN)) as admin:
        await admin.execute(stream.store("other", [("1", b'{"a":1}')], TABLE))

        async def kept() -> tuple[dict[bytes, bytes], Any]:
            meta, log = await admin.execute(("HGETALL", "{other}:meta"), ("XRANGE", "{other}:log", "-", "+"))
            return {
                name: value for name, value in zip(meta[::2], meta[1::2], strict=True) if name != b"taken_back"
            }, log

        before = await kept()
        with pytest.raises(RedisRefused, match=r"publish|access a channel"):
            await link.execute(stream.store("other", [("2", b'{"a":2}')], TABLE))
        assert await kept() == before
        reply, look = await admin.execute(
            stream.store("other", [("2", b'{"a":2}')], TABLE), stream.ensure_epoch("other", TABLE)
        )
        [stored] = stream.read_stored(reply)
        assert stored.position == Position(stream.read_head(look).epochs[0].epoch, 2)


# What they need not do, they may not do

NOT: dict[str, tuple[str, Command]] = {
    "publisher subscribes": (PUBLISHER, ("SUBSCRIBE", "events.critical")),
    "publisher subscribes to patterns": (PUBLISHER, ("PSUBSCRIBE", "*")),
    "publisher reads the log": (PUBLISHER, ("XRANGE", "{events.critical}:log", "-", "+")),
    "publisher probes": (PUBLISHER, ("PUBLISH", "broadcaster.hub.0", "1")),
    "publisher publishes elsewhere": (PUBLISHER, ("PUBLISH", "other", "1")),
    "publisher writes another key": (PUBLISHER, ("SET", "other", "1")),
    "publisher lists keys": (PUBLISHER, ("KEYS", "*")),
    "publisher forgets everything": (PUBLISHER, ("FLUSHALL",)),
    "publisher runs another script": (PUBLISHER, ("EVAL", "return 1", 0)),
    "publisher reconfigures": (PUBLISHER, ("CONFIG", "GET", "*")),
    "publisher looks at users": (PUBLISHER, ("ACL", "LIST")),
    "publisher ends others": (PUBLISHER, ("CLIENT", "KILL", "TYPE", "pubsub")),
    "hub subscribes elsewhere": (HUB, ("SUBSCRIBE", "other")),
    "hub subscribes to patterns": (HUB, ("PSUBSCRIBE", "*")),
    "hub publishes elsewhere": (HUB, ("PUBLISH", "other", "1")),
    "hub writes another key": (HUB, ("SET", "other", "1")),
    "hub lists keys": (HUB, ("KEYS", "*")),
    "hub forgets everything": (HUB, ("FLUSHALL",)),
    "hub forgets the scripts": (HUB, ("SCRIPT", "FLUSH")),
    "hub reconfigures": (HUB, ("CONFIG", "SET", "maxmemory", "0")),
    "hub looks at users": (HUB, ("ACL", "LIST")),
    "hub listens to all": (HUB, ("MONITOR",)),
    "hub stops Redis": (HUB, ("SHUTDOWN", "NOSAVE")),
}


@pytest.mark.parametrize(("user", "command"), NOT.values(), ids=NOT.keys())
@in_loop
async def test_what_a_part_does_not_need_is_denied(steady: RedisServer, user: str, command: Command) -> None:
    """A part that was taken over can do no more than the part."""
    link = await RedisConnection.open(plain(steady, user), timeout_s=5 * UNIT_S)
    try:
        with pytest.raises(RedisRefused, match="NOPERM"):
            await link.execute(*command)
    finally:
        link.abort()


@pytest.mark.parametrize(
    "command", ["PING", "GET a", "PUBLISH a b", "SUBSCRIBE a", "INFO", "EVALSHA a 0", "FLUSHALL"]
)
@in_loop
async def test_the_default_user_may_nothing(steady: RedisServer, command: str) -> None:
    """Who says no name and no password is asked for them."""
    link = await RedisConnection.open(steady.url, timeout_s=5 * UNIT_S)
    try:
        with pytest.raises(RedisRefused, match="NOAUTH"):
            await link.execute(*command.split())
    finally:
        link.abort()


# Who is refused is told so


STRANGERS: dict[str, str] = {
    "no user": "",
    "wrong password": "publisher:wrong-pass-word@",
    "unknown user": "nobody:wrong-pass-word@",
    "password only": ":wrong-pass-word@",
}


@pytest.mark.parametrize("role", ["hub", "publish"])
@pytest.mark.parametrize("who", STRANGERS.values(), ids=STRANGERS.keys())
def test_who_cannot_log_in_ends_with_a_line(
    steady: RedisServer, certificates: Certificates, who: str, role: str
) -> None:
    """Exit code 69 and one line, at once, over TLS as well, and without the password."""
    with Proxy(steady.port, certificates) as proxy:
        url = f"rediss://{who}127.0.0.1:{proxy.port}/0?ssl_ca_certs={certificates.authority}"
        options = ("--type", "T", "--source", "s") if role == "publish" else ()
        hub_port = str(free_port())
        ended = finished(role, *options, BROADCASTER_REDIS__URL=url, BROADCASTER_HUB__PORT=hub_port)
    assert ended.code == 69
    assert ended.complaint.startswith("Redis says: ")
    assert "wrong-pass-word" not in ended.stdout + ended.stderr


def test_a_hub_with_a_publishers_rights_ends_with_a_line(steady: RedisServer) -> None:
    """It may not subscribe, and says so."""
    with broadcaster(
        "hub",
        BROADCASTER_REDIS__URL=plain(steady, PUBLISHER),
        BROADCASTER_HUB__PORT=str(free_port()),
    ) as hub:
        assert hub.wait() == 69
        assert "NOPERM" in hub.lines[-1]
        assert "change-me" not in hub.output
        assert "Traceback" not in hub.output


RIGHTS = ("auth", "evalsha", "script|load", "info", "hmget", "hset", "xadd", "expire", "publish")
"""Commands that a publisher needs; `expire` only sees to it that what is old is forgotten."""

_ENOUGH = {*RIGHTS, "select", "ping", "del", "xdel", "xsetid"}

POOR_USERS = [
    f"user without-{right.replace('|', '-')} on >of-the-tests allkeys allchannels -@all "
    + " ".join(f"+{other}" for other in sorted(_ENOUGH - {right}))
    for right in RIGHTS
]


@pytest.mark.parametrize("right", [right for right in RIGHTS if right not in ("auth", "expire")])
@in_loop
async def test_a_right_that_is_missing_is_told_at_once(steady: RedisServer, right: str) -> None:
    """Trying again would not help: the publish fails long before its deadline, and says what Redis said."""
    user = f"without-{right.replace('|', '-')}:of-the-tests"
    begun_at = time.monotonic()
    with pytest.raises(RedisRefused, match=r"can't|NOPERM|ACL failure"):
        async with Publisher(settings(plain(steady, user), 6 * UNIT_S)) as poor:
            await asyncio.gather(
                *(poor.publish("T", "s", to=f"events.{right.partition('|')[0]}") for _ in range(3))
            )
    assert time.monotonic() - begun_at < 3 * UNIT_S


# TLS itself


@in_loop
async def test_a_subscription_works_over_tls(address: Callable[[str], str]) -> None:
    """Messages come, large ones too, and it is made anew when the link breaks."""
    got: list[bytes] = []
    confirmed: list[str] = []

    class Handlers:
        def on_messages(self, messages: dict[bytes, list[bytes]]) -> None:
            got.extend(messages[b"events.a"])

        def on_confirmed(self, channel: str) -> None:
            confirmed.append(channel)

        def on_lost(self, channel: str) -> None:
            pass

    subscription = PubSubLink(settings(address(HUB)).redis)
    subscription.subscribe("events.a")
    task = asyncio.ensure_future(subscription.run(Handlers()))
    try:
        await until(lambda: confirmed == ["events.a"], "not subscribed")
        payloads = [b"%d" % n + b"x" * 100_000 for n in range(20)]
        async with commands(address(PUBLISHER)) as link:
            await link.execute(*(("PUBLISH", "events.a", payload) for payload in payloads))
            await until(lambda: got == payloads, "messages are missing")
            async with commands(address(ADMIN)) as admin:
                await admin.execute(("CLIENT", "KILL", "TYPE", "pubsub"))
            await until(lambda: len(confirmed) == 2, "not subscribed again")
            await link.execute(("PUBLISH", "events.a", b"again"))
            await until(lambda: got[-1] == b"again", "nothing comes any more")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@in_loop
async def test_a_redis_that_nobody_vouches_for_is_not_believed(
    guarded: RedisServer, proxy: Proxy, certificates: Certificates, tmp_path: Path
) -> None:
    """An authority nobody trusts, a certificate for somebody else: no password is sent, and it is said why."""
    stranger = make(tmp_path, "stranger")
    elsewhere = make(tmp_path, "elsewhere", host="127.0.0.2")
    with Proxy(guarded.port, elsewhere) as other:
        for port, query in (
            (proxy.port, ""),
            (proxy.port, f"?ssl_ca_certs={stranger.authority}"),
            (other.port, f"?ssl_ca_certs={elsewhere.authority}"),
        ):
            with pytest.raises(RedisUnavailable, match=r"CERTIFICATE_VERIFY_FAILED|verify failed") as caught:
                await RedisConnection.open(f"rediss://{HUB}@127.0.0.1:{port}/0{query}", timeout_s=5 * UNIT_S)
            assert "change-me" not in str(caught.value)
    async with commands(plain(guarded, ADMIN)) as admin:
        [entries] = await admin.execute(("CLIENT", "LIST"))
        assert b"user=hub" not in entries


@in_loop
async def test_options_of_tls_mean_what_they_mean_to_redis_py(
    proxy: Proxy, certificates: Certificates, tmp_path: Path
) -> None:
    """Without verification nothing is verified; without a check of the name an authority is enough."""
    stranger = make(tmp_path, "stranger")

    async def opens(query: str, host: str = "127.0.0.1") -> bool:
        url = f"rediss://{HUB}@{host}:{proxy.port}/0?{query}"
        assert RedisTable(url=url).url == url
        try:
            link = await RedisConnection.open(url, timeout_s=5 * UNIT_S)
        except RedisUnavailable:
            return False
        link.abort()
        return True

    assert await opens("ssl_cert_reqs=none")
    assert await opens(f"ssl_cert_reqs=none&ssl_ca_certs={stranger.authority}")
    assert not await opens("ssl_cert_reqs=required")
    assert not await opens("ssl_cert_reqs=optional")
    assert not await opens("ssl_check_hostname=false")
    authority = f"ssl_ca_certs={certificates.authority}"
    assert await opens(f"ssl_cert_reqs=optional&{authority}")
    assert not await opens(authority, host="127.1")
    assert await opens(f"ssl_check_hostname=false&{authority}", host="127.1")
    assert not await opens(f"ssl_ca_path={tmp_path}")
    assert not await opens(f"{authority}&ssl_certfile={tmp_path}/nothing.pem")


AUTHORITIES: dict[str, str] = {
    "there is no such file": "/no/such/authority.pem",
    "it is a folder": "/",
    "it has no certificate": "/dev/null",
}


@pytest.mark.parametrize("file", AUTHORITIES.values(), ids=AUTHORITIES.keys())
@in_loop
async def test_authorities_that_cannot_be_read_are_told(proxy: Proxy, file: str) -> None:
    """Nobody is believed then, and nobody waits: in a hub that was ready a file may be gone for a moment."""
    url = f"rediss://{HUB}@127.0.0.1:{proxy.port}/0?ssl_ca_certs={file}"
    with pytest.raises(RedisUnreachable, match=f"ssl_ca_certs={file}: ") as caught:
        await RedisConnection.open(url, timeout_s=5 * UNIT_S)
    assert "change-me" not in str(caught.value)


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    await asyncio.sleep(60)


async def half_a_handshake(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x16\x03\x03\x00\x7a\x02\x00\x00\x76\x03\x03")
    await silence(reader, writer)


@pytest.mark.parametrize("talk", [silence, half_a_handshake], ids=["silence", "half a handshake"])
@in_loop
async def test_a_handshake_that_does_not_end_is_given_up(talk: Talk, certificates: Certificates) -> None:
    """A port where TLS never comes about is RedisUnavailable within the deadline."""
    port = free_port()
    talks: list[asyncio.Task[Any]] = []

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talks.append(task)
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await talk(reader, writer)
        writer.transport.abort()

    server = await asyncio.start_server(greet, "127.0.0.1", port)
    try:
        with pytest.raises(RedisUnavailable):
            await RedisConnection.open(f"rediss://{HUB}@127.0.0.1:{port}/0", timeout_s=0.4 * UNIT_S)
    finally:
        server.close()
        for one in talks:
            one.cancel()
        await asyncio.gather(*talks, return_exceptions=True)


@in_loop
async def test_a_redis_that_goes_away_and_comes_back_behind_its_proxy_loses_nothing(
    redis: RedisServer, certificates: Certificates
) -> None:
    """Behind a proxy that stays, Redis can be replaced: who publishes is heard again, and gaps are told."""
    with Proxy(redis.port, certificates) as proxy:
        url = f"rediss://127.0.0.1:{proxy.port}/0?ssl_ca_certs={certificates.authority}"
        async with (
            running(url) as hub,
            Publisher(settings(url)) as publisher,
            Subscriber(hub.url, settings=settings("redis://127.0.0.1:1/0")) as subscriber,
        ):
            waiting = asyncio.ensure_future(next_event(subscriber))
            await until(lambda: subscriber.positions, "never connected")
            first = await publisher.publish("T", "s")
            assert (await waiting).event_id == first.event.event_id
            async with dead(redis) as revive:
                await revive()
                second = await publisher.publish("T", "s")
                async with asyncio.timeout(10 * UNIT_S):
                    notices = [await subscriber.receive(), await subscriber.receive()]
            assert [type(notice) for notice in notices] == [Gap, Event]
            assert isinstance(notices[1], Event)
            assert notices[1].event_id == second.event.event_id
