"""What a trial consists of, and the plans of the rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Self


@dataclass(frozen=True, slots=True)
class Plan:
    """Who listens to what. The first `warmup` events are delivered but not judged."""

    conns: int
    events: int
    period_ms: float
    burst: int = 1
    event_bytes: int = 256
    data: str = ""
    """File with the `data` of every event; else it is padding, up to `event_bytes`."""
    warmup: int = 0
    frozen: int = 0
    path: str = "/ws"
    """What subscribers ask for; a %d in it is the number of the subscriber, counted modulo `groups`."""
    groups: int = 1
    sources: int = 1
    """Sources that take turns, src-0 first. More than one: each subscriber gets the events of one of them."""
    grace_s: float = 5.0
    """Time after the last event for deliveries to come; later ones are missing."""

    @property
    def length_s(self) -> float:
        return (self.warmup + self.events) / self.burst * self.period_ms / 1000

    def shrunk(self) -> Self:
        """A fifth of the connections and events: shows that everything works, and nothing else."""
        fewer = replace(self, conns=max(self.conns // 5, 10), events=max(self.events // 5, 20))
        return replace(fewer, groups=max(self.groups // 5, 1), sources=max(self.sources // 5, 1))


BURST: Final = Plan(conns=50, events=1000, burst=50, period_ms=250, warmup=100)
STEADY: Final = Plan(conns=50, events=50, period_ms=100, warmup=5)
FANOUT: Final = Plan(conns=1000, events=100, period_ms=50, warmup=10)
FROZEN: Final = Plan(conns=50, events=3750, period_ms=5, event_bytes=16_000, warmup=50)

LADDER_CONNS: Final = 500
LADDER_STEP_S: Final = 2.0
LADDER_P99_MS: Final = 100.0
LADDER: Final = tuple(round(1_000_000 * 1.4**k) for k in range(-9, 5))
"""Deliveries per second: 48 thousand to 3.8 million, in steps of 1.4."""

IDLE_CONNS: Final = 5000
PING_ROUNDS: Final = 2
CONNECT_RAMP_PER_S: Final = 4000

DENSE_PATH: Final = "/ws?type=SERVER_DOWN&source=bench&source=other-%d"
"""Another filter for each group, and every event passes all of them."""
DENSE: Final = replace(FANOUT, path=DENSE_PATH, groups=100)
SPARSE: Final = Plan(
    conns=1000, events=2000, period_ms=2, warmup=200, path="/ws?source=src-%d", groups=100, sources=100
)
FEW: Final = Plan(conns=10, events=2000, period_ms=2, warmup=200)
"""As many deliveries as `SPARSE`, to subscribers that want everything."""

GUARDED_PATH: Final = "/ws?severity=critical&severity=warning"
"""A filter that every event passes."""

OUTAGE_EVENTS: Final = 10_000
OUTAGE_CONNS: Final = 5


@dataclass(frozen=True, slots=True)
class StormPlan:
    """`live` subscribers follow a stream while `conns` others come at once and want the last `events`."""

    live: int = 200
    rate_hz: float = 50.0
    conns: int = 1000
    events: int = 100
    stored: int = 150
    """Events that are stored before the hub starts, and therefore are not in its ring."""
    event_bytes: int = 256
    from_log: bool = True
    """Whether what they want must not be in the ring any more."""
    repeat: int = 3
    """Storms, each with a quiet window, that make one figure of a round."""

    def shrunk(self) -> Self:
        return replace(self, live=self.live // 5, conns=self.conns // 5, repeat=1)


STORM: Final = StormPlan()
RECONNECT: Final = StormPlan(conns=5000, rate_hz=10.0, events=10, from_log=False, repeat=1)


@dataclass(frozen=True, slots=True)
class FloodPlan:
    """`live` subscribers follow a stream while `conns` peers that mean no good come as fast as `per_s`.

    Attributes:
        say: What those say: half of a request, pings, or text.
        talk_hz: How many frames each sends per second; 0: as fast as the hub takes them.
    """

    say: str
    conns: int
    per_s: float
    talk_hz: float = 0
    live: int = 50
    rate_hz: float = 50.0
    event_bytes: int = 256
    window_s: float = 3.0


FLOODS: Final = {
    "half-open requests": FloodPlan("half", conns=5000, per_s=1000),
    "talkers, as fast as they can": FloodPlan("pings", conns=500, per_s=200),
    "talkers, below the limit": FloodPlan("text", conns=200, per_s=200, talk_hz=50),
}

PAIRS: Final = 5
"""Least rounds of the rows that look for small differences."""


def ladder_plan(deliveries_per_s: float) -> Plan:
    """One step of the ladder: single events, evenly spread; the publisher batches nothing."""
    rate_hz = deliveries_per_s / LADDER_CONNS
    count = round(rate_hz * LADDER_STEP_S)
    return Plan(LADDER_CONNS, count, period_ms=1000 / rate_hz, warmup=count // 5, grace_s=1.0)
