"""The figures of a run, as pure functions of what was published and what was delivered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

import numpy as np

from broadcaster.loadtest.deliveries import Deliveries, Integers
from broadcaster.loadtest.records import PublishedRecord

SAMPLES_BEYOND: Final = 10
"""A percentile with fewer samples beyond it is not told: it would be that of a few samples, and chance."""

_CLASSES: Final = 10
"""Of a histogram."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The outcome for some clients (a whole run, or one fleet process).

    Attributes:
        clients: Subscribers that were to receive.
        events: Events that were published.
        expected: `clients` × `events`.
        received: Of these, the deliveries that arrived, each counted once.
        dropped: Of these, the deliveries that did not arrive.
        duplicates: Deliveries that arrived again.
        out_of_order: Deliveries with a smaller sequence than one before it at the same client.
        negative: Latencies below zero; on one host there can be none. They are in the percentiles as they are.
        p50_ms, p90_ms, p95_ms, p99_ms, p999_ms: Latency in ms: from the time the schedule meant the event to be
            published, to the return of the read that brought it. None with fewer than ten deliveries beyond it.
        max_ms: The largest; None without deliveries.
        beyond_p99: Deliveries beyond the 99th percentile ...
        beyond_p99_events: ... and of how many events they are: one slow event is a slow delivery to every client.
        complete: Events that every client received.
        last_p50_ms, last_p99_ms, last_max_ms: Of these events, the time to the last subscriber; likewise.
    """

    clients: int
    events: int
    expected: int
    received: int
    dropped: int
    duplicates: int
    out_of_order: int
    negative: int
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    max_ms: float | None
    beyond_p99: int
    beyond_p99_events: int
    complete: int
    last_p50_ms: float | None
    last_p99_ms: float | None
    last_max_ms: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Latencies:
    """The deliveries that count, each once: of events whose publish has not failed. One element each.

    Attributes:
        client: Number of the client.
        event: Index of the event in what was published.
        received_ns: When it was received; CLOCK_MONOTONIC, nanoseconds.
        latency_ns: Nanoseconds from the intended time to that.
        ordered_ns: The same, in ascending order.
        duplicates, out_of_order: As in `Figures`.
    """

    client: Integers
    event: Integers
    received_ns: Integers
    latency_ns: Integers
    ordered_ns: Integers
    duplicates: int
    out_of_order: int


def latencies(published: Sequence[PublishedRecord], deliveries: Deliveries) -> Latencies:
    """Take out what does not count, and subtract.

    Events whose publish failed are not expected; should one arrive all the same, it is not counted either.
    """
    failed = np.array([bool(row.error) for row in published], bool)
    counts = ~failed[deliveries.event]
    client, event, received_ns = (
        deliveries.client[counts],
        deliveries.event[counts],
        deliveries.received_ns[counts],
    )
    _, first = np.unique(client * max(len(published), 1) + event, return_index=True)
    first.sort()  # the order of the log
    duplicates = len(client) - len(first)
    client, event, received_ns = client[first], event[first], received_ns[first]
    intended_ns = np.array([row.intended_mono_ns for row in published], np.int64)
    latency_ns = received_ns - intended_ns[event]
    sequences = np.array([row.sequence for row in published], np.int64)
    return Latencies(
        client=client,
        event=event,
        received_ns=received_ns,
        latency_ns=latency_ns,
        ordered_ns=np.sort(latency_ns),
        duplicates=duplicates,
        out_of_order=_out_of_order(client, sequences[event]),
    )


def _out_of_order(client: Integers, sequence: Integers) -> int:
    """Deliveries after one of a larger sequence at the same client, in the order of the log."""
    if not len(client):
        return 0
    by_client = np.argsort(client, kind="stable")
    client, sequence = client[by_client], sequence[by_client]
    # The clients one after another, each above the one before it: the highest so far is that of the same client.
    span = int(sequence.max() - sequence.min()) + 1
    ranks = np.cumsum(np.r_[0, client[1:] != client[:-1]])
    heights = ranks * span + sequence - sequence.min()
    return int((heights < np.maximum.accumulate(heights)).sum())


def figures(published: Sequence[PublishedRecord], measured: Latencies, clients: int) -> Figures:
    """Count."""
    events = sum(not row.error for row in published)
    expected, received = clients * events, len(measured.latency_ns)
    ordered_ns = measured.ordered_ns
    last_ns = to_last_ns(measured, len(published), clients)
    beyond = len(ordered_ns) - rank(len(ordered_ns), 990)
    slowest = np.argsort(measured.latency_ns)[received - beyond :]
    return Figures(
        clients=clients,
        events=events,
        expected=expected,
        received=received,
        dropped=expected - received,
        duplicates=measured.duplicates,
        out_of_order=measured.out_of_order,
        negative=int((ordered_ns < 0).sum()),
        p50_ms=percentile_ms(ordered_ns, 500),
        p90_ms=percentile_ms(ordered_ns, 900),
        p95_ms=percentile_ms(ordered_ns, 950),
        p99_ms=percentile_ms(ordered_ns, 990),
        p999_ms=percentile_ms(ordered_ns, 999),
        max_ms=largest_ms(ordered_ns),
        beyond_p99=beyond,
        beyond_p99_events=len(np.unique(measured.event[slowest])),
        complete=len(last_ns),
        last_p50_ms=percentile_ms(last_ns, 500),
        last_p99_ms=percentile_ms(last_ns, 990),
        last_max_ms=largest_ms(last_ns),
    )


def too_early(measured: Latencies, error_ns: int | None) -> int:
    """Deliveries that came before their event was due by more than the error of their clocks (None: not known)."""
    return 0 if error_ns is None else int((measured.ordered_ns < -error_ns).sum())


def unknown(found: Figures) -> Figures:
    """The same counts without latencies: the clocks at their two ends cannot be compared."""
    nothing = {field.name: None for field in fields(Figures) if field.name.endswith("_ms")}
    return replace(found, **nothing, negative=0, beyond_p99=0, beyond_p99_events=0)  # type: ignore[arg-type]


def without(measured: Latencies) -> Latencies:
    """The same counts without a delivery, likewise: there is nothing to show of when they came."""
    nothing = measured.client[:0]
    return replace(
        measured, client=nothing, event=nothing, received_ns=nothing, latency_ns=nothing, ordered_ns=nothing
    )


def to_last_ns(measured: Latencies, events: int, clients: int) -> Integers:
    """Nanoseconds until the last subscriber had it, ascending, of each event that every client received."""
    largest = np.full(events, np.iinfo(np.int64).min)
    np.maximum.at(largest, measured.event, measured.latency_ns)
    is_complete = np.bincount(measured.event, minlength=events) == clients
    return np.sort(largest[is_complete]) if clients else largest[:0]


def histogram(ordered_ns: Integers) -> list[tuple[float, float, int]]:
    """From and to, in ms, and how many latencies: ten classes, each as many times as wide as the one before it.

    Empty if all latencies are equal, or the smallest is not above zero.
    """
    if not len(ordered_ns) or ordered_ns[0] <= 0 or ordered_ns[0] == ordered_ns[-1]:
        return []
    edges_ns = np.geomspace(ordered_ns[0], ordered_ns[-1], _CLASSES + 1)
    below = np.searchsorted(ordered_ns, edges_ns[1:-1], side="right")
    counts = np.diff(np.r_[0, below, len(ordered_ns)])
    edges_ms = [to_ms(edge_ns) for edge_ns in edges_ns]
    return [*zip(edges_ms[:-1], edges_ms[1:], map(int, counts), strict=True)]


def rank(count: int, permille: int) -> int:
    """Nearest rank: so many of `count` samples are at or below this percentile; exact, without fractions."""
    return -(-permille * count // 1000)


def nearest_rank_ms(ordered_ns: Integers, permille: int) -> float:
    """A percentile of at least one sample: the smallest one with that share at or below it."""
    return to_ms(int(ordered_ns[rank(len(ordered_ns), permille) - 1]))


def percentile_ms(ordered_ns: Integers, permille: int) -> float | None:
    """A percentile that is a sample, in milliseconds; None with fewer than `SAMPLES_BEYOND` beyond it."""
    if len(ordered_ns) - rank(len(ordered_ns), permille) < SAMPLES_BEYOND:
        return None
    return nearest_rank_ms(ordered_ns, permille)


def largest_ms(ordered_ns: Integers) -> float | None:
    return to_ms(int(ordered_ns[-1])) if len(ordered_ns) else None


def to_ms(ns: float) -> float:
    """Milliseconds to the microsecond."""
    return round(float(ns) / 1e6, 3)
