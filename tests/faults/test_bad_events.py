"""What is no event on the channel: counted by its cause, never broadcast, harmless to hub and subscribers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from broadcaster.core.event import CAUSES
from broadcaster.redis.server import RedisServer
from tests.support import (
    Hub,
    HubThread,
    RawClient,
    RedisClient,
    assert_calm,
    event_payload,
    next_but_ping,
    redis_client,
)

MIB = 1 << 20


def changed(**changes: Any) -> bytes:
    return event_payload(**changes)


def with_raw(raw: bytes) -> bytes:
    """A good event with one more, hand-written member at its end."""
    return event_payload()[:-1] + b", " + raw + b"}"


BAD_EVENTS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not_json"),
    "text": (b"server-a is down", "not_json"),
    "half an event": (event_payload()[:-1], "not_json"),
    "two events": (event_payload() * 2, "not_json"),
    "NaN": (with_raw(b'"load": NaN'), "not_json"),
    "raw NUL in a field": (with_raw(b'"note": "a\0b"'), "not_json"),
    "NULs only": (b"\0" * 1000, "not_json"),
    "raw newline in a field": (with_raw(b'"note": "a\nb"'), "not_json"),
    "a byte order mark": (b"\xef\xbb\xbf" + event_payload(), "not_json"),
    "5,000 digits": (with_raw(b'"load": ' + b"9" * 5000), "not_json"),
    "a WebSocket frame": (b"\x81\x05hello", "not_utf8"),
    "a list": (b"[" + event_payload() + b"]", "not_object"),
    "null": (b"null", "not_object"),
    "an empty object": (b"{}", "field"),
    "no event_id": (changed(event_id=...), "field"),
    "sequence as text": (changed(sequence="1"), "field"),
    "sequence as bool": (changed(sequence=True), "field"),
    "published in the far future": (changed(published_at_ms=2**53), "field"),
    "a control character in source": (changed(source="a\x1b[2J"), "field"),
    "a NUL in event_type": (changed(event_type="a\0b"), "field"),
    "an unknown severity": (changed(severity="fatal"), "field"),
    "data as a list": (changed(data=[]), "field"),
    "latin-1 in a known field": (event_payload(source="serv").replace(b'"serv"', b'"serv\xe9"'), "not_utf8"),
    "latin-1 in an unknown field": (with_raw(b'"note": "caf\xe9"'), "not_utf8"),
    "an encoded surrogate": (with_raw(b'"note": "\xed\xa0\x80"'), "not_utf8"),
    "UTF-16": (event_payload().decode().encode("utf-16"), "not_utf8"),
    "a duplicate key": (with_raw(b'"sequence": 2'), "duplicate_key"),
    "a duplicate key, nested": (with_raw(b'"data": {"a": {"b": 1, "b": 2}}'), "duplicate_key"),
    "30,000 levels": (with_raw(b'"data": {"a": ' + b"[" * 30_000 + b"]" * 30_000 + b"}"), "too_deep"),
    "60,000 levels, never closed": (b"[" * 60_000, "too_deep"),
    "100,000 levels": (b"[" * 100_000 + b"]" * 100_000, "too_large"),
    "1 MB": (event_payload(data={"text": "x" * MIB}), "too_large"),
    "1 MB of nonsense": (b"\xff" * MIB, "too_large"),
    "one byte too many": (
        (padded := event_payload(data={"text": ""}))[:-3] + b"x" * (65_537 - len(padded)) + b'"}}',
        "too_large",
    ),
}


class Scene(NamedTuple):
    """A hub with two subscribers, and somebody who publishes."""

    hub: Hub
    publish: RedisClient
    plain: RawClient
    v1: RawClient


@pytest.fixture(scope="module")
def house() -> Iterator[tuple[Hub, RedisClient]]:
    """One hub for all tests of this file: whatever they publish must not harm it."""
    with RedisServer.start() as server, redis_client(server) as publish, HubThread(server.url) as hub:
        yield hub.until_ready(), publish


@pytest.fixture
def scene(house: tuple[Hub, RedisClient]) -> Iterator[Scene]:
    """Two new subscribers of it, who are still there when the test is over."""
    hub, publish = house
    hub.until_connected(0)
    reconnects, said = hub.stats()["redis_reconnects"], len(hub.lines)
    with RawClient(hub.port) as plain, RawClient(hub.port, subprotocol="broadcaster.v1") as v1:
        assert v1.event()["control"] == "welcome"
        hub.until_connected(2)
        yield Scene(hub, publish, plain, v1)
        assert hub.stats()["connected"] == 2
        assert hub.stats()["redis_reconnects"] == reconnects
        assert_calm(hub, said)


def next_text(client: RawClient) -> bytes:
    """The next frame that is no ping and no beat; it has to be an event."""
    while b'{"control": "beat"' in (frame := next_but_ping(client))[1][:20]:
        pass
    opcode, payload = frame
    assert opcode == 1
    return payload


def assert_only(scene: Scene, *payloads: bytes) -> None:
    """Both subscribers get exactly these events next."""
    for client in (scene.plain, scene.v1):
        assert [next_text(client) for _ in payloads] == list(payloads)


@pytest.mark.parametrize(("payload", "cause"), BAD_EVENTS.values(), ids=BAD_EVENTS.keys())
def test_what_is_no_event_is_counted_and_not_broadcast(scene: Scene, payload: bytes, cause: str) -> None:
    """It raises the counter of its cause by one and nothing else; the next good event is the next frame."""
    before = scene.hub.stats()
    assert scene.publish.publish(payload) == 1
    good = event_payload(9)
    assert scene.publish.publish(good) == 1
    assert_only(scene, good)
    after = scene.hub.stats()
    assert after["invalid"] == before["invalid"] | {cause: before["invalid"][cause] + 1}
    assert after["events_received"] == before["events_received"] + 1
    assert after["deliveries"] == before["deliveries"] + 2
    assert after["connected"] == 2


NESTINGS = {"arrays": (b"[", b"]"), "objects": (b'{"a":', b"}")}


@pytest.mark.parametrize(("before", "after"), NESTINGS.values(), ids=NESTINGS.keys())
def test_no_depth_of_nesting_harms_the_hub(scene: Scene, before: bytes, after: bytes) -> None:
    """Every depth up to 1,600 is either broadcast or counted as too deep, and nothing else happens."""
    earlier = scene.hub.stats()
    for depth in range(900, 1600):
        assert scene.publish.publish(with_raw(b'"x": ' + before * depth + b"1" + after * depth)) == 1
    good = event_payload(1)
    assert scene.publish.publish(good) == 1
    while next_text(scene.plain) != good:
        pass
    later = scene.hub.stats()
    too_deep = later["invalid"]["too_deep"] - earlier["invalid"]["too_deep"]
    assert too_deep > 0
    assert too_deep + later["events_received"] - earlier["events_received"] == 701


def test_the_largest_event_that_is_allowed_passes(scene: Scene) -> None:
    """Exactly 64 KiB are an event."""
    empty = event_payload(data={"text": ""})
    payload = empty[:-3] + b"x" * (65_536 - len(empty)) + b'"}}'
    assert len(payload) == 65_536
    scene.publish.publish(payload)
    assert_only(scene, payload)


def test_strange_but_right_events_pass_untouched(scene: Scene) -> None:
    """What only looks like trouble is an event: escapes, unknown fields, deep but readable data."""
    payloads = [
        with_raw(rb'"note": "\u0000 \ud83d\udd25 \u2028"'),
        with_raw(b'"control": "gap"'),
        with_raw(b'"data": {"a": ' + b"[" * 200 + b"]" * 200 + b"}"),
        with_raw(b'"load": -1.5E-300'),
        b"\r\n\t " + event_payload() + b" ",
    ]
    for payload in payloads:
        scene.publish.publish(payload)
    assert_only(scene, *payloads)


def test_good_events_within_a_flood_of_bad_ones_arrive(scene: Scene) -> None:
    """Thousands of bad events, mixed with good ones: every good one arrives, in order, every bad one counts."""
    before = sum(scene.hub.stats()["invalid"].values())
    causes = [payload for payload, _ in BAD_EVENTS.values() if len(payload) < 10_000]
    good = [event_payload(number) for number in range(60)]
    for payload in good:
        for bad in causes:
            scene.publish.publish(bad)
        scene.publish.publish(payload)
    assert_only(scene, *good)
    stats = scene.hub.stats()
    assert sum(stats["invalid"].values()) == before + 60 * len(causes)
    assert set(stats["invalid"]) == set(CAUSES)


def test_a_flood_of_bad_events_is_no_flood_of_lines(scene: Scene) -> None:
    """Refusals are logged at most once a minute and cause, in short lines without control characters."""
    started = time.monotonic()
    for _ in range(500):
        scene.publish.publish(changed(source="\x1b[2J" + "x" * 5000))
        scene.publish.publish(changed(event_type="a\nb\r\n" * 100))
    good = event_payload(1)
    scene.publish.publish(good)
    assert_only(scene, good)
    lines = [line for line in scene.hub.lines if line.startswith("refused: ")]
    assert 1 <= len(lines) <= len(CAUSES) * (1 + (time.monotonic() - started) // 60 + 1)
    for line in lines:
        assert len(line) < 300
        assert line.isprintable()


def test_an_event_on_another_channel_is_not_ours(scene: Scene) -> None:
    """Neither broadcast nor counted: nobody here listens there."""
    before = scene.hub.stats()
    assert scene.publish.publish(event_payload(), channel="events.other") == 0
    assert scene.publish.publish(b"nonsense", channel="events.critical.not") == 0
    good = event_payload(1)
    scene.publish.publish(good)
    assert_only(scene, good)
    assert scene.hub.stats()["invalid"] == before["invalid"]
    assert scene.hub.stats()["events_received"] == before["events_received"] + 1


def test_a_limit_of_ones_own_holds(redis: RedisServer, publish: RedisClient) -> None:
    """With event.max_bytes = 256, 256 bytes pass and 257 are too large."""

    def of(size: int) -> bytes:
        padding = size - len(event_payload(source=""))
        return event_payload(source="x" * padding)

    with (
        HubThread(redis.url, BROADCASTER_EVENT__MAX_BYTES="256") as hub,
        RawClient(hub.until_ready().port) as client,
    ):
        hub.until_connected(1)
        publish.publish(of(257))
        fits = of(256)
        publish.publish(fits)
        assert client.text().encode() == fits
        assert hub.stats()["invalid"]["too_large"] == 1
