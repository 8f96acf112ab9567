"""Runs one seed: starts its world, lets its faults happen, and has everything judged."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

from broadcaster import Publisher
from broadcaster.settings import Settings
from tests.chaos.actors import ClientActor, HubActor, ProducerActor
from tests.chaos.child import RealLoop
from tests.chaos.faults import Faults
from tests.chaos.truth import Life, Truth
from tests.chaos.worlds import World, draw
from tests.simulation import oracle
from tests.simulation.books import Book, Connected, Entry, Place
from tests.simulation.clients import ask
from tests.simulation.oracle import Failure, Findings, Oracle
from tests.simulation.stored import StoredRules
from tests.simulation.troubles import Troubles, source
from tests.simulation.worlds import TYPES, Client, Fault
from tests.support import UNIT_S, Proxy, free_port

SETTLE_S: Final = 5.0 * UNIT_S
"""Seconds after the last fault in which everything must be green, caught up and live."""

BLIND_S: Final = 5.0 * UNIT_S
"""Seconds within which a hub that cannot reach Redis says so, whatever the settings are."""

LATE_S: Final = 1.0 * UNIT_S
"""Seconds that a busy machine may add to what has a deadline."""

STARVED_S: Final = 0.3 * UNIT_S
"""Seconds after which this process should have run: then the machine is in trouble, and so is everybody."""

LOOK_S: Final = 0.1
_WATCH_S: Final = 0.5


@dataclass
class Outcome:
    """What came of a seed.

    Attributes:
        world: Of it.
        failures: The broken promises; times are in seconds from the start.
        counts: What was reached.
        lines: What happened, if that was kept.
    """

    world: World
    failures: list[Failure]
    counts: Counter[str]
    lines: list[str] = field(default_factory=list)


class Chaos:
    """One world at work.

    Attributes:
        world: What was drawn.
        truth: Redis, and what it has taken.
        troubles: What was done to whom.
        calm_from: Time (CLOCK_MONOTONIC) after the last fault.
    """

    def __init__(self, world: World, folder: Path, *, keep_lines: bool = False) -> None:
        self.world = world
        self.counts: Counter[str] = Counter()
        self.truth = Truth(folder, time.monotonic)
        self.troubles = Troubles()
        self.settings = Settings(**cast(Any, self.tables_of()))
        hub, redis = self.settings.hub, self.settings.redis
        self.told_s = min(BLIND_S, hub.prove_interval_s + redis.silence_timeout_s + LATE_S)
        truth = oracle.Truth(
            self.truth.journal,
            self.troubles,
            is_stored=self.truth.is_stored,
            in_charge=self.truth.in_charge,
            silent_s=self._silent_s,
            told_s=self.told_s,
            round_s=redis.silence_timeout_s,
            beat_s=hub.beat_interval_s,
            ping_s=hub.ping_interval_s,
            idle_expire_s=self.settings.history.idle_expire_s,
            dedupe_s=self.settings.history.dedupe_s,
            max_bytes=world.hub_max_bytes,
            behind_max_events=hub.behind_max_events,
            clock_us=lambda: time.time_ns() // 1000,
        )
        self._findings = Findings()
        self.oracle = Oracle(truth, StoredRules(truth, self._findings), self._findings)
        self.calm_from = 0.0
        self.hubs = {f"hub-{number}": HubActor(self, number) for number in world.hubs}
        self.producers = {each.name: ProducerActor(self, each) for each in world.producers}
        self.clients: dict[str, ClientActor] = {}
        self._faults = Faults(self)
        self._proxies: dict[tuple[str, str], Proxy] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ready: dict[str, int] = {}
        self._without_redis: dict[str, float] = {}
        self._statistics: dict[tuple[str, int], dict[str, Any]] = {}
        self._lines: list[str] | None = [] if keep_lines else None
        self._began = time.monotonic()
        self._idle_port = free_port()  # nobody listens there

    # What the parts of it need

    def trace(self, who: str, what: object) -> None:
        """Something has happened."""
        if self._lines is not None:
            self._lines.append(f"{time.monotonic() - self._began:.3f} {who}: {what}")

    def tables_of(self, name: str = "") -> dict[str, dict[str, Any]]:
        """The settings of an actor, with its way to Redis if it has a name."""
        tables = {table: dict(values) for table, values in self.world.tables.items()}
        if name:
            tables["redis"]["url"] = self.proxy(name, "redis").url
        return tables

    def proxy(self, client: str, server: str) -> Proxy:
        """The link between two processes."""
        return self._proxies[client, server]

    def later(self, delay_s: float, work: Callable[[], object]) -> None:
        """Do something after some time."""

        def do() -> None:
            work()
            self.watch_contacts()

        asyncio.get_running_loop().call_later(delay_s, do)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do something meanwhile."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_error(asyncio.get_running_loop(), {"message": task.get_name(), "exception": error})

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Something here has failed: then nothing is proven."""
        error = context.get("exception")
        said = "".join(traceback.format_exception(error)) if error else ""
        self.oracle.fail("an error of the test", time.monotonic(), "test", f"{context['message']}: {said}")

    async def start_redis(self, life: Life) -> None:
        """Start a process; from then on it is at the address."""
        await asyncio.to_thread(life.start)
        self.truth.life = life
        self.send_connections_to(life)

    def send_connections_to(self, life: Life | None) -> None:
        """Where new connections to Redis go."""
        for (_, server), proxy in self._proxies.items():
            if server == "redis":
                proxy.target_port = life.server.port if life is not None else self._idle_port
        self.watch_contacts()

    # What is told to the oracle

    def on_entry(self, book: Book, now: float, entry: Entry) -> None:
        self.trace(book.client, entry)
        found = len(self.oracle.failures)
        self.oracle.on_entry(book, now, entry)
        for failure in self.oracle.failures[found:]:
            self.trace("oracle", failure)

    def watch_contacts(self) -> None:
        """Which hubs can reach Redis may have changed."""
        now, life = time.monotonic(), self.truth.life
        for name, hub in self.hubs.items():
            link = self.proxy(name, "redis")
            blocked = link.requests.blocked or link.answers.blocked
            up = life is not None and not life.frozen and not blocked
            if up or hub.stops or not hub.alive or self.truth.older:
                self._without_redis.pop(name, None)
            else:
                self._without_redis.setdefault(name, now)

    def _silent_s(self, hub: str) -> float:
        """For how many seconds a hub has been running, and could not reach Redis."""
        now = time.monotonic()
        return now - self._without_redis.get(hub, now)

    def expect_notice(self) -> None:
        """Redis' memory went back without a restart: a hub that has seen more notices in a round of its probe."""
        now, seen = time.monotonic(), set[tuple[str, str, Place]]()
        for client in self.clients.values():
            for channel, place in client.book.at.items():
                if place is not None and client.is_connected:
                    seen.add((channel, client.book.hub, place))
        for channel, hub, place in sorted(seen):
            notice_s = self.settings.hub.prove_interval_s + LATE_S
            self.later(notice_s, partial(self._judge_notice, channel, hub, place, now))

    def _judge_notice(self, channel: str, hub: str, place: Place, went_back_at: float) -> None:
        self.truth.pump()
        now, spans = time.monotonic(), self.truth.journal.epochs[channel].values()
        others = [trouble for trouble in self.troubles.noted if trouble.kind != "redis_flush"]
        if any(span.at >= went_back_at for span in spans):
            return
        if not Troubles(others).any(source(hub), now, now - went_back_at + 3):
            self.oracle.fail("memory went back, unnoticed", now, hub, f"{channel}: it had given {place}")

    async def _watch_hub(self, name: str) -> None:
        """Ask a hub for its readiness, again and again."""
        hub, loop, rounds = self.hubs[name], cast(Any, RealLoop({0: self.hubs[name].port})), 0
        while True:
            lives = hub.lives
            status, _ = await ask(loop, 0, "GET /health/ready")
            self._ready[name] = status
            self.counts[f"readiness {status}"] += 1
            if status == 200 and hub.lives == lives:
                hub.has_been_ready()
                if (silent_s := self._silent_s(name)) > self.told_s:
                    what = f"ready, and without Redis for {silent_s:.1f} s"
                    self.oracle.fail("ready although blind", time.monotonic(), name, what)
            self.trace(name, f"readiness {status}")
            if rounds % 4 == 0:
                await self._ask_statistics(name)
            rounds += 1
            await asyncio.sleep(_WATCH_S)

    async def _ask_statistics(self, name: str) -> None:
        hub = self.hubs[name]
        lives = hub.lives
        status, body = await ask(cast(Any, RealLoop({0: hub.port})), 0, "GET /stats?scope=self")
        if status == 200:
            self._statistics[name, lives] = json.loads(body)

    async def _look(self) -> None:
        """Read what Redis has taken, notice what has ended, and whether this machine keeps up."""
        rounds, before = 0, time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            if now - before > LOOK_S + STARVED_S:
                self.counts["starved"] += 1
                names = [*self.hubs, *self.clients, "redis"]
                for name in names:
                    self.troubles.note("starved", [name], before, now)
                self.trace("machine", f"starved for {now - before:.1f} s")
            before = now
            self.truth.pump()
            for hub in self.hubs.values():
                hub.look()
                if hub.process is None and not hub.ended and not hub.comes_back:
                    hub.come_back(0.1)
            for client in self.clients.values():
                client.watch_staleness()
            rounds += 1
            if rounds % 5 == 0:
                self.truth.snapshot()

    # Its course

    async def run(self) -> Outcome:
        """Run it to its end."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.truth.end)
            first = stack.enter_context(Proxy(self._idle_port))
            for client, server, port in self._links():
                link = Proxy(port, beside=first)
                self._proxies[client, server] = stack.enter_context(link)
            stack.callback(self._abandon)
            await self._live()
        self._count()
        failures = [replace(each, at=each.at - self._began) for each in self.oracle.failures]
        return Outcome(self.world, failures, self.counts + self._findings.counts, self._lines or [])

    def _links(self) -> list[tuple[str, str, int]]:
        links = [(name, "redis", self._idle_port) for name in (*self.hubs, *self.producers)]
        return links + [
            (client.name, name, hub.port) for client in self.world.clients for name, hub in self.hubs.items()
        ]

    def _abandon(self) -> None:
        """End all that runs, whatever becomes of one of them."""
        with contextlib.ExitStack() as stack:
            for actor in (*self.hubs.values(), *self.clients.values(), *self.producers.values()):
                stack.callback(actor.abandon)
            for task in self._tasks:
                task.cancel()

    async def _live(self) -> None:
        world = self.world
        asyncio.get_running_loop().set_exception_handler(self._on_error)
        await self.start_redis(self.truth.begin(None))
        self.truth.snapshot()
        self._began = now = time.monotonic()
        self.calm_from = now + world.calm_from_s
        for actor in (*self.hubs.values(), *self.producers.values()):
            actor.start()
        for name in self.hubs:
            self.spawn(self._watch_hub(name))
        self.spawn(self._look())
        for client in world.clients:
            self.later(client.begins_at, partial(self._start_client, client))
        for fault in world.faults:
            self.later(fault.at, partial(self._happen, fault))
        await asyncio.sleep(world.calm_from_s + 0.05)
        await self._settle()
        for task in list(self._tasks):
            task.cancel()
        for hub in self.hubs.values():
            await self._ask_statistics(hub.name)
        for actor in (*self.producers.values(), *self.clients.values()):
            actor.abandon()
        for hub in self.hubs.values():
            await asyncio.to_thread(hub.finish)

    def _start_client(self, client: Client) -> None:
        self.truth.pump()
        actor = self.clients[client.name] = ClientActor(self, client)
        actor.start()

    def _happen(self, fault: Fault) -> None:
        self.trace("fault", fault)
        self.truth.pump()
        self._faults.happen(fault)

    async def _settle(self) -> None:
        """Soon everybody is green, caught up and live."""
        end = self.calm_from + SETTLE_S
        await self._wait(end, self._is_green)
        for producer in self.producers.values():
            producer.abandon()
        last: dict[tuple[str, str], str] = {}
        life = self.truth.life
        sent_at = time.monotonic()
        try:
            assert life is not None, "there is no Redis"
            tables = self.tables_of()
            tables["redis"]["url"] = life.server.url
            async with asyncio.timeout(5), Publisher(Settings(**cast(Any, tables))) as publisher:
                for channel in self.world.channels:
                    for kind in ("SERVER_SLOW", "SERVER_DOWN"):
                        published = await publisher.publish(kind, "last", to=channel)
                        last[channel, kind] = published.event.event_id
        except Exception as error:
            self.oracle.fail("cannot publish at the end", time.monotonic(), "last", f"{error!r}")
        ids = {
            wanted: {channel: last.get((channel, wanted or TYPES[0]), "") for channel in self.world.channels}
            for wanted in ("", *TYPES)
        }
        await self._wait(max(end, sent_at) + 1.5 * UNIT_S, lambda: self._have_all(ids, sent_at))
        self.truth.pump()
        now = time.monotonic()
        self.counts["seconds to settle"] += int(now - self.calm_from)
        self.oracle.at_the_end([each.book for each in self.clients.values()], ids, sent_at, now)
        for name in self.hubs:
            if self._ready.get(name) != 200:
                self.oracle.fail("not ready at the end", now, name, f"readiness {self._ready.get(name)}")

    async def _wait(self, until: float, is_so: Callable[[], bool]) -> None:
        while time.monotonic() < until and not is_so():
            await asyncio.sleep(0.05)

    def _is_green(self) -> bool:
        ready = all(self._ready.get(name) == 200 for name in self.hubs)
        return ready and all(client.is_connected for client in self.clients.values())

    def _have_all(self, ids: dict[str, dict[str, str]], sent_at: float) -> bool:
        return self._is_green() and all(
            self._has_all(client.book, ids[client.book.wanted or ""], sent_at) for client in self.clients.values()
        )

    def _has_all(self, book: Book, last: dict[str, str], sent_at: float) -> bool:
        given = {getattr(entry, "event_id", "") for _, entry in book.entries[-2000:]}
        new = {
            channel
            for at, entry in book.entries
            if at > sent_at and isinstance(entry, Connected)
            for channel, since in entry.since.items()
            if since is None
        }
        return all(last[channel] in given or channel in new for channel in book.channels)

    def _count(self) -> None:
        journal = self.truth.journal
        self.counts["seeds"] = 1
        self.counts["events"] = sum(map(len, journal.accepted.values()))
        self.counts["events at one position"] = sum(map(len, journal.doubled.values()))
        self.counts["epochs"] = sum(map(len, journal.epochs.values()))
        self.counts["trimmed"] = len(journal.removed)
        for stats in self._statistics.values():
            for name in ("resumed", "resumed_whole", "pages_read", "recovered", "twins", "forged", "shed"):
                self.counts[f"hubs {name}"] += stats[name]


async def run_world(world: World, *, keep_lines: bool = False) -> Outcome:
    """Run a world."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        return await Chaos(world, Path(folder), keep_lines=keep_lines).run()


async def run_seed(seed: int, *, keep_lines: bool = False) -> Outcome:
    """Run a seed."""
    return await run_world(draw(seed), keep_lines=keep_lines)
