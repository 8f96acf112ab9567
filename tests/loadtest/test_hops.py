"""Hops add up to the latency, in integer nanoseconds, whatever is known and whichever way a delivery came."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from broadcaster.loadtest.hops import HOPS, WAYS, Budget, Hops, Part, budget, instants
from broadcaster.loadtest.latency import latencies
from broadcaster.loadtest.records import DeliveryRecord, LossRecord, PublishedRecord, TraceRecord
from tests.loadtest import columns


def published(number: int, *, intended_ns: int = 0, written_ns: int = 10) -> PublishedRecord:
    return PublishedRecord(number, f"e{number}", intended_ns, written_ns, 0, 0, 1, "", "a", number)


def traced(
    number: int,
    *,
    stored_us: int | None = 1,
    read_ns: int | None = 1500,
    written_ns: int | None = 1700,
    recovered: int = 0,
) -> TraceRecord:
    return TraceRecord(f"e{number}", stored_us, read_ns, written_ns, recovered)


def delivered(client: int, number: int, received_ns: int) -> DeliveryRecord:
    return DeliveryRecord(client, f"e{number}", number, received_ns, 0)


def reconnected(client: int, at_ns: int | None) -> LossRecord:
    return LossRecord(client, "disconnected 1006", "", None, None, None, None, "", 0, at_ns)


def divided(
    rows: list[PublishedRecord],
    traces: list[TraceRecord],
    deliveries: list[DeliveryRecord],
    losses: tuple[LossRecord, ...] = (),
    *,
    hub_ahead_ns: int = 0,
    redis_ahead_ns: int = 0,
) -> Budget:
    """The budget of a run with one fleet process of ten clients."""
    at = instants(rows, traces, hub_ahead_ns, redis_ahead_ns)
    return budget(rows, latencies(rows, columns(rows, deliveries)), [Part(0, 10, at, losses)])


def way_of(found: Budget) -> str:
    [index] = found.way
    return WAYS[index]


def test_each_hop_ends_where_the_next_begins() -> None:
    """By hand: due at 0, written at 10, stored at 1,000, read at 1,500, written to the first at 1,700 ns."""
    found = divided([published(1)], [traced(1)], [delivered(0, 1, 2000)])
    assert found.of(0) == Hops(10, 990, 500, 200, 300)
    assert [row.name for row in found.rows] == [*HOPS, "latency"]
    assert [row.share for row in found.rows] == [0.005, 0.495, 0.25, 0.1, 0.15, 1.0]


def test_two_clients_of_one_event_differ_in_the_last_hop_only() -> None:
    found = divided([published(1)], [traced(1)], [delivered(0, 1, 2000), delivered(1, 1, 2500)])
    assert [found.of(index) for index in (0, 1)] == [Hops(10, 990, 500, 200, 300), Hops(10, 990, 500, 200, 800)]


@pytest.mark.parametrize("seed", range(20))
def test_hops_add_up_exactly(seed: int) -> None:
    """Of any instants, also such as no sound clocks give, and of any offsets between the clocks."""
    chance = random.Random(seed)
    base = chance.choice([0, 10**9, 10**18])

    def instant() -> int:
        return base + chance.randint(-(10**6), 10**10)

    numbers = range(1, 60)
    rows = [published(number, intended_ns=instant(), written_ns=instant()) for number in numbers]
    traces = [
        traced(
            number,
            stored_us=chance.choice([None, instant() // 1000]),
            read_ns=chance.choice([None, instant()]),
            written_ns=chance.choice([None, instant()]),
        )
        for number in numbers
    ]
    deliveries = [delivered(client, number, instant()) for client in range(10) for number in numbers]
    found = divided(rows, traces, deliveries, hub_ahead_ns=instant(), redis_ahead_ns=instant())
    measured = latencies(rows, columns(rows, deliveries))
    assert 0 < found.known.sum() < len(deliveries)
    for index in range(len(deliveries)):
        if (hops := found.of(index)) is not None:
            assert sum(hops) == measured.latency_ns[index]
    *hop_rows, whole = found.rows
    assert sum(row.sum_ns for row in hop_rows) == whole.sum_ns
    assert sum(row.count for row in found.others) + whole.count == len(deliveries)


def test_clocks_that_are_ahead_are_brought_back() -> None:
    """A hub whose clock began a day earlier, and a Redis that counts from 1970, give the same hops."""
    day, since_1970 = 86_400 * 10**9, 1_790_000_000 * 10**9
    ahead = traced(1, stored_us=(since_1970 + 1000) // 1000, read_ns=day + 1500, written_ns=day + 1700)
    found = divided([published(1)], [ahead], [delivered(0, 1, 2000)], hub_ahead_ns=day, redis_ahead_ns=since_1970)
    assert found.of(0) == Hops(10, 990, 500, 200, 300)


@pytest.mark.parametrize("gap", ["stored_at_us", "read_mono_ns", "written_mono_ns"])
def test_what_is_not_known_of_an_event_leaves_its_hops_unknown(gap: str) -> None:
    """Its deliveries are counted, with their latency; those of others keep their hops."""
    unknown: dict[str, Any] = {gap: None}
    traces = [replace(traced(1), **unknown), traced(2)]
    found = divided([published(1), published(2)], traces, [delivered(0, 1, 2000), delivered(0, 2, 2100)])
    assert (found.known_events, found.events) == (1, 2)
    assert [(row.name, row.count, row.max_ns) for row in found.others] == [("unknown", 1, 2000)]
    assert found.of(0) is None


def test_another_hub_knows_nothing() -> None:
    found = divided([published(1)], [], [delivered(0, 1, 2000)])
    assert found.rows == []
    assert (found.known_events, found.negative) == (0, 0)


def test_a_negative_hop_is_counted_and_left_as_it_is() -> None:
    found = divided([published(1)], [traced(1, read_ns=900)], [delivered(0, 1, 2000)])
    assert found.of(0) == Hops(10, 990, -100, 800, 300)
    assert found.negative == 1


WAYS_TAKEN: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[LossRecord, ...]]] = {
    "published again": ("retried", {"heard": None}, {}, ()),
    "read from the log": ("recovered", {}, {"recovered": 1}, ()),
    "read from the log, after a retry": ("retried", {"heard": None}, {"recovered": 1}, ()),
    "connected again after the first write": ("replayed", {}, {}, (reconnected(0, 1800),)),
    "connected again before the first write": ("live", {}, {}, (reconnected(0, 1600),)),
    "connected again after it was received": ("live", {}, {}, (reconnected(0, 2500),)),
    "another client was connected again": ("live", {}, {}, (reconnected(1, 1800),)),
    "never connected again": ("live", {}, {}, (reconnected(0, None),)),
    "the first write is not known": ("replayed", {}, {"written_mono_ns": None}, (reconnected(0, 1800),)),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS_TAKEN)
def test_a_delivery_that_had_to_wait_is_of_a_row_of_its_own(name: str) -> None:
    """The hops of those that came live are not mixed with the time for which others were away."""
    way, event, trace, losses = WAYS_TAKEN[name]
    rows = [replace(published(1), **event)]
    found = divided(rows, [replace(traced(1), **trace)], [delivered(0, 1, 2000)], losses)
    assert way_of(found) == way
    assert found.known.any() == (way == "live")
    assert [row.name for row in found.others] == ([] if way == "live" else [way])


def test_each_fleet_process_has_its_own_hub() -> None:
    """Two hubs have read the event at different times; each client is of one of them."""
    rows = [published(1)]
    deliveries = [delivered(0, 1, 2000), delivered(5, 1, 2000)]
    measured = latencies(rows, columns(rows, deliveries))
    parts = [
        Part(0, 5, instants(rows, [traced(1)])),
        Part(5, 5, instants(rows, [traced(1, read_ns=1100, written_ns=1200)])),
    ]
    found = budget(rows, measured, parts)
    assert [found.of(index) for index in (0, 1)] == [Hops(10, 990, 500, 200, 300), Hops(10, 990, 100, 100, 800)]


def test_a_publish_that_failed_is_no_event() -> None:
    rows = [replace(published(1), error="no answer", heard=None, offset=None, epoch="")]
    found = divided(rows, [traced(1)], [delivered(0, 1, 2000)])
    assert (found.events, found.known_events, len(found.latency_ns)) == (0, 0, 0)


def test_a_hub_that_was_restarted_knows_only_what_it_has_read() -> None:
    """What the one before had written is unknown, what the client missed is replayed, what follows is exact."""
    rows = [
        published(number, intended_ns=number * 10_000, written_ns=number * 10_000 + 10) for number in (1, 2, 3)
    ]
    after = traced(3, stored_us=31, read_ns=31_500, written_ns=31_700)
    deliveries = [delivered(0, 1, 12_000), delivered(0, 2, 25_100), delivered(0, 3, 32_000)]
    found = divided(rows, [after], deliveries, (reconnected(0, 25_000),))
    assert [WAYS[way] for way in found.way] == ["live", "replayed", "live"]
    assert [found.of(index) for index in range(3)] == [None, None, Hops(10, 990, 500, 200, 300)]
    assert [(row.name, row.count, row.max_ns) for row in found.others] == [
        ("replayed", 1, 5_100),
        ("unknown", 1, 2_000),
    ]
    assert (found.known_events, found.events, found.unread, found.negative) == (1, 3, 2, 0)
