"""Hubs, subscribers and publishers: each a process that is killed, stopped and started again."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any

from tests.chaos import child
from tests.simulation.books import Beaten, Blind, Book, Closed, Connected, Given, Place, Refused, Told, Welcomed
from tests.simulation.journal import Accepted
from tests.simulation.troubles import REDIS, Trouble
from tests.simulation.worlds import Client, Producer
from tests.support import UNIT_S, HubProcess, free_port

if TYPE_CHECKING:
    from tests.chaos.run import Chaos

REFUSED = 69
"""The exit code of a hub that Redis refuses."""

_FORKED = multiprocessing.get_context("forkserver")


class Actor:
    """Something that runs in a process, and in another one when that has died.

    Attributes:
        stops: How many faults have stopped it.
        ended: Whether it is not started again.
    """

    def __init__(self, chaos: Chaos, name: str) -> None:
        self.chaos = chaos
        self.name = name
        self.chance = random.Random(f"{chaos.world.seed}/{name}")
        self.stops = 0
        self.ended = False
        self.lives = 0

    @property
    def alive(self) -> bool:
        raise NotImplementedError

    def start(self) -> None:
        """Begin, in a new process."""
        raise NotImplementedError

    def send(self, number: signal.Signals) -> None:
        """Send its process a signal."""
        raise NotImplementedError

    def kill(self, down_s: float) -> None:
        """SIGKILL, and back after some time."""
        if self.alive:
            self.send(signal.SIGKILL)
            self.chaos.later(down_s, self.start)

    def abandon(self) -> None:
        """End its process, whatever happens."""
        raise NotImplementedError

    def stop(self) -> None:
        """SIGSTOP; stops add up, each ends with a `resume` of its own."""
        self.stops += 1
        if self.alive:
            self.send(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.stops -= 1
        if self.alive and not self.stops:
            self.send(signal.SIGCONT)

    def on_started(self) -> None:
        """What was stopped stays so in its next life."""
        self.lives += 1
        if self.stops:
            self.send(signal.SIGSTOP)


class HubActor(Actor):
    """`broadcaster hub`."""

    def __init__(self, chaos: Chaos, number: int) -> None:
        super().__init__(chaos, f"hub-{number}")
        self.number = number
        self.port = free_port()
        self.process: HubProcess | None = None
        self.expected = False
        self.comes_back = False
        self._begins: Trouble | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and not self.process.ended

    def start(self) -> None:
        if self.ended or self.alive:
            return
        self.look()
        self.comes_back = False
        tables = self.chaos.tables_of(self.name)
        tables["event"] = tables["event"] | {"max_bytes": self.chaos.world.hub_max_bytes}
        url = tables["redis"].pop("url")
        variables = {
            f"BROADCASTER_{table}__{name}".upper(): value if isinstance(value, str) else json.dumps(value)
            for table, values in tables.items()
            for name, value in values.items()
        }
        if self._begins is not None:
            self._begins.end = time.monotonic()
        self._begins = self.chaos.troubles.note("starts", [self.name], time.monotonic())
        self.expected = False
        self.process = HubProcess(url, self.port, **variables)
        self.chaos.counts["hubs"] += 1
        self.on_started()

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.expected |= number in (signal.SIGKILL, signal.SIGTERM)
        self.process.signal(number)
        if number is signal.SIGKILL:
            self.process.wait(5)

    def kill(self, down_s: float) -> None:
        if self.alive:
            self.send(signal.SIGKILL)
            self.come_back(down_s)

    def come_back(self, after_s: float) -> None:
        """Start again after some time."""
        self.comes_back = True
        self.chaos.later(after_s, self.start)

    def has_been_ready(self) -> None:
        """Before that nothing is proven, and nobody is sent heartbeats."""
        if self._begins is not None:
            self._begins.end, self._begins = time.monotonic(), None

    def look(self) -> None:
        """Notice its end, and what it has logged."""
        if self.process is None or not self.process.ended:
            return
        process, self.process = self.process, None
        code = process.wait(5)
        process._output.close()
        self.chaos.trace(self.name, f"exit {code}")
        denied = code == REFUSED and self.chaos.troubles.any([REDIS], time.monotonic(), 10.0, ("redis_deny",))
        # Who has said nothing yet has not begun: a SIGTERM simply ends it.
        ends = (0, -signal.SIGKILL) if process.output else (0, -signal.SIGKILL, -signal.SIGTERM)
        if not denied and not (self.expected and code in ends):
            self.chaos.oracle.fail(
                "a hub has ended", time.monotonic(), self.name, f"{code}: {process.output[-2000:]}"
            )
        for line in process.lines:
            self.chaos.trace(self.name, line)
            if any(word in line for word in ("Traceback", "Error", "exception")):
                self.chaos.oracle.fail(
                    "an error in a hub's log", time.monotonic(), self.name, process.output[-2000:]
                )
                break

    def finish(self) -> None:
        """SIGTERM: it has to end in the time that settings give it."""
        self.ended = True
        if self.process is None:
            return
        self.expected = True
        for number in (signal.SIGCONT, signal.SIGTERM):
            self.process.signal(number)
        hub = self.chaos.world.tables["hub"]
        try:
            self.process.wait(hub["drain_s"] + hub["shutdown_s"] + 3)
        except AssertionError as error:
            self.chaos.oracle.fail("a hub does not end", time.monotonic(), self.name, f"{error}"[-2000:])
            self.send(signal.SIGKILL)
        self.look()

    def abandon(self) -> None:
        """End its process, whatever happens."""
        if self.process is not None:
            self.send(signal.SIGKILL)
            self.process._output.close()
            self.process = None


class ChildActor(Actor):
    """A process of `child`."""

    def __init__(self, chaos: Chaos, name: str) -> None:
        super().__init__(chaos, name)
        self._process: Any = None
        self._reports: Any = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.exitcode is None

    def start(self) -> None:
        if self.ended or self.alive:
            return
        self.close()
        self._reports, writing = _FORKED.Pipe(duplex=False)
        self._process = _FORKED.Process(target=child.run, args=(writing, self.life()), daemon=True)
        self._process.start()
        writing.close()
        asyncio.get_running_loop().add_reader(self._reports.fileno(), self.read)
        self.on_started()

    def life(self) -> child.Life:
        raise NotImplementedError

    def on_report(self, kind: str, at: float, what: Any) -> None:
        raise NotImplementedError

    def read(self) -> None:
        """What it has reported up to now."""
        reports = self._reports
        try:
            while reports is self._reports and reports.poll():
                kind, at, what = reports.recv()
                if kind == "failed":
                    self.chaos.oracle.fail("a bug", at, self.name, what)
                else:
                    self.chaos.truth.pump()
                    self.on_report(kind, at, what)
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self.close()
            if code != -signal.SIGKILL and not self.ended:
                now = time.monotonic()
                self.chaos.troubles.note("is down", [self.name], now, now + 1.5)
                self.chaos.later(self.chance.uniform(0.2, 1), self.start)

    def send(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)
        if number is signal.SIGKILL:
            self._process.join()
            self.read()

    def close(self) -> None:
        """Nothing more is read from it."""
        if self._reports is not None:
            asyncio.get_running_loop().remove_reader(self._reports.fileno())
            self._reports.close()
            self._reports = None

    def abandon(self) -> None:
        """End its process."""
        self.ended = True
        if self.alive:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.join()
        self.close()


class ProducerActor(ChildActor):
    """A publisher."""

    def __init__(self, chaos: Chaos, producer: Producer) -> None:
        super().__init__(chaos, producer.name)
        self._producer = producer

    def life(self) -> child.Life:
        chance, tables = f"{self.chaos.world.seed}/{self.name}/{self.lives}", self.chaos.tables_of(self.name)
        return child.Life(self.name, chance, tables, self.chaos.calm_from, producer=self._producer)

    def on_report(self, kind: str, at: float, what: Any) -> None:
        """The answer to a publisher: if it has a position, the journal knows it."""
        channel, event_id, place, error = what
        self.chaos.counts["published" if error is None else "not known whether published"] += 1
        if error is not None:
            return
        known: list[Accepted] = self.chaos.truth.journal.at[channel, place.epoch, place.offset] if place else []
        if not any(each.event_id == event_id for each in known):
            self.chaos.oracle.fail("answered, but not taken", at, self.name, f"{event_id} at {place}")


class ClientActor(ChildActor):
    """A subscriber of any kind, with one book over all of its lives."""

    def __init__(self, chaos: Chaos, client: Client) -> None:
        super().__init__(chaos, client.name)
        self.client = client
        self.book = Book(client.name, client.kind, {}, client.wanted, not client.naps_s)
        self.book.channels = {channel: self._first_since(channel) for channel in client.channels}
        self.book.listener = chaos.on_entry
        self._forgotten = False
        self._cut_off_at: float | None = None
        self._why_cut_off: tuple[object, ...] = ()

    def _first_since(self, channel: str) -> Place | None:
        accepted = self.chaos.truth.journal.accepted[channel]
        kind, chance = self.client.since, self.chance
        if kind == "now" or (not accepted and kind != "foreign"):
            return None
        if kind == "foreign":
            names = "abcdef012345", "zz", "Tzzzzzzzzzffffff", "Tvvvvvvvvvffffff", "T000000000000000"
            return Place(chance.choice(names), chance.randint(0, 10**6))
        if kind == "huge":
            return Place(accepted[-1].epoch, 2**53 - 1 - chance.randint(0, 5))
        event = chance.choice(accepted if kind == "old" else accepted[: 1 + len(accepted) // 10])
        return Place(event.epoch, event.offset)

    def life(self) -> child.Life:
        book, world = self.book, self.chaos.world
        at = {
            channel: book.at.get(channel, None if self._forgotten else first)
            for channel, first in book.channels.items()
        }
        hubs = {number: self.chaos.proxy(self.name, f"hub-{number}").port for number in world.hubs}
        chance, tables = f"{world.seed}/{self.name}/{self.lives}", self.chaos.tables_of()
        return child.Life(self.name, chance, tables, self.chaos.calm_from, self.client, at=at, hubs=hubs)

    def on_report(self, kind: str, at: float, what: Any) -> None:
        book = self.book
        book.note(at, what)
        match what:
            case Given(channel, place):
                book.at[channel] = place
            case Told(channel=channel, position=position) | Beaten(channel, position):
                book.at[channel] = position
            case Welcomed(channel, position, recovered) if recovered is not False:
                book.at[channel] = position
            case Closed(4009):
                book.at.clear()
                self._forgotten = True
            case _:
                pass

    @property
    def is_connected(self) -> bool:
        """Whether it is connected, as far as it knows; a plain client is told nothing of that."""
        if not self.alive or self.book.blind or not self.book.entries:
            return False
        at, last = self.book.entries[-1]
        waits = isinstance(last, Connected) and (self.book.kind == "v1" or time.monotonic() < at + 1)
        return not waits and not isinstance(last, Closed | Refused | Blind)

    def watch_staleness(self) -> None:
        """A `Subscriber` that has been out of reach of its hub for long has said that it is stale."""
        chaos, now, hub = self.chaos, time.monotonic(), self.book.hub
        if self.book.kind != "Subscriber" or not hub:
            return
        actor, answers = chaos.hubs[hub], chaos.proxy(self.name, hub).answers
        why = actor.lives, actor.alive, actor.stops > 0, answers.blocked
        if why != self._why_cut_off:  # it may have been reached between two looks
            self._why_cut_off, self._cut_off_at = why, None
        up = actor.alive and not actor.stops and not answers.blocked
        if up or self.stops or not self.alive or not self.book.steady:
            self._cut_off_at = None
            return
        self._cut_off_at = self._cut_off_at or now
        patience_s = 3 * chaos.settings.hub.beat_interval_s + 3.0 * UNIT_S
        if not self.book.blind and now > max(self._cut_off_at, self._begun_at) + patience_s:
            chaos.oracle.fail("blind, untold", now, self.name, f"cut off for {now - self._cut_off_at:.1f} s")

    @property
    def _begun_at(self) -> float:
        return max((at for at, entry in self.book.entries if isinstance(entry, Connected)), default=0.0)
