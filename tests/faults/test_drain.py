"""SIGTERM: everybody is sent away, one after another, gets what comes until then, and goes on at another hub."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import resource
import selectors
import signal
import socket
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import pytest
import uvloop

from broadcaster.core.position import Position
from broadcaster.loadtest import fleet as fleet_module
from broadcaster.loadtest.fleet import Fleet
from broadcaster.loadtest.records import DISCONNECTED
from broadcaster.publish.publisher import Publisher
from broadcaster.redis.server import RedisServer
from broadcaster.settings import RedisTable, Settings, SubscriberTable
from broadcaster.wire import read_control
from tests.support import (
    ROOT,
    UNIT_S,
    Hub,
    HubProcess,
    HubThread,
    RawClient,
    RedisClient,
    Running,
    client_frame,
    event_payload,
    eventually,
    frames_from,
    free_port,
    frozen,
    redis_client,
    until,
)

RESTART = 1012


def drained(redis_url: str, drain_s: float, port: int | None = None, **variables: str) -> Hub:
    """A hub that sends its subscribers away over so many seconds."""
    return HubThread(redis_url, port, BROADCASTER_HUB__DRAIN_S=str(drain_s), **variables)


def store_many(url: str, count: int, size: int) -> Position:
    """Publish stored events of so many bytes of data; the position of the first."""

    async def story() -> Position:
        async with Publisher(Settings(redis=RedisTable(url=url))) as publisher:
            drafts = [publisher.draft("SERVER_DOWN", "server-a", data={"pad": "x" * size}) for _ in range(count)]
            stored = [await publisher.publish_all(drafts[at : at + 500]) for at in range(0, count, 500)]
            first = stored[0][0].position
            assert first is not None
            return first

    return asyncio.run(story())


# What is seen from the outside


@dataclass
class Seen:
    """What one client was sent, with the time of its arrival.

    Attributes:
        events: Sequence and time of each event, in order.
        drains: `reconnect_after_s` and time of each `drain` frame.
        others: Names of the other control frames.
        close: Code of the close frame; None before it.
        closed_at: When it came.
        afterwards: Frames that came after it.
    """

    wants_control: bool
    events: list[tuple[int, float]] = field(default_factory=list)
    drains: list[tuple[float, float]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    close: int | None = None
    closed_at: float = 0.0
    afterwards: int = 0

    def take(self, opcode: int, payload: bytes, now: float) -> None:
        if self.close is not None:
            self.afterwards += 1
        elif opcode == 8:
            self.close, self.closed_at = int.from_bytes(payload[:2], "big"), now
        elif opcode == 1 and (control := read_control(payload)):
            if control["control"] == "drain":
                self.drains.append((control["reconnect_after_s"], now))
            else:
                self.others.append(control["control"])
        elif opcode == 1:
            self.events.append((json.loads(payload)["sequence"], now))


class Crowd:
    """Many subscribers, read by one thread that notes when what comes; a close is answered at once."""

    def __init__(self, port: int, plain: int, v1: int) -> None:
        self._stack = contextlib.ExitStack()
        clients = [
            (self._stack.enter_context(RawClient(port, subprotocol="broadcaster.v1" if wants else "")), wants)
            for wants in itertools.chain(itertools.repeat(False, plain), itertools.repeat(True, v1))
        ]
        self.seen = {client: Seen(wants) for client, wants in clients}
        self._bytes = {client: client._buffer for client in self.seen}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for client in self.seen:
                selector.register(client.socket, selectors.EVENT_READ, client)
            while not self._stop.is_set():
                for key, _ in selector.select(0.05):
                    self._read(selector, key.data)

    def _read(self, selector: selectors.BaseSelector, client: RawClient) -> None:
        data, now = b"", time.monotonic()
        with contextlib.suppress(ConnectionError):
            data = client.socket.recv(1 << 20)
        if not data:
            selector.unregister(client.socket)
            return
        data = self._bytes[client] + data
        frames, used = frames_from(data)
        for opcode, payload in frames:
            self.seen[client].take(opcode, payload, now)
            if opcode == 8:
                with contextlib.suppress(ConnectionError):
                    client.send(8, payload[:2])
        self._bytes[client] = data[used:]

    @property
    def all_closed(self) -> bool:
        return all(seen.close is not None for seen in self.seen.values())

    def __enter__(self) -> Crowd:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._stack.close()


def most_within(moments: list[float], window_s: float) -> int:
    """How many of the moments lie in the fullest stretch of so many seconds."""
    moments = sorted(moments)
    first = most = 0
    for last, moment in enumerate(moments):
        while moment - moments[first] > window_s:
            first += 1
        most = max(most, last - first + 1)
    return most


# What the subscribers see

CROWD = 200
DRAIN_S = 3 * UNIT_S


class Ending(NamedTuple):
    """A drain that was watched."""

    began_at: float
    seen: list[Seen]
    published: list[tuple[int, float]]
    """Sequence and time of the events published meanwhile."""


@pytest.fixture(scope="module")
def ending() -> Iterator[Ending]:
    """Half of the crowd speaks `broadcaster.v1`; events are published before and while it is drained."""
    with (
        RedisServer.start() as redis,
        redis_client(redis) as publish,
        HubProcess(redis.url, BROADCASTER_HUB__DRAIN_S=str(DRAIN_S)) as hub,  # the crowd's reader has its own GIL
    ):
        hub.until_ready()
        with Crowd(hub.port, CROWD // 2, CROWD // 2) as crowd:
            hub.until_connected(CROWD)
            published: list[tuple[int, float]] = []

            def publish_one() -> None:
                published.append((len(published) + 1, time.monotonic()))
                publish.publish(event_payload(len(published)))

            for _ in range(10):
                publish_one()
            began_at = time.monotonic()
            hub.signal(signal.SIGTERM)
            while not crowd.all_closed and time.monotonic() - began_at < 3 * DRAIN_S:
                publish_one()
                time.sleep(0.02)
            assert hub.wait(10) == 0
            assert "Traceback" not in hub.output, hub.output
            yield Ending(began_at, list(crowd.seen.values()), published)


def test_everybody_is_closed_1012_and_nothing_follows(ending: Ending) -> None:
    """The close is the last frame of all."""
    assert Counter(seen.close for seen in ending.seen) == {RESTART: CROWD}
    assert sum(seen.afterwards for seen in ending.seen) == 0


def test_the_closes_are_spread_over_the_time_of_the_drain(ending: Ending) -> None:
    """From the first to the last it takes nearly that time, and no tenth of it has more than a third of them."""
    closes = sorted(seen.closed_at for seen in ending.seen)
    assert closes[0] - ending.began_at < DRAIN_S / 2
    assert closes[-1] - closes[0] > 0.8 * DRAIN_S
    assert closes[-1] - ending.began_at < DRAIN_S + 1 * UNIT_S
    assert most_within(closes, DRAIN_S / 10) <= CROWD / 3


def test_the_closes_do_not_follow_the_order_of_arrival_or_of_the_protocol(ending: Ending) -> None:
    """Who came first, and who speaks what, does not decide who goes first."""
    order = sorted(range(CROWD), key=lambda number: ending.seen[number].closed_at)
    early = Counter(ending.seen[number].wants_control for number in order[: CROWD // 2])
    assert min(early[True], early[False]) > CROWD / 8
    for wants_control in (False, True):
        came = [number for number in range(CROWD) if ending.seen[number].wants_control == wants_control]
        went = sorted(came, key=lambda number: ending.seen[number].closed_at)
        half = len(came) // 2
        both = len({*came[:half]} & {*went[:half]})
        assert 0.25 * half < both < 0.75 * half, "who came in the first half went in that half"


def test_v1_clients_are_told_at_once_each_with_a_delay_of_its_own(ending: Ending) -> None:
    """One `drain` frame each, near the beginning, before the close; the delays differ, within bounds."""
    delays = []
    for seen in ending.seen:
        if seen.wants_control:
            [(delay_s, at)] = seen.drains
            assert at <= seen.closed_at
            assert at - ending.began_at < 1 * UNIT_S
            delays.append(delay_s)
    assert all(0 <= delay_s <= max(DRAIN_S, 1.0) for delay_s in delays)
    assert len(set(delays)) > 0.8 * len(delays)
    assert max(delays) - min(delays) > 0.5 * DRAIN_S


def test_plain_clients_are_told_nothing_but_the_close(ending: Ending) -> None:
    """They get events and the close, and no frame that they could not understand."""
    plain = [seen for seen in ending.seen if not seen.wants_control]
    assert [(seen.drains, seen.others) for seen in plain] == [([], [])] * (CROWD // 2)


def test_until_his_close_everybody_gets_what_comes(ending: Ending) -> None:
    """An unbroken beginning of what was published, up to his close at least: nobody is forgotten in the drain.

    What others had some time before is due, and what was published long before: a busy machine takes its time from
    publisher to hub, but the hub writes to all in one turn.
    """
    others: dict[int, float] = {}
    for sequence, at in itertools.chain.from_iterable(seen.events for seen in ending.seen):
        others[sequence] = min(at, others.get(sequence, at))
    for seen in ending.seen:
        got = [sequence for sequence, _ in seen.events]
        assert got == list(range(1, len(got) + 1))
        due = [sequence for sequence, at in others.items() if at < seen.closed_at - 0.2 * UNIT_S]
        due += [sequence for sequence, at in ending.published if at < seen.closed_at - 1.0 * UNIT_S]
        assert set(got) >= set(due), f"closed {seen.closed_at - ending.began_at:.2f} s after SIGTERM"
    lengths = {len(seen.events) for seen in ending.seen}
    assert len(lengths) > 10, "the drain was over before anything was published"


# What the operator sees


def test_ready_is_red_at_once_and_live_stays_green(redis: RedisServer) -> None:
    """A balancer learns at once that this hub goes, and nobody takes it for dead before it has gone."""
    with drained(redis.url, DRAIN_S) as hub:
        hub.until_ready()
        with Crowd(hub.port, 5, 5) as crowd:
            hub.until_connected(10)
            began_at = time.monotonic()
            hub.signal(signal.SIGTERM)
            eventually(lambda: hub.get("/health/ready")[0] == 503, "it stays green", 1.0)
            body = hub.get("/health/ready")[1]
            assert (body["ready"], body["stopping"]) == (False, True)
            refused = 0
            while time.monotonic() - began_at < 0.8 * DRAIN_S:
                assert hub.get("/health/live")[0] == 200
                assert hub.get("/health/ready")[0] == 503
                assert hub.get("/health")[0] == 503
                with RawClient(hub.port) as late:
                    assert late.response.startswith(b"HTTP/1.1 503 ")
                    assert b"\r\nRetry-After: 1" in late.response
                refused += 1
                assert hub.stats()["refused"]["stopping"] == refused
                time.sleep(0.05)
            assert refused > 1
            eventually(lambda: crowd.all_closed, "somebody was forgotten")
            assert hub.wait(5) == 0


# Who will not leave

SHUTDOWN_S = 0.5
MARGIN_S = 1.5 * UNIT_S

Company = Callable[[Hub, RedisServer, RedisClient, contextlib.ExitStack], None]


def nobody(hub: Hub, redis: RedisServer, publish: RedisClient, stack: contextlib.ExitStack) -> None:
    pass


def deaf(hub: Hub, redis: RedisServer, publish: RedisClient, stack: contextlib.ExitStack) -> None:
    """They take everything and answer nothing, not even the close."""
    for subprotocol in ("", "broadcaster.v1"):
        stack.enter_context(RawClient(hub.port, subprotocol=subprotocol))
    hub.until_connected(2)


def full(hub: Hub, redis: RedisServer, publish: RedisClient, stack: contextlib.ExitStack) -> None:
    """Their sockets are full: not even the close can be sent."""
    for subprotocol in ("", "broadcaster.v1"):
        stack.enter_context(RawClient(hub.port, receive_buffer=4096, subprotocol=subprotocol))
    hub.until_connected(2)
    eventually(lambda: publish.publish(event_payload(data={"pad": "x" * 60_000})) and hub.stats()["behind"] == 2,
               "nobody falls behind")  # fmt: skip


def shedding(hub: Hub, redis: RedisServer, publish: RedisClient, stack: contextlib.ExitStack) -> None:
    """They read a little now and then, and of theirs the oldest events are dropped."""
    path = "/ws?channel=events.shed"
    slow = [
        stack.enter_context(RawClient(hub.port, path=path, receive_buffer=4096, subprotocol="broadcaster.v1"))
        for _ in range(3)
    ]
    hub.until_connected(3)

    def sheds() -> bool:
        for _ in range(20):
            publish.publish(event_payload(severity="info", data={"pad": "x" * 60_000}), "events.shed")
        stats = hub.stats()
        for client in slow if stats["behind"] == 3 else ():
            with contextlib.suppress(BlockingIOError):
                for _ in range(500):
                    client.socket.recv(1 << 20, socket.MSG_DONTWAIT)
        return bool(stats["shed"])

    eventually(sheds, "nothing is shed")


def resuming(hub: Hub, redis: RedisServer, publish: RedisClient, stack: contextlib.ExitStack) -> None:
    """They are in the middle of 20 MB of history."""
    first = store_many(redis.url, 5000, size=4000)
    for _ in range(3):
        path = f"/ws?since={first}"
        stack.enter_context(RawClient(hub.port, path=path, receive_buffer=4096, subprotocol="broadcaster.v1"))
    hub.until_connected(3)
    eventually(lambda: hub.stats()["behind"] == 3, "nobody resumes")


def half_open(hub: Hub, redis: RedisServer, publish: RedisClient, stack: contextlib.ExitStack) -> None:
    """Nothing, half a head, half a body, an answer that nobody reads."""
    get = b"GET /stats HTTP/1.1\r\nHost: a\r\n\r\n"
    for words in (
        b"",
        b"GET /ws HTTP/1.1\r\n",
        b"POST /publish HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx",
        get,
    ):
        for _ in range(5):
            connection = socket.socket()
            stack.enter_context(contextlib.closing(connection))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", hub.port))
            connection.sendall(words)
    deaf(hub, redis, publish, stack)


def talking(hub: Hub, redis: RedisServer, publish: RedisClient, stack: contextlib.ExitStack) -> None:
    """They send pings without end, and read nothing."""
    stop = threading.Event()
    clients = [stack.enter_context(RawClient(hub.port)) for _ in range(3)]

    def talk() -> None:
        while not stop.wait(0.02):
            for client in clients:
                with contextlib.suppress(OSError):
                    client.send(9, b"still here")

    thread = threading.Thread(target=talk)
    thread.start()
    stack.callback(thread.join)
    stack.callback(stop.set)
    hub.until_connected(3)


def closing(hub: Hub, redis: RedisServer, publish: RedisClient, stack: contextlib.ExitStack) -> None:
    """They have been closed for a mistake, and stay."""
    for _ in range(3):
        stack.enter_context(RawClient(hub.port)).socket.sendall(client_frame(1, b"\xff"))
    hub.until_connected(3)


def without_redis(hub: Hub, redis: RedisServer, publish: RedisClient, stack: contextlib.ExitStack) -> None:
    """Redis dies in the same moment, while some are resuming."""
    resuming(hub, redis, publish, stack)
    redis.kill()


def with_a_frozen_redis(hub: Hub, redis: RedisServer, publish: RedisClient, stack: contextlib.ExitStack) -> None:
    """Redis stands still from now on, while some are resuming."""
    resuming(hub, redis, publish, stack)
    stack.enter_context(frozen(redis))


COMPANIES: dict[str, Company] = {
    "nobody": nobody,
    "deaf ones": deaf,
    "full sockets": full,
    "shedding ones": shedding,
    "resuming ones": resuming,
    "half-open ones": half_open,
    "talkers": talking,
    "closing ones": closing,
    "Redis is dead": without_redis,
    "Redis is frozen": with_a_frozen_redis,
}


@pytest.mark.parametrize("company", COMPANIES.values(), ids=COMPANIES.keys())
def test_the_hub_is_gone_in_time_whatever_a_peer_does(
    redis: RedisServer, publish: RedisClient, company: Company
) -> None:
    """Within `hub.drain_s` + `hub.shutdown_s`, with exit code 0 and no complaint."""
    drain_s = 0.5
    with (
        HubProcess(
            redis.url,
            None,
            BROADCASTER_HUB__DRAIN_S=str(drain_s),
            BROADCASTER_HUB__SHUTDOWN_S=str(SHUTDOWN_S),
            BROADCASTER_HUB__CLOSE_TIMEOUT_S="60",
            BROADCASTER_HUB__BEHIND_MAX_MS="60000",
            BROADCASTER_HUB__RING_BYTES=str(1 << 20),
            BROADCASTER_HUB__BEHIND_MAX_BYTES=str(1 << 20),
            BROADCASTER_CHANNELS__DROP_OLDEST='["events.shed"]',
        ) as hub,
        contextlib.ExitStack() as stack,
    ):
        hub.until_ready()
        company(hub, redis, publish, stack)
        began_at = time.monotonic()
        hub.signal(signal.SIGTERM)
        assert hub.wait(20) == 0
        took_s = time.monotonic() - began_at
        assert took_s < drain_s + SHUTDOWN_S + MARGIN_S
        assert not any(word in hub.output for word in ("Traceback", "Error", "exception")), hub.output


def test_further_signals_change_nothing(redis: RedisServer) -> None:
    """More SIGTERMs in the middle of a drain neither hurry it nor break it: the closes are spread as before."""
    with drained(redis.url, 1.0) as hub:
        hub.until_ready()
        with Crowd(hub.port, 20, 20) as crowd:
            hub.until_connected(40)
            began_at = time.monotonic()
            for _ in range(5):
                hub.signal(signal.SIGTERM)
                time.sleep(0.1)
            assert hub.wait(10) == 0
            took_s = time.monotonic() - began_at
            eventually(lambda: crowd.all_closed, "somebody was not told")
            closes = [seen.closed_at for seen in crowd.seen.values()]
            assert {seen.close for seen in crowd.seen.values()} == {RESTART}
            assert [len(seen.drains) for seen in crowd.seen.values()] == [0] * 20 + [1] * 20
    assert max(closes) - min(closes) > 0.7
    assert took_s < 1.0 + 1.0 + MARGIN_S
    assert "Traceback" not in hub.output, hub.output


def test_without_a_drain_everybody_is_closed_at_once(redis: RedisServer) -> None:
    """`hub.drain_s` = 0: all in one moment, still told with 1012."""
    with drained(redis.url, 0, BROADCASTER_HUB__SHUTDOWN_S="30") as hub:
        hub.until_ready()
        with Crowd(hub.port, 50, 50) as crowd:
            hub.until_connected(100)
            began_at = time.monotonic()
            hub.signal(signal.SIGTERM)
            eventually(lambda: crowd.all_closed, "somebody was not told")
            closes = [seen.closed_at for seen in crowd.seen.values()]
            assert hub.wait(5) == 0
            assert time.monotonic() - began_at < MARGIN_S
    assert {seen.close for seen in crowd.seen.values()} == {RESTART}
    assert max(closes) - began_at < MARGIN_S
    delays = [delay_s for seen in crowd.seen.values() for delay_s, _ in seen.drains]
    assert (len(delays), len(set(delays)) > 25) == (50, True), "they would all come back at once"


def test_with_nobody_there_the_hub_goes_at_once(redis: RedisServer) -> None:
    """However long a drain may take, there is nobody to wait for."""
    with drained(redis.url, 60, BROADCASTER_HUB__SHUTDOWN_S="60") as hub:
        hub.until_ready()
        began_at = time.monotonic()
        hub.signal(signal.SIGTERM)
        assert hub.wait(10) == 0
        assert time.monotonic() - began_at < MARGIN_S


# The move to another hub

MOVERS = 2000
MOVE_DRAIN_S = 4.0
RATE_HZ = 20.0


class Forwarder:
    """A TCP forwarder before two hubs: new connections go to the second as soon as the first is not ready."""

    def __init__(self, first: int, second: int) -> None:
        self.target, self._second = first, second
        self._health = first
        self.arrivals: list[float] = []

    async def serve(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_server(lambda: Inlet(self), "127.0.0.1", port, backlog=4096)
        print("forwarding", flush=True)
        while self.target == self._health:
            await asyncio.sleep(0.02)
            if not await self._is_ready():
                self.target = self._second
                print("switched", flush=True)
        told = 0
        while True:
            await asyncio.sleep(0.1)
            for moment in self.arrivals[told:]:
                print("arrival", moment)
            told = len(self.arrivals)
            sys.stdout.flush()

    async def _is_ready(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._health)
            writer.write(b"GET /health/ready HTTP/1.1\r\nHost: hub\r\n\r\n")
            answer = await reader.read(12)
            writer.close()
        except OSError:
            return False
        return answer == b"HTTP/1.1 200"


class Inlet(asyncio.Protocol):
    """The subscriber's side of one forwarded connection."""

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder
        self.transport: asyncio.Transport | None = None
        self.outlet: asyncio.Transport | None = None
        self._early: list[bytes] = []
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self._connecting = asyncio.create_task(self._connect(self._forwarder.target))

    async def _connect(self, target: int) -> None:
        assert self.transport is not None
        try:
            await asyncio.get_running_loop().create_connection(lambda: Outlet(self), "127.0.0.1", target)
        except OSError:
            self.transport.abort()
        else:
            if target != self._forwarder._health:
                self._forwarder.arrivals.append(time.monotonic())

    def begin(self, outlet: asyncio.Transport) -> None:
        self.outlet = outlet
        outlet.writelines(self._early)
        self._early.clear()
        if self.transport is None or self.transport.is_closing():
            outlet.close()

    def data_received(self, data: bytes) -> None:
        if self.outlet is None:
            self._early.append(data)
        elif not self.outlet.is_closing():
            self.outlet.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self.outlet is not None:
            self.outlet.close()


class Outlet(asyncio.Protocol):
    """The hub's side."""

    def __init__(self, inlet: Inlet) -> None:
        self._inlet = inlet

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._inlet.begin(transport)  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        transport = self._inlet.transport
        if transport is not None and not transport.is_closing():
            transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self._inlet.transport is not None:
            self._inlet.transport.close()


@contextlib.contextmanager
def many_files() -> Iterator[None]:
    """As many open files as the system lets us have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class ForwarderProcess(Running):
    """A `Forwarder` in a process of its own."""

    def __init__(self, first: Hub, second: Hub) -> None:
        self.port = free_port()
        ports = map(str, (self.port, first.port, second.port))
        super().__init__(sys.executable, "-m", "tests.faults.test_drain", *ports, cwd=ROOT)

    def __enter__(self) -> ForwarderProcess:
        return self

    def arrivals(self) -> list[float]:
        """When it has passed each connection to the second hub."""
        return [float(line.partition(" ")[2]) for line in list(self.lines) if line.startswith("arrival ")]


@contextlib.contextmanager
def forwarded(first: Hub, second: Hub) -> Iterator[tuple[ForwarderProcess, str]]:
    """A forwarder that listens, and its address."""
    with ForwarderProcess(first, second) as process:
        process.said("forwarding")
        yield process, f"ws://127.0.0.1:{process.port}/ws"


@dataclass
class Move:
    """What was measured while everybody moved.

    Attributes:
        offsets: Of each published event, by its id.
        told_at: Time of SIGTERM.
        fleet: The subscribers.
    """

    fleet: Fleet
    offsets: dict[str, int] = field(default_factory=dict)
    told_at: float = 0.0


async def move(url: str, redis_url: str, first: Hub, second: Hub) -> Move:
    """Connect everybody to the first hub, publish all the time, and end that hub in the middle."""
    subscriber = SubscriberTable(reconnect_max_s=0.5)
    result = Move(Fleet(url, clients=MOVERS, ramp_per_s=2000.0, subscriber=subscriber))
    fleet = result.fleet
    parts = [asyncio.create_task(part) for part in (fleet.keep_parsing(), fleet.keep_coming_back())]
    try:
        await fleet.connect()
        assert fleet.connected == MOVERS
        async with Publisher(Settings(redis=RedisTable(url=redis_url))) as publisher:

            async def publish_for(seconds: float) -> None:
                loop = asyncio.get_running_loop()
                begun_at, number = loop.time(), 0
                while loop.time() - begun_at < seconds:
                    published = await publisher.publish("SERVER_DOWN", "server-a")
                    assert published.position is not None
                    result.offsets[published.event.event_id] = published.position.offset
                    number += 1
                    await asyncio.sleep(max(0.0, begun_at + number / RATE_HZ - loop.time()))

            await publish_for(0.5)
            result.told_at = time.monotonic()
            first.signal(signal.SIGTERM)
            await publish_for(MOVE_DRAIN_S + 1.0)
            await until(lambda: fleet.connected == MOVERS and not fleet.awaiting(len(result.offsets)),
                        "somebody waits for events", 20.0)  # fmt: skip
            await publish_for(0.2)
            await until(lambda: not fleet.awaiting(len(result.offsets)), "somebody waits for events", 20.0)
        await fleet.parse_all()
        assert not [part for part in parts if part.done()], "a task of the fleet has ended"
        numbers: dict[str, Any] = await asyncio.to_thread(second.stats)
        assert numbers["connected"] == MOVERS
    finally:
        for part in parts:
            part.cancel()
        await asyncio.wait(parts)
        await fleet.close()
        gc.enable()  # the fleet has turned it off
    return result


def test_thousands_move_to_another_hub_and_miss_nothing(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They resume by themselves: nothing is lost, nothing comes twice, and they do not arrive all at once."""
    monkeypatch.setattr(fleet_module, "_QUIET_NS", 0)  # it is the hub that is looked at: the fleet answers at
    monkeypatch.setattr(fleet_module, "_SLICE_S", 0.05)  # once, and does not wait for a quiet moment
    with (
        many_files(),
        HubProcess(redis.url, None, BROADCASTER_HUB__DRAIN_S=str(MOVE_DRAIN_S)) as first,
        HubProcess(redis.url) as second,
        forwarded(first.until_ready(), second.until_ready()) as (forwarder, url),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,  # in debug mode the fleet would crawl
    ):
        moved = runner.run(move(url, redis.url, first, second))
        assert first.wait(10) == 0
        eventually(lambda: len(forwarder.arrivals()) == MOVERS, "some have arrived without the forwarder")
        arrivals = sorted(forwarder.arrivals())
        for part in (first, second, forwarder):
            assert "Traceback" not in part.output, part.output

    expected = sorted(moved.offsets.values())
    assert expected == list(range(expected[0], expected[0] + len(expected)))
    got: defaultdict[int, list[int]] = defaultdict(list)
    for row in moved.fleet.deliveries:
        got[row.client].append(moved.offsets[row.event_id])
    wrong = {client: offsets for client, offsets in got.items() if offsets != expected}
    spread_s = arrivals[-1] - arrivals[0]
    fullest = most_within(arrivals, MOVE_DRAIN_S / 10)
    print(
        f"\n{MOVERS} subscribers, {RATE_HZ:g} events a second, {MOVE_DRAIN_S:g} s of drain: "
        f"arrivals spread over {spread_s:.2f} s, at most {fullest} of them within {MOVE_DRAIN_S / 10:g} s, "
        f"the last {arrivals[-1] - moved.told_at:.2f} s after SIGTERM; of {len(expected)} events each "
        f"{len(wrong)} subscribers have lost, doubled or disordered any"
    )
    assert len(got) == MOVERS
    assert wrong == {}
    assert {row.cause for row in moved.fleet.losses()} == {f"{DISCONNECTED} {RESTART}"}
    assert moved.fleet.reconnects == MOVERS
    assert spread_s > MOVE_DRAIN_S / 2
    assert fullest <= MOVERS / 3


def test_a_fleet_answers_its_closes_while_events_come_without_a_pause(
    redis: RedisServer, publish: RedisClient
) -> None:
    """After most of a drain most of the fleet has gone: who does not answer is cut, and comes back too late."""
    clients, drain_s = 50, 2.0

    async def story(hub: Hub) -> int:
        fleet = Fleet(hub.url, clients=clients, ramp_per_s=2000.0)
        parsing = asyncio.create_task(fleet.keep_parsing())
        try:
            await fleet.connect()
            hub.signal(signal.SIGTERM)
            until_s = time.monotonic() + 0.7 * drain_s
            while time.monotonic() < until_s:
                publish.publish(event_payload())
                await asyncio.sleep(0.001)
            left: int = (await asyncio.to_thread(hub.stats))["connected"]
        finally:
            parsing.cancel()
            await asyncio.wait([parsing])
            await fleet.close()
            gc.enable()  # the fleet has turned it off
        return left

    with (
        drained(redis.url, drain_s, BROADCASTER_HUB__CLOSE_TIMEOUT_S="30") as hub,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        hub.until_ready()
        assert runner.run(story(hub)) <= 0.6 * clients, "closes are not answered"
        assert hub.wait(10) == 0


if __name__ == "__main__":
    own, before, after = map(int, sys.argv[1:])
    with many_files():
        uvloop.run(Forwarder(before, after).serve(own))
