"""The client library: it stays until it is left, comes back after every fault, and counts what is missing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

from broadcaster import Event, Settings, Subscriber
from broadcaster.errors import HubRefused
from broadcaster.redis_server import RedisServer, free_port
from broadcaster.settings import SubscriberTable
from tests.support import HubProcess, RawClient, RedisClient, event_payload, redis_client, run_async, until

SETTINGS = Settings.model_construct(subscriber=SubscriberTable(connect_timeout_s=2.0, reconnect_max_s=0.2))


class Received:
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
async def receiving(url: str, settings: Settings = SETTINGS) -> AsyncIterator[Received]:
    """A subscriber that is read for as long as the block lasts; the reading must not end before."""
    async with Subscriber(url, settings=settings) as subscriber:
        received = Received(subscriber)
        try:
            yield received
            assert not received.task.done(), f"the iteration has ended: {received.task}"
        finally:
            received.task.cancel()
            await asyncio.wait([received.task])


@contextlib.asynccontextmanager
async def ready_hub(redis: RedisServer, port: int | None = None) -> AsyncIterator[HubProcess]:
    """A hub of the test's own, ended when the block ends."""
    hub = HubProcess(redis.url, port)
    try:
        yield await asyncio.to_thread(hub.until_ready)
    finally:
        await asyncio.to_thread(hub.__exit__, None, None, None)


async def connected(hub: HubProcess, count: int = 1) -> None:
    await asyncio.to_thread(hub.until_connected, count)


# Receiving


def test_events_arrive_as_they_were_published(steady_hub: HubProcess, client: RedisClient) -> None:
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


def test_every_subscriber_receives_every_event_in_order(steady_hub: HubProcess, client: RedisClient) -> None:
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
    steady_hub: HubProcess, client: RedisClient, monkeypatch: pytest.MonkeyPatch
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


def test_a_wait_that_is_given_up_does_not_end_the_iteration(steady_hub: HubProcess, client: RedisClient) -> None:
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
            await until(lambda: "connection lost" in hub.output, "the hub did not notice")
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
        async with ready_hub(redis, port) as first, receiving(first.url) as received:
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
        server = await asyncio.get_running_loop().create_server(Silent, "127.0.0.1", 0)
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws"
        async with server:
            async with receiving(url, Settings.model_construct(subscriber=table)):
                await until(lambda: len(silent) >= 3, "no further attempt")
            await until(lambda: all(connection.gone for connection in silent), "a connection was left")

    run_async(story())


# Other hubs

Talk = Callable[[ServerConnection], Any]


@contextlib.asynccontextmanager
async def fake_hub(talk: Talk) -> AsyncIterator[str]:
    """A hub that says what the real one never would."""
    async with serve(talk, "127.0.0.1", 0, compression=None, close_timeout=0.1) as server:
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
def test_whatever_the_close_code_it_comes_back(code: int) -> None:
    """A hub that closes, even in good order, is connected to again; the holes are counted."""
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
def test_a_refusal_for_good_ends_it(query: str, steady_hub: HubProcess) -> None:
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

    async def story(hub: HubProcess) -> None:
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
    with HubProcess(redis.url, BROADCASTER_HUB__MAX_CONNECTIONS="1") as hub:
        run_async(story(hub.until_ready()))


# Leaving


def test_leaving_leaves_nothing(steady_hub: HubProcess, client: RedisClient) -> None:
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


def test_an_error_in_the_loop_leaves_nothing(steady_hub: HubProcess, client: RedisClient) -> None:
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
