"""`GET /events`: what is stored, in pages, for those who may subscribe."""

from __future__ import annotations

import asyncio
import datetime
import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from broadcaster.core.errors import RedisErrorReply
from broadcaster.core.position import Last, Position
from broadcaster.core.runtime import Limits, Runtime
from broadcaster.hub.catchup.history import Busy, Extract, History
from broadcaster.hub.catchup.times import Times
from broadcaster.hub.connections.request import EventsRequest, read_events_query
from broadcaster.hub.fanout.filters import EVERYTHING, Filter
from broadcaster.redis.server import RedisServer
from broadcaster.wire import Target
from tests.hub.house import AT_ONCE, CHANNEL, INVALID, Memory, payload, store_by_script
from tests.hub.test_times import stamped
from tests.support import Hub, HubThread, in_loop, redis_client

P = Position.parse


def history(redis: Memory, runtime: Runtime = AT_ONCE) -> History:
    return History(redis.event_log(), Times(redis.event_log()), runtime)


async def extract(
    redis: Memory, since: str | Last | None = None, wanted: Filter = EVERYTHING, limit: int = 100
) -> tuple[list[int], str, bool, bool]:
    """Offsets, position, whether there is more, whether it is complete."""
    begins = P(since) if isinstance(since, str) else since
    found = await history(redis).read(CHANNEL, begins, wanted, limit)
    return told(found)


def told(found: Extract) -> tuple[list[int], str, bool, bool]:
    numbers = [json.loads(data)["offset"] for data in found.payloads]
    return numbers, str(found.position), found.more, found.complete


def memory(count: int, **labels: Any) -> Memory:
    redis = Memory()
    for number in range(count):
        redis.store(payload(number, **labels))
    return redis


@in_loop
async def test_from_the_oldest_event_on_in_pages() -> None:
    """The last page says that there is no more; its position is where a subscription would go on."""
    redis = memory(250)
    assert await extract(redis) == ([*range(1, 101)], "e1-100", True, True)
    assert await extract(redis, "e1-100") == ([*range(101, 201)], "e1-200", True, True)
    assert await extract(redis, "e1-200") == ([*range(201, 251)], "e1-250", False, True)
    assert await extract(redis, "e1-250") == ([], "e1-250", False, True)
    assert await extract(redis, limit=250) == ([*range(1, 251)], "e1-250", False, True)
    assert await extract(redis, limit=249) == ([*range(1, 250)], "e1-249", True, True)


@in_loop
async def test_the_last_ones() -> None:
    """So many before the newest one; of more than there are, all."""
    redis = memory(250)
    assert await extract(redis, Last(2)) == ([249, 250], "e1-250", False, True)
    assert await extract(redis, Last(0)) == ([], "e1-250", False, True)
    assert await extract(redis, Last(200), limit=3) == ([51, 52, 53], "e1-53", True, True)
    assert await extract(redis, Last(1000), limit=1) == ([1], "e1-1", True, True)


@in_loop
async def test_a_filter_reads_on_until_there_is_enough() -> None:
    """What does not pass is read, and passed by: the position is beyond it."""
    redis = Memory()
    for number in range(1, 1001):
        redis.store(payload(number, source="rare" if number % 300 == 0 else "usual"))
    rare = Filter(sources=frozenset({"rare"}))
    assert await extract(redis, wanted=rare, limit=2) == ([300, 600], "e1-600", True, True)
    assert await extract(redis, "e1-600", wanted=rare) == ([900], "e1-1000", False, True)


@in_loop
async def test_one_request_reads_no_more_than_so_many_pages() -> None:
    """Where a filter lets nothing through, the client goes on; in the end it has been everywhere."""
    redis = memory(6_000)
    none = Filter(sources=frozenset({"nobody"}))
    assert await extract(redis, wanted=none) == ([], "e1-4096", True, True)
    assert await extract(redis, "e1-4096", wanted=none) == ([], "e1-6000", False, True)


@in_loop
async def test_an_answer_is_bounded_in_bytes() -> None:
    """One event is always given, however large it is."""
    redis = memory(10)
    small = Runtime(limits=Limits(page_bytes=500))
    found = await history(redis, small).read(CHANNEL, None, EVERYTHING, 100)
    assert (len(found.payloads), found.more, str(found.position)) == (2, True, "e1-2")
    tiny = Runtime(limits=Limits(page_bytes=1))
    found = await history(redis, tiny).read(CHANNEL, None, EVERYTHING, 100)
    assert (len(found.payloads), found.more, str(found.position)) == (1, True, "e1-1")


@in_loop
async def test_what_is_missing_makes_it_incomplete() -> None:
    """Expired, deleted, no valid event, of an epoch that Redis has lost, or never given; else it is complete."""
    redis = memory(100)
    redis.trim(31)
    assert (await extract(redis, limit=1))[2:] == (True, False)
    assert await extract(redis, "e1-20", limit=1) == ([31], "e1-31", True, False)
    assert await extract(redis, "e1-30", limit=1) == ([31], "e1-31", True, True)
    assert (await extract(redis, Last(100), limit=1))[3] is False
    redis.delete(50)
    assert (await extract(redis, "e1-40"))[3] is False
    redis.shelves[CHANNEL].log[60] = INVALID
    numbers, _, _, complete = await extract(redis, "e1-50")
    assert 60 not in numbers
    assert not complete
    assert (await extract(redis, "e1-60"))[3] is True
    assert await extract(redis, "e1-900") == ([], "e1-100", False, False)
    redis.trim(101)
    assert await extract(redis, "e1-70") == ([], "e1-100", False, False)
    assert await extract(redis, "e1-100") == ([], "e1-100", False, True)


@in_loop
async def test_over_a_restart_of_redis() -> None:
    """A position of an earlier epoch goes on in the next, and is told that something may be missing."""
    redis = Memory(timed=True)
    stamped(redis, 10, 20)
    old = redis.head()
    redis.restart()
    stamped(redis, 30)
    new = redis.head()
    assert await extract(redis, str(old)) == ([3], str(new), False, False)
    assert await extract(redis) == ([1, 2, 3], str(new), False, False)
    assert await extract(redis, f"T999999999ffffff-{new.offset}") == ([], str(new), False, False)


@in_loop
async def test_a_channel_that_redis_does_not_know_has_no_events_and_begins_nowhere() -> None:
    """Asking makes no keys: anybody may ask for any name."""
    redis = Memory()
    found = await history(redis).read("events.unknown", None, EVERYTHING, 10)
    assert found == Extract([], None)
    found = await history(redis).read("events.unknown", P("e1-5"), EVERYTHING, 10)
    assert found == Extract([], None, complete=False)
    assert not redis.shelves


@in_loop
async def test_requests_are_served_in_turns_and_are_bounded() -> None:
    """One page at a time, whoever asks; of too many some are told to come back."""
    redis = memory(1000)
    reader = history(redis)
    redis.gate.clear()
    waiting = [asyncio.create_task(reader.read(CHANNEL, P("e1-0"), EVERYTHING, 10)) for _ in range(64)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(redis.pages) == 1
    with pytest.raises(Busy):
        await reader.read(CHANNEL, None, EVERYTHING, 10)
    redis.gate.set()
    assert {told(await each)[1] for each in waiting} == {"e1-10"}
    assert told(await reader.read(CHANNEL, None, EVERYTHING, 10))[1] == "e1-10"


ASKED: list[tuple[str, EventsRequest]] = [
    ("", EventsRequest(CHANNEL, None, EVERYTHING, 100)),
    ("channel=x&last=5&limit=1000&_=7", EventsRequest("x", Last(5), EVERYTHING, 1000)),
    (
        "limit=1&since=a-5&severity=info",
        EventsRequest(CHANNEL, P("a-5"), Filter(severities=frozenset({"info"})), 1),
    ),
]


@pytest.mark.parametrize(("query", "asked"), ASKED)
def test_what_is_asked_for(query: str, asked: EventsRequest) -> None:
    """The parameters of `/ws`, of one channel, and `limit`."""
    assert read_events_query(Target.parse(f"/events?{query}").query, CHANNEL) == asked


# Over HTTP

KEYS = [
    {"name": "wall", "key": "wall-key_0123456789", "subscribe": ["events.critical"]},
    {"name": "sensor", "key": "sensor-key_0123456789", "publish": ["events.*"]},
]


@pytest.fixture(scope="module")
def guarded_hub(steady_redis: RedisServer) -> Iterator[Hub]:
    variables = {
        "BROADCASTER_AUTH__MODE": "token",
        "BROADCASTER_AUTH__API_KEYS": json.dumps(KEYS),
        "BROADCASTER_HUB__ALLOWED_ORIGINS": '["https://wall.example"]',
    }
    with HubThread(steady_redis.url, None, **variables) as hub:
        yield hub.until_ready()


def publish(redis: RedisServer, channel: str, count: int) -> list[str]:
    with redis_client(redis) as client:
        numbers = range(1, count + 1)
        return [
            store_by_script(client, payload(number, source=f"s{number % 2}"), channel)[0] for number in numbers
        ]


def ask(hub: Hub, query: str = "", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=5)
    try:
        connection.request(method, f"/events{query}", headers={k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def test_events_over_http(steady_redis: RedisServer, steady_hub: Hub) -> None:
    """As they are stored, the newest last; with `next` to the end; by position, time, number and filter."""
    channel = "events.http"
    positions = publish(steady_redis, channel, 7)
    status, headers, body = ask(steady_hub, f"?channel={channel}&limit=3")
    page = json.loads(body)
    assert (status, headers["content-type"], headers["cache-control"]) == (
        200,
        "application/json",
        "private, no-cache",
    )
    assert [event["offset"] for event in page["events"]] == [1, 2, 3]
    del page["events"]
    assert page == {"channel": channel, "position": positions[2], "next": positions[2], "complete": True}
    with redis_client(steady_redis) as client:
        [[_, [_, stored]]] = client.command("XRANGE", f"{{{channel}}}:log", "1-0", "1-0")
    assert stored in body

    def offsets(query: str) -> list[int]:
        status, _, body = ask(steady_hub, f"?channel={channel}&{query}")
        assert status == 200, body
        return [event["offset"] for event in json.loads(body)["events"]]

    assert offsets(f"since={page['next']}") == [4, 5, 6, 7]
    assert offsets("last=2") == offsets("last=2&since=") == [6, 7]
    assert offsets("since=10m") == offsets("since=all") == offsets("since=2020-01-01T00:00:00Z") == [*range(1, 8)]
    assert offsets("since=2100-01-01T00:00:00Z") == []
    at = datetime.datetime.fromtimestamp(json.loads(stored)["stored_at_us"] / 1e6 + 1e-6, datetime.UTC)
    assert 1 not in offsets(f"since={at.isoformat().replace('+', '%2B')}")
    assert offsets("source=s1&limit=2") == [1, 3]
    assert offsets("type=OTHER") == []


def test_an_answer_has_a_name_for_caches(steady_redis: RedisServer, steady_hub: Hub) -> None:
    """304 as long as nothing has come; HEAD says the same without the body; OPTIONS what may be asked."""
    publish(steady_redis, "events.etag", 2)
    status, headers, body = ask(steady_hub, "?channel=events.etag")
    etag = headers["etag"]
    assert (status, int(headers["content-length"])) == (200, len(body))
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        status, headers, body = ask(steady_hub, "?channel=events.etag", If_None_Match=known)
        assert (status, headers["etag"], body) == (304, etag, b"")
    assert ask(steady_hub, "?channel=events.etag", If_None_Match='"other"')[0] == 200
    status, headers, body = ask(steady_hub, "?channel=events.etag", "HEAD")
    assert (status, headers["etag"], body) == (200, etag, b"")
    publish(steady_redis, "events.etag", 3)
    status, headers, _ = ask(steady_hub, "?channel=events.etag", If_None_Match=etag)
    assert (status, headers["etag"] != etag) == (200, True)
    status, headers, _ = ask(steady_hub, "", "OPTIONS")
    assert (status, headers["allow"]) == (204, "GET, HEAD, OPTIONS")
    assert ask(steady_hub, "", "POST")[0] == 405


WRONG: list[tuple[str, int, str]] = [
    ("?limit=0", 400, "limit is a number of events from 1 to 1000, got '0'"),
    ("?limit=1001", 400, "limit is a number"),
    ("?limit=", 400, "limit is a number"),
    ("?limit=5&limit=6", 400, "limit is given twice"),
    ("?since=yesterday", 400, "since is a position, a duration"),
    ("?since=2026-11-27T02:00:00", 400, "since is a time without its zone"),
    ("?since=1h&last=5", 400, "last is given twice for one channel, or since and last"),
    ("?last=x", 400, "last is a number of events"),
    ("?channel=a*b", 400, "channel must be"),
    ("?channel=events.a&channel=events.b", 400, "channel is given twice"),
    ("?severity=fatal", 400, "severity is one of"),
    ("?count=5", 400, "unknown query parameter 'count'"),
    ("?type=%zz", 400, "a % in the query"),
    ("?channel=other.x", 404, "no such channel here: other.x"),
]


@pytest.mark.parametrize(("query", "status", "words"), WRONG)
def test_a_wrong_query_is_answered_with_a_sentence_that_names_the_parameter(
    steady_hub: Hub, query: str, status: int, words: str
) -> None:
    """JSON, as every refusal, and counted by its cause."""
    answered, headers, body = ask(steady_hub, query)
    assert (answered, headers["content-type"]) == (status, "application/json")
    assert words in json.loads(body)["error"]


def test_who_may_not_subscribe_may_not_read(steady_redis: RedisServer, guarded_hub: Hub) -> None:
    """401 without a token that is good, 403 for another channel; the same rights as of `/ws`."""
    publish(steady_redis, CHANNEL, 1)

    def answer(query: str, token: str = "") -> tuple[int, dict[str, Any], str]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        status, head, body = ask(guarded_hub, query, **headers)
        return status, json.loads(body), head.get("www-authenticate", "")

    assert answer("") == (401, {"error": "access denied: missing"}, "Bearer")
    assert answer("", "wrong-key_0123456789") == (401, {"error": "access denied: unknown key"}, "Bearer")
    assert answer("?channel=events.b", "wall-key_0123456789")[:2] == (403, {"error": "not for you: events.b"})
    assert answer("", "sensor-key_0123456789")[:2] == (403, {"error": f"not for you: {CHANNEL}"})
    status, body, _ = answer("", "wall-key_0123456789")
    assert (status, len(body["events"]) >= 1) == (200, True)
    assert guarded_hub.stats()["refused"]["token_missing"] >= 1


def test_pages_of_other_sites_read_only_if_they_are_known(guarded_hub: Hub) -> None:
    """As the stream: an origin that is allowed gets what lets a browser show the answer, any other one a 403."""
    token = "Bearer wall-key_0123456789"
    status, headers, _ = ask(guarded_hub, "", Authorization=token, Origin="https://wall.example")
    assert (status, headers["access-control-allow-origin"]) == (200, "https://wall.example")
    status, headers, body = ask(guarded_hub, "", Authorization=token, Origin="https://evil.example")
    assert (status, "access-control-allow-origin" in headers) == (403, False)
    assert json.loads(body) == {"error": "this origin is not allowed"}
    status, headers, _ = ask(guarded_hub, "", "OPTIONS", Origin="https://wall.example")
    assert "Authorization" in headers["access-control-allow-headers"]
    assert "access-control-allow-headers" not in ask(guarded_hub, "", "OPTIONS", Origin="https://evil.example")[1]


def test_a_host_that_is_not_the_hubs_is_refused(steady_hub: Hub) -> None:
    """Without tokens a name that was made to resolve to this machine reads nothing (DNS rebinding)."""
    assert ask(steady_hub, "", Host="evil.example")[0] == 403


def test_without_history_there_are_no_stored_events(steady_redis: RedisServer) -> None:
    """404, with the reason."""
    with HubThread(steady_redis.url, BROADCASTER_HISTORY__ENABLED="false") as hub:
        hub.until_ready()
        status, _, body = ask(hub)
        assert (status, json.loads(body)["error"]) == (404, "events are not stored here (history.enabled = false)")


@in_loop
async def test_an_error_of_redis_is_passed_on() -> None:
    """It is not for the reader to try again and again: the answer is 503."""
    redis = memory(5)
    redis.errors[CHANNEL] = {"XRANGE": RedisErrorReply("WRONGTYPE no stream")}
    with pytest.raises(RedisErrorReply):
        await history(redis).read(CHANNEL, None, EVERYTHING, 10)
