"""Real hubs on one core, everything else on the other: what the model is made of, and what it is held against."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

import redis

from broadcaster.redis.server import RedisServer
from tests.bench.hubs import PRODUCT, Hub, redis_url, running_hub
from tests.bench.plan import Plan
from tests.bench.processes import Process, TrialError, anonymous_bytes, cpu_s
from tests.bench.stored import head, store
from tests.bench.tools import Tools
from tests.bench.trial import Bench, await_result
from tests.bench.windows import read_samples
from tests.scale.costs import Costs

EVENT_BYTES: Final = 256
RATE_HZ: Final = 10.0
EVENTS: Final = 60
OFTEN_HZ: Final = 200.0
_WARMUP: Final = 10
_SETTLE_S: Final = 0.5
_FRAME_BYTES: Final = 4 + 40
"""Head of a WebSocket frame of this size, and of the TCP segment and IP packet that carry it."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one plan cost in real processes.

    Attributes:
        hubs: How many, each with `subscribers`.
        hub_us: All hubs' CPU time per event.
        redis_us: Redis' CPU time per event.
        spread_ms: From the first subscriber's receive of an event to the last one's, over all hubs: median.
        first_ms: From its due time to the first receive: median.
        receive_us: CPU time of the subscribers' processes per delivery.
    """

    hubs: int
    subscribers: int
    hub_us: float
    redis_us: float
    spread_ms: float
    first_ms: float
    receive_us: float

    @property
    def delivery_us(self) -> float:
        """The hubs' CPU time per delivery."""
        return self.hub_us / (self.hubs * self.subscribers)


class Rig:
    """A Redis, and hubs that are started as they are wanted.

    Hubs have one core, and publisher, Redis and subscribers the other: so a hub is not slowed down by those that
    it would not share a machine with.
    """

    def __init__(self, tools: Tools, server: RedisServer) -> None:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            raise TrialError("two cores are needed: one for hubs, one for the rest")
        self._hub_core, self._rest = {cores[-1]}, {cores[0]}
        self.tools = tools
        self.server = server
        self.bench = Bench(tools, server.port, PRODUCT, rounds=1, quick=False)
        os.sched_setaffinity(0, self._rest)  # children inherit it
        _pin(server.pid, self._rest)

    @contextmanager
    def hubs(self, count: int, env: dict[str, str] | None = None) -> Iterator[list[Hub]]:
        """So many, all on the one core."""
        with ExitStack() as stack:
            started = []
            for _ in range(count):
                started.append(stack.enter_context(running_hub(PRODUCT, self.server.port, self.tools, env)))
                _pin(started[-1].pid, self._hub_core)
            yield started

    def broadcast(self, hubs: int, subscribers: int, rate_hz: float = RATE_HZ, events: int = EVENTS) -> Measured:
        """Publish events at a constant rate to hubs with so many subscribers each.

        Raises:
            TrialError: One was not delivered once and in order to each.
        """
        plan = Plan(subscribers, events, 1000 / rate_hz, event_bytes=EVENT_BYTES, warmup=_WARMUP)
        with tempfile.TemporaryDirectory() as folder, self.hubs(hubs) as started, ExitStack() as stack:
            files = [Path(folder, str(number)) for number in range(hubs)]
            loads = [
                stack.enter_context(self._load(hub, plan, file)) for hub, file in zip(started, files, strict=True)
            ]
            time.sleep(_SETTLE_S)
            idle_us_per_s = self._idle(self.server.pid)
            hub_idle = sum(self._idle(hub.pid) for hub in started)
            watched = [self.server.pid, *(hub.pid for hub in started)]
            before = [cpu_s(pid) for pid in watched]
            began = time.monotonic()
            self.bench.publish(plan)
            results = [await_result(load, plan.grace_s) for load in loads]
            lasted_s = time.monotonic() - began
            redis_s, *hub_s = [cpu_s(pid) - then for pid, then in zip(watched, before, strict=True)]
            for result in results:
                result.check("hub")
            spreads, firsts = _spreads(files)
        count = events + _WARMUP
        return Measured(
            hubs,
            subscribers,
            (sum(hub_s) * 1e6 - hub_idle * lasted_s) / count,
            (redis_s * 1e6 - idle_us_per_s * lasted_s) / count,
            median(spreads),
            median(firsts),
            sum(result.cpu_s for result in results) * 1e6 / (count * hubs * subscribers),
        )

    def often(self, hubs: int) -> Measured:
        """Many events to few subscribers, for what Redis does per event."""
        return self.broadcast(hubs, 10, OFTEN_HZ, 1500)

    def _load(self, hub: Hub, plan: Plan, samples: Path) -> Process:
        last = plan.warmup + plan.events
        return self.bench.load(
            hub.port, plan.conns, first=plan.warmup + 1, last=last, samples=str(samples), max_s=120
        )

    def _idle(self, pid: int, for_s: float = 2.0) -> float:
        """CPU time of a process per second while nothing happens, in µs."""
        before, began = cpu_s(pid), time.monotonic()
        time.sleep(for_s)
        return (cpu_s(pid) - before) * 1e6 / (time.monotonic() - began)

    def idle_hub(self) -> tuple[float, int]:
        """A hub's CPU time per second without anybody (µs), and its private memory (bytes)."""
        with self.hubs(1) as (hub,):
            time.sleep(1.0)
            return self._idle(hub.pid, 5.0), anonymous_bytes(hub.pid)

    def channel_bytes(self, channels: int = 1000) -> float:
        """A hub's private memory per further open channel, the connection that opens it not counted."""
        env = {f"BROADCASTER_CHANNELS__{name}": str(channels + 10) for name in ("MAX_OPEN", "MAX_PER_ADDRESS")}
        used = []
        for path in ("/ws", "/ws?channel=events.scale%d"):
            with self.hubs(1, env) as (hub,):
                self.bench.load(hub.port, 20).stop()
                before = anonymous_bytes(hub.pid)
                with self.bench.load(hub.port, channels, path=path, groups=channels):
                    time.sleep(1.0)
                    used.append(anonymous_bytes(hub.pid) - before)
        return (used[1] - used[0]) / channels

    def redis_us(self, connections: int, events: int, rate_hz: float = 0.0) -> float:
        """Redis' CPU time per event with so many plain connections subscribed; without a rate it has no rest."""
        with ExitStack() as stack:
            client = stack.enter_context(redis.Redis.from_url(redis_url(self.server.port)))
            for _ in range(connections):
                subscriber = stack.enter_context(socket.create_connection(("127.0.0.1", self.server.port)))
                subscriber.sendall(b"SUBSCRIBE events.scale\r\n")
            time.sleep(0.5)
            before = cpu_s(self.server.pid)
            began = time.monotonic()
            payload = b"x" * EVENT_BYTES
            for number in range(events):
                if rate_hz:
                    time.sleep(max(0.0, began + number / rate_hz - time.monotonic()))
                client.publish("events.scale", payload)
            time.sleep(0.2)
            return (cpu_s(self.server.pid) - before) * 1e6 / events

    def replica_us(self, events: int = 500) -> float:
        """A replica's CPU time per event, besides that of its subscribers (it has none here)."""
        with RedisServer.start(None, "--replicaof", "127.0.0.1", str(self.server.port)) as replica:
            _pin(replica.pid, self._rest)
            with redis.Redis.from_url(replica.url) as client:
                deadline = time.monotonic() + 20
                while client.info("replication")["master_link_status"] != "up":
                    if time.monotonic() > deadline:
                        raise TrialError("the replica does not replicate")
                    time.sleep(0.1)
            idle = self._idle(replica.pid)
            before, began = cpu_s(replica.pid), time.monotonic()
            self.redis_us(1, events, 100.0)
            return (cpu_s(replica.pid) - before - idle * (time.monotonic() - began) / 1e6) * 1e6 / events

    def resume_us(self, connections: int = 1000, events: int = 100) -> float:
        """A hub's CPU time per event that a resuming subscriber is given, its connecting not counted."""
        used = []
        for behind in (0, events):
            store(self.server.port, events, EVENT_BYTES)
            with self.hubs(1) as (hub,):
                self.bench.load(hub.port, 20).stop()
                at = head(self.server.port)
                path = f"/ws?since={at.epoch}-{at.offset - behind}"
                before = cpu_s(hub.pid)
                options = {"first": at.offset - behind + 1, "last": at.offset, "by_offset": 1} if behind else {}
                with self.bench.load(hub.port, connections, path=path, max_s=30, stay=1, **options) as load:
                    if behind:
                        result = await_result(load, 20)
                        if result.whole != connections:
                            raise TrialError(f"{result.whole} of {connections} were served")
                    time.sleep(0.5)
                    used.append(cpu_s(hub.pid) - before)
        return (used[1] - used[0]) * 1e6 / (connections * events)

    def connection_us(self) -> float:
        """A hub's CPU time to let one subscriber in."""
        return median(self.bench.connect_cpu_us(PRODUCT, 2000, 2000, times=3))


def _pin(pid: int, cores: set[int]) -> None:
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), cores)


def _spreads(files: list[Path]) -> tuple[list[float], list[float]]:
    """Per event: from its first receive anywhere to its last, and from its due time to the first; in ms."""
    first: dict[int, int] = {}
    last: dict[int, int] = defaultdict(int)
    for file in files:
        sampled = read_samples(file)
        for due_us, late_ns in zip(sampled[::2], sampled[1::2], strict=True):
            first[due_us] = min(first.get(due_us, late_ns), late_ns)
            last[due_us] = max(last[due_us], late_ns)
    return [(last[due] - first[due]) / 1e6 for due in first], [late / 1e6 for late in first.values()]


def calibrate(rig: Rig, machine: str) -> Costs:
    """The constants of this machine: one hub with few and with many subscribers, Redis with few and many hubs.

    Args:
        rig: Where they are measured.
        machine: What it is, for the file.
    """
    few, many = rig.broadcast(1, 100), rig.broadcast(1, 1000)
    delivery_us = (many.hub_us - few.hub_us) / (many.subscribers - few.subscribers)
    event_us = max(few.hub_us - few.subscribers * delivery_us, 0.0)
    points = tuple((connections, rig.redis_us(connections, 500)) for connections in (1, 3, 10, 30, 100, 300, 1000))
    idle_us, hub_bytes = rig.idle_hub()
    return Costs(
        machine=machine,
        redis_event_us=points,
        redis_wake_us=rig.often(1).redis_us - points[0][1],
        redis_apply_us=rig.replica_us(),
        hub_event_us=event_us,
        hub_delivery_us=delivery_us,
        hub_idle_us_per_s=idle_us,
        hub_connect_us=rig.connection_us(),
        hub_resume_us=rig.resume_us(),
        receive_us=many.receive_us,
        link_us=max((few.first_ms * 1000 - few.redis_us - event_us) / 3, 0.0),
        hub_bytes=hub_bytes,
        connection_bytes=round(rig.bench.idle_bytes(PRODUCT, 2000, 2)),
        channel_bytes=round(rig.channel_bytes()),
        delivery_bytes=EVENT_BYTES + _FRAME_BYTES,
        event_bytes=EVENT_BYTES,
    )
