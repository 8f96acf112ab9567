"""The simulation: Redis, replicas and hubs as servers of one core each, with the measured costs.

A hub's deliveries of one event are one piece of work, not one each: what is asked is when the first and when the
last subscriber has it, and 15 million deliveries would be simulated for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import simpy

from tests.scale.costs import Costs

Steps = Generator[Any, Any, None]
_TURN_US: Final = 3000.0
"""How long Linux lets one process work before another that wants to."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is simulated.

    Attributes:
        hubs: How many.
        subscribers: Of each of them.
        replicas: Of Redis; hubs are spread over them. 0: all hubs subscribe at the master.
        rate_hz: Events per second.
        events: How many of them.
        link_ms: From one machine to another, one way.
        one_core: All hubs share one core, and Redis and the subscribers another, as in `measure.py`; else each
            process has a core of its own, and subscribers are elsewhere.
    """

    hubs: int
    subscribers: int
    replicas: int = 0
    rate_hz: float = 10.0
    events: int = 30
    link_ms: float = 0.0
    one_core: bool = False


@dataclass(slots=True)
class Spread:
    """When subscribers got one event; seconds since it was due."""

    first_s: float = float("inf")
    last_s: float = 0.0

    def note(self, first_s: float, last_s: float) -> None:
        self.first_s = min(self.first_s, first_s)
        self.last_s = max(self.last_s, last_s)


@dataclass(slots=True)
class Simulated:
    """What came of it.

    Attributes:
        spreads: Of every event.
        hub_us: All hubs' CPU time per event.
        redis_us: The master's CPU time per event.
        busiest: The share of the time that the busiest Redis was busy.
    """

    spreads: list[Spread] = field(default_factory=list)
    hub_us: float = 0.0
    redis_us: float = 0.0
    busiest: float = 0.0


class Core:
    """One core: who wants to work on it gets turns of at most `turn_us`, in order of arrival."""

    def __init__(self, env: simpy.Environment, turn_us: float = math.inf) -> None:
        self._env = env
        self._resource = simpy.Resource(env, capacity=1)
        self._turn_us = turn_us
        self.used_us = 0.0

    @property
    def busy(self) -> bool:
        """Whether somebody works on it."""
        return self._resource.count > 0

    def work(self, us: float) -> Steps:
        """Be busy for so long, in turns."""
        while us > 0:
            turn = min(us, self._turn_us)
            with self._resource.request() as request:
                yield request
                yield self._env.timeout(turn / 1e6)
            self.used_us += turn
            us -= turn


class Simulation:
    """One deployment."""

    def __init__(self, deployment: Deployment, costs: Costs) -> None:
        self._plan, self._costs = deployment, costs
        self._env = env = simpy.Environment()
        self._link_s = deployment.link_ms / 1000 if deployment.link_ms else costs.link_us / 1e6
        self._shared = Core(env, _TURN_US) if deployment.one_core else None  # Redis' and the subscribers'
        hub_core = Core(env, _TURN_US) if deployment.one_core else None
        self._master = self._shared or Core(env)
        self._replicas = [Core(env) for _ in range(deployment.replicas)]
        self._hub_cores = [hub_core or Core(env) for _ in range(deployment.hubs)]
        self._result = Simulated(spreads=[Spread() for _ in range(deployment.events)])
        self._redis_us = self._hub_us = 0.0

    def run(self) -> Simulated:
        """Simulate it until everybody has every event."""
        self._env.process(self._publish())
        self._env.run()
        result, lasted_s = self._result, self._env.now
        result.hub_us = self._hub_us / self._plan.events
        result.redis_us = self._redis_us / self._plan.events
        if not self._plan.one_core:
            result.busiest = max(core.used_us for core in (self._master, *self._replicas)) / 1e6 / lasted_s
        return result

    def _publish(self) -> Steps:
        for number in range(self._plan.events):
            self._env.process(self._at_master(number, self._env.now))
            yield self._env.timeout(1 / self._plan.rate_hz)

    def _at_master(self, number: int, due_s: float) -> Steps:
        plan, costs = self._plan, self._costs
        yield self._env.timeout(self._link_s)
        us = costs.redis_us(plan.replicas or plan.hubs) + (0 if self._master.busy else costs.redis_wake_us)
        self._redis_us += us
        yield from self._master.work(us)
        if not self._replicas:
            self._hand_on(self._hub_cores, number, due_s)
            return
        for place, replica in enumerate(self._replicas):
            self._env.process(self._at_replica(replica, self._hub_cores[place :: plan.replicas], number, due_s))

    def _at_replica(self, core: Core, hubs: Sequence[Core], number: int, due_s: float) -> Steps:
        yield self._env.timeout(self._link_s)
        yield from core.work(self._costs.redis_apply_us + self._costs.redis_us(len(hubs)))
        self._hand_on(hubs, number, due_s)

    def _hand_on(self, hubs: Sequence[Core], number: int, due_s: float) -> None:
        for core in hubs:
            self._env.process(self._at_hub(core, self._result.spreads[number], due_s))

    def _at_hub(self, core: Core, spread: Spread, due_s: float) -> Steps:
        plan, costs, env = self._plan, self._costs, self._env
        yield env.timeout(self._link_s)
        self._hub_us += costs.hub_us(plan.subscribers)
        yield from core.work(costs.hub_event_us)
        yield from core.work(costs.hub_delivery_us)
        first_s = env.now + self._link_s - due_s
        if self._shared is not None:  # the subscribers' process wakes up, too, and reads while the hub writes on
            first_s += costs.receive_us / 1e6
        yield from core.work(costs.hub_delivery_us * (plan.subscribers - 1))
        spread.note(first_s, env.now + self._link_s - due_s)


def simulate(deployment: Deployment, costs: Costs) -> Simulated:
    """What a deployment does by these costs."""
    return Simulation(deployment, costs).run()
