"""One trial: a fresh hub, subscribers, events, and what came of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Self

from tests.bench.guard import NO_GUARD, Guard
from tests.bench.hubs import PRODUCT, running_hub, statistics
from tests.bench.plan import Plan
from tests.bench.processes import MemoryPeak, Process, TrialError, anonymous_bytes, cpu_s
from tests.bench.stored import clear, publisher
from tests.bench.tools import Tools

_CONNECT_S: Final = 30.0
_FIRST_CONNECTIONS: Final = 20
"""Opened and closed before connections are counted: what a hub needs once is not theirs."""


@dataclass(frozen=True, slots=True)
class Result:
    """What the load tool counted; latencies in µs by percentile ("p50", "p95", "p99", "max")."""

    end: str
    deliveries: int
    expected: int
    missing: int
    duplicates: int
    out_of_order: int
    negative: int
    """Deliveries before their event was due: the wall clock was set meanwhile."""
    outside: int
    closed: int
    close_code: int
    whole: int
    """Subscribers that got all they were to get."""
    holes: int
    """Where an offset was not the one after the last (only counted by offset)."""
    surplus: int
    """Deliveries beyond what a subscriber was to get."""
    began_at_us: int
    """When the first subscriber began to connect, on the wall clock."""
    ended_at_us: int
    """When the last counted delivery came."""
    cpu_s: float
    """CPU time of the load tool from READY on."""
    latency_us: dict[str, float]
    last_us: dict[str, float]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        return cls(**{field.name: record[field.name] for field in fields(cls)})

    def check(self, hub: str) -> None:
        """Raise TrialError unless every event reached every subscriber once and in order."""
        if self.missing:
            closed = f", {self.closed} connections closed ({self.close_code})" if self.closed else ""
            raise TrialError(f"{hub}: {self.missing} of {self.expected} deliveries are missing{closed}")
        self.check_order(hub)

    def check_order(self, hub: str) -> None:
        """Raise TrialError unless what came, came once and in order."""
        if self.duplicates or self.out_of_order or self.holes or self.surplus:
            raise TrialError(
                f"{hub}: {self.duplicates} duplicates, {self.out_of_order} out of order, {self.holes} holes, "
                f"{self.surplus} too many"
            )
        if self.negative:
            raise TrialError(f"{hub}: {self.negative} deliveries came before they were due: was the clock set?")

    def check_all(self, hub: str, deliveries: int) -> None:
        """Raise TrialError unless there were so many deliveries, and nobody was closed."""
        if self.closed or self.deliveries != deliveries:
            raise TrialError(
                f"{hub}: {self.deliveries} deliveries instead of {deliveries}, "
                f"{self.closed} closed ({self.close_code})"
            )

    @property
    def p50_ms(self) -> float:
        return self.latency_us["p50"] / 1000

    @property
    def p95_ms(self) -> float:
        return self.latency_us["p95"] / 1000

    @property
    def p99_ms(self) -> float:
        return self.latency_us["p99"] / 1000

    @property
    def last_ms(self) -> float:
        return self.last_us["p50"] / 1000


@dataclass(frozen=True, slots=True)
class Outcome:
    """One trial, seen from the subscribers and from the hub's process."""

    result: Result
    late_p99_us: float
    hub_cpu_s: float
    hub_growth_bytes: int
    sent_bytes: int = 0
    """Of all deliveries, as the hub says it; 0 of a hub that does not."""

    @property
    def bytes_per_delivery(self) -> float:
        return self.sent_bytes / max(self.result.deliveries + self.result.outside, 1)

    @property
    def cpu_us_per_delivery(self) -> float:
        return self.hub_cpu_s * 1e6 / max(self.result.deliveries + self.result.outside, 1)

    def check(self, hub: str) -> None:
        """Raise TrialError unless every event reached every subscriber once and in order."""
        self.result.check(hub)


@dataclass(frozen=True, slots=True)
class Bench:
    """What all trials share."""

    tools: Tools
    redis_port: int
    hub: str
    """The hub under test, one of HUBS."""
    rounds: int
    quick: bool

    def trial(self, kind: str, plan: Plan, history: bool | None = None, guard: Guard = NO_GUARD) -> Outcome:
        """Broadcast the plan's events through a fresh hub.

        With `history` on or off (None: as the hub has it) they come from the product's own publisher.
        """
        plan = plan.shrunk() if self.quick else plan
        env = {} if history is None else {"BROADCASTER_HISTORY__ENABLED": str(history).lower()}
        if history is not None:
            clear(self.redis_port)
        with running_hub(kind, self.redis_port, self.tools, {**env, **guard.env}) as hub:
            outcome = self.broadcast(hub.pid, hub.port, plan, None if history is None else env, guard)
            return replace(outcome, sent_bytes=statistics(hub.port)["sent_bytes"] if kind == PRODUCT else 0)

    def broadcast(
        self, pid: int, port: int, plan: Plan, env: Mapping[str, str] | None = None, guard: Guard = NO_GUARD
    ) -> Outcome:
        """Broadcast the plan's events through a hub that runs already.

        They come from publish.c, or from the product's own publisher if `env` has settings for it.
        """
        options: dict[str, int | str] = {
            "frozen": plan.frozen,
            "first": plan.warmup + 1,
            "last": plan.warmup + plan.events,
            "each": plan.events // plan.sources,
            "path": plan.path,
            "groups": plan.groups,
            "max_s": int(plan.length_s * 2 + 60),
            **guard.options,
        }
        with self.load(port, plan.conns, **options) as load:
            started_s = cpu_s(pid)
            with MemoryPeak(pid) as memory:
                published = self.publish(plan, env)
                result = await_result(load, plan.grace_s)
            return Outcome(result, published["late_us"]["p99"], cpu_s(pid) - started_s, memory.growth_bytes)

    def load(self, port: int, conns: int, **options: int | str) -> Process:
        """Subscribers, all connected; give `last` (sequence) or they stay idle until terminated."""
        load = Process("load", command(self.tools.load, port=port, conns=conns, **options), talks=True)
        try:
            failed = load.record("READY", _CONNECT_S + 5)["failed"]
            if failed:
                raise TrialError(f"{failed} of {conns} subscribers could not connect")
        except BaseException:
            load.stop()
            raise
        return load

    def publish(self, plan: Plan, env: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Publish warm-up and events on schedule; returns how late the publisher was."""
        with self._publisher(plan, env) as child:
            record = child.record("PUBLISHED", plan.length_s * 2 + 15)
        if record["errors"] or record["heard"] < record["published"]:
            raise TrialError(
                f"publish: of {record['published']} events Redis refused {record['errors']} "
                f"and passed on {record['heard']}"
            )
        return record

    def _publisher(self, plan: Plan, env: Mapping[str, str] | None) -> Process:
        count = plan.warmup + plan.events
        if env is not None:
            return publisher(self.redis_port, count, 1000 / plan.period_ms, plan.event_bytes, env)
        line = command(
            self.tools.publish,
            port=self.redis_port,
            count=count,
            burst=plan.burst,
            period_ms=plan.period_ms,
            bytes=plan.event_bytes,
            sources=plan.sources,
            **({"data": plan.data} if plan.data else {}),
        )
        return Process("publish", line, talks=True)

    def connect_cpu_us(
        self, kind: str, conns: int, ramp_per_s: int, guard: Guard = NO_GUARD, times: int = 1
    ) -> list[float]:
        """CPU time of a hub per accepted subscriber, µs; of each time that all of them come."""
        used_us: list[float] = []
        with running_hub(kind, self.redis_port, self.tools, guard.env) as hub:
            self.load(hub.port, _FIRST_CONNECTIONS, **guard.options).stop()
            for _ in range(times):
                before_s = cpu_s(hub.pid)
                with self.load(hub.port, conns, ramp=ramp_per_s, **guard.options):
                    time.sleep(0.2)  # what a hub still does after its 101
                    used_us.append((cpu_s(hub.pid) - before_s) * 1e6 / conns)
                time.sleep(1.0)  # what it does when they have gone is not theirs who come next
        return used_us

    def idle_bytes(self, kind: str, conns: int, ping_rounds: int, guard: Guard = NO_GUARD) -> float:
        """Private memory of a hub per connected subscriber that did nothing but answer pings, bytes."""
        env = {"BROADCASTER_HUB__PING_INTERVAL_S": "2", **guard.env}
        with running_hub(kind, self.redis_port, self.tools, env) as hub:
            self.load(hub.port, _FIRST_CONNECTIONS, **guard.options).stop()
            before = anonymous_bytes(hub.pid)
            with self.load(hub.port, conns, pings=ping_rounds, **guard.options) as load:
                if ping_rounds:
                    load.record("PINGED", 2.0 * ping_rounds + 20)
                time.sleep(0.3)  # the last pongs
                return (anonymous_bytes(hub.pid) - before) / conns


def say(text: str) -> None:
    """Tell progress, one line per measurement."""
    print(text, file=sys.stderr, flush=True)


def await_result(load: Process, grace_s: float) -> Result:
    """What the load tool counted, once it has everything; after `grace_s` what it has by then."""
    try:
        return Result.from_record(load.record("RESULT", grace_s))
    except TrialError:
        load.terminate()  # it reports what it has
        return Result.from_record(load.record("RESULT", 10))


def command(tool: str, **options: float | str) -> list[str]:
    """`period_ms=5` becomes `--period-ms 5`."""
    return [
        tool,
        *(part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))),
    ]
