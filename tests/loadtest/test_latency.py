"""From rows to figures: small cases, each counted by hand."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from broadcaster.loadtest.latency import figures, largest_ms, latencies, nearest_rank_ms, percentile_ms, rank
from broadcaster.loadtest.records import DeliveryRecord, PublishedRecord
from tests.loadtest import columns

MS = 1_000_000
"""Nanoseconds in a millisecond."""


def published(number: int, *, intended_ms: int = 0, error: str = "") -> PublishedRecord:
    """Event `e<number>`; it was written 7 ms after its intended time, which must not count."""
    intended_ns = intended_ms * MS
    return PublishedRecord(
        number, f"e{number}", intended_ns, intended_ns + 7 * MS, 0, 0, None if error else 1, error
    )


def delivered(client: int, number: int, *, at_ms: int = 10) -> DeliveryRecord:
    return DeliveryRecord(client, f"e{number}", number, at_ms * MS, 0)


NOTHING: dict[str, Any] = {"duplicates": 0, "out_of_order": 0, "negative": 0, "dropped": 0}

CASES: dict[str, tuple[list[PublishedRecord], list[DeliveryRecord], int, dict[str, Any]]] = {
    "all_came": (
        [published(1), published(2)],
        [delivered(0, 1), delivered(0, 2), delivered(1, 1), delivered(1, 2)],
        2,
        {"clients": 2, "events": 2, "expected": 4, "received": 4, "max_ms": 10.0, "complete": 2},
    ),
    "latency_counts_from_the_intended_time": (
        [published(1, intended_ms=100)],
        [delivered(0, 1, at_ms=112)],
        1,
        {"received": 1, "max_ms": 12.0},
    ),
    "one_dropped": (
        [published(1), published(2)],
        [delivered(0, 1), delivered(0, 2), delivered(1, 1)],
        2,
        {"expected": 4, "received": 3, "dropped": 1},
    ),
    "a_client_that_got_nothing": ([published(1)], [delivered(0, 1)], 3, {"expected": 3, "dropped": 2}),
    "nothing_came": (
        [published(1)],
        [],
        2,
        {
            "expected": 2,
            "received": 0,
            "dropped": 2,
            "p50_ms": None,
            "p95_ms": None,
            "p99_ms": None,
            "max_ms": None,
        },
    ),
    "nothing_published": ([], [], 2, {"events": 0, "expected": 0, "received": 0, "max_ms": None}),
    "a_duplicate": (
        [published(1)],
        [delivered(0, 1, at_ms=3), delivered(0, 1, at_ms=99)],
        1,
        {"received": 1, "duplicates": 1, "max_ms": 3.0},
    ),
    "a_duplicate_does_not_stand_in_for_a_drop": (
        [published(1), published(2)],
        [delivered(0, 1), delivered(0, 1)],
        1,
        {"expected": 2, "received": 1, "duplicates": 1, "dropped": 1},
    ),
    "the_same_event_to_two_clients_is_no_duplicate": (
        [published(1)],
        [delivered(0, 1), delivered(1, 1)],
        2,
        {"received": 2},
    ),
    "out_of_order": (
        [published(number) for number in (1, 2, 3, 4)],
        [delivered(0, number) for number in (1, 3, 2, 4)],
        1,
        {"received": 4, "out_of_order": 1},
    ),
    "far_behind_counts_each": (
        [published(number) for number in (1, 2, 3, 4)],
        [delivered(0, number) for number in (4, 1, 2, 3)],
        1,
        {"received": 4, "out_of_order": 3},
    ),
    "order_is_per_client": (
        [published(1), published(2)],
        [delivered(0, 2), delivered(1, 1), delivered(1, 2), delivered(2, 1)],
        3,
        {"expected": 6, "received": 4, "out_of_order": 0, "dropped": 2},
    ),
    "negative_is_counted_and_not_clamped": (
        [published(1, intended_ms=50), published(2, intended_ms=50)],
        [delivered(0, 1, at_ms=45), delivered(0, 2, at_ms=60)],
        1,
        {"received": 2, "negative": 1, "max_ms": 10.0},
    ),
    "a_failed_publish_is_not_expected": (
        [published(1), published(2, error="Redis closed the connection")],
        [delivered(0, 1)],
        1,
        {"events": 1, "expected": 1, "received": 1},
    ),
    "a_failed_publish_that_comes_all_the_same": (
        [published(1), published(2, error="no answer")],
        [delivered(0, 1), delivered(0, 2)],
        1,
        {"events": 1, "expected": 1, "received": 1},
    ),
    "foreign_events_are_ignored": (
        [published(1)],
        [delivered(0, 77, at_ms=9999), delivered(0, 1), delivered(0, 78), delivered(0, 78)],
        1,
        {"expected": 1, "received": 1, "max_ms": 10.0},
    ),
}


@pytest.mark.parametrize(("events", "deliveries", "clients", "expected"), CASES.values(), ids=CASES.keys())
def test_figures(
    events: list[PublishedRecord], deliveries: list[DeliveryRecord], clients: int, expected: dict[str, Any]
) -> None:
    """Each case has exactly the counts that are given; those not given are 0."""
    counted = asdict(figures(events, latencies(events, columns(events, deliveries)), clients))
    wanted = NOTHING | {"clients": clients} | expected
    assert {name: counted[name] for name in wanted} == wanted
    assert counted["dropped"] == counted["expected"] - counted["received"]


def test_the_order_of_the_log_is_the_order_of_arrival() -> None:
    """Rows of several clients may be mixed: each client's own order counts."""
    events = [published(number) for number in range(1, 101)]
    rows = [delivered(client, number) for number in range(1, 101) for client in (3, 1, 2)]
    counted = figures(events, latencies(events, columns(events, rows)), 4)
    assert (counted.received, counted.out_of_order, counted.dropped) == (300, 0, 100)


NEAREST_RANK: dict[str, tuple[list[float], tuple[float, float, float, float]]] = {
    "one": ([7], (7, 7, 7, 7)),
    "two": ([1, 2], (1, 2, 2, 2)),
    "three": ([3, 1, 2], (2, 3, 3, 3)),
    "four": ([4, 3, 2, 1], (2, 4, 4, 4)),
    "twenty": ([*range(1, 21)], (10, 19, 20, 20)),
    "hundred": ([*range(1, 101)], (50, 95, 99, 100)),
    "hundred_and_one": ([*range(1, 102)], (51, 96, 100, 101)),
    "thousand": ([*range(1000, 0, -1)], (500, 950, 990, 1000)),
    "one_outlier": ([1.0] * 99 + [500.0], (1, 1, 1, 500)),
    "two_outliers": ([1.0] * 98 + [500.0] * 2, (1, 1, 500, 500)),
    "microseconds": ([0.001, 0.002, 0.003], (0.002, 0.003, 0.003, 0.003)),
    "negative": ([-3, -2, -1], (-2, -1, -1, -1)),
}


@pytest.mark.parametrize(("latencies_ms", "expected"), NEAREST_RANK.values(), ids=NEAREST_RANK.keys())
def test_percentiles_are_measured_values(
    latencies_ms: list[float], expected: tuple[float, float, float, float]
) -> None:
    """p50, p95, p99 and max by nearest rank: the smallest value with at least that share at or below it."""
    ordered_ns = np.sort(np.array([round(latency * MS) for latency in latencies_ms]))
    found = tuple(nearest_rank_ms(ordered_ns, permille) for permille in (500, 950, 990))
    assert (*found, largest_ms(ordered_ns)) == expected


def test_percentiles_of_nothing() -> None:
    """Without a delivery there is no latency, and none is made up."""
    nothing = np.empty(0, np.int64)
    assert (percentile_ms(nothing, 500), largest_ms(nothing)) == (None, None)


ENOUGH = {"p50": (500, 20), "p90": (900, 100), "p95": (950, 200), "p99": (990, 1000), "p99.9": (999, 10_000)}


@pytest.mark.parametrize(("permille", "count"), ENOUGH.values(), ids=ENOUGH)
def test_a_percentile_of_a_few_samples_is_none(permille: int, count: int) -> None:
    """Ten samples lie beyond it, or it is not told."""
    samples = np.arange(1, count + 1) * MS
    assert percentile_ms(samples, permille) == rank(count, permille) == count - 10
    assert percentile_ms(samples[1:], permille) is None


def test_what_lies_beyond_is_counted_in_events_too() -> None:
    """One slow event is slow for every client: twenty deliveries beyond p99 are one event, not twenty samples."""
    events = [published(number) for number in range(1, 101)]
    rows = [
        delivered(client, number, at_ms=900 if number == 7 else 10)
        for number in range(1, 101)
        for client in range(20)
    ]
    counted = figures(events, latencies(events, columns(events, rows)), 20)
    assert (counted.beyond_p99, counted.beyond_p99_events, counted.p99_ms, counted.p999_ms) == (20, 1, 10.0, None)


def test_time_to_the_last_subscriber() -> None:
    """Of an event that all have received it is the slowest delivery; one that somebody missed has none."""
    events = [published(number, intended_ms=number) for number in range(1, 31)]
    rows = [
        delivered(client, number, at_ms=number * (1 + client)) for number in range(1, 31) for client in (0, 1, 2)
    ]
    whole = figures(events, latencies(events, columns(events, rows)), 3)
    assert (whole.complete, whole.last_p50_ms, whole.last_p99_ms, whole.last_max_ms) == (30, 30.0, None, 60.0)
    without = figures(events, latencies(events, columns(events, rows[:-1])), 3)
    assert (without.complete, without.last_p50_ms, without.last_max_ms) == (29, 30.0, 58.0)
