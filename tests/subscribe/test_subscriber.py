"""The client library: it stays until it is left, comes back after every fault, and counts what is missing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from broadcaster import Event, Fresh, Gap, Position, Publisher, Settings, Stale, Subscriber
from broadcaster.core.errors import HubRefused
from broadcaster.core.runtime import LIMITS
from broadcaster.redis.server import RedisServer
from broadcaster.settings import EventTable, HubTable, RedisTable, SubscriberTable
from broadcaster.subscribe import connector
from broadcaster.subscribe.connector import Connector
from broadcaster.subscribe.status_events import Received
from broadcaster.wire import CloseCode, close_frame
from tests.support import (
    Hub,
    HubProcess,
    HubThread,
    Proxy,
    RawClient,
    RedisClient,
    event_payload,
    free_port,
    redis_client,
    run_async,
    until,
)
from tests.support.hub import settings_of

SETTINGS = Settings.model_construct(subscriber=SubscriberTable(connect_timeout_s=2.0, reconnect_max_s=0.2))


class Collected:
    """What a subscriber has received so far, gathered by a task of its own."""

    def __init__(self, subscriber: Subscriber) -> None:
        self.subscriber = subscriber
        self.events: list[Event] = []
        self.task = asyncio.create_task(self._gather())

    async def _gather(self) -> None:
        async for event in self.subscriber:
            self.events.append(event)

    @property
    def numbers(self) -> list[int]:
        return [event.sequence for event in self.events]

    async def until(self, *numbers: int) -> None:
        """Wait until exactly these have come; fail at once if the reading has ended."""
        await until(
            lambda: self.task.done() or self.numbers == list(numbers),
            f"{numbers} did not come",
        )
        assert not self.task.done(), f"the iteration has ended: {self.task}"


@contextlib.asynccontextmanager
async def receiving(url: str, settings: Settings = SETTINGS) -> AsyncIterator[Collected]:
    """A subscriber that is read for as long as the block lasts; the reading must not end before."""
    async with Subscriber(url, settings=settings) as subscriber:
        received = Collected(subscriber)
        try:
            yield received
            assert not received.task.done(), f"the iteration has ended: {received.task}"
        finally:
            received.task.cancel()
            await asyncio.wait([received.task])


@contextlib.asynccontextmanager
async def ready_hub(
    redis: RedisServer, port: int | None = None, kind: type[HubProcess] | type[HubThread] = HubThread
) -> AsyncIterator[Hub]:
    """A hub of the test's own, ended when the block ends."""
    hub = kind(redis.url, port)
    try:
        yield await asyncio.to_thread(hub.until_ready)
    finally:
        await asyncio.to_thread(hub.__exit__, None, None, None)


async def connected(hub: Hub, count: int = 1) -> None:
    await asyncio.to_thread(hub.until_connected, count)


# Receiving


def test_events_arrive_as_they_were_published(steady_hub: Hub, client: RedisClient) -> None:
    """An event has all its fields, the bytes it travelled as, and the time at which it was received."""
    payload = event_payload(7, severity="info", data={"rack": "ü"}, extra=[1])

    async def story() -> Event:
        async with receiving(steady_hub.url) as received:
            await connected(steady_hub)
            client.publish(payload)
            await received.until(7)
            assert (received.subscriber.received, received.subscriber.missing) == (1, {})
            return received.events[0]

    event = run_async(story())
    fields = json.loads(payload)
    assert event.payload == payload
    assert (event.event_id, event.event_type, event.source) == (fields["event_id"], "SERVER_DOWN", "server-a")
    assert (event.published_at_ms, event.published_at_us) == (fields["published_at_ms"], fields["published_at_us"])
    assert (event.severity, event.data) == ("info", {"rack": "ü"})
    assert event.received_at_us is not None
    assert event.received_at_us >= fields["published_at_us"]
    assert event.latency_ms == (event.received_at_us - fields["published_at_us"]) / 1000


def test_every_subscriber_receives_every_event_in_order(steady_hub: Hub, client: RedisClient) -> None:
    """Three subscribers each receive 300 events, in the order of Redis."""

    async def story() -> None:
        async with receiving(steady_hub.url) as a, receiving(steady_hub.url) as b, receiving(steady_hub.url) as c:
            await connected(steady_hub, 3)
            await asyncio.to_thread(publish_numbers, client, *range(1, 301))
            for received in (a, b, c):
                await received.until(*range(1, 301))

    run_async(story())


def publish_numbers(client: RedisClient, *numbers: int) -> None:
    for number in numbers:
        client.publish(event_payload(number))


def test_it_reads_settings_of_its_own(
    steady_hub: Hub, client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Subscriber()` takes the hub's address from the configuration."""
    monkeypatch.setenv("BROADCASTER_HUB__PORT", str(steady_hub.port))
    subscriber = Subscriber()

    async def story() -> int:
        async with subscriber:
            waiting = asyncio.ensure_future(anext(subscriber))
            await connected(steady_hub)
            client.publish(event_payload(3))
            return (await waiting).sequence

    assert run_async(story()) == 3


def test_a_wait_that_is_given_up_does_not_end_the_iteration(steady_hub: Hub, client: RedisClient) -> None:
    """Who waits for an event with a time-out, and gets none, can go on waiting and receives the next one."""

    async def publish_all_the_time() -> None:
        for number in range(1000):
            client.publish(event_payload(number))
            await asyncio.sleep(0.02)

    async def story() -> None:
        async with Subscriber(steady_hub.url, settings=SETTINGS) as subscriber:
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await anext(subscriber)
            publishing = asyncio.create_task(publish_all_the_time())
            async with asyncio.timeout(10):
                first, second = await anext(subscriber), await anext(subscriber)
            publishing.cancel()
            await asyncio.wait([publishing])
            assert second.sequence == first.sequence + 1

    run_async(story())


# What is missing

HOLES: dict[str, tuple[list[tuple[str, int]], dict[str, int]]] = {
    "none": ([("a", 1), ("a", 2), ("a", 3)], {}),
    "one": ([("a", 1), ("a", 3)], {"a": 1}),
    "several": ([("a", 1), ("a", 3), ("a", 7)], {"a": 4}),
    "first_seen_late": ([("a", 90), ("a", 91)], {}),
    "each_source_for_itself": ([("a", 1), ("b", 10), ("a", 2), ("b", 13), ("a", 4)], {"a": 1, "b": 2}),
    "a_source_that_began_anew": ([("a", 8), ("a", 1), ("a", 2)], {}),
    "the_same_number_again": ([("a", 1), ("a", 1), ("a", 2)], {}),
}


@pytest.mark.parametrize(("published", "missing"), HOLES.values(), ids=HOLES.keys())
def test_holes_in_the_numbers_are_counted(published: list[tuple[str, int]], missing: dict[str, int]) -> None:
    """`missing` counts, per source, the numbers that were skipped."""

    async def story() -> dict[str, int]:
        async with (
            fake_hub(send_all([event_payload(number, source=source) for source, number in published])) as url,
            receiving(url) as received,
        ):
            await received.until(*(number for _, number in published))
            return dict(received.subscriber.missing)

    assert run_async(story()) == missing


def test_a_hole_of_the_hub_is_announced(redis: RedisServer) -> None:
    """Redis restarts under the hub: `gaps` counts it, and events flow again on the same connection."""

    async def story() -> None:
        async with ready_hub(redis) as hub, receiving(hub.url) as received:
            await connected(hub)
            await asyncio.to_thread(publish_one, redis, 1)
            await received.until(1)
            redis.kill()
            await until(lambda: "Redis closed the connection" in hub.output, "the hub did not notice")
            again = await asyncio.to_thread(RedisServer.start, redis.port)
            try:
                await asyncio.to_thread(hub.until_ready)
                await asyncio.to_thread(publish_one, again, 5)
                await received.until(1, 5)
            finally:
                await asyncio.to_thread(again.stop)
            assert (received.subscriber.gaps, received.subscriber.reconnects) == (1, 0)
            assert received.subscriber.missing == {"server-a": 3}

    run_async(story())


def publish_one(redis: RedisServer, number: int) -> None:
    with redis_client(redis) as client:
        client.publish(event_payload(number))


# Coming back

ENDINGS = {"killed": (signal.SIGKILL, -9), "restarted": (signal.SIGTERM, 0)}


@pytest.mark.parametrize(("number", "code"), ENDINGS.values(), ids=ENDINGS.keys())
def test_it_comes_back_after_the_hub(
    number: signal.Signals, code: int, redis: RedisServer, publish: RedisClient
) -> None:
    """The hub dies, or restarts with 1012, and comes back on the same port: so does the subscriber."""
    port = free_port()

    async def story() -> None:
        async with ready_hub(redis, port, HubProcess) as first, receiving(first.url) as received:
            await connected(first)
            publish.publish(event_payload(1))
            await received.until(1)
            first.signal(number)
            assert await asyncio.to_thread(first.wait) == code
            publish.publish(event_payload(2))
            async with ready_hub(redis, port) as second:
                await connected(second)
                publish.publish(event_payload(3))
                await received.until(1, 3)
            assert received.subscriber.reconnects == 1
            assert received.subscriber.missing == {"server-a": 1}

    run_async(story())


def test_a_hub_that_is_not_there_yet_is_waited_for(
    redis: RedisServer, publish: RedisClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A subscriber may be first: it tries again until the hub is there, and complains once."""
    port = free_port()

    async def story() -> None:
        async with receiving(f"ws://127.0.0.1:{port}/ws") as received:
            await until(lambda: "trying again" in caplog.text, "it never complained")
            await asyncio.sleep(0.5)  # a few more attempts
            async with ready_hub(redis, port) as hub:
                await connected(hub)
                publish.publish(event_payload(1))
                await received.until(1)
            assert received.subscriber.reconnects == 0

    with caplog.at_level(logging.INFO):
        run_async(story())
    assert caplog.text.count("trying again") == 1
    assert f"waiting for the hub at ws://127.0.0.1:{port}/ws: connection refused; trying again" in caplog.messages


def test_connected_is_said_when_the_hub_has_welcomed(caplog: pytest.LogCaptureFixture) -> None:
    """Not before: until then no event comes. Once, however many channels there are."""

    async def story() -> None:
        welcome = asyncio.Event()

        async def talk(connection: ServerConnection) -> None:
            await welcome.wait()
            for channel in ("events.one", "events.two"):
                await connection.send(json.dumps({"control": "welcome", "channel": channel, "position": None}))
            await connection.send(event_payload(1).decode())
            await connection.wait_closed()

        async with serve(talk, "127.0.0.1", 0, subprotocols=[Subprotocol("broadcaster.v1")]) as server:
            url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws"
            async with receiving(url) as received:
                await until(lambda: server.connections, "it does not connect")
                await asyncio.sleep(0.1)
                assert "connected" not in caplog.text
                welcome.set()
                await received.until(1)
                assert [text for text in caplog.messages if "connected" in text] == [f"connected to {url}"]

    caplog.set_level(logging.INFO)
    run_async(story())


def test_a_hub_that_does_not_answer_is_given_up_and_tried_again() -> None:
    """A port that accepts and says nothing costs subscriber.connect_timeout_s, then the next attempt follows."""
    silent: list[Silent] = []

    class Silent(asyncio.Protocol):
        gone = False

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            silent.append(self)

        def connection_lost(self, error: Exception | None) -> None:
            self.gone = True

    async def story() -> None:
        table = SubscriberTable(connect_timeout_s=0.2, reconnect_max_s=0.05)
        server = await asyncio.get_running_loop().create_server(Silent, "127.0.0.1", free_port())
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws"
        async with server:
            async with receiving(url, Settings.model_construct(subscriber=table)):
                await until(lambda: len(silent) >= 3, "no further attempt")
            await until(lambda: all(connection.gone for connection in silent), "a connection was left")

    run_async(story())


# Other hubs

Talk = Callable[[ServerConnection], Any]


@contextlib.asynccontextmanager
async def fake_hub(talk: Talk, *, v1: bool = False, **options: Any) -> AsyncIterator[str]:
    """A hub that says what the real one never would; in `broadcaster.v1`, or in no language of ours."""
    if v1:
        options["subprotocols"] = [Subprotocol("broadcaster.v1")]
    async with serve(talk, "127.0.0.1", 0, compression=None, close_timeout=0.1, **options) as server:
        yield f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/ws"


def send_all(messages: list[bytes]) -> Talk:
    async def talk(connection: ServerConnection) -> None:
        for message in messages:
            await connection.send(message, text=True)
        await connection.wait_closed()

    return talk


STRANGE = {
    "no_json": (b"hello", 1),
    "no_event": (b"{}", 1),
    "nested_without_end": (b"[" * 100_000, 1),
    "too_large": (event_payload(1, data={"pad": "x" * 70_000}), 1),
    "half_a_control_frame": (b'{"control": ', 1),
    "unknown_control_frame": (b'{"control": "hint", "channel": "c", "new": 1}', 0),
    "control_frame_without_fields": (b'{"control": "gap"}', 0),
    "control_frame_that_is_no_text": (b'{"control": null}', 0),
}


@pytest.mark.parametrize(("message", "invalid"), STRANGE.values(), ids=STRANGE.keys())
def test_a_strange_message_is_passed_over(message: bytes, invalid: int) -> None:
    """What is no event is counted (control frames are not), never given out, and the next event arrives."""

    async def story() -> int:
        async with fake_hub(send_all([message, event_payload(9)])) as url, receiving(url) as received:
            await received.until(9)
            assert received.subscriber.reconnects == 0
            return received.subscriber.invalid

    assert run_async(story()) == invalid


def test_an_event_may_have_a_field_named_control() -> None:
    """An event with a field of that name is an event all the same."""
    payload = b'{"control": "mine", ' + event_payload(4)[1:]

    async def story() -> bytes:
        async with fake_hub(send_all([payload])) as url, receiving(url) as received:
            await received.until(4)
            return received.events[0].payload

    assert run_async(story()) == payload


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012, 1013, 4008, 4009])
def test_whatever_the_close_code_it_comes_back(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that closes, even in good order, is connected to again; the holes are counted."""
    monkeypatch.setattr(connector, "TRY_LATER_S", 0.1)
    numbers = iter(range(1, 100, 2))

    async def one_event(connection: ServerConnection) -> None:
        await connection.send(event_payload(next(numbers)), text=True)
        await connection.close(code, "by the test")

    async def story() -> None:
        async with fake_hub(one_event) as url, receiving(url) as received:
            await until(lambda: len(received.events) >= 3, f"only {received.numbers} after {code}")
            assert received.numbers[:3] == [1, 3, 5]
            assert received.subscriber.reconnects >= 2
            assert received.subscriber.missing["server-a"] >= 2

    run_async(story())


REFUSALS = {"no_such_channel": "?channel=other", "unknown_parameter": "?chanel=events.critical"}


@pytest.mark.parametrize("query", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_for_good_ends_it(query: str, steady_hub: Hub) -> None:
    """A hub that will never have us is an error: trying for ever would look like a quiet system."""

    async def story() -> None:
        before = asyncio.all_tasks()
        async with Subscriber(steady_hub.url + query, settings=SETTINGS) as subscriber, asyncio.timeout(10):
            with pytest.raises(HubRefused, match=r"40[04]"):
                await anext(subscriber)
        assert asyncio.all_tasks() == before

    run_async(story())


def test_a_full_hub_is_tried_again(
    redis: RedisServer, publish: RedisClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A hub that refuses for now (503) is asked again until there is room."""

    async def story(hub: Hub) -> None:
        in_the_way = await asyncio.to_thread(RawClient, hub.port)
        with in_the_way:
            await connected(hub)
            async with receiving(hub.url) as received:
                await until(lambda: "503" in caplog.text, "it was not refused")
                in_the_way.vanish()
                await until(lambda: "connected to" in caplog.text, "it did not come in")
                publish.publish(event_payload(2))
                await received.until(2)

    caplog.set_level(logging.INFO)
    with HubThread(redis.url, BROADCASTER_HUB__MAX_CONNECTIONS="1") as hub:
        run_async(story(hub.until_ready()))


# Positions


async def publish_stored(
    redis: RedisServer, count: int, *, channel: str | None = None, **fields: Any
) -> list[Position]:
    """Publish events through the product; their positions."""
    settings = Settings.model_construct(redis=RedisTable(url=redis.url))
    async with Publisher(settings, channel=channel) as publisher:
        published = [await publisher.publish("SERVER_DOWN", "server-p", **fields) for _ in range(count)]
    assert all(event.position for event in published)
    return [event.position for event in published if event.position]


class Notices:
    """Everything `receive` has given so far, gathered by a task of its own."""

    def __init__(self, subscriber: Subscriber) -> None:
        self.subscriber = subscriber
        self.all: list[Received] = []
        self.task = asyncio.create_task(self._gather())

    async def _gather(self) -> None:
        while (notice := await self.subscriber.receive()) is not None:
            self.all.append(notice)

    @property
    def short(self) -> list[int | str]:
        """Numbers of events, causes of gaps, `stale` and `fresh`."""
        return [brief(notice) for notice in self.all]

    async def until(self, *short: int | str, within: float = 20.0) -> None:
        """Wait until exactly these have come."""
        with contextlib.suppress(AssertionError):
            await until(lambda: self.task.done() or self.short == list(short), "", within)
        assert self.short == list(short)
        assert not self.task.done()


def brief(notice: Received | None) -> int | str:
    if isinstance(notice, Event):
        return notice.sequence
    return str(notice.cause) if isinstance(notice, Gap) else type(notice).__name__.lower()


@contextlib.asynccontextmanager
async def noticing(url: str, settings: Settings = SETTINGS, **options: Any) -> AsyncIterator[Notices]:
    """A subscriber whose `receive` is called for as long as the block lasts."""
    async with Subscriber(url, settings=settings, **options) as subscriber:
        notices = Notices(subscriber)
        try:
            yield notices
        finally:
            notices.task.cancel()
            await asyncio.wait([notices.task])


def test_it_knows_where_it_stands(steady_redis: RedisServer, steady_hub: Hub) -> None:
    """A stored event has channel and position; the subscriber's own position is that of the last one."""

    async def story() -> None:
        async with receiving(steady_hub.url) as received:
            subscriber = received.subscriber
            await connected(steady_hub)
            await until(lambda: subscriber.position is not None, "it was not welcomed")
            positions = await publish_stored(steady_redis, 3)
            await received.until(1, 2, 3)
            assert [event.position for event in received.events] == positions
            assert {event.channel for event in received.events} == {"events.critical"}
            assert subscriber.position == positions[-1]
            assert subscriber.positions == {"events.critical": positions[-1]}

    run_async(story())


SINCE: dict[str, Callable[[Position], Any]] = {
    "a position": lambda position: position,
    "text": str,
    "a mapping": lambda position: {"events.critical": position},
}


@pytest.mark.parametrize("given", SINCE.values(), ids=SINCE.keys())
def test_it_begins_where_it_is_told(
    given: Callable[[Position], Any], steady_redis: RedisServer, steady_hub: Hub
) -> None:
    """`since` at construction: everything stored after it comes first, then what is published now."""

    async def story() -> None:
        positions = await publish_stored(steady_redis, 5)
        async with noticing(steady_hub.url, since=given(positions[1])) as notices:
            await notices.until(3, 4, 5)
            await publish_stored(steady_redis, 2)
            await notices.until(3, 4, 5, 1, 2)
            assert notices.subscriber.gaps == 0

    run_async(story())


@pytest.mark.parametrize("since", ["", "a", "7", "nonsense-x", Position("a b", 3)])
def test_what_is_no_position_is_an_error_at_once(since: Any) -> None:
    """A wrong `since` is a ValueError before anything is connected; empty is none."""
    if since == "":
        assert Subscriber("ws://127.0.0.1:1/ws", settings=SETTINGS, since=since).positions == {}
        return
    with pytest.raises(ValueError, match="since is a position"):
        Subscriber("ws://127.0.0.1:1/ws", settings=SETTINGS, since=since)


def test_a_position_nobody_has_given_is_told(steady_redis: RedisServer, steady_hub: Hub) -> None:
    """Who comes with a position of the future gets a gap as a value, then what is published now."""

    async def story() -> None:
        [last] = await publish_stored(steady_redis, 1)
        future = last._replace(offset=last.offset + 1000)
        async with noticing(steady_hub.url, since=future) as notices:
            await notices.until("position_unknown")
            await publish_stored(steady_redis, 1)
            await notices.until("position_unknown", 1)
            assert isinstance(gap := notices.all[0], Gap)
            assert (gap.first, gap.last, gap.position) == (future.offset + 1, None, last)

    run_async(story())


def test_several_channels_each_go_on_where_they_were(steady_redis: RedisServer, steady_hub: Hub) -> None:
    """Two channels on one connection, each with its own position; what was missed on each comes in its order."""

    async def story() -> None:
        names = ("events.one", "events.two")
        since = {}
        for name in names:
            since[name] = (await publish_stored(steady_redis, 4, channel=name))[1]
        async with noticing(steady_hub.url, channels=names, since=since) as notices:
            await until(lambda: len(notices.all) == 4, "they did not come")
            for name in names:
                come = [n.sequence for n in notices.all if isinstance(n, Event) and n.channel == name]
                assert come == [3, 4]
            await publish_stored(steady_redis, 1, channel="events.two")
            await until(lambda: len(notices.all) == 5, "the live one did not come")
            assert {name: position.offset for name, position in notices.subscriber.positions.items()} == {
                "events.one": since["events.one"].offset + 2,
                "events.two": since["events.two"].offset + 3,
            }

    run_async(story())


def test_a_filter_holds_back_and_loses_nothing(redis: RedisServer) -> None:
    """Only what was asked for comes; the position goes on over the rest, which is neither gap nor missing."""

    async def story(hub: Hub) -> None:
        wanted: dict[str, Any] = {"types": ["SERVER_DOWN"], "severities": ["critical"]}
        async with noticing(hub.url, **wanted) as notices:
            await connected(hub)
            await publish_stored(redis, 3, severity="info")
            await publish_stored(redis, 2)
            [*_, last] = await publish_stored(redis, 3, severity="warning")
            await notices.until(1, 2)
            subscriber = notices.subscriber
            await until(lambda: subscriber.position == last, "no beat moved it on")
            assert (subscriber.gaps, subscriber.missing) == (0, {})

    with HubThread(redis.url, BROADCASTER_HUB__BEAT_INTERVAL_S="0.2") as hub:
        run_async(story(hub.until_ready()))


# Going on


@pytest.mark.parametrize(("number", "code"), ENDINGS.values(), ids=ENDINGS.keys())
def test_it_goes_on_where_it_was_after_the_hub(number: signal.Signals, code: int, redis: RedisServer) -> None:
    """What was published while the hub was away comes when it is back, in its order, with nothing missing."""
    port = free_port()

    async def story() -> None:
        async with ready_hub(redis, port, HubProcess) as first, noticing(first.url) as notices:
            await connected(first)
            await publish_stored(redis, 1)
            await notices.until(1)
            first.signal(number)
            assert await asyncio.to_thread(first.wait) == code
            await publish_stored(redis, 3)
            async with ready_hub(redis, port) as second:
                await connected(second)
                await notices.until(1, 1, 2, 3)
                await publish_stored(redis, 1)
                await notices.until(1, 1, 2, 3, 1)
            assert (notices.subscriber.reconnects, notices.subscriber.gaps) == (1, 0)

    run_async(story())


def frame(control: str, **fields: Any) -> bytes:
    """A control frame of the default channel."""
    return json.dumps({"control": control, "channel": "events.critical"} | fields).encode()


def placed(number: int, offset: int | None = None, **changes: Any) -> bytes:
    """A stored event of epoch a."""
    place = {"channel": "events.critical", "epoch": "a", "offset": offset or number}
    return event_payload(number, **place | changes)


WELCOME = frame("welcome", position="a-0", recovered=None, beat_interval_s=60)


class Asked:
    """A fake hub that notes what it is asked for, and ends each connection in its own way."""

    def __init__(self, end: Talk) -> None:
        self.paths: list[str] = []
        self._end = end

    async def __call__(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        self.paths.append(connection.request.path)
        if connection.subprotocol:
            await connection.send(frame("welcome", position=f"a-{len(self.paths) - 1}"), text=True)
        await connection.send(placed(len(self.paths)), text=True)
        await asyncio.sleep(0.02)
        await self._end(connection)


def closing(code: int) -> Talk:
    async def end(connection: ServerConnection) -> None:
        await connection.close(code, "by the test")

    return end


async def aborting(connection: ServerConnection) -> None:
    connection.transport.abort()


WAYS: dict[str, Talk] = {str(code): closing(code) for code in (1000, 1001, 1011, 1012, 1013, 4008)} | {
    "RST": aborting
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_however_it_ends_it_asks_for_what_it_misses(way: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every end of a connection the next one begins behind the last event."""
    monkeypatch.setattr(connector, "TRY_LATER_S", 0.1)

    async def story() -> None:
        hub = Asked(way)
        async with fake_hub(hub, v1=True) as url, noticing(url):
            await until(lambda: len(hub.paths) >= 3, "it did not come back")
        assert hub.paths[:3] == ["/ws", "/ws?since=a-1", "/ws?since=a-2"]

    run_async(story())


def test_after_4009_it_begins_anew_and_says_so() -> None:
    """The hub cannot bring what follows our position: it is not asked for again, and the loss is told."""

    async def story() -> None:
        hub = Asked(closing(4009))
        async with fake_hub(hub) as url, noticing(url) as notices:
            await until(lambda: len(hub.paths) >= 2, "it did not come back")
            assert hub.paths[:2] == ["/ws", "/ws"]
            await until(
                lambda: any(isinstance(notice, Gap) for notice in notices.all), "the loss is silent", within=2
            )

    run_async(story())


def test_without_history_a_lost_connection_is_a_gap(redis: RedisServer) -> None:
    """Nothing is stored, so what came meanwhile is lost: a gap without numbers, before what comes then."""

    async def story(hub: Hub) -> None:
        with Proxy(hub.port) as proxy:
            async with noticing(f"ws://127.0.0.1:{proxy.port}/ws") as notices:
                await connected(hub)
                await asyncio.to_thread(publish_one, redis, 1)
                await notices.until(1)
                proxy.cut()
                await notices.until(1, "no_history")
                await asyncio.to_thread(publish_one, redis, 3)
                await notices.until(1, "no_history", 3)
                assert notices.all[1] == Gap("events.critical", "no_history")
                assert (notices.subscriber.gaps, notices.subscriber.reconnects) == (1, 1)

    with HubThread(redis.url, BROADCASTER_HISTORY__ENABLED="false") as hub:
        run_async(story(hub.until_ready()))


def test_without_history_each_channel_has_its_gap() -> None:
    """Of those that were welcomed before, once each, when they are welcomed again."""
    welcomes = {name: frame("welcome", channel=name, position=None) for name in ("one", "two")}
    connections = itertools.count(1)

    async def talk(connection: ServerConnection) -> None:
        number = next(connections)
        for name in ((), ("one",), ("one", "two"), ("two", "one"))[min(number, 4) - 1]:
            await connection.send(welcomes[name], text=True)
        await connection.send(event_payload(number), text=True)
        if number < 4:
            await asyncio.sleep(0.02)
            connection.transport.abort()
        await connection.wait_closed()

    async def story() -> None:
        async with fake_hub(talk, v1=True) as url, noticing(url, channels=["one", "two"]) as notices:
            await notices.until(1, 2, "no_history", 3, "no_history", "no_history", 4)
            assert [n.channel for n in notices.all if isinstance(n, Gap)] == ["one", "two", "one"]

    run_async(story())


def test_the_hint_of_a_drain_is_kept_to() -> None:
    """A hub that asks to be left alone for a while is."""
    at: list[float] = []

    async def talk(connection: ServerConnection) -> None:
        at.append(asyncio.get_running_loop().time())
        await connection.send(frame("drain", reconnect_after_s=0.6), text=True)
        await connection.close(1012, "")

    async def story() -> None:
        async with fake_hub(talk, v1=True) as url, noticing(url):
            await until(lambda: len(at) >= 2, "it did not come back")
        assert at[1] - at[0] >= 0.6

    run_async(story())


def test_retry_after_is_kept_to() -> None:
    """A hub that refuses with Retry-After is not asked again before."""
    at: list[float] = []

    def refuse(connection: ServerConnection, request: Request) -> Response | None:
        at.append(asyncio.get_running_loop().time())
        if len(at) > 1:
            return None
        response = connection.respond(503, "full\n")
        response.headers["Retry-After"] = "1"
        return response

    async def story() -> None:
        async with (
            fake_hub(send_all([event_payload(5)]), process_request=refuse) as url,
            receiving(url) as received,
        ):
            await received.until(5)
        assert at[1] - at[0] >= 1.0

    run_async(story())


# Gaps, twins, holes


def test_gaps_stand_in_their_place() -> None:
    """`receive` gives a gap between the events it stands between; the iteration counts it."""
    messages = [
        *(WELCOME, placed(1)),
        frame("gap", cause="expired", epoch="a", first=2, last=8, position="a-8"),
        *(placed(9), placed(10)),
        frame("gap", cause="redis_restarted", epoch="a", first=11, last=None, position="b-20"),
        event_payload(21, channel="events.critical", epoch="b", offset=21),
    ]

    async def story() -> None:
        async with fake_hub(send_all(messages), v1=True) as url:
            async with noticing(url) as notices:
                await notices.until(1, "expired", 9, 10, "redis_restarted", 21)
                assert notices.all[1] == Gap("events.critical", "expired", "a", 2, 8, Position("a", 8))
                assert notices.subscriber.position == Position("b", 21)
                assert notices.subscriber.gaps == 2
            async with receiving(url) as received:
                await received.until(1, 9, 10, 21)
                assert received.subscriber.gaps == 2

    run_async(story())


STRANGE_GAPS = {
    "without fields": {},
    "with wrong types": {"cause": 7, "epoch": [], "first": "x", "last": 1.5, "position": {}},
    "with no position": {"cause": "expired", "epoch": "a", "first": 2, "last": 3, "position": "nonsense"},
}


@pytest.mark.parametrize("fields", STRANGE_GAPS.values(), ids=STRANGE_GAPS.keys())
def test_a_strange_gap_is_told_all_the_same(fields: dict[str, Any]) -> None:
    """What cannot be read of it counts as not known."""

    async def story() -> None:
        messages = [WELCOME, frame("gap", **fields), event_payload(9)]
        async with fake_hub(send_all(messages), v1=True) as url, noticing(url) as notices:
            await notices.until(brief(Gap("", str(fields.get("cause")))), 9)
            assert notices.subscriber.gaps == 1

    run_async(story())


def test_what_comes_again_is_dropped() -> None:
    """An event whose id is one of the last 1,024 is not given out again; an older one is."""
    first, second = event_payload(1), event_payload(2)
    others = [event_payload(number) for number in range(3, LIMITS.recent_ids + 2)]

    async def story() -> None:
        messages = [first, second, first, *others, second, first]
        async with fake_hub(send_all(messages)) as url, receiving(url) as received:
            await received.until(1, 2, *range(3, LIMITS.recent_ids + 2), 1)
            assert (received.subscriber.twins, received.subscriber.received) == (2, LIMITS.recent_ids + 2)

    run_async(story())


ANOTHER_ID = "00000000-0000-4000-8000-000000000001"
ON_TWO_CHANNELS: dict[str, tuple[list[bytes], list[int], int]] = {
    "stored": (
        [
            *(placed(1, event_id=ANOTHER_ID), placed(1, 1, channel="two", event_id=ANOTHER_ID)),
            *(placed(2), placed(2, 2, channel="two")),
        ],
        [1, 1, 2, 2],
        0,
    ),
    "stored, and again on each": (
        [
            *(placed(1, event_id=ANOTHER_ID), placed(1, 1, channel="two", event_id=ANOTHER_ID)),
            *(placed(2, event_id=ANOTHER_ID), placed(2, 2, channel="two", event_id=ANOTHER_ID)),
            placed(3),
        ],
        [1, 1, 3],
        2,
    ),
    "not stored": ([event_payload(1, event_id=ANOTHER_ID)] * 2 + [placed(1)], [1, 1, 1], 0),
}


@pytest.mark.parametrize(
    ("messages", "numbers", "duplicates"), ON_TWO_CHANNELS.values(), ids=ON_TWO_CHANNELS.keys()
)
def test_one_event_on_two_channels_is_two_deliveries(
    messages: list[bytes], numbers: list[int], duplicates: int
) -> None:
    """An event is a duplicate on its own channel only; one that is not stored does not say on which it came."""

    async def story() -> None:
        channels = ["events.critical", "two"]
        async with (
            fake_hub(send_all(messages), v1=True) as url,
            noticing(url, channels=channels) as notices,
        ):
            await notices.until(*numbers)
            assert notices.subscriber.twins == duplicates

    run_async(story())


def test_a_twin_in_a_new_epoch_moves_the_position() -> None:
    """A publisher has sent it again to a Redis that had forgotten it: dropped, and the position is the new one."""
    again = placed(7)
    fields = json.loads(again) | {"epoch": "b", "offset": 8}
    messages = [
        *(WELCOME, frame("gap", cause="expired", epoch="a", first=1, last=6, position="a-6"), again),
        frame("gap", cause="redis_restarted", epoch="a", first=8, last=None, position="b-7"),
        json.dumps(fields).encode(),
        event_payload(9, channel="events.critical", epoch="b", offset=9),
    ]

    async def story() -> None:
        async with fake_hub(send_all(messages), v1=True) as url, noticing(url) as notices:
            await notices.until("expired", 7, "redis_restarted", 9)
            assert notices.subscriber.twins == 1
            assert notices.subscriber.position == Position("b", 9)

    run_async(story())


def test_an_older_event_is_dropped_and_counted() -> None:
    """Another event at a position that was passed already is not given out, and moves nothing back."""
    older = event_payload(3, channel="events.critical", epoch="T000000001aaaaaa", offset=7)
    newer = event_payload(4, channel="events.critical", epoch="T000000002aaaaaa", offset=3)
    gap = frame("gap", cause="redis_restarted", epoch="a", first=3, last=None, position="T000000002aaaaaa-2")

    async def story() -> None:
        messages = [WELCOME, placed(1), placed(2), placed(8, 1), gap, older, placed(9, 3), newer]
        async with fake_hub(send_all(messages), v1=True) as url, noticing(url) as notices:
            await notices.until(1, 2, "redis_restarted", 4)
            assert (notices.subscriber.twins, notices.subscriber.received) == (3, 3)
            assert notices.subscriber.position == Position("T000000002aaaaaa", 3)

    run_async(story())


def test_positions_of_the_hub_are_taken_as_they_are() -> None:
    """A hub whose Redis has an older memory says so, and goes on from there: what it then has is new."""
    unknown = frame("gap", cause="position_unknown", epoch="a", first=8, last=None, position="a-2")

    async def story() -> None:
        messages = [frame("welcome", position="a-2"), unknown, placed(3), placed(4)]
        async with fake_hub(send_all(messages), v1=True) as url, noticing(url, since="a-7") as notices:
            await notices.until("position_unknown", 3, 4)
            assert notices.subscriber.twins == 0

    run_async(story())


def test_the_position_moves_with_what_is_handed_out() -> None:
    """One message may bring a gap and an event: who goes between them comes back before the event."""

    async def story() -> None:
        async with (
            fake_hub(send_all([WELCOME, placed(1), placed(5)]), v1=True) as url,
            Subscriber(url, settings=SETTINGS, since="a-0") as subscriber,
        ):
            told = []
            for _ in range(3):
                item = await subscriber.receive()
                told.append((type(item).__name__, str(subscriber.position)))
            assert told == [("Event", "a-1"), ("Gap", "a-4"), ("Event", "a-5")]

    run_async(story())


def test_what_cannot_be_read_is_a_gap_at_its_position() -> None:
    """Too large for this subscriber, no JSON, or no event: nothing is lost without a word."""

    def stored(offset: int, rest: bytes) -> bytes:
        return b'{"channel":"events.critical","epoch":"a","offset":%d,' % offset + rest

    async def story() -> None:
        large = event_payload(2, data={"pad": "x" * 70_000})[1:]
        messages = [WELCOME, placed(1), stored(2, large), stored(3, b'"x":'), stored(4, b'"x":1}'), placed(5)]
        async with fake_hub(send_all(messages), v1=True) as url, noticing(url, since="a-0") as notices:
            await notices.until(1, "refused", "refused", "refused", 5)
            subscriber = notices.subscriber
            assert (subscriber.invalid, subscriber.gaps, str(subscriber.position)) == (3, 3, "a-5")

    run_async(story())


def test_two_publishers_of_one_source_are_nothing_missing() -> None:
    """Each counts for itself; of stored events the offsets say whether one is missing."""

    async def story() -> None:
        messages = [WELCOME, *(placed(number, offset) for offset, number in enumerate((1, 100, 2, 101), 1))]
        async with fake_hub(send_all(messages), v1=True) as url, noticing(url, since="a-0") as notices:
            await notices.until(1, 100, 2, 101)
            assert notices.subscriber.missing == {}

    run_async(story())


ONE_ID = "00000000-0000-4000-8000-000000000000"
UNEXPLAINED: dict[str, tuple[list[bytes], list[int | str], tuple[int, int | None]]] = {
    "an offset is skipped": ([placed(1), placed(4)], [1, "unexplained", 4], (2, 3)),
    "the first one is skipped": ([placed(2)], ["unexplained", 2], (1, 1)),
    "a beat goes too far": ([placed(1), frame("beat", position="a-5"), placed(6)], [1, "unexplained", 6], (2, 5)),
    "behind it stands one that has come before": (
        [placed(1, event_id=ONE_ID), placed(9, 4, event_id=ONE_ID), frame("beat", position="a-4")],
        [1, "unexplained"],
        (2, 3),
    ),
    "an epoch begins without a word": (
        [placed(1), event_payload(9, channel="events.critical", epoch="b", offset=2)],
        [1, "unexplained", 9],
        (2, None),
    ),
}


@pytest.mark.parametrize(("messages", "short", "hole"), UNEXPLAINED.values(), ids=UNEXPLAINED.keys())
def test_a_hole_that_the_hub_did_not_announce_is_found(
    messages: list[bytes], short: list[int | str], hole: tuple[int, int | None]
) -> None:
    """A hub that is wrong is found out: an unexplained gap of the very range, in its place, once."""

    async def story() -> None:
        async with fake_hub(send_all([WELCOME, *messages]), v1=True) as url, noticing(url) as notices:
            await notices.until(*short)
            [gap] = [notice for notice in notices.all if isinstance(notice, Gap)]
            assert (gap.first, gap.last) == hole
            assert notices.subscriber.gaps == 1

    run_async(story())


def test_the_position_is_never_ahead_of_what_was_given() -> None:
    """Who saves `positions` after each `receive`, and begins there next time, has been given everything before."""
    messages = [WELCOME, placed(1), placed(4), placed(5), frame("beat", position="a-7")]

    async def story() -> list[tuple[int | str, int]]:
        async with (
            fake_hub(send_all(messages), v1=True) as url,
            Subscriber(url, settings=SETTINGS) as subscriber,
            asyncio.timeout(10),
        ):
            seen = []
            for _ in range(5):
                notice = await subscriber.receive()
                assert subscriber.position is not None
                seen.append((brief(notice), subscriber.position.offset))
            return seen

    assert run_async(story()) == [(1, 1), ("unexplained", 3), (4, 4), (5, 5), ("unexplained", 7)]


# Waiting, and giving up


def test_a_wait_that_is_cut_short_loses_nothing() -> None:
    """However often `receive` is cancelled, everything comes, in order, gaps and all."""
    messages = [WELCOME]
    for number in range(1, 400):
        if number % 10 == 0:
            messages.append(
                frame("gap", cause="expired", epoch="a", first=number, last=number, position=f"a-{number}")
            )
        else:
            messages.append(placed(number))

    async def talk(connection: ServerConnection) -> None:
        for number, message in enumerate(messages):
            await connection.send(message, text=True)
            if number % 3 == 0:
                await asyncio.sleep(0.003)
        await connection.wait_closed()

    async def story() -> None:
        got: list[int | str] = []
        cut = 0
        async with fake_hub(talk, v1=True) as url, Subscriber(url, settings=SETTINGS) as subscriber:
            async with asyncio.timeout(20):
                while len(got) < 399:
                    waiting = asyncio.ensure_future(subscriber.receive())
                    await asyncio.sleep(0 if subscriber.position else 0.1)
                    if not waiting.done():
                        waiting.cancel()
                        await asyncio.wait([waiting])
                        cut += waiting.cancelled()
                    if not waiting.cancelled():
                        got.append(brief(waiting.result()))
        assert got == ["expired" if number % 10 == 0 else number for number in range(1, 400)]
        assert cut > 10

    run_async(story())


async def polled(subscriber: Subscriber, every_s: float, within_s: float = 10.0) -> Received | None:
    """What `receive` gives to somebody who never waits for longer than `every_s`."""
    async with asyncio.timeout(within_s):
        while True:
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(subscriber.receive(), every_s)


class Slow:
    """A hub that takes its time to answer a handshake, and may refuse it."""

    def __init__(self, delay_s: float, status: int | None = None) -> None:
        self.asked = 0
        self._delay_s = delay_s
        self._status = status

    async def __call__(self, connection: ServerConnection, request: Request) -> Response | None:
        self.asked += 1
        await asyncio.sleep(self._delay_s)
        return connection.respond(self._status, "no\n") if self._status else None


def test_who_polls_connects_over_a_slow_link() -> None:
    """A handshake that takes longer than each of the waits is not begun anew by them."""

    async def story() -> None:
        slow = Slow(0.5)
        async with (
            fake_hub(send_all([WELCOME, placed(1)]), v1=True, process_request=slow) as url,
            Subscriber(url, settings=SETTINGS) as subscriber,
        ):
            assert brief(await polled(subscriber, 0.05)) == 1
            assert slow.asked == 1

    run_async(story())


def test_who_polls_comes_back_after_a_drain() -> None:
    """A hint that is longer than each of the waits is kept to, once."""
    at: list[float] = []

    async def talk(connection: ServerConnection) -> None:
        at.append(asyncio.get_running_loop().time())
        await connection.send(placed(len(at)), text=True)
        await connection.send(frame("drain", reconnect_after_s=0.6), text=True)
        await connection.close(1012, "")

    async def story() -> None:
        async with fake_hub(talk, v1=True) as url, Subscriber(url, settings=SETTINGS) as subscriber:
            assert brief(await polled(subscriber, 0.1)) == 1
            assert brief(await polled(subscriber, 0.1)) == 2
            assert at[1] - at[0] >= 0.6

    run_async(story())


def test_who_polls_is_told_of_a_refusal() -> None:
    """It comes out of the next `receive`, though nobody waited when it came; the one after that tries again."""

    async def story() -> None:
        slow = Slow(0.3, 404)
        async with (
            fake_hub(send_all([]), v1=True, process_request=slow) as url,
            Subscriber(url, settings=SETTINGS) as subscriber,
        ):
            for asked in (1, 2):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(subscriber.receive(), 0.05)
                await asyncio.sleep(0.5)
                with pytest.raises(HubRefused, match="404"):
                    await polled(subscriber, 0.05)
                assert slow.asked == asked

    run_async(story())


def test_an_error_of_the_token_comes_out_of_receive() -> None:
    """Whatever ends the attempts is told to whoever waits, and is not the end of waiting."""
    tokens = iter(["none"])

    def token() -> str:
        return next(tokens, "") or str(1 // 0)

    async def story() -> None:
        async with fake_hub(aborting, v1=True) as url, noticing(url, token=token) as notices:
            with pytest.raises(ZeroDivisionError):
                await asyncio.wait_for(asyncio.shield(notices.task), 10)

    run_async(story())


# Blindness


def beating(*pauses_s: float, interval_s: float = 0.1) -> Talk:
    """Welcomes, beats after each of these pauses, and then as it should."""

    async def talk(connection: ServerConnection) -> None:
        await connection.send(
            frame("welcome", position="a-0", recovered=None, beat_interval_s=interval_s), text=True
        )
        for pause_s in itertools.chain(pauses_s, itertools.repeat(interval_s)):
            await asyncio.sleep(pause_s)
            await connection.send(frame("beat", position="a-0"), text=True)

    return talk


def test_missing_beats_are_blindness_and_the_next_one_ends_it() -> None:
    """Three beats are missing: `Stale`, with the seconds of silence; the next beat: `Fresh`. Nobody reconnects."""

    async def story() -> None:
        async with fake_hub(beating(0.1, 0.1, 0.8), v1=True) as url, noticing(url) as notices:
            await notices.until("stale")
            assert notices.subscriber.stale
            assert isinstance(stale := notices.all[0], Stale)
            assert 0.3 <= stale.silent_s < 5
            await notices.until("stale", "fresh")
            assert not notices.subscriber.stale
            assert isinstance(notices.all[1], Fresh)
            assert notices.subscriber.reconnects == 0

    run_async(story())


def test_events_are_no_beats() -> None:
    """Events alone prove nothing about the others that may be missing: without beats it is blind."""

    async def talk(connection: ServerConnection) -> None:
        await connection.send(frame("welcome", position="a-0", recovered=None, beat_interval_s=0.1), text=True)
        for number in range(1, 1000):
            await connection.send(placed(number), text=True)
            await asyncio.sleep(0.02)

    async def story() -> None:
        async with fake_hub(talk, v1=True) as url, noticing(url) as notices:
            await until(lambda: "stale" in notices.short, "it believes the events")

    run_async(story())


def test_a_welcome_is_no_heartbeat() -> None:
    """A hub that proves nothing welcomes all the same: who was blind before is blind with it."""
    connections = 0

    async def talk(connection: ServerConnection) -> None:
        nonlocal connections
        connections += 1
        await connection.send(frame("welcome", position="a-0", recovered=None, beat_interval_s=0.1), text=True)
        await asyncio.sleep(0.7)
        if connections == 3:
            await connection.send(frame("beat", position="a-0"), text=True)
        await connection.close(1012)

    async def story() -> None:
        async with fake_hub(talk, v1=True) as url, noticing(url) as notices:
            await notices.until("stale", "fresh")
            assert connections == 3

    run_async(story())


def test_who_hears_of_one_of_its_channels_only_is_blind() -> None:
    """Until all of them have heartbeats again."""
    all_beat = asyncio.Event()

    async def talk(connection: ServerConnection) -> None:
        for name in ("one", "two"):
            welcome = frame("welcome", channel=name, position="a-0", recovered=None, beat_interval_s=0.1)
            await connection.send(welcome, text=True)
        while True:
            await asyncio.sleep(0.05)
            for name in ("one", "two") if all_beat.is_set() else ("one",):
                await connection.send(frame("beat", channel=name, position="a-0"), text=True)

    async def story() -> None:
        async with fake_hub(talk, v1=True) as url, noticing(f"{url}?channel=one&channel=two") as notices:
            await notices.until("stale")
            await asyncio.sleep(0.3)
            assert notices.short == ["stale"]
            all_beat.set()
            await notices.until("stale", "fresh")
            assert notices.subscriber.reconnects == 0

    run_async(story())


def test_a_hub_that_does_not_beat_but_lives_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hub answers pings, so the connection is good: it stays, blind, until the hub has found its Redis."""
    monkeypatch.setattr("broadcaster.subscribe.connector._PONG_S", 0.2)

    async def story() -> None:
        async with fake_hub(beating(1.5), v1=True) as url, noticing(url) as notices:
            await notices.until("stale")
            await notices.until("stale", "fresh")
            assert notices.subscriber.reconnects == 0

    run_async(story())


@contextlib.asynccontextmanager
async def swallowing(url: str) -> AsyncIterator[Proxy]:
    """A link to a hub that can be made to swallow everything."""
    with Proxy(int(url.split(":")[2].removesuffix("/ws"))) as proxy:
        yield proxy


def test_a_half_open_connection_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The link swallows everything: `Stale`, no answer to a ping, a new connection, and what it missed."""
    monkeypatch.setattr("broadcaster.subscribe.connector._PONG_S", 0.2)
    paths: list[str] = []

    async def talk(connection: ServerConnection) -> None:
        assert connection.request is not None
        paths.append(connection.request.path)
        number = len(paths)
        await connection.send(frame("welcome", position=f"a-{number - 1}", beat_interval_s=0.1), text=True)
        await connection.send(placed(number), text=True)
        while True:
            await asyncio.sleep(0.1)
            await connection.send(frame("beat", position=f"a-{number}"), text=True)

    async def story() -> None:
        async with (
            fake_hub(talk, v1=True) as url,
            swallowing(url) as proxy,
            noticing(f"ws://127.0.0.1:{proxy.port}/ws") as notices,
        ):
            await notices.until(1)
            proxy.swallow()
            await until(lambda: "fresh" in notices.short and 2 in notices.short, "it does not come back")
            assert sorted(map(str, notices.short)) == ["1", "2", "fresh", "stale"]
            assert notices.short[:2] == [1, "stale"]
            assert (notices.subscriber.reconnects, paths) == (1, ["/ws", "/ws?since=a-1"])

    run_async(story())


class Mute:
    """A hub whose first connection says little; those after it have the event of their number, and beat."""

    def __init__(self, *first: bytes) -> None:
        self.connections = 0
        self._first = first

    async def __call__(self, connection: ServerConnection) -> None:
        self.connections += 1
        if self.connections == 1:
            for message in self._first:
                await connection.send(message, text=True)
            await connection.wait_closed()
            return
        await connection.send(frame("welcome", position="a-1", beat_interval_s=0.1), text=True)
        await connection.send(placed(self.connections), text=True)
        while True:
            await asyncio.sleep(0.1)
            await connection.send(frame("beat", position=f"a-{self.connections}"), text=True)


def test_a_blind_connection_that_goes_half_open_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stale, its hub answers a ping, and only then the link swallows everything: that is found, too."""
    monkeypatch.setattr("broadcaster.subscribe.connector._PONG_S", 0.2)

    async def story() -> None:
        async with (
            fake_hub(Mute(frame("welcome", position="a-1", beat_interval_s=0.1)), v1=True) as url,
            swallowing(url) as proxy,
            noticing(f"ws://127.0.0.1:{proxy.port}/ws") as notices,
        ):
            await notices.until("stale")
            await asyncio.sleep(1.0)  # more than one ping is answered
            assert notices.subscriber.reconnects == 0
            proxy.swallow()
            await until(lambda: {2, "fresh"} <= set(notices.short), "it does not come back", within=5)
            assert sorted(map(str, notices.short)) == ["2", "fresh", "stale"]

    run_async(story())


def test_a_connection_without_a_word_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stale since before it was connected, and the link swallows everything at once."""
    monkeypatch.setattr("broadcaster.subscribe.connector._PONG_S", 0.2)
    settings = SETTINGS.model_copy(update={"hub": HubTable(beat_interval_s=0.1)})

    async def story() -> None:
        hub = Mute()
        async with (
            fake_hub(hub, v1=True, process_request=Slow(0.8)) as url,
            swallowing(url) as proxy,
            noticing(f"ws://127.0.0.1:{proxy.port}/ws", settings) as notices,
        ):
            await until(lambda: hub.connections == 1, "it does not connect")
            proxy.swallow()
            await until(lambda: {2, "fresh"} <= set(notices.short), "it does not come back", within=5)
            assert sorted(map(str, notices.short)) == ["2", "fresh", "stale"]

    run_async(story())


def test_a_goodbye_without_an_end_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that says that it closes, and then does not, is no better than a half-open link."""
    monkeypatch.setattr("broadcaster.subscribe.connector._PONG_S", 0.2)

    class Goodbye(Mute):
        blind = asyncio.Event()

        async def __call__(self, connection: ServerConnection) -> None:
            if not self.connections:
                await connection.send(frame("welcome", position="a-1", beat_interval_s=0.1), text=True)
                await self.blind.wait()
                connection.transport.pause_reading()
                connection.transport.write(close_frame(CloseCode.RESTART, ""))
            await super().__call__(connection)

    async def story() -> None:
        hub = Goodbye()
        async with fake_hub(hub, v1=True) as url, noticing(url) as notices:
            await notices.until("stale")
            hub.blind.set()
            await until(lambda: {2, "fresh"} <= set(notices.short), "it does not come back", within=5)

    run_async(story())


SAID: dict[str, tuple[object, int]] = {
    "huge": (1e300, 1),
    "a number that is no float": (10**400, 1),
    "infinite": (float("inf"), 1),
    "not a number": (float("nan"), 1),
    "negative": (-1.0, 1),
    "text": ("0.1", 1),
    "next to nothing": (1e-9, 1),
    "long": (60, 0),
}


@pytest.mark.parametrize(("said", "stale"), SAID.values(), ids=SAID.keys())
def test_a_beat_interval_is_bounded(said: object, stale: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that no hub can have is passed over, one that is too short is not kept up with."""
    settings = SETTINGS.model_copy(update={"hub": HubTable(beat_interval_s=0.1)})
    probes: list[Connector] = []

    def note(connector: Connector) -> None:
        probes.append(connector)

    monkeypatch.setattr(Connector, "probe", note)

    async def story() -> None:
        messages = [
            frame("welcome", position="a-0", beat_interval_s=said),
            frame("drain", reconnect_after_s=said),
            placed(1),
        ]
        async with fake_hub(send_all(messages), v1=True) as url, noticing(url, settings) as notices:
            await until(lambda: 1 in notices.short, "the event does not come")
            await asyncio.sleep(1.0)
            assert notices.short == [1] + ["stale"] * stale
            assert stale <= len(probes) <= 4 * stale

    run_async(story())


def test_who_polls_is_told_that_it_is_blind() -> None:
    """However seldom and shortly it asks: being late is an excuse once in a silence, not for ever."""

    async def story() -> None:
        async with (
            fake_hub(send_all([frame("welcome", position="a-0", beat_interval_s=0.1)]), v1=True) as url,
            Subscriber(url, settings=SETTINGS) as subscriber,
            asyncio.timeout(10),
        ):
            notice: Received | None = None
            while notice is None:
                with contextlib.suppress(TimeoutError):
                    notice = await asyncio.wait_for(subscriber.receive(), 0.1)
                await asyncio.sleep(0.9)
            assert isinstance(notice, Stale)

    run_async(story())


def test_without_a_hub_it_is_blind() -> None:
    """A hub that is not there cannot beat either: silence is told, not taken for peace."""
    settings = SETTINGS.model_copy(update={"hub": HubTable(beat_interval_s=0.1)})

    async def story() -> None:
        async with noticing(f"ws://127.0.0.1:{free_port()}/ws", settings) as notices:
            await notices.until("stale")
            await asyncio.sleep(0.5)
            assert notices.short == ["stale"]

    run_async(story())


def test_a_foreign_hub_is_never_blind() -> None:
    """A hub without `broadcaster.v1` cannot beat: while it is connected, silence means nothing."""
    settings = SETTINGS.model_copy(update={"hub": HubTable(beat_interval_s=0.1)})

    async def late(connection: ServerConnection) -> None:
        await asyncio.sleep(1.0)
        await connection.send(event_payload(3), text=True)
        await connection.wait_closed()

    async def story() -> None:
        async with fake_hub(late) as url, noticing(url, settings) as notices:
            await notices.until(3)
            assert not notices.subscriber.stale

    run_async(story())


# Leaving


def test_leaving_leaves_nothing(steady_hub: Hub, client: RedisClient) -> None:
    """After the block no task is left, and the hub has nobody connected, though events were waiting."""

    async def story() -> None:
        before = asyncio.all_tasks()
        async with Subscriber(steady_hub.url, settings=SETTINGS) as subscriber:
            waiting = asyncio.ensure_future(anext(subscriber))
            await connected(steady_hub)
            for number in range(10):
                client.publish(event_payload(number))
            assert (await waiting).sequence == 0
        await asyncio.to_thread(steady_hub.until_connected, 0)
        assert asyncio.all_tasks() == before
        with pytest.raises(StopAsyncIteration):
            await anext(subscriber)

    run_async(story())


def test_leaving_before_connecting_leaves_nothing() -> None:
    """A subscriber that was never read has nothing to close; one that cannot connect ends at once."""
    url = f"ws://127.0.0.1:{free_port()}/ws"

    async def story() -> None:
        before = asyncio.all_tasks()
        async with Subscriber(url, settings=SETTINGS) as subscriber:
            pass
        async with asyncio.timeout(5), receiving(url):
            await asyncio.sleep(0.1)
        assert asyncio.all_tasks() == before
        assert (subscriber.received, subscriber.reconnects) == (0, 0)

    run_async(story())


def test_whoever_waits_while_it_is_left_is_told() -> None:
    """A `receive` of another task ends with None, connected or not, and no new connection is made."""

    async def left(url: str, *, connects: bool) -> None:
        before = asyncio.all_tasks()
        async with Subscriber(url, settings=SETTINGS) as subscriber:
            waiting = asyncio.create_task(subscriber.receive())
            await until(lambda: subscriber.position is not None or not connects, "it does not connect")
            await asyncio.sleep(0.05)
        assert await asyncio.wait_for(waiting, 5) is None
        # The other end of the connection is a part of this test, and (on Python 3.13) a turn later at its end.
        await until(lambda: asyncio.all_tasks() == before, "a task is left")

    async def story() -> None:
        slow = Slow(0.0)
        async with fake_hub(send_all([WELCOME]), v1=True, process_request=slow) as url:
            await left(url, connects=True)
            assert slow.asked == 1
        await left(f"ws://127.0.0.1:{free_port()}/ws", connects=False)

    run_async(story())


def test_leaving_that_is_cancelled_leaves_nothing() -> None:
    """A peer that is not there any more holds up a goodbye; who does not wait for it has closed all the same."""

    async def story() -> None:
        async with fake_hub(send_all([WELCOME]), v1=True) as url, swallowing(url) as proxy:
            subscriber = await Subscriber(f"ws://127.0.0.1:{proxy.port}/ws", settings=SETTINGS).__aenter__()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(subscriber.receive(), 0.5)
            proxy.swallow()
            [link] = proxy.links
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(subscriber.__aexit__(None, None, None), 0.1)
            await until(lambda: link.client.lost, "the connection was left", within=1)

    run_async(story())


def test_an_error_in_the_loop_leaves_nothing(steady_hub: Hub, client: RedisClient) -> None:
    """An exception in the body of `async for` passes through, and the connection is closed."""

    async def story() -> None:
        with pytest.raises(ZeroDivisionError):
            await fail_at_the_first_event()
        await asyncio.to_thread(steady_hub.until_connected, 0)

    async def fail_at_the_first_event() -> None:
        async with Subscriber(steady_hub.url, settings=SETTINGS) as subscriber:
            publishing = asyncio.create_task(publish_when_connected())
            async for event in subscriber:
                await publishing
                raise ZeroDivisionError(event.sequence)

    async def publish_when_connected() -> None:
        await connected(steady_hub)
        client.publish(event_payload(1))

    run_async(story())


# What cannot be given out


def small(max_bytes: int) -> Settings:
    return SETTINGS.model_copy(update={"event": EventTable(max_bytes=max_bytes)})


def in_front(number: int, payload: bytes) -> bytes:
    """As a stored event is delivered: its position stands in front of what was published."""
    return b'{"channel":"events.critical","epoch":"a","offset":%d,' % number + payload[1:]


UNFIT = {
    "too large": event_payload(2, data={"pad": "x" * 5000}),
    "no event": b'{"what": "is this"}',
    "no JSON": b'{"event_id": ',
    "not UTF-8": event_payload(2)[:-1] + b',"x":"\xff"}',
    "a key twice": event_payload(2)[:-1] + b',"x":1,"x":2}',
    "nested without end": b'{"x":' + b"[" * 100_000,
    "not a number": event_payload(2, event_type=["T"]),
}


@pytest.mark.parametrize("payload", UNFIT.values(), ids=UNFIT)
def test_what_cannot_be_given_out_is_a_gap_with_its_position(payload: bytes) -> None:
    """In its place among the events, once, and the position is beyond it only when the gap was handed out."""

    async def story() -> None:
        messages = [WELCOME, placed(1), in_front(2, payload), in_front(2, payload), placed(3)]
        async with (
            fake_hub(send_all(messages), v1=True) as url,
            Subscriber(url, settings=small(2000)) as subscriber,
        ):
            items = [await subscriber.receive() for _ in range(3)]
            position = Position("a", 2)
            assert items[1] == Gap("events.critical", "refused", "a", 2, 2, position)
            assert [item.position for item in (items[0], items[2]) if isinstance(item, Event)] == [
                Position("a", 1), Position("a", 3)
            ]  # fmt: skip
            assert (subscriber.gaps, subscriber.invalid, subscriber.position) == (1, 2, Position("a", 3))

    run_async(story())


def test_what_is_missing_before_it_is_another_gap() -> None:
    """Offsets that never came are not the fault of the one that could not be read."""

    async def story() -> None:
        messages = [WELCOME, placed(1), in_front(5, b'{"no": "event"}')]
        async with (
            fake_hub(send_all(messages), v1=True) as url,
            Subscriber(url, settings=SETTINGS) as subscriber,
        ):
            await subscriber.receive()
            gaps = [await subscriber.receive(), await subscriber.receive()]
            assert gaps == [
                Gap("events.critical", "unexplained", "a", 2, 4, Position("a", 4)),
                Gap("events.critical", "refused", "a", 5, 5, Position("a", 5)),
            ]

    run_async(story())


@pytest.mark.parametrize("payload", [b"hello", b"{}", b"\xff", event_payload(1, data={"pad": "x" * 5000})])
def test_what_cannot_be_given_out_and_has_no_position_is_a_gap_too(payload: bytes) -> None:
    """It is not known which event it was, but that there was one."""

    async def story() -> None:
        async with fake_hub(send_all([payload])) as url, Subscriber(url, settings=small(2000)) as subscriber:
            assert await subscriber.receive() == Gap("", "refused")

    run_async(story())


def test_the_limit_is_that_of_the_hub(redis: RedisServer) -> None:
    """Unless a subscriber has one of its own, which is a gap at the exact position."""
    large = {"pad": "x" * 100_000}

    async def story() -> None:
        settings = settings_of({"BROADCASTER_REDIS__URL": redis.url, "BROADCASTER_EVENT__MAX_BYTES": "200000"})
        with HubThread(redis.url, BROADCASTER_EVENT__MAX_BYTES="200000") as hub:
            await asyncio.to_thread(hub.until_ready)
            async with (
                noticing(hub.url) as following,
                noticing(hub.url, small(2000)) as bound,
                Publisher(settings) as publisher,
            ):
                await connected(hub, 2)
                published = await publisher.publish("T", "s", data=large)
                await until(lambda: bool(following.all and bound.all), "nothing has come")
            assert published.position is not None
            epoch, offset = published.position
            assert isinstance(following.all[0], Event)
            assert following.all[0].data == large
            assert bound.all[0] == Gap("events.critical", "refused", epoch, offset, offset, published.position)

    run_async(story())


@pytest.mark.parametrize(("said", "holds"), [(10**12, 2**24), (-1, 65_536), ("many", 65_536), (100_000, 100_000)])
def test_no_hub_makes_it_take_gigabytes(said: object, holds: int) -> None:
    """What a hub says of its events is bounded."""

    async def story() -> None:
        welcome = frame("welcome", position="a-0", recovered=None, beat_interval_s=60, max_bytes=said)
        async with (
            fake_hub(send_all([welcome, placed(1)]), v1=True) as url,
            Subscriber(url, settings=SETTINGS) as subscriber,
        ):
            await subscriber.receive()
            assert subscriber._max_bytes == holds

    run_async(story())


def test_a_message_beyond_every_limit_ends_the_connection() -> None:
    """It is not taken into memory."""
    codes: list[int | None] = []

    async def talk(connection: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            await connection.send(b"x" * 2**25, text=True)
        await connection.wait_closed()
        codes.append(connection.close_code)

    async def story() -> None:
        async with fake_hub(talk) as url, noticing(url):
            await until(lambda: bool(codes), "it takes 32 MiB")
            assert codes[0] == 1009

    run_async(story())


def test_replicas_that_count_alike_miss_nothing() -> None:
    """Two publishers of one source count each for itself; what is missing is told by the offsets only."""

    async def story() -> None:
        sequences = [1, 100, 2, 101, 3, 102, 50]
        messages = [placed(number, offset=at) for at, number in enumerate(sequences, 1)]
        async with (
            fake_hub(send_all([WELCOME, *messages]), v1=True) as url,
            Subscriber(url, settings=SETTINGS) as subscriber,
        ):
            for _ in sequences:
                assert isinstance(await subscriber.receive(), Event)
            assert (subscriber.missing, subscriber.gaps) == ({}, 0)

    run_async(story())
