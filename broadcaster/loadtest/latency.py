"""The figures of a run, as pure functions of what was published and what was delivered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from broadcaster.loadtest.records import DeliveryRecord, PublishedRecord


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
        p50_ms, p95_ms, p99_ms, max_ms: Latency in ms: from the time the schedule meant the event to be
            published, to the return of the read that brought it; None without deliveries.
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
    p95_ms: float | None
    p99_ms: float | None
    max_ms: float | None


def figures(published: Sequence[PublishedRecord], deliveries: Iterable[DeliveryRecord], clients: int) -> Figures:
    """Join by event_id on CLOCK_MONOTONIC and count.

    Events whose publish failed are not expected; should one arrive all the same, it is not counted either.
    """
    intended = {row.event_id: row.intended_mono_ns for row in published if not row.error}
    seen: set[tuple[int, str]] = set()
    last: dict[int, int] = {}
    latencies_ns: list[int] = []
    duplicates = out_of_order = 0
    for row in deliveries:
        start_ns = intended.get(row.event_id)
        if start_ns is None:
            continue
        key = (row.client, row.event_id)
        if key in seen:
            duplicates += 1
            continue
        seen.add(key)
        if row.sequence < last.get(row.client, 0):
            out_of_order += 1
        else:
            last[row.client] = row.sequence
        latencies_ns.append(row.received_mono_ns - start_ns)
    expected = clients * len(intended)
    p50, p95, p99, largest = percentiles_ms(latencies_ns)
    return Figures(
        clients=clients,
        events=len(intended),
        expected=expected,
        received=len(seen),
        dropped=expected - len(seen),
        duplicates=duplicates,
        out_of_order=out_of_order,
        negative=sum(latency < 0 for latency in latencies_ns),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        max_ms=largest,
    )


def percentiles_ms(latencies_ns: Sequence[int]) -> tuple[float | None, ...]:
    """p50, p95, p99 and max in milliseconds by nearest rank: each is a latency that was measured."""
    if not latencies_ns:
        return (None, None, None, None)
    ordered = sorted(latencies_ns)
    return tuple(round(ordered[ceil(share * len(ordered)) - 1] / 1e6, 3) for share in (0.50, 0.95, 0.99, 1.0))
