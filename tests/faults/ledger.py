"""The ledger of the fault tests: what was published, what each subscriber got or was told, and if that is all.

Publishers and subscribers run in an event loop of their own, in a thread, so that a test reads as a story: begin,
break something, repair it, and let the books be closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import uvloop
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.typing import Subprotocol

from broadcaster import Event, Fresh, Gap, Position, Publisher, Settings, Stale, Subscriber, Unavailable
from broadcaster.core.event import decode
from broadcaster.publish.publisher import Sent
from broadcaster.settings import EventTable, HistoryTable, HubTable, PublisherTable, RedisTable, SubscriberTable
from broadcaster.wire import read_control
from tests.support import UNIT_S, Proxy, eventually, opened_by_library

T = TypeVar("T")


def settings_for(redis_url: str, **changes: Any) -> Settings:
    """Settings of the ledger's publishers and subscribers; `changes` replace tables."""
    tables: dict[str, Any] = {
        "event": EventTable(),
        "redis": RedisTable(url=redis_url, reconnect_max_s=0.2),
        "history": HistoryTable(),
        "hub": HubTable(),
        "publisher": PublisherTable(),
        "subscriber": SubscriberTable(connect_timeout_s=2.0, reconnect_max_s=0.2),
    }
    return Settings.model_construct(**tables | changes)


# What is written down


@dataclass(slots=True)
class Entry:
    """One event that was to be published.

    Attributes:
        source, sequence, event_id: Of the event.
        position: What the publisher was answered; None before that, or with an error.
        error: Why it is not known whether it was published.
        at: When it was sent; monotonic seconds.
    """

    source: str
    sequence: int
    event_id: str
    at: float
    position: Position | None = None
    error: str | None = None


class Got(NamedTuple):
    """One delivery."""

    event_id: str
    source: str
    sequence: int
    position: Position | None

    @classmethod
    def of(cls, event: Event) -> Got:
        return cls(event.event_id, event.source, event.sequence, event.position)


Item = Got | Gap | str
"""What a subscriber is given: an event, a gap, or `stale`, `fresh`, `connected`, `close 4009`."""


class Note(NamedTuple):
    """An item, and when it came (monotonic seconds)."""

    at: float
    item: Item


# Publishers


class Sender:
    """Publishes at a rate, whatever happens; nothing waits for the answer to anything else."""

    def __init__(self, settings: Settings, rate_hz: float, source: str, data: Mapping[str, Any] | None) -> None:
        self._settings = settings
        self._rate_hz = rate_hz
        self._source = source
        self._data = data
        self._stopped = False
        self.entries: list[Entry] = []

    async def run(self) -> None:
        """Publish until `stop`, then wait for every answer."""
        loop = asyncio.get_running_loop()
        answers: list[asyncio.Task[None]] = []
        async with Publisher(self._settings) as publisher, _cancelled_at_the_end(answers):
            begin = loop.time()
            while not self._stopped:
                draft = publisher.draft("SERVER_DOWN", self._source, data=self._data)
                event = draft.unpublished
                entry = Entry(self._source, event.sequence, event.event_id, time.monotonic())
                self.entries.append(entry)
                answers.append(asyncio.create_task(self._settle(publisher, publisher.send([draft]), entry)))
                await asyncio.sleep(max(0.0, begin + len(self.entries) / self._rate_hz - loop.time()))
            await asyncio.gather(*answers)

    async def burst(self, count: int, data: Mapping[str, Any]) -> None:
        """Publish so many as fast as Redis takes them."""
        async with Publisher(self._settings) as publisher:
            for start in range(0, count, 500):
                numbers = range(start, min(start + 500, count))
                drafts = [publisher.draft("SERVER_DOWN", self._source, data=data) for _ in numbers]
                for published in await publisher.publish_all(drafts):
                    event = published.event
                    self.entries.append(
                        Entry(self._source, event.sequence, event.event_id, time.monotonic(), published.position)
                    )

    async def _settle(self, publisher: Publisher, sent: Sent, entry: Entry) -> None:
        try:
            [published] = await publisher.settle(sent)
        except Unavailable as error:
            entry.error = str(error)
        else:
            entry.position, entry.error = published.position, published.error

    def stop(self) -> None:
        self._stopped = True


@contextlib.asynccontextmanager
async def _cancelled_at_the_end(tasks: list[asyncio.Task[None]]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# Subscribers


class Reader:
    """A subscriber that writes down everything; it can be paused, sent away, and called back."""

    keeps_ids = False

    def __init__(self, name: str, url: str, since: str = "") -> None:
        self.name = name
        self.url = url
        self.since = since
        self.notes: list[Note] = []
        self.first_entry = 0
        self.reading = asyncio.Event()
        self.reading.set()

    def note(self, item: Item) -> None:
        self.notes.append(Note(time.monotonic(), item))

    @property
    def items(self) -> list[Item]:
        return [note.item for note in list(self.notes)]

    @property
    def got(self) -> list[Got]:
        return [item for item in self.items if isinstance(item, Got)]

    @property
    def gaps(self) -> list[Gap]:
        return [item for item in self.items if isinstance(item, Gap)]

    def has(self, *words: str) -> bool:
        items = self.items
        return all(word in items for word in words)

    async def run(self) -> None:
        raise NotImplementedError


class Library(Reader):
    """The product's own `Subscriber`, which drops what comes again."""

    keeps_ids = True

    def __init__(self, name: str, url: str, settings: Settings, since: str = "", **options: Any) -> None:
        super().__init__(name, url, since)
        self._settings = settings
        self._options = options

    async def run(self) -> None:
        since = Position.parse(self.since) if self.since else None
        async with Subscriber(self.url, settings=self._settings, since=since, **self._options) as subscriber:
            try:
                while True:
                    await self.reading.wait()
                    notice = await subscriber.receive()
                    if isinstance(notice, Event):
                        self.note(Got.of(notice))
                    elif isinstance(notice, Gap):
                        self.note(notice)
                    elif notice is not None:
                        self.note({Stale: "stale", Fresh: "fresh"}[type(notice)])
            finally:
                self.since = str(subscriber.position or "")


class Raw(Reader):
    """Somebody else's client: does what the contract says and nothing more; speaks `broadcaster.v1` or not."""

    def __init__(self, name: str, url: str, since: str = "", *, v1: bool = True) -> None:
        super().__init__(name, url, since)
        self._v1 = v1

    async def run(self) -> None:
        while True:
            query = f"?since={self.since}" if self.since else ""
            names = [Subprotocol("broadcaster.v1")] if self._v1 else None
            with contextlib.suppress(OSError, TimeoutError, InvalidHandshake):
                await self._listen(self.url + query, names)
            await asyncio.sleep(0.05)

    async def _listen(self, url: str, names: list[Subprotocol] | None) -> None:
        options: dict[str, Any] = {"max_queue": 1024, "ping_interval": 0.5, "ping_timeout": 4}
        async with await opened_by_library(
            url, subprotocols=names, open_timeout=2, close_timeout=0.5, **options
        ) as ws:
            self.note("connected")
            try:
                while True:
                    await self.reading.wait()
                    self._read(await ws.recv(decode=False))
            except ConnectionClosed as error:
                code = error.rcvd.code if error.rcvd else 1006
                self.note(f"close {code}")
                if code == 4009:
                    self.since = ""

    def _read(self, message: bytes) -> None:
        control = read_control(message)
        if control is None:
            event = decode(message)
            self.note(Got.of(event))
            self.since = str(event.position or self.since)
        elif control["control"] == "gap":
            self.note(Gap.from_fields(control))
            self.since = control["position"] or ""
        elif control["control"] in ("welcome", "beat"):
            self.since = control["position"] or ""


# Links


class Wire:
    """A TCP link in which things go wrong, as a test commands it."""

    def __init__(self, target_port: int) -> None:
        self._proxy = Proxy(target_port)
        self.port = self._proxy.port

    @property
    def target_port(self) -> int:
        return self._proxy.target_port

    @target_port.setter
    def target_port(self, port: int) -> None:
        self._proxy.target_port = port

    async def start(self) -> None:
        self._proxy.__enter__()

    async def stop(self) -> None:
        self._proxy.__exit__(None, None, None)

    async def cut(self) -> None:
        self._proxy.cut()

    async def swallow(self) -> None:
        self._proxy.swallow()


# The reckoning


@dataclass
class Account:
    """One subscriber's part: every event was delivered once and in order, or told as missing.

    Attributes:
        delivered, told: Events delivered; events not delivered, and told to be missing.
        lost: Events that were neither.
        twice: Events that came twice at one position; or at all, to those who drop what comes again.
        disorder: What came out of its order, or though it was told to be missing.
    """

    name: str
    delivered: int = 0
    told: int = 0
    lost: list[Entry] = field(default_factory=list)
    twice: list[Got] = field(default_factory=list)
    disorder: list[str] = field(default_factory=list)

    @property
    def unaccounted(self) -> str:
        """What must not be; empty if the books close."""
        if not (self.lost or self.twice or self.disorder):
            return ""
        lost = [f"{entry.source}#{entry.sequence} at {entry.position}" for entry in self.lost[:5]]
        return (
            f"{self.name}: {len(self.lost)} lost {lost}, {len(self.twice)} twice {self.twice[:3]}, "
            f"{len(self.disorder)} out of order {self.disorder[:3]}"
        )


def covers(gap: Gap, position: Position) -> bool:
    """Whether a gap says that the event at a position is missing."""
    if gap.epoch != position.epoch:
        return False
    return (gap.first is None or gap.first <= position.offset) and (
        gap.last is None or position.offset <= gap.last
    )


def reckon(reader: Reader, entries: Sequence[Entry]) -> Account:
    """Close one subscriber's books."""
    account = Account(reader.name)
    items = reader.items
    index_of = {entry.event_id: index for index, entry in enumerate(entries)}
    mine = [item for item in items if isinstance(item, Got) and item.event_id in index_of]
    ids = {got.event_id for got in mine}
    gaps = reader.gaps
    closes = _told_by_close(items, index_of)
    for index, entry in enumerate(entries):
        if entry.event_id in ids:
            account.delivered += 1
        elif entry.error is not None or index < reader.first_entry:
            continue
        elif (entry.position is not None and any(covers(gap, entry.position) for gap in gaps)) or any(
            before < index < after for before, after in closes
        ):
            account.told += 1
        else:
            account.lost.append(entry)
    places = Counter(got.position for got in mine)
    counts = Counter(got.event_id for got in mine)
    account.twice = [
        got for got in mine if places[got.position] > 1 or (reader.keeps_ids and counts[got.event_id] > 1)
    ]
    account.disorder = list(_disorder(reader, items, set(index_of)))
    return account


def _told_by_close(items: Sequence[Item], index_of: Mapping[str, int]) -> list[tuple[int, int]]:
    """Between which events a plain client was told that it misses something (4009)."""
    places = [index_of.get(item.event_id) if isinstance(item, Got) else None for item in items]
    closes = []
    for number, item in enumerate(items):
        if item == "close 4009":
            before = [place for place in places[:number] if place is not None]
            after = [place for place in places[number:] if place is not None]
            closes.append((max(before, default=-1), min(after, default=len(index_of))))
    return closes


def _disorder(reader: Reader, items: Sequence[Item], known: set[str]) -> Iterator[str]:
    """Within an epoch positions rise, no epoch comes back, and numbers of a source rise."""
    at: Position | None = None
    ended: set[str] = set()
    last: dict[str, int] = {}
    for item in items:
        if isinstance(item, str) or (isinstance(item, Got) and item.event_id not in known):
            continue
        position = item.position
        if position is not None:
            if position.epoch in ended:
                yield f"{item} in an epoch that was over"
            elif at is not None and position.epoch == at.epoch and position.offset <= at.offset:
                if isinstance(item, Got):
                    yield f"{item} after {at}"
            else:
                if at is not None and position.epoch != at.epoch:
                    ended.add(at.epoch)
                at = position
        if isinstance(item, Got) and reader.keeps_ids:
            if item.sequence <= last.get(item.source, 0):
                yield f"{item} after #{last[item.source]}"
            last[item.source] = item.sequence


# The whole


class Ledger:
    """Publishers and subscribers at work: `with Ledger() as ledger`."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._works: dict[object, asyncio.Task[None]] = {}
        self._proxies: list[Wire] = []
        self.senders: list[Sender] = []
        self.readers: list[Reader] = []
        self.more_entries: list[Entry] = []
        self._sent_away: set[Reader] = set()
        self.broken_at = self.repaired_at = 0.0
        self.notice_s: float | None = None

    def __enter__(self) -> Ledger:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.call(self._end())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _end(self) -> None:
        for work in self._works.values():
            work.cancel()
        await asyncio.gather(*self._works.values(), return_exceptions=True)
        for proxy in self._proxies:
            await proxy.stop()

    def call(self, story: Coroutine[Any, Any, T], within: float = 60.0) -> T:
        """Run a coroutine in the ledger's loop."""
        return asyncio.run_coroutine_threadsafe(story, self._loop).result(within * UNIT_S)

    async def _spawn(self, key: object, story: Coroutine[Any, Any, None]) -> None:
        self._works[key] = asyncio.create_task(story)

    # Who takes part

    def publish(
        self, settings: Settings, rate_hz: float = 200.0, source: str = "server-a", data: Any = None
    ) -> Sender:
        """Begin to publish, and wait until it flows."""
        sender = Sender(settings, rate_hz, source, data)
        self.senders.append(sender)
        self.call(self._spawn(sender, sender.run()))
        eventually(lambda: sum(entry.position is not None for entry in list(sender.entries)) > 20, "nothing flows")
        return sender

    def subscribe(self, *readers: Reader) -> None:
        """Begin to receive."""
        for reader in readers:
            self.readers.append(reader)
            self.call(self._spawn(reader, reader.run()))

    def send_away(self, reader: Reader) -> None:
        """A subscriber leaves; it keeps its position."""

        async def leave() -> None:
            work = self._works.pop(reader)
            work.cancel()
            await asyncio.wait([work])

        self._sent_away.add(reader)
        self.call(leave())
        assert reader.since, f"{reader.name} has no position yet"

    def call_back(self, reader: Reader) -> None:
        """It comes back with its position."""
        self.call(self._spawn(reader, reader.run()))

    def pause(self, reader: Reader, *, pause: bool = True) -> None:
        """It stops reading, or reads on."""
        self._loop.call_soon_threadsafe(reader.reading.clear if pause else reader.reading.set)

    def proxy(self, target_port: int) -> Wire:
        proxy = Wire(target_port)
        self._proxies.append(proxy)
        self.call(proxy.start())
        return proxy

    # What happens

    @property
    def entries(self) -> list[Entry]:
        """What was published, also by others (`more_entries`), in the order of the channel."""
        entries = [entry for sender in self.senders for entry in list(sender.entries)]
        if len(self.senders) == 1 and not self.more_entries:
            return entries
        return sorted([*self.more_entries, *entries], key=_offset)

    def flows(self, events: int = 40) -> None:
        """Wait until so many more events have been published, and everybody who reads has one of them."""
        for sender in self.senders:
            first = len(sender.entries)
            eventually(
                lambda: sum(entry.position is not None for entry in sender.entries[first:]) >= events,  # noqa: B023
                "nothing is published any more", within=30,
            )  # fmt: skip

    def broken(self) -> None:
        """Now something breaks."""
        self.broken_at = time.monotonic()

    def noticed(self, sign: Callable[[], object], message: str, within: float = 10.0) -> None:
        """Wait for the first sign of it."""
        eventually(sign, message, within)
        self.notice_s = time.monotonic() - self.broken_at

    def repaired(self) -> None:
        """Now it is whole again."""
        self.repaired_at = time.monotonic()

    def record(self, case: str) -> list[Account]:
        """Close the books of what has been published up to now, while it goes on."""
        entries = [entry for entry in self.entries if entry.position is not None]

        def all_there() -> bool:
            return all(reader.got and reader.got[-1].sequence >= entries[-1].sequence for reader in self.readers)

        eventually(all_there, "somebody does not catch up", within=20.0)
        return self._close(case, entries)

    def close(self, case: str, within: float = 20.0) -> list[Account]:
        """Stop publishing, let everybody finish, and close the books; nothing may be unaccounted for."""
        for sender in self.senders:
            sender.stop()
        for sender in self.senders:
            self.call(asyncio.wait_for(_finished(self._works[sender]), 30 * UNIT_S))
        entries = self.entries
        last = [[entry for entry in sender.entries if entry.error is None][-1] for sender in self.senders]
        present = [reader for reader in self.readers if reader in self._works]

        def finished(reader: Reader) -> bool:
            ids = {got.event_id for got in reader.got}
            return all(entry.event_id in ids for entry in last)

        deadline = time.monotonic() + within * UNIT_S
        while not all(map(finished, present)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return self._close(case, entries)

    def _close(self, case: str, entries: Sequence[Entry]) -> list[Account]:
        for work in self._works.values():
            if work.done():
                work.result()  # raises what has ended it
        accounts = [reckon(reader, entries) for reader in self.readers]
        self._file(case, entries, accounts)
        unaccounted = [account.unaccounted for account in accounts if account.unaccounted]
        assert not unaccounted, "\n".join(unaccounted)
        return accounts

    def _recover_s(self) -> float | None:
        """From the repair until everybody who was there had an event that was sent after it."""
        if not self.repaired_at:
            return None
        late = {entry.event_id for entry in self.entries if entry.at >= self.repaired_at and entry.error is None}
        firsts = []
        for reader in self.readers:
            if reader in self._sent_away:
                continue
            times = (note.at for note in reader.notes if isinstance(note.item, Got) and note.item.event_id in late)
            firsts.append(next(times, float("inf")))
        return max(firsts) - self.repaired_at if firsts else None

    def _file(self, case: str, entries: Sequence[Entry], accounts: Sequence[Account]) -> None:
        if not (table := os.environ.get("FAULT_TABLE")):
            return
        recover_s = self._recover_s()
        row = {
            "case": case,
            "notice_s": None if self.notice_s is None else round(self.notice_s, 3),
            "recover_s": None if recover_s is None else round(recover_s, 3),
            "published": len(entries),
            "delivered": sum(account.delivered for account in accounts),
            "lost": sum(len(account.lost) for account in accounts),
            "twice": sum(len(account.twice) for account in accounts),
            "told": sum(account.told for account in accounts),
            "subscribers": len(accounts),
            "failed": sum(entry.error is not None for entry in entries),
        }
        with Path(table).open("a") as file:
            file.write(json.dumps(row) + "\n")


def _offset(entry: Entry) -> float:
    return float("inf") if entry.position is None else entry.position.offset


async def _finished(work: asyncio.Task[None]) -> None:
    await work
