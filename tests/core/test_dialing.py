"""Connections to host names: an address that swallows packets delays none of the others, whoever connects."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from broadcaster import Event, Publisher, PublisherSync, Settings, Subscriber
from broadcaster.core import dialing
from broadcaster.core.errors import HubUnavailable, RedisUnreachable
from broadcaster.core.text import reason
from broadcaster.loadtest.fleet import Fleet
from broadcaster.redis.connection import RedisConnection
from broadcaster.redis.presence import answers, what_it_says
from broadcaster.redis.server import RedisServer
from broadcaster.settings import RedisTable, SubscriberTable
from broadcaster.subscribe import hub_status
from tests.certificates import make
from tests.support import UNIT_S, Hub, HubThread, Proxy, event_payload, free_port, run_async, unblocked
from tests.support.hub import settings_of

HOLE = "127.0.0.2"
NAME = "two-addresses.test"
SOON_S, LATE_S = 8 * UNIT_S, 10 * UNIT_S
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


@pytest.fixture
def two_addresses(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Makes `NAME`, and localhost, have two addresses: the first a black hole on this port, the second is real."""
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *rest: Any, **options: Any) -> list[Any]:
        if host in (NAME, "localhost"):
            addresses = HOLE, "127.0.0.1"
            return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (at, port)) for at in addresses]
        return real(host, port, *rest, **options)

    async def resolve_on_uvloop(loop: object, host: Any, port: Any, **options: Any) -> list[Any]:
        return resolve(host, port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(uvloop.Loop, "getaddrinfo", resolve_on_uvloop)
    with contextlib.ExitStack() as stack:
        yield lambda port: stack.enter_context(black_hole(port))


@contextlib.contextmanager
def black_hole(port: int) -> Iterator[None]:
    """A port that answers no packet: the queue of those who wait to be accepted is full."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind((HOLE, port))
        listening.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((HOLE, port))
        with pytest.raises(TimeoutError):
            socket.create_connection((HOLE, port), timeout=0.1)
        yield


@pytest.fixture
def redis_url(steady_redis: RedisServer, two_addresses: Callable[[int], None]) -> str:
    two_addresses(steady_redis.port)
    return f"redis://{NAME}:{steady_redis.port}/0"


@pytest.fixture
def hub_url(steady_hub: Hub, two_addresses: Callable[[int], None]) -> str:
    two_addresses(steady_hub.port)
    return f"ws://{NAME}:{steady_hub.port}/ws"


def run(loop: str, story: Awaitable[Any]) -> Any:
    """Run a coroutine on a loop of this kind."""

    async def in_time() -> Any:
        async with asyncio.timeout(SOON_S):
            return await story

    with unblocked(), asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        return runner.run(in_time())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_connection_to_redis(redis_url: str, loop: str) -> None:
    """It is there in its time; a user's program may have either loop."""

    async def story() -> None:
        connection = await RedisConnection.open(redis_url, timeout_s=2.0 * UNIT_S)
        assert await connection.execute("PING") == b"PONG"
        assert connection._transport is not None
        link = connection._transport.get_extra_info("socket")
        assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        connection.abort()

    run(loop, story())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_connection_with_tls(
    steady_redis: RedisServer, two_addresses: Callable[[int], None], tmp_path: Path, loop: str
) -> None:
    """The certificate is that of the name, whatever the address."""
    certificates = make(tmp_path)
    with Proxy(steady_redis.port, certificates) as proxy:
        two_addresses(proxy.port)
        options = f"?ssl_ca_certs={certificates.authority}"

        async def story() -> None:
            url = f"rediss://localhost:{proxy.port}/0{options}"
            connection = await RedisConnection.open(url, timeout_s=2.0 * UNIT_S)
            assert await connection.execute("PING") == b"PONG"
            connection.abort()
            with pytest.raises(RedisUnreachable, match="Hostname mismatch"):
                await RedisConnection.open(url.replace("localhost", NAME), timeout_s=2.0 * UNIT_S)

        run(loop, story())


def test_a_hub(steady_redis: RedisServer, redis_url: str) -> None:
    """It becomes ready: its subscription, its commands and its log are connections of their own."""
    with HubThread(redis_url) as hub:
        hub.until_ready(20)


def test_a_publisher(redis_url: str) -> None:
    settings = Settings(redis=RedisTable(url=redis_url))

    async def story() -> None:
        async with Publisher(settings) as publisher:
            assert (await publisher.publish("A", "s")).position

    run("uvloop", story())


def test_a_synchronous_publisher(redis_url: str) -> None:
    with PublisherSync(Settings(redis=RedisTable(url=redis_url))) as publisher:
        assert publisher.publish("A", "s").position


def test_the_look_for_a_redis(redis_url: str) -> None:
    """`broadcaster redis` finds the one that runs there, and starts no other; for which it needs no event loop."""
    assert what_it_says(redis_url) == "+PONG"
    assert run("asyncio", asyncio.to_thread(answers, redis_url, LATE_S))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_subscriber(steady_redis: RedisServer, hub_url: str, loop: str) -> None:
    settings = settings_of({"BROADCASTER_REDIS__URL": steady_redis.url})

    async def story() -> None:
        async with Publisher(settings) as publisher:
            sent = await publisher.publish("A", "s")
        async with Subscriber(hub_url, settings=settings, last=1) as subscriber:
            received = await subscriber.receive()
        assert isinstance(received, Event)
        assert received.event_id == sent.event.event_id

    run(loop, story())


def test_a_fleet(hub_url: str) -> None:
    async def story() -> None:
        fleet = Fleet(hub_url, clients=3, ramp_per_s=1000.0, subscriber=SubscriberTable())
        await fleet.connect()
        assert fleet.connected == 3
        await fleet.close()

    try:
        run("uvloop", story())
    finally:
        gc.enable()


def test_the_status_of_a_hub(hub_url: str) -> None:
    assert run("uvloop", hub_status.statistics(hub_status.base_url(hub_url), LATE_S))["ready"]


def test_a_status_over_tls(steady_hub: Hub, two_addresses: Callable[[int], None], tmp_path: Path) -> None:
    """Over https, too; and a certificate of another name is refused."""
    certificates = make(tmp_path)
    with Proxy(steady_hub.port, certificates) as proxy:
        two_addresses(proxy.port)
        url = f"https://localhost:{proxy.port}"
        assert run_async(hub_status.statistics(url, tls_ca=certificates.authority))["ready"]
        with pytest.raises(HubUnavailable, match="Hostname mismatch"):
            run_async(hub_status.statistics(url.replace("localhost", NAME), tls_ca=certificates.authority))


def test_no_address_takes_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are tried, and why they do not is said once, in words."""
    refused = [
        (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, free_port()))
        for address in (HOLE, "127.0.0.1")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: refused)

    async def story() -> None:
        with pytest.raises(RedisUnreachable) as error:
            await RedisConnection.open(f"redis://{NAME}/0", timeout_s=5.0 * UNIT_S)
        assert error.value.reason == "connection refused"

    run("asyncio", story())
    with pytest.raises(ConnectionRefusedError) as refusal:
        dialing.connect_blocking(NAME, 1, 5.0 * UNIT_S)
    assert reason(refusal.value) == "connection refused"


def test_a_redirect_of_a_hub_is_followed(two_addresses: Callable[[int], None]) -> None:
    """As one that was given as an address is."""

    async def redirect(connection: ServerConnection, request: Request) -> Response | None:
        if request.path.startswith("/ws"):
            return None
        return Response(302, "Found", Headers({"Location": "/ws", "Content-Length": "0"}), b"")

    async def story() -> None:
        port = free_port()

        async def speak(connection: ServerConnection) -> None:
            await connection.send(event_payload(7).decode())
            await connection.wait_closed()

        async with serve(speak, "127.0.0.1", port, process_request=redirect):
            settings = Settings(subscriber=SubscriberTable(connect_timeout_s=5.0 * UNIT_S))
            async with Subscriber(f"ws://{NAME}:{port}/old", settings=settings) as subscriber:
                assert (await anext(subscriber)).sequence == 7

    run("asyncio", story())
