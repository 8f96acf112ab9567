"""A slow subscriber on real sockets: it loses the oldest and is told of each, or is closed and loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from broadcaster import Publisher, wire
from broadcaster.publish.publisher import Published
from broadcaster.redis.server import RedisServer
from broadcaster.settings import SubscriberTable
from tests.faults.ledger import Entry, Ledger, Library, Reader, settings_for
from tests.support import (
    Frame,
    Hub,
    HubProcess,
    HubThread,
    RawClient,
    assert_calm,
    eventually,
    frames_from,
    memory_bytes,
)

MIB = 1 << 20
SMALL = 4096
"""Receive buffer of a client that is to be slow, in bytes."""

CHANNEL = "events.critical"
SEVERITIES = ("info", "warning", "critical")
SIZE = 2000
EVENTS = 5000
"""So many of that size are several times what the kernel and the ring hold together."""

TIGHT: dict[str, Any] = {
    "BROADCASTER_HUB__RING_BYTES": str(MIB),
    "BROADCASTER_HUB__BEHIND_MAX_BYTES": str(MIB),
    "BROADCASTER_HUB__BEHIND_MAX_MS": "60000",
}
DROPS = TIGHT | {"BROADCASTER_CHANNELS__DROP_OLDEST": '["events.*"]'}


class Flood:
    """Events of all severities, stored and published by the product's own publisher."""

    def __init__(self, runner: asyncio.Runner, publisher: Publisher) -> None:
        self._runner = runner
        self._publisher = publisher
        self.published: list[Published] = []

    def batch(self, count: int = 100) -> None:
        """Publish so many at once, and wait until Redis has taken them."""
        first = len(self.published)
        drafts = [
            self._publisher.draft("LOAD", "server-a", severity=SEVERITIES[number % 3], data={"pad": "x" * SIZE})
            for number in range(first, first + count)
        ]
        self.published += self._runner.run(self._publisher.publish_all(drafts))

    def at_the_pace_of(self, *counts: Callable[[], int], events: int = EVENTS) -> Iterator[None]:
        """Publish so many; everybody whose count is given has each batch before the next; yields after each."""
        end = len(self.published) + events
        while len(self.published) < end:
            self.batch()
            for count in counts:
                eventually(lambda count=count: count() >= len(self.published), "a reader is held up", 20)  # type: ignore[misc]
            yield

    @property
    def offsets(self) -> list[int]:
        return [one.position.offset for one in self.published if one.position is not None]

    @property
    def entries(self) -> list[Entry]:
        """The same for the ledger."""
        events = [(one.event, one.position) for one in self.published]
        return [Entry(event.source, event.sequence, event.event_id, 0.0, place) for event, place in events]


@contextlib.contextmanager
def flooding(redis: RedisServer) -> Iterator[Flood]:
    publisher = Publisher(settings_for(redis.url))
    with asyncio.Runner() as runner:
        runner.run(publisher.__aenter__())
        try:
            yield Flood(runner, publisher)
        finally:
            runner.run(publisher.__aexit__(None, None, None))


class Tap:
    """Reads one client in a thread, fast or slowly, and understands nothing before it is asked."""

    def __init__(self, client: RawClient, *, slow: bool = False) -> None:
        self.slow = slow
        self._client = client
        self._bytes = bytearray(client._buffer)
        self._read = 0  # how many of the bytes are in `frames`
        self._frames: list[Frame] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self._client.socket.settimeout(0.05)
        while not self._stop.is_set():
            try:
                if not (more := self._client.socket.recv(SMALL if self.slow else MIB)):
                    return
            except TimeoutError:
                continue
            self._bytes += more
            if self.slow:
                time.sleep(0.01)

    @property
    def frames(self) -> list[Frame]:
        more, self._read = frames_from(self._bytes, self._read)
        self._frames += more
        return self._frames

    def controls(self, kind: str) -> list[dict[str, Any]]:
        found = [wire.read_control(payload) for opcode, payload in self.frames if opcode == 1]
        return [control for control in found if control and control["control"] == kind]

    @property
    def story(self) -> list[int | tuple[int, int]]:
        """Offsets that it was given, and ranges that it was told of, in order."""
        story: list[int | tuple[int, int]] = []
        for opcode, payload in self.frames:
            control = wire.read_control(payload) if opcode == 1 else {}
            if control is None:
                story.append(json.loads(payload)["offset"])
            elif control.get("control") == "gap":
                assert control["cause"] == "shed"
                story.append((control["first"], control["last"]))
        return story

    @property
    def offsets(self) -> list[int]:
        """All that it was given or told of, in order."""
        return [
            n for word in self.story for n in ([word] if isinstance(word, int) else range(word[0], word[1] + 1))
        ]

    def count(self) -> int:
        """How many events it was given."""
        return sum(opcode == 1 and not wire.read_control(payload) for opcode, payload in self.frames)

    def __enter__(self) -> Tap:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


def slow_client(hub: Hub, *, v1: bool = True) -> RawClient:
    return RawClient(hub.port, subprotocol="broadcaster.v1" if v1 else "", receive_buffer=SMALL)


def of_channel(hub: Hub) -> dict[str, Any]:
    statistics: dict[str, Any] = hub.stats()["channels"][CHANNEL]
    return statistics


def test_a_slow_one_stays_loses_the_oldest_and_is_told_of_each(redis: RedisServer) -> None:
    """Whatever it was not given it was told, in order; the others lose nothing, and the hub does not grow."""
    with (
        HubProcess(redis.url, **DROPS, BROADCASTER_HUB__CLOSE_TIMEOUT_S="20") as hub,
        slow_client(hub.until_ready()) as client,
        slow_client(hub, v1=False) as plain,
        RawClient(hub.port, subprotocol="broadcaster.v1") as first,
        RawClient(hub.port) as second,
        Tap(client, slow=True) as slow,
        Tap(first) as quick,
        Tap(second) as quick_plain,
        flooding(redis) as flood,
    ):
        hub.until_connected(4)
        for _ in flood.at_the_pace_of(quick.count, quick_plain.count, events=1000):
            pass
        before = most = memory_bytes(hub)
        for _ in flood.at_the_pace_of(quick.count, quick_plain.count, events=EVENTS - 1000):
            most = max(most, memory_bytes(hub))
        assert most - before < MIB + 10 * MIB
        slow.slow = False
        eventually(lambda: slow.offsets[-1:] == flood.offsets[-1:], "it does not catch up", 20)
        assert slow.offsets == flood.offsets
        assert quick.offsets == quick_plain.offsets == flood.offsets
        assert quick.controls("gap") == quick_plain.controls("gap") == []
        gaps = slow.controls("gap")
        assert [gap["position"] for gap in gaps] == [f"{gap['epoch']}-{gap['last']}" for gap in gaps]
        assert slow.controls("lag")
        lost = len(flood.offsets) - slow.count()
        channel = of_channel(hub)
        assert sum(channel["shed"].values()) == lost == hub.stats()["shed"] > 0
        assert channel["gaps"] == {"shed": len(gaps)}
        assert channel["shed"]["info"] > 0
        assert channel["shed"].get("critical", 0) == 0
        eventually(lambda: hub.stats()["slow_closed"] == 1, "the plain one is not closed")
        eventually(lambda: hub.stats()["behind"] == 0, "it is not live again")
        flood.batch(3)
        eventually(lambda: slow.offsets == flood.offsets, "it gets nothing any more")
        stats = hub.stats()
        assert (stats["slow_closed"], stats["ping_timeouts"]) == (1, 0)
        assert plain.close_code() == 4008
        assert_calm(hub)


def test_beats_of_a_slow_one_are_never_ahead(redis: RedisServer) -> None:
    """What a beat says was sent or told before it, frame by frame."""
    with (
        HubThread(redis.url, **DROPS, BROADCASTER_HUB__BEAT_INTERVAL_S="0.1") as hub,
        slow_client(hub.until_ready()) as client,
        RawClient(hub.port) as other,
        Tap(client, slow=True) as slow,
        Tap(other) as quick,
        flooding(redis) as flood,
    ):
        hub.until_connected(2)
        for _ in flood.at_the_pace_of(quick.count, events=3000):
            pass
        slow.slow = False
        eventually(lambda: slow.offsets == flood.offsets, "it does not catch up", 20)
        seen = len(slow.controls("beat"))
        eventually(lambda: len(slow.controls("beat")) > seen, "no beat")
        at = 0
        for opcode, payload in list(slow.frames):
            control = wire.read_control(payload) if opcode == 1 else {}
            if control is None:
                at = json.loads(payload)["offset"]
            elif control.get("control") in ("gap", "beat"):
                place = int(control["position"].rpartition("-")[2])
                assert place == at or (control["control"] == "gap" and place > at), control
                at = place
        assert at == flood.offsets[-1]
        assert slow.controls("gap")


def test_one_that_stops_for_good_is_ended(redis: RedisServer) -> None:
    """Where being slow is no reason to close, reading nothing for a round of pings is; it is told why."""
    with (
        HubThread(
            redis.url,
            **DROPS,
            BROADCASTER_HUB__PING_INTERVAL_S="1",
            BROADCASTER_HUB__CLOSE_TIMEOUT_S="20",
        ) as hub,
        slow_client(hub.until_ready()) as stopped,
        flooding(redis) as flood,
    ):
        hub.until_connected(1)
        while hub.stats()["behind"] == 0:
            assert len(flood.published) < 2 * EVENTS, "it does not fall behind"
            flood.batch(500)
        eventually(lambda: hub.stats()["ping_timeouts"] == 1, "it is not ended", 5)
        assert hub.stats()["behind"] == 0
        assert stopped.close_code() == 1011
        assert b"nothing is read" in stopped.frames[-1][1]
        assert hub.stats()["slow_closed"] == 0
        assert_calm(hub)


def paced(slow: Reader, quick: Reader, flood: Flood, ledger: Ledger) -> None:
    """A flood at the pace of one subscriber, while the other stands still; then both get to its end."""
    flood.batch(1)
    eventually(lambda: len(slow.got) == len(quick.got) == 1, "nothing comes")
    ledger.pause(slow)
    for _ in flood.at_the_pace_of(lambda: len(quick.got)):
        pass


def until_the_end(flood: Flood, *readers: Reader) -> None:
    last = flood.published[-1].event.event_id
    for reader in readers:
        eventually(lambda reader=reader: reader.got[-1].event_id == last, f"{reader.name} is behind", 20)  # type: ignore[misc]


def test_the_subscriber_says_what_it_has_lost(redis: RedisServer) -> None:
    """The client library, standing still for a while: each event is delivered or in a gap, in its place."""
    with HubThread(redis.url, **DROPS) as hub, Ledger() as ledger, flooding(redis) as flood:
        hub.until_ready()
        settings = settings_for(redis.url, subscriber=SubscriberTable(queue_events=16, reconnect_max_s=0.2))
        slow, quick = Library("slow", hub.url, settings), Library("quick", hub.url, settings)
        ledger.subscribe(slow, quick)
        hub.until_connected(2)
        paced(slow, quick, flood, ledger)
        ledger.pause(slow, pause=False)
        until_the_end(flood, slow, quick)
        ledger.more_entries = flood.entries
        of_slow, of_quick = ledger.close("too slow, the oldest are dropped")
        assert of_slow.told > 0
        assert (of_quick.told, of_quick.delivered) == (0, len(flood.published))
        assert {gap.cause for gap in slow.gaps} == {"shed"}
        channel = of_channel(hub)
        assert sum(channel["shed"].values()) == of_slow.told
        assert channel["gaps"] == {"shed": len(slow.gaps)}
        assert (channel["resumed"], hub.stats()["slow_closed"]) == (0, 0)
        assert_calm(hub)


def test_elsewhere_a_slow_one_is_warned_closed_and_loses_nothing(redis: RedisServer) -> None:
    """`lag`, then 4008 that says by how much; who comes back with its position gets everything it had not read."""
    with (
        HubThread(redis.url, **TIGHT, BROADCASTER_HUB__CLOSE_TIMEOUT_S="20") as hub,
        slow_client(hub.until_ready()) as raw,
        Ledger() as ledger,
        flooding(redis) as flood,
    ):
        settings = settings_for(redis.url, subscriber=SubscriberTable(queue_events=16, reconnect_max_s=0.2))
        slow, quick = Library("slow", hub.url, settings), Library("quick", hub.url, settings)
        ledger.subscribe(slow, quick)
        hub.until_connected(3)
        paced(slow, quick, flood, ledger)
        eventually(lambda: hub.stats()["slow_closed"] == 2, f"not closed: {hub.stats()}")
        assert raw.close_code() == 4008
        kinds = Counter[str]()
        given: list[int] = []
        for opcode, payload in raw.frames[:-1]:
            control = wire.read_control(payload) if opcode == 1 else {}
            if control is None:
                given.append(json.loads(payload)["offset"])
            elif opcode == 1:
                kinds[control["control"]] += 1
        assert given == flood.offsets[: len(given)]
        assert kinds["lag"] >= 1
        assert set(kinds) <= {"welcome", "beat", "lag"}
        assert re.fullmatch(rb"too slow: \d+ events, \d+ bytes, \d+ ms behind", raw.frames[-1][1][2:])
        ledger.pause(slow, pause=False)
        until_the_end(flood, slow, quick)
        ledger.more_entries = flood.entries
        accounts = ledger.close("too slow, and closed")
        assert [(one.told, one.delivered) for one in accounts] == [(0, len(flood.published))] * 2
        assert slow.gaps == quick.gaps == []
        channel = of_channel(hub)
        assert (channel["resumed"], channel["resumed_whole"], channel["shed"]) == (1, 1, {})
        assert hub.stats()["slow_closed"] == 2
        assert_calm(hub)
