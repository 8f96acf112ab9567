"""The actors: hubs, `Publisher`s, `Subscriber`s and raw clients, each a process that dies and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import zlib
from bisect import bisect
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from broadcaster import Event, Gap, Position, Publisher, Stale, Subscriber
from broadcaster.core.errors import BroadcasterError, HubRefused, RedisRefused, RedisUnavailable
from broadcaster.core.event import Draft
from broadcaster.core.runtime import Limits, Runtime
from broadcaster.hub.serve import serve
from broadcaster.publish.publisher import Sent
from tests.simulation import worlds
from tests.simulation.books import Beaten, Blind, Book, Closed, Connected, Given, Place, Refused, Told
from tests.simulation.clients import RawClient, ask
from tests.simulation.journal import is_named_before
from tests.simulation.loop import DrawnChance
from tests.simulation.process import Pauses, Process
from tests.simulation.times import instant
from tests.simulation.troubles import Trouble, way

if TYPE_CHECKING:
    from tests.simulation.run import Simulation


def _place(position: Position | None) -> Place | None:
    return None if position is None else Place(position.epoch, position.offset)


class Actor:
    """Something that runs in a process, and again in another one when that has died."""

    def __init__(self, simulation: Simulation, name: str) -> None:
        self.sim = simulation
        self.name = name
        self.chance = random.Random(f"{simulation.world.seed}/{name}")
        # Hubs are not announced: what they would say of themselves goes to nobody here.
        limits = replace(Limits(), announce_every_s=math.inf, **simulation.world.limits)
        self.runtime = Runtime(chance=DrawnChance(self.chance), limits=limits)
        self.process = Process(name, simulation.loop)
        self.ended = False

    def start(self) -> None:
        """Begin, in a new process."""
        if self.ended:
            return
        self.process = Process(self.name, self.sim.loop)
        if (pauses := self.sim.world.pauses) is not None and not self.sim.is_calm:
            self.process.pauses = Pauses(self.chance, *pauses)
        self.process.spawn(self._run(), "run")

    def kill(self, down_s: float) -> None:
        """SIGKILL, and back after some time."""
        if self.process.alive:
            self.process.kill()
            self.sim.loop.call_outside(self.sim.loop.now + down_s, self.start)

    async def _run(self) -> None:
        process = self.process
        try:
            await self.work()
        except BroadcasterError as error:
            self.on_error(error)
        except Exception as error:
            if self.sim.loop.over:
                return
            self.sim.oracle.fail("a bug", self.sim.loop.now, self.name, f"{type(error).__name__}: {error}")
        now = self.sim.loop.now
        self.sim.troubles.note("is down", [self.name], now, now + 1.5)
        self.sim.loop.call_outside(now, process.kill)
        self.sim.loop.call_outside(self.sim.loop.now + self.chance.uniform(0.2, 1), self._start_after, process)

    def _start_after(self, process: Process) -> None:
        if self.process is process:
            self.start()

    def on_error(self, error: BroadcasterError) -> None:
        """It has ended with an error that the product knows."""
        self.sim.trace(self.name, f"ended: {type(error).__name__}")

    async def work(self) -> None:
        raise NotImplementedError


class HubActor(Actor):
    """A hub: `serve()`."""

    def __init__(self, simulation: Simulation, port: int) -> None:
        super().__init__(simulation, f"hub-{port}")
        self.port = port
        self.lives = 0
        self._stop: asyncio.Event | None = None
        self._start: Trouble | None = None
        settings = simulation.settings
        hub = settings.hub.model_copy(update={"port": port, "ring_bytes": simulation.world.ring_bytes})
        event = settings.event.model_copy(update={"max_bytes": simulation.world.hub_max_bytes})
        self._settings = settings.model_copy(update={"hub": hub, "event": event})  # below what is allowed

    async def work(self) -> None:
        self._stop = asyncio.Event()
        self.lives += 1
        self.sim.counts["hubs"] += 1
        self.has_been_ready()
        self._start = self.sim.troubles.note("starts", [self.name], self.sim.loop.now)
        code = await serve(self._settings, self._stop, runtime=self.runtime)
        self.sim.trace(self.name, f"exit {code}")

    def on_error(self, error: BroadcasterError) -> None:
        super().on_error(error)
        if not (isinstance(error, RedisRefused) and self.sim.refuses_rights(30.0)):
            self.sim.oracle.fail("a hub has ended", self.sim.loop.now, self.name, f"{error}")

    def has_been_ready(self) -> None:
        """Before that nothing is proven, and nobody is sent heartbeats."""
        if self._start is not None:
            self._start.end, self._start = self.sim.loop.now, None

    def drain(self) -> None:
        """SIGTERM."""
        if self._stop is not None and self.process.alive:
            self.sim.loop.call_soon(self._stop.set, context=self.process.context)


class ProducerActor(Actor):
    """A publisher with the product's `Publisher`."""

    def __init__(self, simulation: Simulation, producer: worlds.Producer) -> None:
        super().__init__(simulation, producer.name)
        self._producer = producer
        self._stored = dict[str, list[tuple[int, Place]]]()
        # Drawn apart, so that what else happens in a seed does not depend on it.
        self._elsewhere = random.Random(f"{simulation.world.seed}/{producer.name}/elsewhere")
        self._publishes_twice = self._elsewhere.random() < 0.1

    async def work(self) -> None:
        if self._producer.uses_http and self.sim.world.token:
            while True:
                await self._post()
        self._stored = {channel: [] for channel in self._producer.channels}
        try:
            async with (
                Publisher(self.sim.settings, runtime=self.runtime) as publisher,
                asyncio.TaskGroup() as group,
            ):
                await self._publish(publisher, group)
        except* (RedisUnavailable, RedisRefused):
            self.sim.counts["publisher without redis"] += 1

    async def _publish(self, publisher: Publisher, group: asyncio.TaskGroup) -> None:
        producer, chance = self._producer, self.chance
        sent = 0
        while True:
            await asyncio.sleep(chance.expovariate(1 / producer.every_s))
            to = chance.choice(producer.channels)
            for _ in range(1 if producer.waits else chance.randint(1, 6)):
                drafts = self._drafts(publisher, to)
                for channel in self._places_for(to):
                    settling = self._settle(publisher, publisher.send(drafts, channel), channel, sent)
                    sent += len(drafts)
                    if producer.waits:
                        await settling
                    else:
                        group.create_task(settling)

    def _places_for(self, channel: str) -> list[str]:
        """Where to publish what is for a channel: in some seeds the same events on another one, too."""
        others = [each for each in self._producer.channels if each != channel]
        return [channel, self._elsewhere.choice(others)] if others and self._publishes_twice else [channel]

    def _drafts(self, publisher: Publisher, to: str) -> list[Draft]:
        chance = self.chance
        types = [chance.choice(worlds.TYPES) for _ in range(chance.randint(1, self._producer.most))]
        calm = self.sim.loop.now > self.sim.world.calm_from_s
        data = {"x": "x" * (0 if calm else chance.choice((0, 20, 400)))}  # the largest may be refused
        severities = ["critical", "critical", "warning", "info"]
        return [
            publisher.draft(each, self.name, severity=chance.choice(severities), data=data, to=to)
            for each in types
        ]

    async def _settle(self, publisher: Publisher, sent: Sent, to: str, first: int) -> None:
        """Wait for the answers; the first event is the `first`-th that it has sent."""
        for number, published in enumerate(await publisher.settle(sent), first):
            if published.error is not None:
                self.sim.counts["not known whether published"] += 1
                continue
            place = _place(published.position)
            self.sim.note_published(self.name, to, published.event.event_id, place)
            if place is not None:
                self._judge_order(to, number, place)

    def _judge_order(self, channel: str, number: int, place: Place) -> None:
        """What it has sent later is stored later, however often either was sent."""
        stored = self._stored[channel]
        at = bisect(stored, (number,))
        stored.insert(at, (number, place))
        for (_, earlier), (_, later) in pairwise(stored[max(0, at - 1) : at + 2]):
            goes_back = earlier.epoch == later.epoch and later.offset <= earlier.offset
            if goes_back or is_named_before(later.epoch, earlier.epoch):
                what = f"{channel}: {later} is sent after {earlier}"
                self.sim.oracle.fail("stored out of order", self.sim.loop.now, self.name, what)

    async def _post(self) -> None:
        """Publish an event over HTTP."""
        producer, chance = self._producer, self.chance
        await asyncio.sleep(chance.expovariate(1 / producer.every_s))
        to, port = chance.choice(producer.channels), chance.choice(self.sim.world.hubs)
        event = {"channel": to, "event_type": chance.choice(worlds.TYPES), "source": self.name}
        bearer = f"Authorization: Bearer {self.sim.world.token}"
        status, answer = await ask(
            self.sim.loop, port, "POST /publish", bearer, body=json.dumps(event).encode(), timeout_s=6.0
        )
        self.sim.counts[f"posted {status}"] += 1
        if status == 201:
            fields = json.loads(answer)
            self.sim.note_published(self.name, to, fields["event_id"], Place.read(fields["position"]))
            return
        # A request that is under way for too long is told so.
        is_late = status == 408 and self.sim.troubles.any(way(self.name, f"hub-{port}"), self.sim.loop.now, 6.0)
        if status not in (0, 503) and not is_late:
            self.sim.oracle.fail(
                f"POST /publish is answered {status}", self.sim.loop.now, self.name, f"{answer!r}"
            )


class ClientActor(Actor):
    """A subscriber of any kind, with one book over all of its lives."""

    def __init__(self, simulation: Simulation, client: worlds.Client) -> None:
        super().__init__(simulation, client.name)
        self._client = client
        channels: dict[str, Place | None] = {channel: self._first_since(channel) for channel in client.channels}
        world = simulation.world
        steady = not client.naps_s and world.pauses is None and world.windows[0] > 8_000
        self.book = Book(client.name, client.kind, channels, client.wanted, steady, self._time())
        self.book.listener = simulation.on_entry
        self._subscriber: Subscriber | None = None
        self._hub = ""
        self._cut_off_at: float | None = None
        self._why_cut_off: tuple[object, ...] = ()

    def led_to(self) -> int:
        """The port of one of the hubs, to which its `Subscriber` connects now."""
        port = self.chance.choice(self.sim.world.hubs)
        self._hub = f"hub-{port}"
        self.book.asks(self._hub)
        return port

    @property
    def is_connected(self) -> bool:
        """Whether it has an open connection, as far as it knows."""
        if self._subscriber is not None:
            return self.process.alive and self._subscriber._connector.connection is not None
        ended = self.book.entries and isinstance(self.book.entries[-1][1], Closed | Refused | Connected)
        return self.process.alive and not ended

    def watch_staleness(self) -> None:
        """A `Subscriber` that has been out of reach of its hub for long has said that it is stale."""
        sim, subscriber, hub = self.sim, self._subscriber, self._hub
        if subscriber is None:
            return
        process = sim.hubs[hub].process
        why = process, process.alive, process.stopped, sim.network.link(hub, self.name).blocked
        if why != self._why_cut_off:  # it may have been reached between two looks
            self._why_cut_off, self._cut_off_at = why, None
        up = process.alive and not process.stopped and not sim.network.link(hub, self.name).blocked
        if up or self.process.stopped or not self.process.alive or not self.book.steady:
            self._cut_off_at = None
            return
        self._cut_off_at = self._cut_off_at or sim.loop.now
        beat_s = sim.settings.hub.beat_interval_s
        if not subscriber.stale and sim.loop.now > self._cut_off_at + 3 * beat_s + 2.0:
            since_s = sim.loop.now - self._cut_off_at
            sim.oracle.fail("blind, untold", sim.loop.now, self.name, f"cut off for {since_s:.1f} s")

    def _first_since(self, channel: str) -> Place | None:
        accepted = [event for event in self.sim.journal.accepted[channel] if not event.withdrawn]
        kind, chance = self._client.since, self.chance
        if kind in ("now", "time") or (not accepted and kind != "foreign"):
            return None
        if kind == "foreign":
            names = "abcdef012345", "zz", "Tzzzzzzzzzffffff", "Tvvvvvvvvvffffff", "T000000000000000"
            return Place(chance.choice(names), chance.randint(0, 10**6))
        if kind == "huge":
            return Place(accepted[-1].epoch, 2**53 - 1 - chance.randint(0, 5))
        some = accepted if kind == "old" else accepted[: 1 + len(accepted) // 10]
        event = chance.choice(some)
        return Place(event.epoch, event.offset)

    def _time(self) -> str | None:
        """What it asks for who asks by time: everything, so many seconds, or when an event was stored, or so."""
        if self._client.since != "time":
            return None
        stamps = [
            event.stored_us for channel in self._client.channels for event in self.sim.journal.accepted[channel]
        ]
        us = self.chance.choice(stamps or [0]) + self.chance.choice((0, 0, 1, -1))
        return self.chance.choice(("all", f"{self.chance.randint(1, 30)}s", instant(us)))

    async def work(self) -> None:
        if self._client.since != "now":
            self.sim.counts[f"since {self._client.since} {self._client.kind}"] += 1
        if self._client.kind == "Subscriber":
            await self._subscribe()
        else:
            client, ports = self._client, list(self.sim.world.hubs)
            beat_s = self.sim.settings.hub.beat_interval_s
            rest = self.sim.world.token, client.naps_s, self.sim.world.calm_from_s, self._form()
            await RawClient(self.sim.loop, self.book, ports, self.chance, beat_s, *rest).run()

    def _form(self) -> str:
        """How it is given events; not drawn, so that what else happens in a seed does not depend on it."""
        forms = ["ws", "deflate"]
        if self._client.kind == "v1" and len(self._client.channels) == 1:
            forms += ["sse", "sse"]
        form = forms[zlib.crc32(f"{self.sim.world.seed}/{self._client.name}".encode()) % len(forms)]
        self.sim.counts[f"clients by {form}"] += 1
        return form

    async def _subscribe(self) -> None:
        client, book, loop = self._client, self.book, self.sim.loop
        port = self.led_to()
        self._subscriber = None
        address = worlds.BALANCER_PORT if self.sim.world.balanced else port
        since: dict[str, Position] = {}
        for channel in client.channels:
            if (place := book.at.get(channel) or book.channels[channel]) is not None:
                since[channel] = Position(place.epoch, place.offset)
        time = None if since else book.time  # who knows one of its places says where, and not when
        places = {channel: _place(since.get(channel)) for channel in client.channels}
        book.note(loop.now, Connected(f"hub-{port}", places, time))
        try:
            async with Subscriber(
                f"ws://127.0.0.1:{address}/ws",
                settings=self.sim.settings,
                channels=client.channels,
                since=time or since,
                types=[client.wanted] if client.wanted else [],
                token=self.sim.world.token,
                runtime=self.runtime,
            ) as subscriber:
                self._subscriber = subscriber
                while True:
                    await self._receive(subscriber)
        except HubRefused as error:
            book.note(loop.now, Refused(int(str(error).split(": ")[1].split()[0])))

    async def _receive(self, subscriber: Subscriber) -> None:
        item: Any = None
        if self._client.polls_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._client.polls_s):
                    item = await subscriber.receive()
        else:
            item = await subscriber.receive()
        book, now = self.book, self.sim.loop.now
        if isinstance(item, Event):
            book.note(now, Given(item.channel or self._client.channels[0], _place(item.position), item.event_id))
        elif isinstance(item, Gap):
            place = _place(item.position)
            book.note(now, Told(item.channel, item.cause, item.epoch, item.first, item.last, place))
        elif item is not None:
            book.note(now, Blind(isinstance(item, Stale)))
        self._note_positions(subscriber, item)
        naps_s = self._client.naps_s
        if naps_s and now + naps_s < self.sim.world.calm_from_s and self.chance.random() < 0.1:
            await asyncio.sleep(self.chance.uniform(0, naps_s))

    def _note_positions(self, subscriber: Subscriber, item: Any) -> None:
        book, now = self.book, self.sim.loop.now
        for channel, position in subscriber.positions.items():
            place = _place(position)
            if book.at.get(channel) != place:
                if not (isinstance(item, Event | Gap) and item.channel == channel):
                    book.note(now, Beaten(channel, place, is_claim=False))
                book.at[channel] = place


class Watcher(Actor):
    """Asks the hubs for their readiness, again and again."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation, "watcher")
        self.ready: dict[int, int] = {}

    async def work(self) -> None:
        rounds = 0
        while True:
            for port in self.sim.world.hubs:
                status, _ = await ask(self.sim.loop, port, "GET /health/ready")
                self.ready[port] = status
                self.sim.on_readiness(port, status)
                if rounds % 8 == 0:
                    await self.ask_statistics(port)
            rounds += 1
            await asyncio.sleep(0.5)

    async def ask_statistics(self, port: int) -> None:
        status, body = await ask(self.sim.loop, port, "GET /stats?scope=self")
        if status == 200:
            self.sim.on_statistics(port, json.loads(body))
