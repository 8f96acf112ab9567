"""Publishing: from Python, on an open-loop schedule, and as a process of `honcho start`."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from broadcaster import InvalidEvent, Publisher, Settings
from broadcaster.core.errors import HubUnavailable, RedisRefused, RedisUnavailable
from broadcaster.core.event import decode, draft
from broadcaster.core.position import Position
from broadcaster.publish.publisher import Published
from broadcaster.publish.schedule import due_times, on_schedule, padding
from broadcaster.redis.server import RedisServer
from broadcaster.settings import HistoryTable, PublisherTable, RedisTable
from broadcaster.subscribe import hub_status
from tests.support import (
    Hub,
    HubThread,
    RawClient,
    RedisClient,
    Running,
    broadcaster,
    eventually,
    finished,
    free_port,
    next_message,
    redis_client,
    run_async,
    unstamped,
)


def settings_for(redis_url: str, *, stored: bool = True, deadline_s: float = 15.0) -> Settings:
    """The defaults with another Redis; made without reading a file, which would block the loop."""
    return Settings.model_construct(
        redis=RedisTable(url=redis_url, silence_timeout_s=0.6),
        history=HistoryTable(enabled=stored),
        publisher=PublisherTable(publish_deadline_s=deadline_s),
    )


def placed(result: Published, channel: str = "events.critical") -> bytes:
    """The bytes of an event as they travel once it is stored: its place, then what was published."""
    assert result.position is not None
    epoch, offset = result.position
    place = f'{{"channel":"{channel}","epoch":"{epoch}","offset":{offset},'.encode()
    return place + result.event.payload[1:]


@pytest.fixture(scope="module")
def steady_redis() -> Iterator[RedisServer]:
    """A Redis for tests that leave it as it is."""
    with RedisServer.start() as server:
        yield server


# From Python


def test_publish_says_how_many_heard_it(redis: RedisServer) -> None:
    """`heard` is the number of Redis subscriptions that heard the event; 0 is nobody."""

    async def story() -> list[int | None]:
        heard = []
        async with Publisher(settings_for(redis.url)) as publisher:
            for listeners in range(3):
                if listeners:
                    clients[listeners - 1].command("SUBSCRIBE", "events.critical")
                heard.append((await publisher.publish("SERVER_DOWN", "server-a")).heard)
        return heard

    with redis_client(redis) as first, redis_client(redis) as second:
        clients = (first, second)
        assert run_async(story()) == [0, 1, 2]


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not stored"])
def test_what_is_published_is_what_travels(redis: RedisServer, publish: RedisClient, stored: bool) -> None:
    """The payload that `publish` returns is on the channel byte for byte, after its place if it is stored."""

    async def story() -> Published:
        async with Publisher(settings_for(redis.url, stored=stored), channel="other.channel") as publisher:
            data = {"host": "dömäne", "tries": 3}
            return await publisher.publish("DISK_FULL", "db-1", severity="warning", data=data)

    publish.command("SUBSCRIBE", "other.channel")
    before_ms = time.time_ns() // 1_000_000
    published = run_async(story())
    assert published.error is None
    message = next_message(publish)
    assert unstamped(message) == (placed(published, "other.channel") if stored else published.event.payload)
    fields = json.loads(message)
    assert (fields["event_type"], fields["source"], fields["sequence"]) == ("DISK_FULL", "db-1", 1)
    assert (fields["severity"], fields["data"]) == ("warning", {"host": "dömäne", "tries": 3})
    assert before_ms <= fields["published_at_ms"] <= time.time_ns() // 1_000_000
    assert fields["published_at_us"] // 1000 == fields["published_at_ms"]
    received = decode(message)
    assert (received.position, received.event_id) == (published.position, published.event.event_id)
    assert received.channel == ("other.channel" if stored else None)


def test_where_an_event_is_stored_is_told(steady_redis: RedisServer) -> None:
    """Positions of one channel rise by one, whoever publishes; without history there is none."""

    async def story() -> None:
        settings = settings_for(steady_redis.url)
        async with (
            Publisher(settings, channel="counted") as one,
            Publisher(settings, channel="counted") as other,
            Publisher(settings_for(steady_redis.url, stored=False), channel="counted") as forgetful,
        ):
            first = (await one.publish("T", "s")).position
            second = (await other.publish("T", "s")).position
            assert (await forgetful.publish("T", "s")).position is None
            batch = [
                result.position for result in await one.publish_all([one.draft("T", "s") for _ in range(100)])
            ]
        assert first is not None
        assert [first, second, *batch] == [Position(first.epoch, offset) for offset in range(1, 103)]

    run_async(story())


def test_the_same_drafts_again_are_no_new_events(redis: RedisServer, publish: RedisClient) -> None:
    """Drafts that are published a second time have their first positions, and nobody hears them again."""

    async def story() -> list[bytes]:
        async with Publisher(settings_for(redis.url)) as publisher:
            drafts = [publisher.draft("T", "s") for _ in range(3)]
            first = await publisher.publish_all(drafts[:2])
            again = await publisher.publish_all(drafts)
        assert [result.position for result in again[:2]] == [result.position for result in first]
        assert [result.heard for result in again] == [None, None, 1]
        return [placed(result) for result in (*first, again[2])]

    publish.command("SUBSCRIBE", "events.critical")
    payloads = run_async(story())
    assert [unstamped(next_message(publish)) for _ in payloads] == payloads


def test_each_source_counts_for_itself(steady_redis: RedisServer) -> None:
    """The sequence of a source rises by one with each event, whatever other sources do."""

    async def story() -> list[tuple[str, int]]:
        async with Publisher(settings_for(steady_redis.url)) as publisher:
            results = [await publisher.publish("T", source) for source in "abaab"]
        return [(result.event.source, result.event.sequence) for result in results]

    assert run_async(story()) == [("a", 1), ("b", 1), ("a", 2), ("a", 3), ("b", 2)]


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not stored"])
def test_a_batch_arrives_in_its_order(redis: RedisServer, publish: RedisClient, stored: bool) -> None:
    """`publish_all` publishes in order and answers for each event."""

    async def story() -> list[Published]:
        async with Publisher(settings_for(redis.url, stored=stored)) as publisher:
            results = await publisher.publish_all([publisher.draft("T", "s", data={"n": n}) for n in range(200)])
        assert [result.heard for result in results] == [1] * 200
        assert [result.event.data["n"] for result in results] == list(range(200))
        return results

    publish.command("SUBSCRIBE", "events.critical")
    results = run_async(story())
    expected = [placed(result) if stored else result.event.payload for result in results]
    assert [unstamped(next_message(publish)) for _ in results] == expected


def test_what_is_sent_before_is_published_before(redis: RedisServer, publish: RedisClient) -> None:
    """`send` without waiting keeps the order, whichever is settled first; each has its own results."""

    async def story() -> list[bytes]:
        async with Publisher(settings_for(redis.url)) as publisher:
            sent = [publisher.send([publisher.draft("T", "s") for _ in range(3)]) for _ in range(10)]
            results = [await publisher.settle(one) for one in reversed(sent)]
        numbers = [[result.event.sequence for result in one] for one in reversed(results)]
        assert numbers == [[3 * n + 1, 3 * n + 2, 3 * n + 3] for n in range(10)]
        return [placed(result) for one in reversed(results) for result in one]

    publish.command("SUBSCRIBE", "events.critical")
    payloads = run_async(story())
    assert [unstamped(next_message(publish)) for _ in payloads] == payloads


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "empty_type": ({"event_type": ""}, "event_type"),
    "type_with_newline": ({"event_type": "A\nB"}, "event_type"),
    "type_too_long": ({"event_type": "x" * 257}, "event_type"),
    "type_with_half_a_character": ({"event_type": "\ud800"}, "event_type"),
    "type_no_text": ({"event_type": 7}, "event_type"),
    "empty_source": ({"source": ""}, "source"),
    "source_with_escape": ({"source": "\x1b[31mred"}, "source"),
    "source_with_half_a_character": ({"source": "a\udfff"}, "source"),
    "unknown_severity": ({"severity": "fatal"}, "severity"),
    "data_is_a_list": ({"data": [1]}, "data"),
    "data_is_text": ({"data": "text"}, "data"),
    "data_holds_nan": ({"data": {"x": float("nan")}}, "data"),
    "data_holds_an_object": ({"data": {"x": object()}}, "data"),
    "data_with_half_a_character": ({"data": {"x": "\ud800"}}, "data"),
    "too_large": ({"data": {"x": "y" * 70_000}}, "bytes"),
}


@pytest.mark.parametrize(("change", "name"), INVALID.values(), ids=INVALID.keys())
def test_an_invalid_event_is_refused_by_name(change: dict[str, Any], name: str, steady_redis: RedisServer) -> None:
    """InvalidEvent names the field, nothing is published, and no number of the sequence is used up."""
    fields: dict[str, Any] = {"event_type": "T", "source": "s"} | change

    async def story() -> None:
        async with Publisher(settings_for(steady_redis.url)) as publisher:
            with pytest.raises(InvalidEvent) as caught:
                await publisher.publish(fields.pop("event_type"), fields.pop("source"), **fields)
            assert caught.value.detail.startswith(name) or name == "bytes" in caught.value.detail
            assert (await publisher.publish("T", "s")).event.sequence == 1

    run_async(story())


def test_nesting_without_end_is_refused(steady_redis: RedisServer) -> None:
    """Data nested deeper than an encoder goes is an InvalidEvent, too."""
    data: dict[str, Any] = {}
    for _ in range(100_000):
        data = {"d": data}

    async def story() -> str:
        async with Publisher(settings_for(steady_redis.url)) as publisher:
            with pytest.raises(InvalidEvent) as caught:
                await publisher.publish("T", "s", data=data)
        return caught.value.cause

    try:
        assert run_async(story()) == "too_deep"
    finally:
        while data:  # taken apart by hand: the interpreter would do it recursively
            data = data.pop("d")


RESERVED = ("channel", "epoch", "offset")
"""Fields that are given to an event when it is stored, all three; a publisher cannot set them."""


@pytest.mark.parametrize("name", [*RESERVED, "event_id", "sequence", "published_at_ms", "published_at_us"])
def test_reserved_fields_cannot_be_set(name: str, steady_redis: RedisServer) -> None:
    """The store's fields and the publisher's own are no arguments, and the store's are in no payload."""

    async def story() -> dict[str, Any]:
        async with Publisher(settings_for(steady_redis.url)) as publisher:
            wrong: dict[str, Any] = {name: 1}
            with pytest.raises(TypeError, match=name):
                await publisher.publish("T", "s", **wrong)
            fields: dict[str, Any] = json.loads((await publisher.publish("T", "s", data=wrong)).event.payload)
        return fields

    fields = run_async(story())
    assert not fields.keys() & set(RESERVED)
    assert fields["data"] == {name: 1}


def test_one_publisher_serves_many_channels(steady_redis: RedisServer) -> None:
    """`to` names the channel of one event; each channel has its own positions, and its own numbers per source."""

    async def story() -> list[Published]:
        async with Publisher(settings_for(steady_redis.url), channel="events.a") as publisher:
            targets = (None, "events.b", "events.b", None, "events.a")
            return [await publisher.publish("T", "many", to=to) for to in targets]

    published = run_async(story())
    assert [one.event.channel for one in published] == ["events.a", "events.b", "events.b", "events.a", "events.a"]
    assert [one.event.sequence for one in published] == [1, 1, 2, 2, 3]
    offsets = [one.position.offset for one in published if one.position is not None]
    assert [offset - offsets[0] for offset in (offsets[0], *offsets[3:])] == [0, 1, 2]
    assert offsets[2] == offsets[1] + 1


@pytest.mark.parametrize("name", ["", "a b", "events.é", "x" * 129, "events\r\nSET a b"])
def test_a_channel_that_cannot_be_is_refused_before_anything_is_sent(redis: RedisServer, name: str) -> None:
    """Wherever it is named; the next number of the source is not used up."""

    async def story() -> None:
        async with Publisher(settings_for(redis.url)) as publisher:
            draft = publisher.draft("SERVER_DOWN", "server-a")
            with pytest.raises(InvalidEvent, match="channel must"):
                await publisher.publish("SERVER_DOWN", "server-a", to=name)
            with pytest.raises(InvalidEvent, match="channel must"):
                publisher.draft("SERVER_DOWN", "server-a", to=name)
            with pytest.raises(InvalidEvent, match="channel must"):
                publisher.send([draft], name)
            published = await publisher.publish("SERVER_DOWN", "server-a")
            assert published.event.sequence == 2
            assert published.position is not None
            assert published.position.offset == 1, "nothing was sent before"

    run_async(story())


@pytest.mark.parametrize("channel", ["a b", "ä", "x" * 129, "a/b", "a\n", "*"])
def test_a_bad_channel_is_refused_before_connecting(channel: str) -> None:
    """A name that may not be a channel is an InvalidEvent when the publisher is made."""
    with pytest.raises(InvalidEvent, match="channel must"):
        Publisher(settings_for("redis://127.0.0.1:1/0"), channel=channel)


def test_without_redis_nothing_is_entered() -> None:
    """Entering raises RedisUnavailable when nobody answers."""

    async def story() -> None:
        with pytest.raises(RedisUnavailable, match="cannot be reached"):
            async with Publisher(settings_for(f"redis://127.0.0.1:{free_port()}/0")):
                pytest.fail("entered without Redis")
        assert len(asyncio.all_tasks()) == 1

    run_async(story())


def test_a_publisher_outlives_its_redis(redis: RedisServer) -> None:
    """While Redis is dead each publish raises RedisUnavailable at its deadline; afterwards the next works."""

    async def story() -> None:
        async with Publisher(settings_for(redis.url, deadline_s=0.3)) as publisher:
            assert (await publisher.publish("T", "s")).event.sequence == 1
            redis.kill()
            for _ in range(3):
                with pytest.raises(
                    RedisUnavailable, match=r"may not have been published: no answer .* within 0\.3 s"
                ):
                    await publisher.publish("T", "s")
            again = await asyncio.to_thread(RedisServer.start, redis.port)
            try:
                published = await publisher.publish("T", "s")
            finally:
                await asyncio.to_thread(again.stop)
        assert (published.heard, published.event.sequence) == (0, 5)

    run_async(story())


def test_a_restart_within_the_deadline_costs_nothing(redis: RedisServer) -> None:
    """Events that are published while Redis is restarted are stored in the new one; nothing is raised."""

    async def story() -> None:
        async with Publisher(settings_for(redis.url)) as publisher:
            await publisher.publish("T", "s")
            redis.kill()
            waiting = [asyncio.create_task(publisher.publish("T", "s")) for _ in range(3)]
            await asyncio.sleep(0.2)
            again = await asyncio.to_thread(RedisServer.start, redis.port)
            try:
                results = await asyncio.gather(*waiting)
            finally:
                await asyncio.to_thread(again.stop)
        assert [result.event.sequence for result in results] == [2, 3, 4]
        assert [result.position.offset for result in results if result.position] == [1, 2, 3]

    run_async(story())


def test_a_frozen_redis_is_noticed(redis: RedisServer) -> None:
    """A Redis that does not answer in time is RedisUnavailable; when it thaws, publishing works again."""

    async def story() -> None:
        async with Publisher(settings_for(redis.url, deadline_s=0.8)) as publisher:
            redis.freeze()
            try:
                async with asyncio.timeout(10):
                    with pytest.raises(RedisUnavailable, match=r"within 0\.8 s"):
                        await publisher.publish("T", "s")
            finally:
                redis.thaw()
            published = await publisher.publish("T", "s")
            assert published.heard in (0, None)  # None if its first reply was too late
            assert published.position is not None

    run_async(story())


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not stored"])
def test_failures_of_a_batch_are_told_one_by_one(redis: RedisServer, stored: bool) -> None:
    """`publish_all` raises nothing: each event comes back with what is known about it."""

    async def story() -> None:
        async with Publisher(settings_for(redis.url, stored=stored, deadline_s=0.3)) as publisher:
            assert await publisher.publish_all([]) == []
            batch = [publisher.draft("T", "s") for _ in range(3)]
            redis.kill()
            results = await publisher.publish_all(batch)
        assert [result.event.sequence for result in results] == [1, 2, 3]
        assert all(result.heard is None and result.position is None and result.error for result in results)

    run_async(story())


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not stored"])
def test_a_publisher_without_the_right_is_refused(redis: RedisServer, publish: RedisClient, stored: bool) -> None:
    """A user that may not publish, or gives a wrong password, is told so, without the password."""
    publish.command("ACL", "SETUSER", "reader", "on", ">secret", "+@connection", "+info")

    async def story() -> None:
        address = redis.url.removeprefix("redis://")
        with pytest.raises(RedisRefused, match="WRONGPASS") as caught:
            async with Publisher(settings_for(f"redis://reader:guessed@{address}", stored=stored)):
                pytest.fail("entered with a wrong password")
        assert "guessed" not in str(caught.value)
        with pytest.raises(RedisRefused, match="NOPERM"):
            async with Publisher(settings_for(f"redis://reader:secret@{address}", stored=stored)) as publisher:
                await publisher.publish("T", "s")

    run_async(story())


def test_leaving_leaves_nothing(redis: RedisServer, publish: RedisClient) -> None:
    """After the block there is no task and no connection, also when it ended with an error."""

    async def story() -> None:
        with contextlib.suppress(ZeroDivisionError):
            async with Publisher(settings_for(redis.url)) as publisher:
                await publisher.publish("T", "s")
                raise ZeroDivisionError
        assert len(asyncio.all_tasks()) == 1

    run_async(story())
    eventually(lambda: len(publish.command("CLIENT", "LIST").splitlines()) == 1, "a connection was left")


# The schedule (which blocks its loop for the last 2 ms before an event is due, on purpose: no `run_async` here)

DUE: dict[str, tuple[int, float, list[float]]] = {
    "one_at_once": (1, 0.0, [0.0]),
    "all_at_once": (3, 0.0, [0.0, 0.0, 0.0]),
    "one": (1, 10.0, [0.0]),
    "ten_a_second": (4, 10.0, [0.0, 0.1, 0.2, 0.3]),
    "four_a_second": (3, 4.0, [0.0, 0.25, 0.5]),
    "one_in_two_seconds": (3, 0.5, [0.0, 2.0, 4.0]),
}


@pytest.mark.parametrize(("events", "rate_hz", "expected"), DUE.values(), ids=DUE.keys())
def test_due_times(events: int, rate_hz: float, expected: list[float]) -> None:
    """Event n is due n / rate seconds after the start; without a rate all are due at once."""
    assert list(due_times(events, rate_hz)) == pytest.approx(expected)


def test_due_times_do_not_drift() -> None:
    """The millionth event is due exactly when the rate says: errors do not add up. 0 events is no end."""
    due_s = next(itertools.islice(due_times(0, 1000.0), 1_000_000, None))
    assert due_s == 1000.0


def test_a_late_schedule_keeps_its_times() -> None:
    """Whoever is late gets what is due at once, each event with the time it was meant for."""

    async def story() -> list[list[int]]:
        batches = []
        async for due in on_schedule(50, 200.0):
            assert time.monotonic_ns() >= due[-1], "given out before it was due"
            batches.append(due)
            if len(batches) == 3:
                await asyncio.sleep(0.1)  # a slow consumer: 20 events become due meanwhile
        return batches

    batches = asyncio.run(story(), debug=True)
    assert len(batches[3]) >= 20
    times = [due for batch in batches for due in batch]
    assert [due - times[0] for due in times] == [number * 5_000_000 for number in range(50)]


def test_an_event_does_not_wait_for_the_next() -> None:
    """An event is given out when it is due, not when the one after it is."""

    async def story() -> list[tuple[int, int]]:
        return [(due[0], time.monotonic_ns()) async for due in on_schedule(3, 1.0)]

    seen = asyncio.run(story(), debug=True)
    assert len(seen) == 3
    for (_, given_ns), (next_due_ns, _) in itertools.pairwise(seen):
        assert given_ns < next_due_ns


@pytest.mark.parametrize("events", [1, 50, 2000])
def test_rate_0_is_one_moment(events: int) -> None:
    """Without a rate all events are due at one and the same time; 50 of them are one batch."""

    async def story() -> list[list[int]]:
        return [due async for due in on_schedule(events, 0.0)]

    batches = asyncio.run(story(), debug=True)
    times = [due for batch in batches for due in batch]
    assert len(times) == events
    assert len(set(times)) == 1
    assert len(batches) == 1 or events > 50


# Padding

PADDED = {"none": (0, 0), "less_than_bare": (200, 0), "a_little": (300, 300), "kilobyte": (1024, 1024)}


@pytest.mark.parametrize(("payload_bytes", "expected"), PADDED.values(), ids=PADDED.keys())
def test_padding_brings_events_to_their_size(payload_bytes: int, expected: int) -> None:
    """Shorter events are as long as publisher.payload_bytes, up to the digits of their number; never longer."""
    settings = Settings.model_construct(publisher=PublisherTable(payload_bytes=payload_bytes))
    data = padding(settings)
    assert (data is None) == (expected == 0)
    if data is not None:
        now_us = time.time_ns() // 1000
        sizes = [len(draft("SERVER_DOWN", "server-a", n, data=data).stamp(now_us)) for n in (1, 10**6)]
        assert sizes == [expected - 6, expected]


# The process of `honcho start`


def next_sequence(client: RawClient) -> int:
    """The number of the next event; control frames are passed over."""
    while "sequence" not in (fields := client.event()):
        pass
    sequence: int = fields["sequence"]
    return sequence


def role(redis_url: str, hub_port: int, **variables: str) -> Running:
    return broadcaster(
        "publisher", BROADCASTER_REDIS__URL=redis_url, BROADCASTER_HUB__PORT=str(hub_port), **variables
    )


def test_the_role_waits_for_a_subscriber(redis: RedisServer) -> None:
    """It starts before the hub, waits for hub and one subscriber, and then publishes at its rate from #1 on."""
    port = free_port()
    with role(redis.url, port, BROADCASTER_PUBLISHER__RATE_HZ="20") as publisher:
        with HubThread(redis.url, port) as hub:
            hub.until_ready()
            assert hub.stats()["events_received"] == 0
            with RawClient(port) as client:
                numbers = [client.event()["sequence"] for _ in range(5)]
        assert numbers == [1, 2, 3, 4, 5]
        publisher.said("publishing 20 events a second to events.critical")
        publisher.said("was heard by nobody")
    assert (publisher.wait(), "Traceback" in publisher.output) == (0, False)


def test_the_role_outlives_its_redis(redis: RedisServer) -> None:
    """A Redis that is away for longer than the deadline is a line in the log; the numbers show what was lost."""
    with (
        HubThread(redis.url) as hub,
        RawClient(hub.until_ready().port, subprotocol="broadcaster.v1") as client,
        role(
            redis.url,
            hub.port,
            BROADCASTER_PUBLISHER__RATE_HZ="20",
            BROADCASTER_PUBLISHER__PUBLISH_DEADLINE_S="0.3",
        ) as publisher,
    ):
        assert next_sequence(client) == 1
        redis.kill()
        publisher.said("may not have been published")
        lost = 2
        with RedisServer.start(redis.port):
            while (sequence := next_sequence(client)) == lost:  # what had arrived before the end
                lost += 1
            assert sequence > lost
            assert [next_sequence(client) for _ in range(3)] == [sequence + 1, sequence + 2, sequence + 3]


def test_the_role_loses_nothing_to_a_restart_of_redis(redis: RedisServer) -> None:
    """A Redis that is back within the deadline costs no number: they go on as if nothing had happened."""
    with (
        HubThread(redis.url) as hub,
        RawClient(hub.until_ready().port, subprotocol="broadcaster.v1") as client,
        role(redis.url, hub.port, BROADCASTER_PUBLISHER__RATE_HZ="20") as publisher,
    ):
        numbers = [next_sequence(client) for _ in range(3)]
        redis.kill()
        time.sleep(0.3)
        with RedisServer.start(redis.port):
            numbers += [next_sequence(client) for _ in range(10)]
            numbers = list(dict.fromkeys(numbers))  # one that nobody could answer for may come twice
            assert numbers == list(range(1, len(numbers) + 1))
            assert "may not have been published" not in publisher.output


@contextlib.contextmanager
def other_server(body: bytes | None) -> Iterator[int]:
    """Something on a port that is no hub: an HTTP server that answers `body`, or with None no HTTP at all."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle(self) -> None:
            if body is not None:
                return super().handle()
            self.request.recv(1000)
            self.request.sendall(b"-ERR unknown command 'GET'\r\n")
            self.request.shutdown(socket.SHUT_WR)
            return None

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *arguments: Any) -> None:
            """Be quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", free_port()), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


NO_HUBS = {
    "no_http": None,
    "no_json": b"<html>",
    "no_object": b"[]",
    "other_json": b"{}",
}


@pytest.mark.parametrize("body", NO_HUBS.values(), ids=NO_HUBS.keys())
def test_something_else_on_the_port_of_the_hub(body: bytes | None) -> None:
    """Whatever answers there: it is not a ready hub, and waiting for one ends with HubUnavailable."""
    with other_server(body) as port, pytest.raises(HubUnavailable, match=r"waited 0\.2 s for the hub"):
        asyncio.run(hub_status.wait_until_ready(f"http://127.0.0.1:{port}", within_s=0.2))


def test_the_role_gives_up_without_a_hub(redis: RedisServer) -> None:
    """No ready hub within publisher.start_timeout_s is one line that says what was missing, exit code 69."""
    port = free_port()
    ended = finished(
        "publisher",
        BROADCASTER_REDIS__URL=redis.url,
        BROADCASTER_HUB__PORT=str(port),
        BROADCASTER_PUBLISHER__START_TIMEOUT_S="0.3",
    )
    assert ended.code == 69
    assert f"waited 0.3 s for the hub at http://127.0.0.1:{port}" in ended.complaint


def test_the_role_gives_up_without_a_subscriber(hub: Hub, redis: RedisServer) -> None:
    """A hub that nobody subscribes to is told as such."""
    ended = finished(
        "publisher",
        BROADCASTER_REDIS__URL=redis.url,
        BROADCASTER_HUB__PORT=str(hub.port),
        BROADCASTER_PUBLISHER__START_TIMEOUT_S="0.3",
    )
    assert ended.code == 69
    assert "0 of 1 subscribers are connected" in ended.complaint
