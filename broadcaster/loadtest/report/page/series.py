"""What the pictures of a report show, as numbers: each is drawn, and stands in a table beside its picture."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Final

import numpy as np
from numpy.typing import NDArray

from broadcaster.core.text import printable_or_repr
from broadcaster.loadtest.deliveries import Integers
from broadcaster.loadtest.latency import SAMPLES_BEYOND, Latencies, rank
from broadcaster.loadtest.report.hgrm import shares
from broadcaster.loadtest.report.outcome import Outcome

Numbers = NDArray[np.float64]

_BINS: Final = 240
_MAP_ROWS: Final = 50
_MAP_COLUMNS: Final = 100
_RATES: Final = 50


def curve(ordered_ns: Integers) -> tuple[Numbers, Numbers]:
    """The percentile curve: shares from 0 towards 1, and the latency in ms that so many are at or below."""
    count = len(ordered_ns)
    found = [share for share in shares(count) if share < 1]
    if count:
        found.append(1 - Fraction(1, 2 * count))  # where the largest is drawn: 1 is infinitely far away
    at = [max(1, ceil(share * count)) - 1 for share in found]
    return np.array([float(share) for share in found]), ordered_ns[at] / 1e6


@dataclass(frozen=True, slots=True, eq=False)
class OverTime:
    """Latency by when the events were due; one element for each event, or for each of 240 times of equal length.

    Attributes:
        at: Seconds since the first event was due, in the middle; or numbers of events, if all were due at once.
        is_time: Whether they are seconds.
        least_ms, p50_ms, p99_ms, most_ms: Of the deliveries of these events; NaN where too few.
        deliveries: How many.
    """

    at: Numbers
    is_time: bool
    least_ms: Numbers
    p50_ms: Numbers
    p99_ms: Numbers
    most_ms: Numbers
    deliveries: Integers


def over_time(outcome: Outcome) -> OverTime:
    measured = outcome.latencies
    at, is_time = _due(outcome)
    events = len(at)
    if events > _BINS:
        edges = np.linspace(at.min(), at.max(), _BINS + 1)
        group = np.clip(np.searchsorted(edges, at, side="right") - 1, 0, _BINS - 1)
        centers = (edges[:-1] + edges[1:]) / 2
    else:
        group, centers = np.arange(events), at
    of_delivery = group[measured.event]
    order = np.lexsort((measured.latency_ns, of_delivery))
    latency_ms = measured.latency_ns[order] / 1e6
    counts = np.bincount(of_delivery, minlength=len(centers))
    starts = np.cumsum(counts) - counts
    is_there = counts > 0
    starts, counts = starts[is_there], counts[is_there]
    return OverTime(
        at=centers[is_there],
        is_time=is_time,
        least_ms=latency_ms[starts],
        p50_ms=_percentiles_ms(latency_ms, starts, counts, 500),
        p99_ms=_percentiles_ms(latency_ms, starts, counts, 990),
        most_ms=latency_ms[starts + counts - 1],
        deliveries=counts,
    )


def _percentiles_ms(ordered_ms: Numbers, starts: Integers, counts: Integers, permille: int) -> Numbers:
    """A percentile of each group, NaN where fewer than ten are beyond it: the same rule as for the whole."""
    ranks = np.array([rank(int(count), permille) for count in counts], np.int64)
    return np.where(counts - ranks < SAMPLES_BEYOND, np.nan, ordered_ms[starts + ranks - 1])


def _due(outcome: Outcome) -> tuple[Numbers, bool]:
    """When each event was due, in seconds since the first; if all were due at once, their numbers."""
    due_s = np.array([row.intended_mono_ns for row in outcome.published], np.float64) / 1e9
    if len(due_s) and due_s.max() > due_s.min():
        return due_s - due_s.min(), True
    return np.arange(1.0, len(due_s) + 1), False


def start_ns(outcome: Outcome) -> int:
    """When the first event was due."""
    return min((row.intended_mono_ns for row in outcome.published), default=0)


def marks_of(outcome: Outcome) -> list[tuple[str, float, float, str]]:
    """Kind, begin and end in seconds, and what it was: of gaps and faults, each once, in order."""
    start = start_ns(outcome)
    found: dict[tuple[str, float, float], str] = {}
    for loss in outcome.losses:
        kind = "gap" if loss.was_announced else "no connection"
        begin = round((loss.from_mono_ns - start) / 1e9, 2)
        end = begin if loss.to_mono_ns is None else round((loss.to_mono_ns - start) / 1e9, 2)
        found.setdefault((kind, begin, end), printable_or_repr(loss.cause))
    for row in outcome.published:
        if row.error:
            at = round((row.intended_mono_ns - start) / 1e9, 2)
            found.setdefault(("publish failed", at, at), f"#{row.sequence}")
    for name, lag in outcome.lags.items():
        for stall in lag.stalls:
            end = (stall.ended_mono_ns - start) / 1e9
            found[("rig stood still", end - stall.still_ms / 1000, end)] = f"{name}, {stall.still_ms:.0f} ms"
    return sorted(((*key, what) for key, what in found.items()), key=lambda mark: mark[1])


@dataclass(frozen=True, slots=True, eq=False)
class HeatMap:
    """The slowest delivery of some subscribers in some time.

    Attributes:
        slowest_ms: Row × column; NaN where nothing was delivered.
        last_client: Of each row, the last of its subscribers.
        until: Of each column, where it ends, as `OverTime.at`.
    """

    slowest_ms: Numbers
    last_client: Integers
    until: Numbers


def heat_map(outcome: Outcome) -> HeatMap:
    measured: Latencies = outcome.latencies
    at, _ = _due(outcome)
    rows, columns = min(_MAP_ROWS, max(1, outcome.whole.clients)), min(_MAP_COLUMNS, max(1, len(at)))
    edges = np.linspace(at.min(), at.max(), columns + 1) if len(at) else np.zeros(columns + 1)
    column = np.clip(np.searchsorted(edges, at, side="right") - 1, 0, columns - 1)
    last_client = (np.arange(1, rows + 1) * outcome.whole.clients) // rows - 1
    row = np.clip(np.searchsorted(last_client, measured.client), 0, rows - 1)
    slowest = np.full(rows * columns, -np.inf)
    np.maximum.at(slowest, row * columns + column[measured.event], measured.latency_ns / 1e6)
    slowest[np.isneginf(slowest)] = np.nan
    return HeatMap(slowest.reshape(rows, columns), last_client, edges[1:])


def rates(outcome: Outcome) -> tuple[Numbers, Numbers]:
    """Deliveries a second: edges in seconds since the first event was due, and the rate between each two."""
    received_s = (outcome.latencies.received_ns - start_ns(outcome)) / 1e9
    if not len(received_s):
        return np.zeros(2), np.zeros(1)
    last_s = max(float(received_s.max()), 1e-3)
    between_s = 1 / outcome.rate_hz if outcome.rate_hz else 0.0
    width_s = next(width for width in _WIDTHS_S if last_s / width <= _RATES and width >= between_s)
    edges = np.arange(0, last_s + 2 * width_s, width_s)[: ceil(last_s / width_s) + 1]
    counts, _ = np.histogram(received_s, edges)
    return edges, counts / width_s


_WIDTHS_S: Final = [each * 10**power for power in range(-5, 7) for each in (1, 2, 5)]
