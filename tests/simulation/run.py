"""Runs one seed: builds its world, lets its faults happen, and has everything judged."""

from __future__ import annotations

import gc
import hashlib
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sanic import Sanic
from sanic.router import Router
from sanic.touchup import TouchUp

from broadcaster import Publisher
from broadcaster.hub import serve as hub_serve
from broadcaster.hub.catchup.replay import Replay
from broadcaster.settings import Settings
from tests.simulation import clients
from tests.simulation.actors import ClientActor, HubActor, ProducerActor, Watcher
from tests.simulation.books import Book, Entry, Given, Place
from tests.simulation.faults import Faults
from tests.simulation.journal import Accepted, Journal
from tests.simulation.live import LiveRules
from tests.simulation.loop import EPOCH_S, Stuck, VirtualLoop, virtual
from tests.simulation.lua import Scripts
from tests.simulation.memory import Stream
from tests.simulation.network import Link, Network
from tests.simulation.oracle import Failure, Findings, Oracle, Truth
from tests.simulation.redis import HOST, PORT, REPLICA_PORT, Redis, RedisProcess
from tests.simulation.stored import StoredRules
from tests.simulation.troubles import REDIS, Troubles, source
from tests.simulation.worlds import BALANCER_PORT, TYPES, Client, Fault, World, draw

SETTLE_S: Final = 5.0
"""Seconds after the last fault in which everything must be green, caught up and live."""

IDLE_CALLBACKS_PER_S: Final = 500
"""Callbacks of a hub with its clients while nothing happens: timers ten times a second, probes, heartbeats."""

MOST_TASKS: Final = 35
"""Tasks of a hub and of who asks it."""

SLACK_BYTES: Final = 8_000
"""How much more than its limits may wait for a socket: one large event, and what announces gaps."""

BEAT_BYTES: Final = 110
"""Of a heartbeat."""

BLIND_S: Final = 5.0
"""Seconds within which a hub that cannot reach Redis says so, whatever the settings are."""

SNAPSHOT_S: Final = 0.5
_SCRIPTS: Final = Scripts()


@dataclass
class Outcome:
    """What came of a seed.

    Attributes:
        seed: Of it.
        profile: The name of the kinds of fault.
        failures: The broken promises.
        counts: What was reached.
        digest: Of everything that happened: the same for the same seed and script.
        lines: What happened, if that was kept.
    """

    seed: int
    profile: str
    failures: list[Failure]
    counts: Counter[str]
    digest: str
    lines: list[str] = field(default_factory=list)


class Simulation:
    """One world at work."""

    def __init__(self, world: World, keep_lines: bool = False) -> None:
        self.world = world
        self.loop = loop = VirtualLoop()
        self.is_calm = False
        self.network = loop.network = Network(loop, self._random("network"))
        self.network.usual = Link(world.delays_s, splits=world.splits)
        self.network.windows = world.windows
        self.network.narrow = lambda server: server != "redis"  # whose clients send scripts in little time
        self.journal = Journal()
        self.counts: Counter[str] = Counter()
        self.redis = Redis(self.network, _SCRIPTS, self.journal, self._random("redis"), world.node_entries)
        self.redis.output_limit = world.output_limit
        self.settings = _settings(world)
        self.faults = Faults(self)
        self.troubles = Troubles()
        self.told_s = _told_s(self.settings, world)
        self.redis.on_cut = self._on_cut
        truth = Truth(
            self.journal,
            self.troubles,
            is_stored=self._is_stored,
            in_charge=self._in_charge,
            connections=self._connections,
            silent_s=self._silent_s,
            told_s=self.told_s,
            round_s=self.settings.redis.silence_timeout_s,
            beat_s=self.settings.hub.beat_interval_s,
            ping_s=self.settings.hub.ping_interval_s,
            idle_expire_s=self.settings.history.idle_expire_s,
            dedupe_s=self.settings.history.dedupe_s,
            max_bytes=world.hub_max_bytes,
            behind_max_events=world.tables["hub"]["behind_max_events"],
            clock_us=self._clock_us,
        )
        findings = Findings()
        rules = StoredRules if self.settings.history.enabled else LiveRules
        self.oracle = Oracle(truth, rules(truth, findings), findings)
        self._findings = findings
        self.hubs = {f"hub-{port}": HubActor(self, port) for port in world.hubs}
        self.producers = {each.name: ProducerActor(self, each) for each in world.producers}
        self.clients: dict[str, ClientActor] = {}
        self.network.balanced = (clients.HOST, BALANCER_PORT) if world.balanced else None
        self.network.balance = self._balance
        self.watcher = Watcher(self)
        self._digest = hashlib.blake2b(digest_size=8)
        self._lines: list[str] | None = [] if keep_lines else None
        self._without_redis: dict[str, float] = {}
        self._last_sent_at = 0.0
        self._statistics: dict[tuple[int, int], dict[str, Any]] = {}
        self._over = loop.create_future()

    def _random(self, name: str) -> random.Random:
        return random.Random(f"{self.world.seed}/{name}")

    def trace(self, who: str, what: object) -> None:
        """Something has happened."""
        line = f"{self.loop.now:.6f} {who}: {what}"
        self._digest.update(line.encode())
        if self._lines is not None:
            self._lines.append(line)

    def _balance(self, client: str) -> int:
        return self.clients[client].led_to()

    # What is told to the oracle

    def on_entry(self, book: Book, now: float, entry: Entry) -> None:
        self.trace(book.client, entry)
        found = len(self.oracle.failures)
        self.oracle.on_entry(book, now, entry)
        for failure in self.oracle.failures[found:]:
            self.trace("oracle", failure)

    def on_readiness(self, port: int, status: int) -> None:
        """What a hub has just said of itself."""
        hub = f"hub-{port}"
        self.counts[f"readiness {status}"] += 1
        self.trace(hub, f"readiness {status}")
        if status == 200:
            self.hubs[hub].has_been_ready()
        silent_s = self._silent_s(hub) if status == 200 else 0.0
        # What a slow link has taken before it was cut still arrives.
        is_slow = self.troubles.any(source(hub), self.loop.now, silent_s + self.told_s, ("throttle", "delay"))
        if silent_s > self.told_s and not is_slow:
            what = f"ready, and without Redis for {silent_s:.1f} s"
            self.oracle.fail("ready although blind", self.loop.now, hub, what)

    def _runs(self, server: RedisProcess) -> bool:
        """Whether a process is not frozen; a slow one is stopped again and again, too."""
        return not server.process.stopped or self.loop.now - server.process.ran_at < SNAPSHOT_S

    def watch_contacts(self) -> None:
        """Who can reach whom may have changed."""
        for client in self.clients.values():
            client.watch_staleness()
        now, server, replicas = self.loop.now, self.redis.server, self.redis.replicas
        for hub, actor in self.hubs.items():
            ways = self.network.link(hub, "redis"), self.network.link("redis", hub)
            up = server is not None and self._runs(server) and not any(way.blocked for way in ways)
            # Who is at one that stands still moves to another one; a promoted one is the server.
            fed = any(each.is_fed and self._runs(each.server) for each in replicas)
            up &= not replicas or fed or (server is not None and server.replica_port > 0)
            if up or actor.process.stopped or not actor.process.alive or self.redis.older:
                self._without_redis.pop(hub, None)
            else:
                self._without_redis.setdefault(hub, now)

    def _silent_s(self, hub: str) -> float:
        """For how many seconds a hub has been running, and could not reach Redis."""
        self.watch_contacts()  # a slow Redis that was frozen has done something again, perhaps
        return self.loop.now - self._without_redis.get(hub, self.loop.now)

    def _connections(self, client: str) -> list[tuple[float, float]]:
        """When the WebSockets of a client began and ended."""
        return [(end.upgraded_at, end.lost_at) for end in self.network.websockets[client] if end.closed]

    def _on_cut(self, peer: str) -> None:
        """Redis has cut a connection for which it had too much."""
        self.troubles.note("output_limit", [peer, "redis"], self.loop.now, self.loop.now)

    def refuses_rights(self, within_s: float) -> bool:
        """Whether Redis has refused somebody something by its rights."""
        return self.troubles.any([REDIS], self.loop.now, within_s, ("redis_deny",))

    def expect_notice(self) -> None:
        """Redis' memory went back without a restart: a hub that has seen more notices in a round of its probe."""
        now, seen = self.loop.now, dict[str, dict[tuple[str, Place], list[str]]]()
        for actor in self.clients.values():
            book = actor.book
            ends = self.network.websockets[book.client]
            if ends and all(end.closed for end in ends):
                continue  # it sleeps, and does not know: its hub may have closed its channels since then
            for channel, place in book.at.items():
                if place is not None and actor.is_connected:
                    seen.setdefault(channel, {}).setdefault((book.hub, place), []).append(book.client)
        heads = self.journal.losses[-1].heads
        for channel, places in seen.items():
            epoch, offset = heads.get(channel, ("", 0))
            for (hub, place), names in sorted(places.items()):
                if place.epoch == epoch and place.offset > offset:
                    what = channel, hub, place, now, names
                    self.loop.call_outside(now + self._notice_s, self._judge_notice, *what)

    @property
    def _notice_s(self) -> float:
        """Seconds within which a hub notices that memory went back: a round of its probe, and what it takes."""
        notice_s = self.settings.hub.prove_interval_s + 20 * self.world.delays_s[1] + 0.5
        if self.world.replica_lag_s is None:
            return notice_s
        # What was under way to a replica is lost with its memory: the round that waits for it is in vain.
        return notice_s + self.settings.redis.silence_timeout_s

    def _may_have_closed(self, channel: str, names: Sequence[str], went_back_at: float) -> bool:
        """Whether a hub may have closed a channel before it could notice: no client has stayed so long."""
        table, until = self.settings.channels, went_back_at + self._notice_s
        ends = [end for name in names for end in self.network.websockets[name]]
        stayed = any(end.upgraded_at <= went_back_at and end.lost_at >= until for end in ends)
        return channel != self.settings.event.channel and table.linger_s < self._notice_s and not stayed

    def _judge_notice(
        self, channel: str, hub: str, place: Place, went_back_at: float, names: Sequence[str]
    ) -> None:
        if self._may_have_closed(channel, names, went_back_at):
            return
        spans = self.journal.epochs[channel].values()
        within_s = self.loop.now - went_back_at - 1e-6
        since = [loss.heads.get(channel) for loss in self.journal.losses if loss.at > went_back_at]
        if any(head is not None and head[0] == place.epoch and head[1] >= place.offset for head in since):
            return  # it was set back once more, to a memory that has it
        others = [trouble for trouble in self.troubles.noted if trouble.kind != "redis_set_back"]
        if any(span.at >= went_back_at for span in spans) or Troubles(others).any(
            source(hub), self.loop.now, within_s + 3
        ):
            return
        again = any(event.at > went_back_at for event in self.journal.at[channel, *place])
        if again and not any(actor.book.has_been_given(channel, place) for actor in self.clients.values()):
            return  # it got as far again, and no hub had handed on an event there that could be another one
        if self.watcher.ready.get(self.hubs[hub].port) == 503:  # it has noticed
            look_again_at = self.loop.now + self._notice_s
            self.loop.call_outside(look_again_at, self._judge_notice, channel, hub, place, went_back_at, names)
            return
        what = f"{channel}: it had given {place}"
        self.oracle.fail("memory went back, unnoticed", self.loop.now, hub, what)

    def on_statistics(self, port: int, stats: dict[str, Any]) -> None:
        """Of one hub, up to now: what it has reached, and what it holds."""
        self._statistics[port, self.hubs[f"hub-{port}"].lives] = stats
        for channel, figures in stats["channels"].items():
            # One frame may be larger than all of the ring.
            if figures["ring_bytes"] > self.world.ring_bytes + 2_000:
                what = f"{channel}: {figures['ring_bytes']} bytes in the ring"
                self.oracle.fail("the ring is too large", self.loop.now, f"hub-{port}", what)

    def note_published(self, who: str, channel: str, event_id: str, place: Place | None) -> None:
        """The answer to a publisher: if it has a position, the journal knows it."""
        self.counts["published"] += 1
        if place is not None:
            known = self.journal.at[channel, place.epoch, place.offset]
        else:
            known = self.journal.published[channel]
        if not any(each.event_id == event_id for each in known):
            self.oracle.fail("answered, but not taken", self.loop.now, who, f"{event_id} at {place}")

    def _is_stored(self, event: Accepted) -> bool:
        """Whether an event is in the log of the Redis in charge; of two masters nobody knows which one is."""
        if self.redis.server is None or self.redis.older:
            return False
        stream = self.redis.server.memory.values.get(f"{{{event.channel}}}:log".encode())
        if not isinstance(stream, Stream):
            return False
        at = stream.at((event.offset, 0))
        found = stream.entries[at] if at < len(stream.entries) else None
        if found is None or found[0][0] != event.offset:
            return False
        return event.event_id.encode() in found[1][1] and f'"{event.epoch}"'.encode() in found[1][1]

    def _in_charge(self) -> str:
        return "" if self.redis.server is None or self.redis.older else self.redis.server.run_id

    def _clock_us(self) -> int:
        return int((EPOCH_S + self.loop.now + self.redis.clock_s) * 1_000_000)

    # Its course

    def run(self) -> Outcome:
        """Run it to its end."""
        world, loop = self.world, self.loop
        stuck = None
        with virtual(loop, self._random("libraries")):
            try:
                self._begin()
                loop.run_until_complete(self._over)
            except Stuck as error:
                stuck = error
                self.oracle.fail("stuck", loop.now, "loop", str(error))
            finally:
                loop.finish()
        for said in loop.errors:
            self.oracle.fail("an error nobody has handled", loop.now, "loop", said)
        self._count()
        counts = self.counts + self._findings.counts
        counts["stuck"] += stuck is not None
        self.trace("end", f"{len(self.oracle.failures)} failures, {loop.callbacks} callbacks")
        lines = self._lines or []
        return Outcome(world.seed, world.profile, self.oracle.failures, counts, self._digest.hexdigest(), lines)

    def _count(self) -> None:
        self.counts["seeds"] = 1
        journal = self.journal
        self.counts["events"] = sum(map(len, (*journal.accepted.values(), *journal.published.values())))
        self.counts["events not stored"] = sum(map(len, journal.published.values()))
        self.counts["events at one position"] = sum(map(len, journal.doubled.values()))
        self.counts["epochs"] = sum(map(len, journal.epochs.values()))
        for many in (16, 64):
            self.counts[f"epochs over {many}"] = sum(max(0, len(each) - many) for each in journal.epochs.values())
        self.counts["trimmed"] = len(self.journal.removed)
        self.counts["virtual seconds"] = int(self.loop.now)
        self.counts["callbacks"] = self.loop.callbacks
        for stats in self._statistics.values():
            for name in (
                "resumed",
                "resumed_whole",
                "pages_read",
                "recovered",
                "twins",
                "forged",
                "shed",
                "redis_moves",
            ):
                self.counts[f"hubs {name}"] += stats[name]
        self.counts.update(_RESUMED)
        _RESUMED.clear()
        self.counts["output limit"] = self.redis.counts["output limit"]
        self.counts.update({f"network {name}": count for name, count in self.network.counts.items()})

    def _begin(self) -> None:
        loop, world = self.loop, self.world
        if world.replica_lag_s is not None:
            self.redis.replica_lag_s = world.replica_lag_s
            self.redis.replica_ports = tuple(REPLICA_PORT + number for number in range(world.replicas))
        self.redis.start()
        self.redis.snapshot()
        for actor in (*self.hubs.values(), *self.producers.values(), self.watcher):
            loop.call_outside(loop.now, actor.start)
        for client in world.clients:
            loop.call_outside(loop.now + client.begins_at, self._start_client, client)
        for fault in world.faults:
            loop.call_outside(loop.now + fault.at, self._happen, fault)
        self._take_snapshots()
        loop.call_outside(loop.now + world.calm_from_s, self._calm_down)
        loop.call_outside(loop.now + world.calm_from_s + SETTLE_S, self._say_goodbye)

    def _calm_down(self) -> None:
        """From now on nothing is slow any more."""
        self.is_calm = True
        self.network.widen()
        for actor in (*self.hubs.values(), *self.producers.values(), *self.clients.values(), self.watcher):
            actor.process.pauses = None

    def _start_client(self, client: Client) -> None:
        actor = self.clients[client.name] = ClientActor(self, client)
        actor.start()

    def _happen(self, fault: Fault) -> None:
        self.trace("fault", fault)
        self.watch_contacts()
        self.faults.happen(fault)
        self.watch_contacts()

    def _take_snapshots(self) -> None:
        self.redis.snapshot()
        self.watch_contacts()
        self._judge_buffers()
        self.loop.call_outside(self.loop.now + SNAPSHOT_S, self._take_snapshots)

    def _judge_buffers(self) -> None:
        """What waits for a client's socket is bounded, whatever that does."""
        limits, hub_settings = self.world.limits, self.settings.hub
        # A client that reads nothing is closed after so long, and gets a heartbeat of each channel until then.
        patience_s = max(hub_settings.behind_max_ms / 1000, hub_settings.ping_interval_s) + 1
        beats = (patience_s / hub_settings.beat_interval_s + 1) * len(self.world.channels)
        most = limits["unsent_bytes"] + limits["write_bytes"] + SLACK_BYTES + int(beats * BEAT_BYTES)
        for client in self.clients:
            for hub in self.hubs:
                waiting = max(
                    (end.get_write_buffer_size() for end in self.network.between(hub, client)), default=0
                )
                if waiting > most:
                    self.oracle.fail(
                        "too much waits for a client", self.loop.now, hub, f"{waiting} bytes: {client}"
                    )

    def _say_goodbye(self) -> None:
        """Publish a last event on each channel, which everybody must get soon."""
        process = self.watcher.process
        self._judge_readiness()
        for actor in self.producers.values():
            actor.ended = True
            actor.process.kill()
        process.spawn(self._publish_last(), "last events")

    def _judge_readiness(self) -> None:
        """After the last fault every hub is ready, while events come as after them."""
        for port, status in self.watcher.ready.items():
            if status != 200:
                self.oracle.fail("not ready after all", self.loop.now, f"hub-{port}", f"readiness {status}")

    async def _publish_last(self) -> None:
        last = {}
        self._last_sent_at = self.loop.now
        try:
            async with Publisher(self.settings, runtime=self.watcher.runtime) as publisher:
                for channel in self.world.channels:
                    for kind in ("SERVER_SLOW", "SERVER_DOWN"):
                        published = await publisher.publish(kind, "last", to=channel)
                        last[channel, kind] = published.event.event_id
        except Exception as error:
            self.oracle.fail("cannot publish at the end", self.loop.now, "last", f"{error!r}")
        self.loop.call_outside(self.loop.now + 1.5, self._begin_idling, last)

    def _begin_idling(self, last: dict[tuple[str, str], str]) -> None:
        busy = sum(self.redis.counts.values()), self.loop.callbacks
        self.watcher.process.spawn(self._ask_all_statistics(), "last statistics")
        self.loop.call_outside(self.loop.now + 1.0, self._end, last, *busy)

    @property
    def _idle_commands(self) -> int:
        """How many commands the hubs may send in a second in which nothing happens: those of their probes."""
        rounds = int(1 / self.settings.hub.prove_interval_s) + 2
        return len(self.hubs) * (rounds * (4 + 2 * len(self.world.channels)) + 10)

    def _judge_idleness(self, commands: int, callbacks: int) -> None:
        """Where nothing happens nobody is busy, and nothing is left behind."""
        now, hubs = self.loop.now, len(self.hubs)
        entries = [entry for actor in self.clients.values() for entry in actor.book.entries]
        if any(isinstance(entry, Given) and at > now - 1.0 for at, entry in entries):
            return  # one is still reading what it had missed
        if commands > self._idle_commands:
            self.oracle.fail("busy while nothing happens", now, "redis", f"{commands} commands in a second")
        if callbacks > IDLE_CALLBACKS_PER_S * (hubs + len(self.clients)):
            self.oracle.fail("busy while nothing happens", now, "loop", f"{callbacks} callbacks in a second")
        if (tasks := self.loop.count_tasks()) > MOST_TASKS * (hubs + 1):
            self.oracle.fail("too many tasks", now, "loop", f"{tasks} tasks")

    async def _ask_all_statistics(self) -> None:
        for port in self.world.hubs:
            await self.watcher.ask_statistics(port)

    def _end(self, last: dict[tuple[str, str], str], commands: int, callbacks: int) -> None:
        now = self.loop.now
        ids = {
            wanted: {channel: last.get((channel, wanted or TYPES[0]), "") for channel in self.world.channels}
            for wanted in ("", *TYPES)
        }
        self._over.set_result(None)  # whatever is found now
        self.oracle.at_the_end([actor.book for actor in self.clients.values()], ids, self._last_sent_at, now)
        self._judge_idleness(sum(self.redis.counts.values()) - commands, self.loop.callbacks - callbacks)
        self._judge_readiness()


def _told_s(settings: Settings, world: World) -> float:
    """Seconds within which a hub that cannot reach Redis says so: until its next probe, and what that may take."""
    late_s = 4 * world.delays_s[1] + (2 * world.pauses[1] if world.pauses else 0.0) + 0.3
    return min(BLIND_S, settings.hub.prove_interval_s + settings.redis.silence_timeout_s + late_s)


def _settings(world: World) -> Settings:
    tables: dict[str, Any] = {name: dict(table) for name, table in world.tables.items()}
    tables["redis"]["url"] = f"redis://{HOST}:{PORT}/0"
    if world.replica_lag_s is not None:
        ports = range(REPLICA_PORT, REPLICA_PORT + world.replicas)
        tables["redis"]["subscribe_url"] = [f"redis://{HOST}:{port}/0" for port in ports]
    if world.token:
        key = {"name": "all", "key": world.token, "subscribe": ["events.*"], "publish": ["events.*"]}
        tables["auth"] = {"mode": "token", "api_keys": [key]}
    tables["event"] = {"channel": world.channels[0]}
    return Settings(**tables)


_TOUCHED: list[bool] = []


def _touch_up_once(app: Any) -> None:
    """Sanic rewrites its own classes at each start, and dies of what it has rewritten already."""
    if not _TOUCHED:
        _TOUCHED.append(True)
        _TOUCH_UP(app)


_TOUCH_UP: Final[Any] = TouchUp.run


_RESUMED: Final[Counter[str]] = Counter()
"""How many subscriptions of this seed have resumed from where: the hub's statistics do not tell these apart."""


def _counting(where: str, method: Any) -> Any:
    """A method of `Replay` that feeds a subscription, so that it is counted if it is the first to."""

    def feed(replay: Replay, subscription: Any, *rest: Any) -> Any:
        was_welcomed = subscription.since is None
        fed = method(replay, subscription, *rest)
        _RESUMED[f"resumed from the {where}"] += not was_welcomed and subscription.since is None
        return fed

    return feed


def prepare() -> None:
    """Make this process fit for simulations; it is of no other use afterwards."""
    if Sanic.test_mode:
        return
    Sanic.test_mode = True
    setattr(TouchUp, "run", _touch_up_once)  # noqa: B010
    setattr(Replay, "_enter_ring", _counting("ring", Replay._enter_ring))  # noqa: B010
    setattr(Replay, "_serve", _counting("log", Replay._serve))  # noqa: B010
    setattr(hub_serve, "_quiet_garbage_collector", lambda: None)  # noqa: B010
    for name in ("broadcaster", "sanic", "websockets", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
        logging.getLogger(name).propagate = False
    gc.collect()
    gc.freeze()  # what is here to stay is not looked at between seeds


def run_seed(seed: int, *, keep_lines: bool = False) -> Outcome:
    """Run a seed."""
    return run_world(draw(seed), keep_lines=keep_lines)


def run_world(world: World, *, keep_lines: bool = False) -> Outcome:
    """Run a world, that of a seed or a part of it."""
    prepare()
    simulation = Simulation(world, keep_lines)
    outcome = simulation.run()
    del simulation
    # Sanic keeps every app that there was, and each with all that it has served.
    Sanic._app_registry.clear()
    Router.get.cache_clear()
    Router.find_route_by_view_name.cache_clear()
    gc.collect()
    return outcome
