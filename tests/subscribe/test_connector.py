"""The connector of a subscriber: when it makes its attempts, and that these are nobody's but its own."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import itertools
import logging
import random
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, cast

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.frames import Close
from websockets.typing import Subprotocol

from broadcaster import Subscriber
from broadcaster.core.backoff import ReconnectBackoff
from broadcaster.core.runtime import CLOCK
from broadcaster.settings import Settings, SubscriberTable
from broadcaster.subscribe import connector as connector_module
from broadcaster.subscribe.connector import Connector
from broadcaster.wire import client
from broadcaster.wire.retry_after import retry_after_s
from tests.support import free_port, in_loop, run_async, until

LOST = client.ConnectionClosed(None, None)
TABLE = SubscriberTable(reconnect_max_s=3600.0)


class Attempts:
    """A hub that is not there, and how often it was looked for."""

    def __init__(self, url: str = "") -> None:
        self.count = 0
        self._url = url or f"ws://127.0.0.1:{free_port()}/ws"

    def url(self) -> str:
        self.count += 1
        return self._url


@contextlib.asynccontextmanager
async def connector(
    url: Callable[[], str], table: SubscriberTable = TABLE, *, tls: bool = False
) -> AsyncIterator[Connector]:
    """A connector that is closed with the block."""
    opened = Connector(table, url, "", ssl.create_default_context() if tls else None)
    try:
        yield opened
    finally:
        await opened.close()


async def poll(connector: Connector, times: int, every_s: float) -> None:
    """Wait for a connection again and again, for a short time each."""
    for _ in range(times):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(every_s):
                await connector.connect()


@pytest.mark.parametrize("hint_s", [0.0, 0.3])
def test_a_wait_that_is_cancelled_goes_on_and_is_not_begun_anew(hint_s: float) -> None:
    """Whoever polls with short time-outs comes to an attempt as soon as whoever waits."""

    async def story() -> int:
        attempts = Attempts()
        async with connector(attempts.url) as one:
            one.hint(hint_s)
            one.on_lost(LOST)
            await poll(one, 60, 0.01)
            return attempts.count

    assert run_async(story()) >= 1


def test_nobody_has_to_wait_for_it() -> None:
    """A connection that was lost is opened again although nobody asks for it meanwhile."""

    async def story() -> None:
        attempts = Attempts()
        async with connector(attempts.url, SubscriberTable(reconnect_max_s=0.01)) as one:
            one.on_lost(LOST)
            await until(lambda: attempts.count >= 3, "it waits to be asked")

    run_async(story())


def test_the_hint_holds_for_whoever_polls() -> None:
    """A cancelled wait shortens nothing: before the hint has passed there is no attempt."""

    async def story() -> int:
        attempts = Attempts()
        async with connector(attempts.url) as one:
            one.hint(60.0)
            one.on_lost(LOST)
            await poll(one, 20, 0.005)
            return attempts.count

    assert run_async(story()) == 0


HINTS: dict[str, tuple[object, float]] = {
    "a number": (1.5, 1.5),
    "nothing": (None, 0.0),
    "text": ("3", 0.0),
    "negative": (-1e9, 0.0),
    "not a number": (float("nan"), 0.0),
    "infinite": (float("inf"), 60.0),
    "a number that is no float": (10**400, 60.0),
    "negative, and no float": (-(10**400), 0.0),
}


@pytest.mark.parametrize(("hint", "waits_s"), HINTS.values(), ids=HINTS.keys())
def test_a_hint_is_bounded(hint: object, waits_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a hub asks for: the wait is not shorter than the backoff, and at most a minute longer."""
    asked: list[float] = []
    sleep = asyncio.sleep

    async def noting(delay_s: float) -> None:
        asked.append(delay_s)
        await sleep(0)

    async def story() -> None:
        monkeypatch.setattr(asyncio, "sleep", noting)
        attempts = Attempts()
        async with connector(attempts.url) as one:
            one.hint(hint)
            one.on_lost(LOST)
            while not attempts.count:
                await sleep(0)

    run_async(story())
    assert waits_s <= asked[0] <= waits_s + 0.2


# A server that accepts and closes at once


async def aborting(connection: ServerConnection) -> None:
    connection.transport.abort()


def closing(code: int) -> Callable[[ServerConnection], Awaitable[None]]:
    async def close(connection: ServerConnection) -> None:
        await connection.close(code)

    return close


class Middle:
    """Chance that draws the middle of each range: the waits of a backoff are then half of its bounds."""

    def uniform(self, low: float, high: float) -> float:
        return (low + high) / 2


ENDS = {str(code): closing(code) for code in (1000, 1011, 1012, 1013, 4008, 4009)} | {"RST": aborting}


class Bounds:
    """Chance that notes below which bounds it is to draw, and draws nothing: there is no wait."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def uniform(self, low: float, high: float) -> float:
        self.seen.append(high)
        return 0.0


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_server_that_closes_at_once_is_not_stormed(
    end: Callable[[ServerConnection], Awaitable[None]], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The backoff rises to 30 s, however short that of failed attempts is; each cause is said once."""
    drawn = Bounds()
    monkeypatch.setattr(connector_module, "TRY_LATER_S", 0.01)

    async def story() -> None:
        async with serve(end, "127.0.0.1", 0, subprotocols=[Subprotocol("broadcaster.v1")]) as server:
            url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/ws"
            table = SubscriberTable(reconnect_max_s=0.1)
            async with Subscriber(url, settings=Settings.model_construct(subscriber=table)) as subscriber:
                monkeypatch.setattr(subscriber._connector._backoff, "_chance", drawn)
                receiving = asyncio.create_task(drain(subscriber))
                await until(lambda: len(drawn.seen) >= 8, "it does not come back")
                receiving.cancel()
                await asyncio.wait([receiving])

    with caplog.at_level(logging.INFO, "broadcaster"):
        run_async(story())
    assert drawn.seen[:8] == [1, 2, 4, 8, 16, 30, 30, 30]
    assert sum("connection closed" in line for line in caplog.messages) == 1


def test_try_again_later_is_heeded() -> None:
    """Close 1013 has no number of its own: 2 s, and the backoff on top of it."""

    async def story() -> int:
        attempts = Attempts()
        async with connector(attempts.url) as one:
            one.on_lost(client.ConnectionClosed(Close(1013, "full"), None))
            assert one._hint_s == 2.0
            await poll(one, 10, 0.1)
            return attempts.count

    assert run_async(story()) == 0


async def drain(subscriber: Subscriber) -> None:
    while await subscriber.receive() is not None:
        pass


def bounds(backoff: ReconnectBackoff, count: int) -> list[float]:
    """Twice what it waits, with chance in the middle."""
    return [2 * wait_s for wait_s in itertools.islice(backoff.waits_s(), count)]


def test_a_connection_that_was_good_is_opened_again_soon() -> None:
    """One that has lasted 5 s, or brought an event; one that was not makes every later wait longer."""
    backoff = ReconnectBackoff(1.0, cast("Any", Middle()))
    assert bounds(backoff, 4) == pytest.approx([0.2, 0.4, 0.8, 1.0])
    for lasted_s, brought_event, first_s in ((4.9, False, 1.0), (0, False, 2.0), (5.0, False, 0.2),
                                             (0, False, 1.0), (0.1, True, 0.2)):  # fmt: skip
        backoff.on_lost(lasted_s, brought_event=brought_event)
        assert bounds(backoff, 1) == pytest.approx([first_s])


def test_in_vain_again_and_again_is_at_most_eight_times_in_twelve_seconds() -> None:
    """By chance, in 2,000 lives with seeds: the ninth connection comes later, but for one in a thousand."""
    sooner = 0
    for seed in range(2000):
        backoff = ReconnectBackoff(5.0, cast("Any", random.Random(seed)))
        waited_s = 0.0
        for _ in range(8):
            backoff.on_lost(0.0, brought_event=False)
            waited_s += next(backoff.waits_s())
        sooner += waited_s < 12
    assert sooner <= 2


DATES = {
    "a number": ("17", 17.0),
    "none": ("", 0.0),
    "no number": ("soon", 0.0),
    "negative": ("-5", 0.0),
    "other digits": ("\u0665", 0.0),
    "a date": (email.utils.formatdate(4e9, usegmt=True), 4e9 - CLOCK.wall_ns() / 1e9),
    "a date that has passed": ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
    "a date that is none": ("Wed, 99 Oct 2015 07:28:00 GMT", 0.0),
    "without end": ("9" * 400, float("inf")),
}


@pytest.mark.parametrize(("value", "seconds"), DATES.values(), ids=DATES)
def test_retry_after_is_a_number_or_a_date(value: str, seconds: float) -> None:
    """RFC 9110 10.2.3; what is neither asks for nothing."""
    assert retry_after_s(value) == pytest.approx(seconds, abs=3600)


# A hub that has gone before it is asked

REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
RESET = struct.pack("ii", 1, 0)


@pytest.mark.parametrize("said", [REFUSAL, b"", None], ids=["refuses", "closes", "resets"])
def test_who_hangs_up_before_the_request_is_tried_again(
    said: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library has errors of its own for that, which are none of the contract's; here they come each time."""
    handshake = client.ClientConnection.handshake

    async def late(connection: Any, *arguments: Any) -> None:
        await asyncio.sleep(0.05)
        await handshake(connection, *arguments)

    async def story() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.setblocking(False)

            async def hang_up() -> None:
                while True:
                    connection, _ = await loop.sock_accept(server)
                    if said is None:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    else:
                        await loop.sock_sendall(connection, said)
                    connection.close()

            attempts = Attempts(f"ws://127.0.0.1:{server.getsockname()[1]}/ws")
            async with connector(attempts.url, TABLE.model_copy(update={"reconnect_max_s": 0.05})) as one:
                hanging, connecting = asyncio.create_task(hang_up()), asyncio.create_task(one.connect())
                await until(lambda: attempts.count >= 3 or connecting.done(), "no further attempt")
                assert not connecting.done(), connecting
                for task in (hanging, connecting):
                    task.cancel()
                await asyncio.wait([hanging, connecting])

    monkeypatch.setattr(client.ClientConnection, "handshake", late)
    run_async(story())


# Closing in the middle


class Silent(asyncio.Protocol):
    """Accepts and says nothing."""

    def __init__(self) -> None:
        self.gone = False

    def connection_lost(self, error: Exception | None) -> None:
        self.gone = True


@contextlib.contextmanager
def unanswered() -> Iterator[int]:
    """A port on which a connection is not even accepted: its backlog is full."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", free_port()))
        listening.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        yield listening.getsockname()[1]


async def close_soon(url: str, *, lost: bool = False) -> Attempts:
    """Close a connector that has been busy for a moment; nothing of it may be left."""
    before = asyncio.all_tasks()
    attempts = Attempts(url)
    async with connector(attempts.url, tls=url.startswith("wss:")) as one:
        if lost:
            one.hint(30.0)
            one.on_lost(LOST)
        await poll(one, 1, 0.2)
        assert one.connection is None
        async with asyncio.timeout(1.0):
            await one.close()
    assert asyncio.all_tasks() == before
    return attempts


def test_closing_ends_a_wait_for_the_next_attempt() -> None:
    """It does not sleep to the end, and makes no attempt any more."""
    assert run_async(close_soon("ws://127.0.0.1:1/ws", lost=True)).count == 0


def test_closing_ends_a_dial_that_is_not_answered() -> None:
    """A socket that is being connected is closed: an open one would be a ResourceWarning, which is an error."""
    with unanswered() as port:
        assert run_async(close_soon(f"ws://127.0.0.1:{port}/ws")).count == 1


@pytest.mark.parametrize("scheme", ["ws", "wss"])
def test_closing_ends_a_handshake(scheme: str) -> None:
    """In the middle of that of HTTP or of TLS: the connection ends at once."""
    silent: list[Silent] = []

    def accept() -> Silent:
        silent.append(Silent())
        return silent[-1]

    async def story() -> None:
        server = await asyncio.get_running_loop().create_server(accept, "127.0.0.1", free_port())
        async with server:
            await close_soon(f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws")
            assert len(silent) == 1
            await until(lambda: silent[0].gone, "the connection was left", within=1)

    run_async(story())


HUB, SUBSCRIBER = Close(1012, "the hub is restarting"), Close(1011, "keepalive ping timeout")
CLOSES: dict[str, tuple[Close | None, Close | None, bool | None, str]] = {
    "by the hub": (HUB, HUB, True, "1012 the hub is restarting"),
    "by the hub, without a word": (Close(1000, ""), Close(1000, ""), True, "1000"),
    "by nobody": (None, None, None, "it was lost"),
    "by this side": (None, SUBSCRIBER, None, "1011 keepalive ping timeout"),
}


@pytest.mark.parametrize(("received", "sent", "order", "words"), CLOSES.values(), ids=CLOSES)
def test_why_a_connection_was_closed_is_said_once(
    received: Close | None, sent: Close | None, order: bool | None, words: str
) -> None:
    """The other side's code and reason; what was answered to it says nothing new."""
    assert client.close_reason(client.ConnectionClosed(received, sent, order)) == words


# Servers that take a connection and end it


async def count_connections(code: int | None, within_s: float) -> int:
    """How often a subscriber comes in so many seconds to a server that ends each connection at once."""
    times: list[float] = []

    async def end(connection: ServerConnection) -> None:
        times.append(time.monotonic())
        if code is None:
            connection.transport.abort()
        else:
            await connection.close(code)

    async with serve(end, "127.0.0.1", 0, subprotocols=[Subprotocol("broadcaster.v1")]) as server:
        port = server.sockets[0].getsockname()[1]
        async with Subscriber(f"ws://127.0.0.1:{port}/ws", settings=Settings.model_construct()) as subscriber:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await subscriber.receive()
    return len(times)


@pytest.mark.slow
@in_loop
async def test_nobody_makes_a_storm_of_connections_that_are_ended_at_once() -> None:
    """At most 8 in the first 12 s, whatever the way of ending; a thousand clients would keep a hub down."""
    codes = (None, 1000, 1011, 1012, 1013, 4008)
    counts = await asyncio.gather(*(count_connections(code, 12.0) for code in codes))
    assert all(2 <= count <= 8 for count in counts), dict(zip(codes, counts, strict=True))
