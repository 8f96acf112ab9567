"""The hop table of a report: where the milliseconds went, as far as it is known."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from broadcaster.loadtest.hops import HOPS, Budget, HopRow
from broadcaster.loadtest.latency import SAMPLES_BEYOND, rank, to_ms

GROUPS: Final = (("all", 0.0), ("slowest 10 %", 0.9), ("slowest 1 %", 0.99))
"""Deliveries of which the mean hops are drawn, and the share that is faster than they are."""


def table(budget: Budget) -> list[list[str]]:
    """A line for each hop, one for the latency, and one for each other way: name, deliveries, and milliseconds."""
    return [
        [
            row.name,
            f"{row.count:,}",
            f"{row.mean_ns / 1e6:.3f}",
            *(_told(value_ms) for value_ms in _percentiles_ms(row).values()),
            "-" if row.share is None else f"{100 * row.share:.1f} %",
        ]
        for row in (*budget.rows, *budget.others)
    ]


HEADS: Final = ("hop", "deliveries", "mean (ms)", "p50 (ms)", "p95 (ms)", "p99 (ms)", "max (ms)", "share")


def note(budget: Budget) -> str:
    """What has to be known of the table."""
    negative = f" {budget.negative:,} hops are below zero: clocks disagree." if budget.negative else ""
    return (
        f"Hops known for {budget.known_events:,} of {budget.events:,} events. "
        f"Their means add up to that of the latency; percentiles do not.{negative}"
    )


def unknown(budget: Budget) -> list[str]:
    """One sentence for each instant that is not known of some events, and why that may be."""
    causes = {
        "when Redis stored them": (budget.unstored, "history is off, or Redis refuses TIME to the publisher"),
        "when the hub read them": (
            *(
                budget.unread,
                "another hub, a restarted one, hub.trace_events, or no token that may monitor",
            ),
        ),
        "when the hub first wrote them": (budget.unwritten, "nobody was connected who wanted them as they came"),
    }
    return [
        f"Of {count:,} events it is not known {what}: {why}." for what, (count, why) in causes.items() if count
    ]


def as_summary(budget: Budget) -> dict[str, Any]:
    """The same for `summary.json`."""
    return {
        "known_events": budget.known_events,
        "events": budget.events,
        "negative": budget.negative,
        "rows": [_fields(row) for row in budget.rows],
        "others": [_fields(row) for row in budget.others],
    }


def _fields(row: HopRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "deliveries": row.count,
        "mean_ms": to_ms(row.mean_ns),
        "p50_ms": _percentiles_ms(row)["p50"],
        "p95_ms": _percentiles_ms(row)["p95"],
        "p99_ms": _percentiles_ms(row)["p99"],
        "max_ms": to_ms(row.max_ns),
        "share": None if row.share is None else round(row.share, 4),
        "negative": row.negative,
    }


def _percentiles_ms(row: HopRow) -> dict[str, float | None]:
    """Those with enough samples beyond, and the largest."""
    values = {"p50": (row.p50_ns, 500), "p95": (row.p95_ns, 950), "p99": (row.p99_ns, 990)}
    return {
        name: to_ms(value_ns) if row.count - rank(row.count, permille) >= SAMPLES_BEYOND else None
        for name, (value_ns, permille) in values.items()
    } | {"max": to_ms(row.max_ns)}


def _told(value_ms: float | None) -> str:
    return "-" if value_ms is None else f"{value_ms:.3f}"


def means_ms(budget: Budget | None) -> dict[str, float | None]:
    """The mean of each hop, for the archive; None if not known."""
    known = {row.name: to_ms(row.mean_ns) for row in budget.rows} if budget else {}
    return {f"{name}_mean_ms": known.get(name) for name in HOPS}


def groups(budget: Budget) -> dict[str, NDArray[np.float64]]:
    """For each group of deliveries whose hops are known the mean of each hop, in ms."""
    latency_ns = budget.latency_ns[budget.known]
    order = np.argsort(latency_ns)
    hops_ns = np.array([budget.hops[name][budget.known] for name in HOPS])
    found = {}
    for name, share in GROUPS:
        chosen = order[int(share * len(order)) :]
        if len(chosen) >= (SAMPLES_BEYOND if share else 1):
            found[name] = hops_ns[:, chosen].mean(axis=1) / 1e6
    return found
