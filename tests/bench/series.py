"""Trials of several sides in turn, and the figures of all rounds of one side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.guard import NO_GUARD, Guard
from tests.bench.plan import Plan
from tests.bench.trial import Bench, Outcome, say


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison.

    Attributes:
        name: Shown in the progress.
        kind: One of HUBS.
        plan: What is broadcast.
        history: Whether events are stored; None leaves hub and publisher as they are.
        guard: What the hub demands of subscribers.
    """

    name: str
    kind: str
    plan: Plan
    history: bool | None = None
    guard: Guard = NO_GUARD


def interleaved(bench: Bench, row: str, rounds: int, *sides: Side) -> list[list[Outcome]]:
    """Trials of every side in turn; per side, the outcomes of all rounds."""
    outcomes: list[list[Outcome]] = [[] for _ in sides]
    for number_of_round in range(1, rounds + 1):
        for place, side in enumerate(sides):
            outcome = bench.trial(side.kind, side.plan, side.history, side.guard)
            outcome.check(side.name)
            outcomes[place].append(outcome)
            say(f"{row} {number_of_round}/{rounds} {side.name}: {summary(outcome)}")
    return outcomes


def summary(outcome: Outcome) -> str:
    result = outcome.result
    said = [
        f"p50 {result.p50_ms:.2f} ms, p99 {result.p99_ms:.2f} ms, last {result.last_ms:.2f} ms",
        f"CPU {outcome.cpu_us_per_delivery:.2f} µs per delivery",
        f"publisher late {outcome.late_p99_us:.0f} µs",
    ]
    return ", ".join([*said, f"{result.missing:,} missing"] if result.missing else said)


def p50(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.result.p50_ms for outcome in outcomes]


def p95(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.result.p95_ms for outcome in outcomes]


def p99(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.result.p99_ms for outcome in outcomes]


def last(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.result.last_ms for outcome in outcomes]


def cpu_us(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.cpu_us_per_delivery for outcome in outcomes]


def growth_mb(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.hub_growth_bytes / 1e6 for outcome in outcomes]
