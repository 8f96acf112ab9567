"""The trace: when the last events were read and first written; bounded, and next to nothing on the event path."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from broadcaster.core.position import Position
from broadcaster.hub.fanout.trace import TracedEvent
from broadcaster.redis.server import RedisServer
from tests.hub.house import CHANNEL, House, store_by_script
from tests.support import MONITOR_KEY, Hub, HubThread, RawClient, RedisClient, event_payload, in_loop, redis_client

OTHER = "events.other"


async def traced_house(**arguments: object) -> House:
    """A hub whose CLOCK_MONOTONIC is 1, 2, 3 ... ns."""
    house = await House.opened(**arguments)  # type: ignore[arg-type]
    readings = itertools.count(1)
    house.clock.monotonic_ns = lambda: next(readings)  # type: ignore[method-assign]
    return house


def trace_of(house: House, channel: str = CHANNEL, after: Position | None = None) -> list[TracedEvent]:
    events, complete = house.channels.trace.after(channel, after, 1_000_000)
    assert complete
    return events


def instants(house: House) -> list[tuple[int, int | None]]:
    return [(event.read_mono_ns, event.written_mono_ns) for event in trace_of(house)]


@in_loop
async def test_a_batch_costs_two_readings_of_the_clock_however_many_receive_it() -> None:
    """One when it was read, one before the first write."""
    house = await traced_house()
    for _ in range(5):
        house.connect()
    house.publish(50)
    assert instants(house) == [(1, 2)] * 50
    assert [event.position.offset for event in trace_of(house)] == [*range(1, 51)]
    assert house.clock.monotonic_ns() == 3


@in_loop
async def test_each_piece_has_an_instant_of_its_own() -> None:
    """257 events of 256 bytes leave in two writes: the last one waits for the first piece to be written to all."""
    house = await traced_house()
    house.connect()
    house.publish(257)
    assert instants(house) == [(1, 2)] * 256 + [(1, 3)]


@in_loop
async def test_the_first_write_counts_where_filters_differ() -> None:
    """An event that two audiences want was first written to one of them; one that only the second wants, later."""
    house = await traced_house()
    house.connect()
    house.connect("severity=info")
    first = house.store(1, severity="critical")
    house.hear(first + house.store(1, severity="info"))
    assert instants(house) == [(1, 2), (1, 2)]
    assert house.clock.monotonic_ns() == 3  # nothing is left to be stamped for the second audience


@in_loop
async def test_an_event_that_nobody_wants_was_not_written() -> None:
    house = await traced_house()
    house.publish(1)
    house.connect("severity=info")
    house.publish(1, severity="critical")
    assert instants(house) == [(1, None), (2, None)]


@in_loop
async def test_what_was_read_from_the_log_says_so() -> None:
    """Also what the subscription brought meanwhile, which had to wait for it."""
    house = await traced_house()
    house.connect()
    house.store(2)  # the subscription does not bring them
    house.publish(1)
    await house.settle()
    house.publish(1)
    assert [event.recovered for event in trace_of(house)] == [True, True, True, False]
    assert all(event.written_mono_ns and event.read_mono_ns < event.written_mono_ns for event in trace_of(house))


@pytest.mark.parametrize("size", [1, 3, 10])
@in_loop
async def test_the_last_events_are_kept(size: int) -> None:
    """`hub.trace_events` of all channels together, also of batches that are larger."""
    house = await traced_house(trace_events=size)
    house.connect()
    house.connect(f"channel={OTHER}")
    house.channels.on_confirmed(OTHER)
    await house.settle()
    house.publish(4)
    house.publish(7)
    assert [event.position.offset for event in trace_of(house)] == [*range(1, 12)][-size:]
    assert trace_of(house, OTHER) == []
    house.publish(1, channel=OTHER)
    assert [event.position.offset for event in trace_of(house, OTHER)] == [1]
    assert len(trace_of(house)) == size - 1


@in_loop
async def test_what_comes_after_a_position() -> None:
    """One that is not kept any more leaves all that is."""
    house = await traced_house(trace_events=5)
    house.publish(8)
    epoch = trace_of(house)[0].position.epoch
    for offset, expected in ((3, [4, 5, 6, 7, 8]), (4, [5, 6, 7, 8]), (7, [8]), (8, [])):
        found = trace_of(house, after=Position(epoch, offset))
        assert [event.position.offset for event in found] == expected
    events, complete = house.channels.trace.after(CHANNEL, Position(epoch, 4), 2)
    assert ([event.position.offset for event in events], complete) == ([5, 6], False)
    events, complete = house.channels.trace.after(CHANNEL, Position(epoch, 6), 2)
    assert ([event.position.offset for event in events], complete) == ([7, 8], True)


@pytest.mark.parametrize("off", [{"trace_events": 0}, {"history": False}], ids=["0", "no history"])
@in_loop
async def test_without_a_trace_no_clock_is_read(off: dict[str, object]) -> None:
    """What is not stored has no position at which it could be found."""
    house = await traced_house(**off)
    house.connect()
    house.unstored(3)
    if "history" not in off:
        house.publish(3)
    assert trace_of(house) == []
    assert house.clock.monotonic_ns() == 1


@in_loop
async def test_what_is_not_stored_is_not_among_it() -> None:
    house = await traced_house()
    house.connect()
    house.unstored(2)
    house.publish(1)
    assert len(trace_of(house)) == 1


# Over HTTP


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with RedisServer.start() as server, HubThread(server.url, BROADCASTER_HUB__TRACE_EVENTS="2500") as hub:
        hub.until_ready()
        with redis_client(server) as client:
            hub.redis = client  # type: ignore[attr-defined]
            yield hub


@pytest.fixture
def publish(hub: Hub) -> RedisClient:
    client: RedisClient = hub.redis  # type: ignore[attr-defined]
    return client


def test_the_trace_of_events_that_were_delivered(hub: Hub, publish: RedisClient) -> None:
    """Read before written, written before received, page by page; on the clock of this machine."""
    with RawClient(hub.port) as guest:
        begun_ns = time.monotonic_ns()
        positions = [store_by_script(publish, event_payload(number))[0] for number in range(1, 31)]
        for _ in positions:
            guest.event()
        ended_ns = time.monotonic_ns()
    pages: list[dict[str, Any]] = []
    after = ""
    while not pages or not pages[-1]["complete"]:
        status, page = hub.get(f"/trace?channel={CHANNEL}&count=7&after={after}")
        assert status == 200
        pages.append(page)
        after = page["events"][-1]["position"]
    events = [event for page in pages for event in page["events"]]
    assert [len(page["events"]) for page in pages] == [7, 7, 7, 7, 2]
    assert [event["position"] for event in events] == positions
    for event in events:
        assert begun_ns < event["read_mono_ns"] < event["written_mono_ns"] < ended_ns
        assert event["recovered"] is False
    assert {page["instance"] for page in pages} == {hub.get("/time")[1]["instance"]}


WRONG = {
    "a channel that is none": ("channel=a%20b", "a channel name"),
    "a position that is none": ("after=x", "a position is <epoch>-<offset>, got 'x'"),
    "no event at all": ("count=0", "count is a number of events from 1, got '0'"),
    "a number that is none": ("count=-1", "count is a number of events from 1, got '-1'"),
    "digits of another script": ("count=%D9%A3", "count is a number of events from 1, got '٣'"),
}


@pytest.mark.parametrize(("query", "why"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_question_is_refused_by_name(hub: Hub, query: str, why: str) -> None:
    status, body = hub.get(f"/trace?{query}")
    assert status == 400
    assert why.removeprefix("a channel name") in body["error"]


def test_a_channel_that_is_not_open_has_no_trace(hub: Hub) -> None:
    assert hub.get("/trace?channel=events.nobody")[1]["events"] == []


def test_the_hubs_clocks(hub: Hub) -> None:
    """Both of the same instant, give or take what one reading takes."""
    before_ns, before_wall_ns = time.monotonic_ns(), time.time_ns()
    body = hub.get("/time")[1]
    assert before_ns < body["monotonic_ns"] < time.monotonic_ns()
    assert before_wall_ns <= body["wall_ns"] <= time.time_ns()


# Access


KEYS = [{"name": "wall", "key": "wall-key_0123456789", "subscribe": ["*"], "publish": ["*"]}]


@pytest.fixture(scope="module")
def guarded() -> Iterator[Hub]:
    keys = json.dumps(KEYS)
    access = {"BROADCASTER_AUTH__MODE": "token", "BROADCASTER_AUTH__API_KEYS": keys}
    with RedisServer.start() as server, HubThread(server.url, None, **access) as hub:
        yield hub.until_ready()


@pytest.mark.parametrize("path", ["/stats", "/stats/", "/stats?scope=self", "/trace", "/trace?count=x", "/time"])
def test_what_a_hub_says_of_itself_asks_for_a_token_that_may_monitor(guarded: Hub, path: str) -> None:
    """A right of its own: to subscribe to everything is not enough, and it is no right to subscribe."""
    assert guarded.get(path) == (401, {"error": "access denied: missing"})
    assert guarded.get(path, "nobody-knows-this-key") == (401, {"error": "access denied: unknown key"})
    assert guarded.get(path, "wall-key_0123456789") == (403, {"error": "the token is not good for monitoring"})
    assert guarded.get(path, MONITOR_KEY)[0] == (400 if "count" in path else 200)


def test_health_asks_for_none(guarded: Hub) -> None:
    assert [guarded.get(path)[0] for path in ("/health", "/health/live", "/health/ready")] == [200] * 3
