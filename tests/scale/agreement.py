"""Whether the model says of this machine what is measured on it."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Final

from tests.scale.costs import Costs
from tests.scale.measure import EVENTS, OFTEN_HZ, RATE_HZ, Measured
from tests.scale.model import Deployment, simulate

HUBS: Final = (1, 2, 4)
SUBSCRIBERS: Final = 1000
WITHIN: Final = 0.15


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure, measured and by the model."""

    hubs: int
    what: str
    measured: float
    modelled: float

    @property
    def error(self) -> float:
        """How far the model is off, as a share of what was measured."""
        return self.modelled / self.measured - 1

    @property
    def agrees(self) -> bool:
        return abs(self.error) <= WITHIN


def compare(measured: Measured, often: Measured, costs: Costs) -> list[Comparison]:
    """The three figures of one deployment of this machine.

    Args:
        measured: With many subscribers.
        often: The same hubs with few subscribers and many events: Redis' time per event is little beside what it
            does by itself.
        costs: By which the model goes.
    """
    plan = Deployment(measured.hubs, measured.subscribers, rate_hz=RATE_HZ, events=EVENTS, one_core=True)
    simulated = simulate(plan, costs)
    plan = Deployment(often.hubs, often.subscribers, rate_hz=OFTEN_HZ, events=EVENTS, one_core=True)
    redis_us = simulate(plan, costs).redis_us
    deliveries = measured.hubs * measured.subscribers
    spread_ms = median((spread.last_s - spread.first_s) * 1000 for spread in simulated.spreads)
    return [
        Comparison(measured.hubs, "hub CPU per delivery, µs", measured.delivery_us, simulated.hub_us / deliveries),
        Comparison(measured.hubs, "first to last subscriber, ms", measured.spread_ms, spread_ms),
        Comparison(measured.hubs, "Redis' CPU per event, µs", often.redis_us, redis_us),
    ]
