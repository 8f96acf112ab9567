"""The rows of the table: what is compared with what, and how good it must be.

A row runs its trials interleaved (A B A B ...), one hub at a time on an otherwise idle Redis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile
from statistics import median
from typing import Final

from broadcaster.settings import HubTable
from tests.bench.catchup import catchup
from tests.bench.figures import Line, absolute_line, number, ratio_line, ratios_of, spread, verdict
from tests.bench.filters import filters
from tests.bench.floods import floods
from tests.bench.forms import compression, streams
from tests.bench.guarded import guarded, token
from tests.bench.history import history
from tests.bench.hubs import FLOOR, NAIVE
from tests.bench.own_loadtest import own_loadtest
from tests.bench.plan import (
    BURST,
    CONNECT_RAMP_PER_S,
    FANOUT,
    FROZEN,
    IDLE_CONNS,
    LADDER,
    LADDER_P99_MS,
    PAIRS,
    PING_ROUNDS,
    STEADY,
    Plan,
    ladder_plan,
)
from tests.bench.resume import resume, storm
from tests.bench.series import Side, cpu_us, growth_mb, interleaved, last, p50, p95, p99, summary
from tests.bench.trial import Bench, Outcome, say

_KB: Final = 1000
_HEAP_MB: Final = 1.0
"""Beside `hub.ring_bytes`, which bounds the events kept: the hub's own heap, frozen subscriber or not."""


def burst(bench: Bench) -> list[Line]:
    """20 bursts of 50 events to 50 subscribers, until delivered."""
    hub, floor, naive = _interleaved(bench, "burst", BURST, bench.hub, FLOOR, NAIVE)
    return [
        ratio_line("burst: p50, ms", p50(hub), "floor", p50(floor), 0.2),
        ratio_line("burst: p99, ms", p99(hub), "floor", p99(floor), 0.4),
        ratio_line("burst: p50, ms", p50(hub), "naive", p50(naive), 1 / 20),
    ]


def steady(bench: Bench) -> list[Line]:
    """10 events/s to 50 subscribers."""
    hub, floor = _interleaved(bench, "steady", STEADY, bench.hub, FLOOR)
    return [ratio_line("steady: p50, ms", p50(hub), "floor", p50(floor), 1.35)]


def fanout(bench: Bench) -> list[Line]:
    """20 events/s to 1,000 subscribers."""
    hub, floor = _interleaved(bench, "fanout", FANOUT, bench.hub, FLOOR)
    return [
        ratio_line("fanout: hub CPU per delivery, µs", cpu_us(hub), "floor", cpu_us(floor), 1.35),
        ratio_line("fanout: to the last subscriber, p50, ms", last(hub), "floor", last(floor), 1.3),
    ]


def throughput(bench: Bench) -> list[Line]:
    """The highest step of a ladder of rates that 500 subscribers follow."""
    hub: list[float] = []
    floor: list[float] = []
    for number_of_round in range(1, bench.rounds + 1):
        hub.append(_climb(bench, bench.hub, number_of_round))
        floor.append(_climb(bench, FLOOR, number_of_round))
    ratios = ratios_of(hub, floor)
    reached = median(hub) >= 1e6 or median(ratios) >= 8
    return [
        Line(
            f"throughput: deliveries/s, p99 ≤ {LADDER_P99_MS:g} ms",
            number(median(hub)),
            f"floor {number(median(floor))}",
            spread(ratios),
            "≥ 1,000,000 or ≥ 8 ×",
            verdict(reached),
        )
    ]


def memory(bench: Bench) -> list[Line]:
    """5,000 idle connections after two ping rounds."""
    conns = IDLE_CONNS // 5 if bench.quick else IDLE_CONNS
    used_kb: list[float] = []
    for number_of_round in range(1, bench.rounds + 1):
        used_kb.append(bench.idle_bytes(bench.hub, conns, PING_ROUNDS) / _KB)
        say(f"memory {number_of_round}/{bench.rounds} {bench.hub}: {used_kb[-1]:.2f} KB per connection")
    return [absolute_line("memory: per idle connection, KB", used_kb, 2.5)]


def connect(bench: Bench) -> list[Line]:
    """5,000 connects offered at 4,000/s."""
    conns = IDLE_CONNS // 5 if bench.quick else IDLE_CONNS
    used: dict[str, list[float]] = {"hub": [], NAIVE: []}
    for number_of_round in range(1, bench.rounds + 1):
        for name, kind in (("hub", bench.hub), (NAIVE, NAIVE)):
            used[name] += bench.connect_cpu_us(kind, conns, CONNECT_RAMP_PER_S)
            say(f"connect {number_of_round}/{bench.rounds} {kind}: {used[name][-1]:.0f} µs of CPU")
    return [
        absolute_line("connect: hub CPU per connect, µs", used["hub"], 350),
        ratio_line("connect: hub CPU per connect, µs", used["hub"], "Sanic's route", used[NAIVE], 0.5),
    ]


def frozen(bench: Bench) -> list[Line]:
    """60 MB of events to 50 subscribers, with and without one more that does not read."""
    pairs = replace(bench, rounds=bench.rounds if bench.quick else max(bench.rounds, PAIRS))
    with_one, without = _paired(pairs)
    bound_mb = HubTable().ring_bytes / 1e6 + _HEAP_MB
    lost = sum(outcome.result.missing for outcome in with_one)
    return [
        Line("frozen: missing at the others", str(lost), goal="0", verdict=verdict(lost == 0)),
        ratio_line("frozen: p50 of the others, ms", p50(with_one), "without", p50(without), 1.1),
        ratio_line("frozen: p95 of the others, ms", p95(with_one), "without", p95(without), 1.3),
        absolute_line(
            "frozen: growth of the hub, MB",
            growth_mb(with_one),
            bound_mb,
            f"without {number(median(growth_mb(without)))}",
        ),
    ]


ROWS: Final[dict[str, Callable[[Bench], list[Line]]]] = {
    "burst": burst,
    "steady": steady,
    "fanout": fanout,
    "throughput": throughput,
    "memory": memory,
    "connect": connect,
    "frozen": frozen,
    "filters": filters,
    "compression": compression,
    "streams": streams,
    "history": history,
    "resume": resume,
    "storm": storm,
    "guarded": guarded,
    "token": token,
    "floods": floods,
    "catchup": catchup,
    "loadtest": own_loadtest,
}


def _interleaved(bench: Bench, row: str, plan: Plan, *kinds: str) -> list[list[Outcome]]:
    """Trials of every kind of hub in turn; per kind, the outcomes of all rounds."""
    return interleaved(bench, row, bench.rounds, *(Side(kind, kind, plan) for kind in kinds))


def _paired(bench: Bench) -> tuple[list[Outcome], list[Outcome]]:
    """Trials with a frozen subscriber and without one, in turn. Losses are a figure here."""
    with_one: list[Outcome] = []
    without: list[Outcome] = []
    for number_of_round in range(1, bench.rounds + 1):
        for outcomes, count in ((with_one, 1), (without, 0)):
            outcome = bench.trial(bench.hub, replace(FROZEN, frozen=count))
            outcomes.append(outcome)
            said = f"{summary(outcome)}, hub grew by {outcome.hub_growth_bytes / 1e6:.1f} MB"
            say(f"frozen {number_of_round}/{bench.rounds} with {count}: {said}")
            if not count or not outcome.result.missing:
                outcome.check(bench.hub)
    return with_one, without


def _climb(bench: Bench, kind: str, number_of_round: int) -> float:
    """The highest step, in deliveries per second, before the first that fails twice; 0: not even one."""

    def sustained(per_s: float) -> bool:
        return _holds(bench, kind, per_s) or _holds(bench, kind, per_s)

    steps = LADDER[:3] if bench.quick else LADDER
    held = list(takewhile(sustained, steps))
    highest = held[-1] if held else 0.0
    say(f"throughput {number_of_round}/{bench.rounds} {kind}: {highest:,.0f} deliveries/s")
    return highest


def _holds(bench: Bench, kind: str, per_s: float) -> bool:
    """Whether the hub delivers everything at this rate, and 99 % of it in time."""
    outcome = bench.trial(kind, ladder_plan(per_s))
    say(f"throughput {kind} at {per_s:,.0f}/s: {summary(outcome)}")
    if outcome.result.missing:
        return False
    outcome.check(kind)
    return outcome.result.p99_ms <= LADDER_P99_MS
