"""What runs in a process of its own: a subscriber or a publisher. What happens to it is reported at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, cast

from broadcaster import Event, Gap, Position, Publisher, Stale, Subscriber
from broadcaster.core.errors import HubRefused, RedisRefused, RedisUnavailable
from broadcaster.settings import Settings
from tests.chaos.worlds import SIZES
from tests.simulation.books import Beaten, Blind, Book, Connected, Entry, Given, Place, Refused, Told
from tests.simulation.clients import RawClient
from tests.simulation.worlds import TYPES, Client, Producer


@dataclass(frozen=True)
class Life:
    """What one life of a child begins with.

    Attributes:
        name: Of the actor.
        chance: Seed of this life.
        tables: Settings.
        calm_from: Time (CLOCK_MONOTONIC) from which on it behaves.
        client: What it is, if it is a subscriber.
        producer: What it is, if it is a publisher.
        at: Per channel where a subscriber goes on; None: now.
        hubs: Per hub the port at which it is reached.
    """

    name: str
    chance: str
    tables: dict[str, dict[str, Any]]
    calm_from: float
    client: Client | None = None
    producer: Producer | None = None
    at: dict[str, Place | None] | None = None
    hubs: dict[int, int] | None = None


Report = tuple[str, float, Any]
"""`entry`, `published` or `failed`, when (CLOCK_MONOTONIC), and what."""


def run(reports: Connection, life: Life) -> None:
    """Live; ends by a signal, or because a hub refuses it."""
    os.setsid()  # Ctrl-C is for the parent, which then ends this one
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    logging.disable()  # what a `Subscriber` says is in its book
    work = Producing(reports, life) if life.producer else Subscribing(reports, life)
    with contextlib.suppress(BrokenPipeError):
        try:
            asyncio.run(_while_the_parent_lives(work))
        except Exception as error:
            reports.send(("failed", time.monotonic(), f"{type(error).__name__}: {error}"))


async def _while_the_parent_lives(work: Producing | Subscribing) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    asyncio.get_running_loop().add_reader(parent.sentinel, os._exit, 1)
    await work.run()


class RealLoop:
    """What a raw client needs of a loop: its clock, and connections to hubs by their numbers."""

    def __init__(self, hubs: dict[int, int]) -> None:
        self._hubs = hubs

    @property
    def now(self) -> float:
        return time.monotonic()

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()

    async def create_connection(self, protocol: Any, host: str, hub: int) -> Any:
        return await asyncio.get_running_loop().create_connection(protocol, host, self._hubs[hub])


def place_of(position: Position | None) -> Place | None:
    return None if position is None else Place(position.epoch, position.offset)


class Subscribing:
    """A raw client, or one with the product's `Subscriber`."""

    def __init__(self, reports: Connection, life: Life) -> None:
        assert life.client is not None
        assert life.at is not None
        assert life.hubs is not None
        self._client, self._hubs, self._life = life.client, life.hubs, life
        self._reports = reports
        self._chance = random.Random(life.chance)
        self._book = Book(life.name, self._client.kind, dict(life.at), self._client.wanted)
        self._book.listener = self._report

    def _report(self, book: Book, now: float, entry: Entry) -> None:
        self._reports.send(("entry", now, entry))
        book.entries.clear()

    async def run(self) -> None:
        if self._client.kind == "Subscriber":
            await self._subscribe()
            return
        beat_s = self._life.tables["hub"]["beat_interval_s"]
        rest = beat_s, "", self._client.naps_s, self._life.calm_from
        await RawClient(cast(Any, RealLoop(self._hubs)), self._book, list(self._hubs), self._chance, *rest).run()

    async def _subscribe(self) -> None:
        client, book = self._client, self._book
        hub = self._chance.choice(list(self._hubs))
        since = {channel: Position(place.epoch, place.offset) for channel, place in book.channels.items() if place}
        book.note(time.monotonic(), Connected(f"hub-{hub}", book.channels))
        book.at.update(book.channels)
        try:
            async with Subscriber(
                f"ws://127.0.0.1:{self._hubs[hub]}/ws",
                settings=Settings(**cast(Any, self._life.tables)),
                channels=client.channels,
                since=since,
                types=[client.wanted] if client.wanted else [],
            ) as subscriber:
                while True:
                    await self._receive(subscriber)
        except HubRefused as error:
            book.note(time.monotonic(), Refused(int(str(error).split(": ")[1].split()[0])))

    async def _receive(self, subscriber: Subscriber) -> None:
        item: Any = None
        if self._client.polls_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._client.polls_s):
                    item = await subscriber.receive()
        else:
            item = await subscriber.receive()
        book, now = self._book, time.monotonic()
        if isinstance(item, Event):
            channel = item.channel or self._client.channels[0]
            book.note(now, Given(channel, place_of(item.position), item.event_id))
        elif isinstance(item, Gap):
            told = Told(item.channel, item.cause, item.epoch, item.first, item.last, place_of(item.position))
            book.note(now, told)
        elif item is not None:
            book.note(now, Blind(isinstance(item, Stale)))
        for channel, position in subscriber.positions.items():
            place = place_of(position)
            if book.at.get(channel) != place:
                if not (isinstance(item, Event | Gap) and item.channel == channel):
                    book.note(now, Beaten(channel, place, is_claim=False))
                book.at[channel] = place
        naps_s = self._client.naps_s
        if naps_s and now + naps_s < self._life.calm_from and self._chance.random() < 0.1:
            await asyncio.sleep(self._chance.uniform(0, naps_s))


class Producing:
    """A publisher with the product's `Publisher`."""

    def __init__(self, reports: Connection, life: Life) -> None:
        assert life.producer is not None
        self._producer, self._life, self._reports = life.producer, life, reports
        self._chance = random.Random(life.chance)

    async def run(self) -> None:
        settings = Settings(**cast(Any, self._life.tables))
        while True:
            try:
                async with Publisher(settings) as publisher:
                    while True:
                        await self._publish(publisher)
            except (RedisUnavailable, RedisRefused):
                await asyncio.sleep(0.1)

    async def _publish(self, publisher: Publisher) -> None:
        producer, chance = self._producer, self._chance
        await asyncio.sleep(chance.expovariate(1 / producer.every_s))
        to = chance.choice(producer.channels)
        types = [chance.choice(TYPES) for _ in range(chance.randint(1, producer.most))]
        calm = time.monotonic() > self._life.calm_from
        data = {"x": "x: " * ((0 if calm else chance.choice(SIZES)) // 3)}  # the largest may be refused
        drafts = [publisher.draft(each, producer.name, data=data, to=to) for each in types]
        for published in await publisher.publish_all(drafts, to):
            place = place_of(published.position)
            what = to, published.event.event_id, place, published.error
            self._reports.send(("published", time.monotonic(), what))
