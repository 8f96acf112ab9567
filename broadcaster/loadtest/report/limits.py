"""The limits of `[report]`, each held or broken."""

from __future__ import annotations

from dataclasses import dataclass

from broadcaster.loadtest.latency import Figures
from broadcaster.loadtest.ledger import Ledger, complaint
from broadcaster.settings import ReportTable


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit.

    Attributes:
        name: Its key in `[report]`; `ledger`, `published` and `clocks` always hold.
        what: What is limited, in words.
        unit: `ms`, or empty for a count.
        value: What the run has; None: too few samples for this percentile.
        allowed: The most that holds; a count below zero, which there cannot be, never does.
        holds: Whether it does.
        broken: One sentence that says how it is broken; empty if it holds.
    """

    name: str
    what: str
    unit: str
    value: float | None
    allowed: float
    holds: bool
    broken: str

    @property
    def line(self) -> str:
        """One line for people, such as `✓ p99 latency: 1.2 ms (5 ms allowed)`."""
        unit = f" {self.unit}" if self.unit else ""
        value = "too few samples" if self.value is None else f"{self.value:,}{unit}"
        return f"{'✓' if self.holds else '✗'} {self.what}: {value} ({self.allowed:,g}{unit} allowed)"


def limits(
    whole: Figures,
    ledger: Ledger,
    disconnects: int,
    unpublished: int,
    table: ReportTable,
    *,
    clocks_known: bool = True,
) -> list[Limit]:
    """All limits of a run. Those of latencies only where they are set.

    Args:
        whole: The figures of the whole run.
        ledger: Of the whole run.
        disconnects: Connections that were lost, and clients that never had one.
        unpublished: Events that were to be published, and were not.
        table: The settings of the run.
        clocks_known: Whether the clocks of publisher and fleet can be compared; else there are no latencies.
    """
    counts = [
        ("max_dropped", "dropped deliveries", whole.dropped, table.max_dropped),
        ("max_duplicates", "duplicates", whole.duplicates, table.max_duplicates),
        ("max_out_of_order", "deliveries out of order", whole.out_of_order, table.max_out_of_order),
        ("max_disconnects", "disconnects", disconnects, table.max_disconnects),
        ("published", "events that could not be published", unpublished, 0),
    ]
    found = [
        Limit(name, what, "", count, allowed, 0 <= count <= allowed, _not_allowed(count, what, allowed))
        for name, what, count, allowed in counts
    ]
    latencies = [
        ("max_p50_ms", "p50", whole.p50_ms, whole.max_ms, table.max_p50_ms),
        ("max_p99_ms", "p99", whole.p99_ms, whole.max_ms, table.max_p99_ms),
        (
            "max_last_p99_ms",
            "p99 to the last subscriber",
            whole.last_p99_ms,
            whole.last_max_ms,
            table.max_last_p99_ms,
        ),
    ]
    why = "nothing was delivered" if clocks_known else "the clocks cannot be compared"
    found += [_latency(*each, why) for each in latencies if each[-1]]
    silent = len(ledger.unexplained)  # regardless of what is allowed
    found.append(Limit("ledger", "silent losses", "", silent, 0, not silent, complaint(ledger) if silent else ""))
    if not clocks_known:
        broken = "latencies are not known: publisher and fleet are on clocks that nothing compares"
        found.append(Limit("clocks", "clocks that nothing compares", "", 1, 0, holds=False, broken=broken))
    return found


def _not_allowed(count: int, what: str, allowed: int) -> str:
    if count < 0:
        return f"{what} are {count}: more was counted than there can have been"
    return f"{count} {what}, {allowed} allowed" if count > allowed else ""


def _latency(
    name: str, what: str, value_ms: float | None, max_ms: float | None, allowed_ms: float, why_unknown: str
) -> Limit:
    """A limit of a percentile. One of too few samples holds if the largest of them does."""
    judged_ms = max_ms if value_ms is None else value_ms
    holds = judged_ms is not None and judged_ms <= allowed_ms
    if holds:
        broken = ""
    elif judged_ms is None:
        broken = f"{what} is not known: {why_unknown}, {allowed_ms:g} ms allowed"
    elif value_ms is None:
        broken = (
            f"{what} is not known of so few samples, and the largest is {judged_ms} ms, {allowed_ms:g} ms allowed"
        )
    else:
        broken = f"{what} is {value_ms} ms, {allowed_ms:g} ms allowed"
    return Limit(name, what, "ms", value_ms, allowed_ms, holds, broken)
