"""What no machine here can run: up to 1,000 hubs, 15 million subscribers, 100,000 channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Final

import simpy
from tabulate import tabulate

from tests.scale.costs import Costs
from tests.scale.model import Deployment, simulate

SUBSCRIBERS: Final = 15_000
"""Of a hub: 15 million of 1,000 hubs."""
LINK_MS: Final = 0.25
"""One way between two machines of a data centre."""
DRAIN_S: Final = 3.0
READY_S: Final = 2.0
"""Until a hub that was started is ready."""
SHARE: Final = 0.25
"""Of a hub's time that connecting and resuming may take while it has live events (`limits.slice_share`)."""


def tables(costs: Costs, most_hubs: int = 1000) -> dict[str, str]:
    """The table of each scenario by its name; those that are simulated with so many hubs at most."""
    return {
        "growth": growth(costs, most_hubs),
        "redis_limit": redis_limit(costs, most_hubs),
        "channels": channels(costs),
        "rolling_restart": rolling_restart(costs),
        "reconnect_storm": reconnect_storm(costs),
    }


def growth(costs: Costs, most_hubs: int = 1000) -> str:
    """One channel, one event a second, more and more hubs of 15,000 subscribers."""
    rows = []
    for hubs, replicas in (
        (1, 0),
        (10, 0),
        (100, 0),
        (100, 4),
        (300, 0),
        (300, 8),
        (1000, 0),
        (1000, 16),
        (1000, 32),
    ):
        plan = Deployment(hubs, SUBSCRIBERS, replicas, rate_hz=1.0, events=5, link_ms=LINK_MS)
        done = simulate(plan, costs)
        rows.append(
            (
                hubs,
                replicas,
                f"{hubs * SUBSCRIBERS:,}",
                median(each.first_s for each in done.spreads) * 1000,
                median(each.last_s for each in done.spreads) * 1000,
                done.redis_us / 1000,
                f"{hubs * (costs.hub_bytes + SUBSCRIBERS * costs.connection_bytes) / 1e9:,.1f}",
                f"{hubs * SUBSCRIBERS * costs.delivery_bytes * 8 / 1e9:,.2f}",
            )
        )
    headers = (
        "hubs",
        "replicas",
        "subscribers",
        "first, ms",
        "last, ms",
        "master, ms of CPU an event",
        "hubs' memory, GB",
        "Gbit an event",
    )
    return _titled("One channel, one event a second", rows, headers)


def redis_limit(costs: Costs, most_hubs: int = 1000) -> str:
    """How many events a second one Redis gives so many hubs, alone and through replicas."""
    rows = []
    for hubs in (10, 100, 300, 1000):
        for replicas in (0, 4, 16, 32):
            if hubs > most_hubs or replicas * 4 > hubs:
                continue
            limit = min(bottlenecks(costs, hubs, replicas).values())
            rate_hz = limit * 0.8
            plan = Deployment(hubs, 1, replicas, rate_hz=rate_hz, events=20, link_ms=LINK_MS)
            done = simulate(plan, costs)
            where = min(bottlenecks(costs, hubs, replicas).items(), key=lambda item: item[1])[0]
            last_ms = median(each.last_s for each in done.spreads) * 1000
            rows.append((hubs, replicas, round(limit), where, last_ms, f"{done.busiest:.0%}"))
    headers = ("hubs", "replicas", "events/s at most", "limited by", "last hub at 80 %, ms", "busiest Redis")
    return _titled("Where PUBLISH is the limit (one channel that all hubs have open)", rows, headers)


def bottlenecks(costs: Costs, hubs: int, replicas: int) -> dict[str, float]:
    """Events per second at which each Redis is busy all the time."""
    if not replicas:
        return {"the master": 1e6 / costs.redis_us(hubs)}
    each = costs.redis_apply_us + costs.redis_us(hubs / replicas)
    return {"the master": 1e6 / costs.redis_us(replicas), "a replica": 1e6 / each}


def channels(costs: Costs) -> str:
    """100,000 channels with 150 subscribers each, wherever they happen to connect, or led to a hub by channel."""
    count, each, hubs = 100_000, 150, 1000
    rows = []
    for how, open_on in (("anywhere", hubs * (1 - (1 - 1 / hubs) ** each)), ("one hub per channel", 1.0)):
        per_hub = count * open_on / hubs
        memory = costs.hub_bytes + per_hub * costs.channel_bytes + SUBSCRIBERS * costs.connection_bytes
        rows.append((how, round(open_on), round(per_hub), memory / 1e6, round(1e6 / costs.redis_us(open_on))))
    headers = (
        "subscribers connect",
        "hubs per channel",
        "open channels per hub",
        "MB per hub",
        "events/s of one Redis",
    )
    return _titled(f"{count:,} channels on {hubs:,} hubs, {each} subscribers each", rows, headers)


def rolling_restart(costs: Costs) -> str:
    """One hub after another: how long it takes, and what those who come back cost the others."""
    rows = []
    for hubs, at_once in ((10, 1), (100, 1), (100, 5), (1000, 10), (1000, 50)):
        came_back = at_once * SUBSCRIBERS / (hubs - at_once)
        rounds = hubs / at_once
        lasts_s = rounds * (DRAIN_S + READY_S)
        busy = came_back * costs.hub_connect_us / 1e6 / DRAIN_S
        moves = sum(1 / (hubs / at_once - each) for each in range(round(rounds) - 1)) + 1
        rows.append((hubs, at_once, f"{lasts_s / 60:.1f}", round(came_back), f"{busy:.1%}", moves))
    headers = (
        "hubs",
        "at once",
        "minutes in all",
        "arrivals per hub and round",
        "of each hub's time",
        "moves of a subscriber",
    )
    return _titled(f"Rolling restart, {SUBSCRIBERS:,} subscribers a hub, drain of {DRAIN_S:g} s", rows, headers)


def reconnect_storm(costs: Costs) -> str:
    """A third of 15 million lose their connections at once, and come back with 10 events behind."""
    rows = []
    for hubs, spread_s in ((1000, 1.0), (1000, 5.0), (1000, 30.0), (400, 5.0), (100, 5.0)):
        arrivals = 5_000_000 // hubs
        waits = storm(costs, arrivals, spread_s, busy=False)
        live = storm(costs, arrivals, spread_s, busy=True)
        rows.append((hubs, f"{spread_s:g}", arrivals, median(waits), max(waits), max(live)))
    headers = (
        "hubs left",
        "spread over, s",
        "arrivals per hub",
        "back after, s: median",
        "last",
        "last, hub busy with events",
    )
    return _titled("A region of 5 million reconnects", rows, headers)


def storm(costs: Costs, arrivals: int, spread_s: float, *, busy: bool, groups: int = 500) -> list[float]:
    """When the subscribers that come to one hub within `spread_s` (full jitter) are served, in seconds.

    Args:
        costs: Of connecting and resuming.
        arrivals: How many come.
        spread_s: Over how long, evenly.
        busy: Whether live events leave only their share of the time.
        groups: So many arrive together, for less to simulate.
    """
    env = simpy.Environment()
    hub = simpy.Resource(env, capacity=1)
    each_us = (costs.hub_connect_us + 10 * costs.hub_resume_us) / (SHARE if busy else 1.0)
    served: list[float] = []

    def arrive(at_s: float) -> Iterator[simpy.Event]:
        yield env.timeout(at_s)
        with hub.request() as request:
            yield request
            yield env.timeout(each_us * arrivals / groups / 1e6)
        served.append(env.now)

    for number in range(groups):
        env.process(arrive(spread_s * number / groups))  # type: ignore[arg-type]
    env.run()
    return served


def _titled(title: str, rows: Sequence[tuple[object, ...]], headers: tuple[str, ...]) -> str:
    return f"{title}\n\n{tabulate(rows, headers=headers, tablefmt='github', floatfmt=',.3g')}"
