"""The budget of a run: the latency of every delivery, divided into hops that add up to it exactly.

A pure function of what was published, traced, delivered and lost, all on one clock, CLOCK_MONOTONIC of the
publisher, in integer nanoseconds. Nothing is clamped: a negative hop says that clocks disagree, and is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broadcaster.loadtest.deliveries import Integers
from broadcaster.loadtest.latency import Latencies, rank
from broadcaster.loadtest.records import DISCONNECTED, LossRecord, PublishedRecord, TraceRecord

Flags = NDArray[np.bool_]

HOPS: Final = ("schedule", "to_redis", "to_hub", "in_hub", "fanout")
"""The hops in the order of the way; also the names of `Hops`."""

WAYS: Final = ("live", "retried", "recovered", "replayed")
"""How a delivery came. Live: as it was published. On the other ways it waits for more than its hops: the publisher
has sent it again; the hub has read it from the log; the client was not connected when it was first written."""


class Hops(NamedTuple):
    """The hops of one delivery in ns; their sum is its latency.

    Attributes:
        schedule: Intended by the schedule → written by the publisher.
        to_redis: Written → stored: Redis has begun the call that stores and publishes it.
        to_hub: Stored → read by the hub.
        in_hub: Read → the instant before the first write of the piece that carries it.
        fanout: That instant → this client's read has returned: writes to other clients, network, the client.
    """

    schedule: int
    to_redis: int
    to_hub: int
    in_hub: int
    fanout: int


@dataclass(frozen=True, slots=True, eq=False)
class Instants:
    """When the events were stored, read and first written, on the publisher's clock; per published event.

    Attributes:
        stored_ns, read_ns, written_ns: Nanoseconds; see `TraceRecord`. Without a meaning where not known.
        stored, read, written: Which of them are known.
        recovered: The hub has read it from the log.
    """

    stored_ns: Integers
    read_ns: Integers
    written_ns: Integers
    stored: Flags
    read: Flags
    written: Flags
    recovered: Flags

    def without(self, *, stored: bool = True, hub: bool = True) -> Instants:
        """The same, where the clock of Redis (`stored`) or of the hub is not known if it is False."""
        return replace(self, stored=self.stored & stored, read=self.read & hub, written=self.written & hub)

    @property
    def known(self) -> Flags:
        """Events of which all of these are known."""
        return self.stored & self.read & self.written


def instants(
    published: Sequence[PublishedRecord],
    traces: Iterable[TraceRecord],
    hub_ahead_ns: int = 0,
    redis_ahead_ns: int = 0,
) -> Instants:
    """Bring a trace onto the publisher's clock.

    Args:
        published: The events of the run.
        traces: Of one fleet process; those of other events are left out.
        hub_ahead_ns: How far the hub's CLOCK_MONOTONIC is ahead of the publisher's.
        redis_ahead_ns: How far the wall clock of Redis is ahead of the publisher's CLOCK_MONOTONIC.
    """
    indexes = {row.event_id: index for index, row in enumerate(published)}
    values = np.zeros((3, len(published)), np.int64)
    known = np.zeros((4, len(published)), bool)
    for trace in traces:
        if (index := indexes.get(trace.event_id)) is None:
            continue
        if trace.stored_at_us is not None:
            values[0, index], known[0, index] = trace.stored_at_us * 1000 - redis_ahead_ns, True
        if trace.read_mono_ns is not None:
            values[1, index], known[1, index] = trace.read_mono_ns - hub_ahead_ns, True
        if trace.written_mono_ns is not None:
            values[2, index], known[2, index] = trace.written_mono_ns - hub_ahead_ns, True
        known[3, index] = bool(trace.recovered)
    return Instants(*values, *known)


class Part(NamedTuple):
    """A fleet process: its clients, and what it knows of the events. All on the publisher's clock.

    Attributes:
        first, clients: Number of its first client, and how many.
        instants: See there.
        losses: Its times without a connection.
    """

    first: int
    clients: int
    instants: Instants
    losses: Sequence[LossRecord] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Budget:
    """The hops of all deliveries of a run; element by element those of `Latencies`.

    Attributes:
        hops: By name: nanoseconds. Without a meaning where not known.
        known: Deliveries that came live, and of which all hops are known.
        way: The index in `WAYS`.
        latency_ns: That of `Latencies`.
        known_events: Published events of which all hops but the last are known (at a fleet process at least).
        events: Published events.
        unstored, unread, unwritten: Of how many no fleet process knows when they were stored, when the hub read
            them, and, of those that it read, when it first wrote them.
        rows: The hops in the order of the way, then `latency`, all of the same deliveries; empty if none is known.
        others: Of the other ways that some came on, and of `unknown` ones: the latency. With the row `latency`
            they have all deliveries.
    """

    hops: dict[str, Integers]
    known: Flags
    way: NDArray[np.int8]
    latency_ns: Integers
    known_events: int
    events: int
    unstored: int
    unread: int
    unwritten: int
    rows: list[HopRow]
    others: list[HopRow]

    @property
    def negative(self) -> int:
        """Hops below zero, which no hop can be: clocks disagree."""
        return sum(row.negative for row in self.rows if row.name in HOPS)

    def of(self, index: int) -> Hops | None:
        """The hops of one delivery; None if not known."""
        return Hops(*(int(self.hops[name][index]) for name in HOPS)) if self.known[index] else None


@dataclass(frozen=True, slots=True)
class HopRow:
    """One hop over many deliveries in ns; percentiles by nearest rank.

    Attributes:
        name: One of `HOPS`, `latency`; or one of `WAYS` or `unknown`, of which there is only the latency.
        count: Deliveries.
        sum_ns: Of all: these add up to the latency's, and so do the means. Percentiles do not.
        share: Of the sum of the latencies; None if that is 0, and of other ways.
        negative: Below zero.
    """

    name: str
    count: int
    sum_ns: int
    p50_ns: int
    p95_ns: int
    p99_ns: int
    max_ns: int
    share: float | None
    negative: int

    @property
    def mean_ns(self) -> float:
        return self.sum_ns / self.count

    @classmethod
    def of(cls, name: str, column: Integers, total_ns: int = 0) -> HopRow:
        """The row of at least one delivery."""
        ordered = np.sort(column)
        p50, p95, p99, largest = (
            int(ordered[rank(len(ordered), permille) - 1]) for permille in (500, 950, 990, 1000)
        )
        sum_ns = int(ordered.sum())
        share = sum_ns / total_ns if total_ns else None
        return cls(name, len(ordered), sum_ns, p50, p95, p99, largest, share, int((ordered < 0).sum()))


def budget(published: Sequence[PublishedRecord], measured: Latencies, parts: Sequence[Part]) -> Budget:
    """Divide the latency of every delivery.

    Args:
        published: The events.
        measured: The deliveries, on the publisher's clock.
        parts: The fleet processes; deliveries of clients of none are `unknown`.
    """
    intended_ns = np.array([row.intended_mono_ns for row in published], np.int64)
    published_ns = np.array([row.published_mono_ns for row in published], np.int64)
    is_retried = np.array([row.heard is None and row.offset is not None for row in published], bool)
    counts = np.array([not row.error for row in published], bool)
    size, event = len(measured.latency_ns), measured.event
    hops = {name: np.zeros(size, np.int64) for name in HOPS}
    hops["schedule"] = (published_ns - intended_ns)[event]
    known, known_events = np.zeros(size, bool), np.zeros(len(published), bool)
    stored, read, written = np.zeros((3, len(published)), bool)
    way = np.zeros(size, np.int8)
    for first, clients, at, losses in parts:
        here = np.flatnonzero((measured.client >= first) & (measured.client < first + clients))
        events = event[here]
        hops["to_redis"][here] = (at.stored_ns - published_ns)[events]
        hops["to_hub"][here] = (at.read_ns - at.stored_ns)[events]
        hops["in_hub"][here] = (at.written_ns - at.read_ns)[events]
        hops["fanout"][here] = measured.received_ns[here] - at.written_ns[events]
        known[here] = at.known[events]
        known_events |= at.known
        stored, read, written = stored | at.stored, read | at.read, written | at.written
        way[here[at.recovered[events]]] = WAYS.index("recovered")
        first_ns = np.where(at.written, at.written_ns, published_ns)
        replayed = _replayed(measured.client[here], first_ns[events], measured.received_ns[here], losses)
        way[here[replayed & (way[here] == 0)]] = WAYS.index("replayed")
    way[is_retried[event]] = WAYS.index("retried")
    known &= way == 0
    return Budget(
        hops=hops,
        known=known,
        way=way,
        latency_ns=measured.latency_ns,
        known_events=int((known_events & counts).sum()),
        events=int(counts.sum()),
        unstored=int((counts & ~stored).sum()),
        unread=int((counts & ~read).sum()),
        unwritten=int((counts & read & ~written).sum()),
        rows=_rows(hops, measured.latency_ns, known),
        others=_others(way, measured.latency_ns, known),
    )


def _rows(hops: dict[str, Integers], latency_ns: Integers, known: Flags) -> list[HopRow]:
    if not known.any():
        return []
    total_ns = int(latency_ns[known].sum())
    columns = {**hops, "latency": latency_ns}
    return [HopRow.of(name, column[known], total_ns) for name, column in columns.items()]


def _others(way: NDArray[np.int8], latency_ns: Integers, known: Flags) -> list[HopRow]:
    groups = {name: way == index for index, name in enumerate(WAYS) if index}
    groups["unknown"] = (way == 0) & ~known
    return [HopRow.of(name, latency_ns[chosen]) for name, chosen in groups.items() if chosen.any()]


def _replayed(client: Integers, first_ns: Integers, received_ns: Integers, losses: Iterable[LossRecord]) -> Flags:
    """Which deliveries came after their client was connected again, of an event that was written before that."""
    found = np.zeros(len(client), bool)
    order = np.argsort(client, kind="stable")
    by_client = client[order]
    for loss in losses:
        if loss.cause.startswith(DISCONNECTED) and (connected_ns := loss.to_mono_ns) is not None:
            start, end = np.searchsorted(by_client, (loss.client, loss.client + 1))
            its = order[start:end]
            found[its] |= (first_ns[its] < connected_ns) & (received_ns[its] >= connected_ns)
    return found
