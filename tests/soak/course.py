"""One soak: a real Redis, a real hub, events, those who stay, and those who come and go."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import uvloop

from broadcaster import Event, Publisher, Subscriber
from broadcaster.redis.server import RedisServer
from broadcaster.settings import HistoryTable
from tests.faults.ledger import settings_for
from tests.soak.guests import GUESTS, SEVERITIES, Books, Town, severity_at, stay
from tests.soak.verdict import Sample, Soak
from tests.support import UNIT_S, HubProcess, memory_bytes

EVENTS_PER_S: Final = 50
CONNECTS_PER_S: Final = sum(rate for rate, _ in GUESTS.values())

STORED: Final = 8704
"""Events that are published and read before anything is measured: every buffer is full then, and stays full."""

HISTORY: Final = HistoryTable(max_events=8000)

HUB: Final[dict[str, Any]] = {
    "BROADCASTER_HISTORY__MAX_EVENTS": str(HISTORY.max_events),
    "BROADCASTER_CHANNELS__LINGER_S": "0.5",
    "BROADCASTER_HUB__RING_BYTES": str(2**20),
    "BROADCASTER_HUB__BEHIND_MAX_MS": "3000",
    "BROADCASTER_HUB__HANDSHAKE_TIMEOUT_S": "3",  # the guests share a process, and may be late themselves
    "BROADCASTER_HUB__CLOSE_TIMEOUT_S": "0.5",
    "BROADCASTER_HUB__BEAT_INTERVAL_S": "0.5",
    "BROADCASTER_HUB__PING_INTERVAL_S": "5",
}
"""Small and hasty, so that every buffer is full and every deadline is met in little time."""


class Press:
    """Publishes through the product's publisher; the severity of an event is known by its offset."""

    def __init__(self, publisher: Publisher, town: Town) -> None:
        self._publisher = publisher
        self._town = town

    async def fill(self) -> None:
        """Fill the log."""
        while self._town.position < STORED:
            first = self._town.position + 1
            drafts = [
                self._publisher.draft("SERVER_DOWN", "server-a", severity=severity_at(first + n), data=_data())
                for n in range(512)
            ]
            for published in await self._publisher.publish_all(drafts):
                self._enter(published.event)

    async def run(self) -> None:
        """Publish at a rate until everybody leaves."""
        loop = asyncio.get_running_loop()
        begin, count = loop.time(), 0
        while not self._town.leaving.is_set():
            severity = severity_at(self._town.position + 1)
            published = await self._publisher.publish("SERVER_DOWN", "server-a", severity=severity, data=_data())
            self._enter(published.event)
            count += 1
            await asyncio.sleep(max(0.0, begin + count / EVENTS_PER_S - loop.time()))

    def _enter(self, event: Event) -> None:
        assert event.position is not None
        assert event.position.offset == self._town.position + 1, "somebody else has published"
        self._town.position = event.position.offset
        self._town.epoch = event.position.epoch


def _data() -> dict[str, str]:
    return {"pad": "x" * random.randrange(100, 900)}


class Stayers:
    """Clients of all kinds that are there from the start to the end."""

    def __init__(self, town: Town, redis_url: str) -> None:
        self._first = town.position + 1
        self._books: dict[str, Books] = {}
        self._works: list[asyncio.Task[None]] = []
        self._library = 0
        for number in range(3):
            self._stay(town, f"plain {number}", "", "", "")
            self._stay(town, f"v1 {number}", "", "broadcaster.v1", "")
        for severity in SEVERITIES:
            self._stay(town, severity, f"?severity={severity}", "broadcaster.v1", severity)
        self._works.append(asyncio.create_task(self._use_library(town, redis_url)))
        self.count = len(self._works)

    def _stay(self, town: Town, name: str, query: str, subprotocol: str, severity: str) -> None:
        books = self._books[name] = Books(severity, self._first - 1)
        self._works.append(asyncio.create_task(stay(town, query, subprotocol, books)))

    async def _use_library(self, town: Town, redis_url: str) -> None:
        settings = settings_for(redis_url)
        async with Subscriber(f"ws://127.0.0.1:{town.port}/ws", settings=settings) as subscriber:
            async for _ in subscriber:
                self._library += 1
                if subscriber.gaps or subscriber.missing or subscriber.reconnects or subscriber.twins:
                    town.complaints.append("the library saw a gap, a twin or the end of its connection")
                    return

    def _given(self, last: int) -> dict[str, int]:
        """How many events each was given; of those who filter, what it does not want is as good as given."""
        given = {"the library": self._library}
        for name, books in self._books.items():
            held_back = sum(not books.wants(offset) for offset in range(self._first, last + 1))
            given[name] = books.given + held_back
        return given

    async def finish(self, last: int) -> dict[str, int]:
        """Wait, for some time, until everybody has everything, and leave; how many events each was given."""
        deadline = asyncio.get_running_loop().time() + 10 * UNIT_S
        while set(self._given(last).values()) != {last - self._first + 1}:
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.05)
        for work in self._works:
            work.cancel()
        await asyncio.gather(*self._works, return_exceptions=True)
        return self._given(last)


class Measure:
    """Looks at the hub."""

    def __init__(self, hub: HubProcess, town: Town) -> None:
        self._hub = hub
        self._town = town
        self._begin_s = asyncio.get_running_loop().time()

    def files(self) -> int:
        return len(list(Path(f"/proc/{self._hub.process.pid}/fd").iterdir()))

    async def sample(self) -> Sample:
        stats = await asyncio.to_thread(self._hub.stats)
        return Sample(
            at_s=asyncio.get_running_loop().time() - self._begin_s,
            memory=memory_bytes(self._hub),
            files=self.files(),
            connected=stats["connected"],
            events=stats["events_received"],
            deliveries=stats["deliveries"],
            connects=self._town.connects,
        )


async def _connected(hub: HubProcess, count: int) -> int:
    """Wait, for some time, until so many are connected; how many are."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + 10 * UNIT_S
    while True:
        connected: int = (await asyncio.to_thread(hub.stats)).get("connected", -1)
        if connected == count or loop.time() > deadline:
            return connected
        await asyncio.sleep(0.05)


async def _churn(town: Town) -> None:
    """Let guests come until everybody leaves, one of each kind first; wait for the last."""
    loop = asyncio.get_running_loop()
    kinds, weights = list(GUESTS), [rate for rate, _ in GUESTS.values()]
    begin, count = loop.time(), 0
    async with asyncio.TaskGroup() as guests:
        while not town.leaving.is_set():
            kind = kinds[count] if count < len(kinds) else random.choices(kinds, weights)[0]
            guests.create_task(town.come(kind))
            count += 1
            await asyncio.sleep(max(0.0, begin + count / CONNECTS_PER_S - loop.time()))


async def _fill(town: Town, press: Press) -> None:
    """Fill the log, the ring and the pages that are kept."""
    await press.fill()
    since = town.position - HISTORY.max_events
    async with town.subscribed(f"?since={town.epoch}-{since}") as reader:
        books = Books(last=since)
        while books.last != town.position:
            books.read(await reader.recv(decode=False))


async def _run(redis_url: str, hub: HubProcess, duration_s: float, say: Callable[[str], None]) -> Soak:
    soak = Soak()
    town = Town(hub.port)
    async with Publisher(settings_for(redis_url, history=HISTORY)) as publisher:
        press = Press(publisher, town)
        await _fill(town, press)
        await _connected(hub, 0)
        measure = Measure(hub, town)
        soak.files_before = measure.files()
        stayers = Stayers(town, redis_url)
        first = town.position
        await _connected(hub, stayers.count)
        tasks = [asyncio.create_task(press.run()), asyncio.create_task(_churn(town))]
        step_s = min(10.0, duration_s / 20)
        for _ in range(round(duration_s / step_s)):
            await asyncio.sleep(step_s)
            soak.samples.append(await measure.sample())
            say(str(soak.samples[-1]))
        town.leaving.set()
        await asyncio.gather(*tasks)
        soak.published = town.position - first
        soak.stayers = await stayers.finish(town.position)
    soak.left = await _connected(hub, 0)
    soak.files_after = measure.files()
    stats = await asyncio.to_thread(hub.stats)
    soak.ready = (await asyncio.to_thread(hub.get, "/health/ready"))[0] == 200
    soak.ended = dict(town.ended) | {"closed as too slow": stats["slow_closed"], "cut": stats["aborted"]}
    soak.ended |= {"closed as a talker": stats["talkers_closed"], "shown out": stats["refused"]["too_late"]}
    soak.complaints = town.complaints
    return soak


def run(duration_s: float, say: Callable[[str], None] = print) -> Soak:
    """Soak a hub.

    Args:
        duration_s: How long guests come and go.
        say: Told one line per sample.
    """
    with RedisServer.start() as redis, HubProcess(redis.url, **HUB) as hub:
        hub.until_ready()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            soak = runner.run(_run(redis.url, hub, duration_s, say))
        hub.signal(signal.SIGTERM)
        soak.exit_code = hub.wait()
        soak.output = hub.lines
    return soak
