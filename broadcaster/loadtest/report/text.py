"""The report as text, for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tabulate import tabulate

from broadcaster.loadtest.ledger import in_words
from broadcaster.loadtest.report.outcome import Outcome, disconnects

_MEANINGS: Final = """\
Dropped: a delivery that was expected (every event published, to every client) and did not come.
Latency: from the moment the schedule meant an event to be published to the moment the read that brought it
  to a client returned; both on the same clock (CLOCK_MONOTONIC), so publisher, Redis, hub and network are in it.
p99: 99 of 100 deliveries were as fast or faster; max is the slowest of all. Each is a measured value.
Fleet lag: how late the subscribers' own event loop ran a timer (1 ms coarse): the error bar of the figures.
Ledger: every event that was to be published, for every client. What was lost was named by the hub (a gap), or
  the client had no connection and could not go on where it was, or the event could not be published."""


def present(outcome: Outcome, folder: Path, *, explain: bool = False) -> str:
    """The report as text; with what its lines mean, if `explain`."""
    columns = {"whole run": (outcome.whole, outcome.disconnects)}
    if len(outcome.per_process) > 1:
        for number, (part, _) in outcome.per_process.items():
            columns[f"fleet.{number}"] = (part, disconnects(outcome.fleet[number]))
    lines: list[tuple[str, list[Any]]] = [
        ("Clients", [part.clients for part, _ in columns.values()]),
        ("Events", [part.events for part, _ in columns.values()]),
        ("Expected deliveries", [part.expected for part, _ in columns.values()]),
        ("Received deliveries", [part.received for part, _ in columns.values()]),
        ("Dropped deliveries", [part.dropped for part, _ in columns.values()]),
        ("p50 latency (ms)", [_ms(part.p50_ms) for part, _ in columns.values()]),
        ("p95 latency (ms)", [_ms(part.p95_ms) for part, _ in columns.values()]),
        ("p99 latency (ms)", [_ms(part.p99_ms) for part, _ in columns.values()]),
        ("max latency (ms)", [_ms(part.max_ms) for part, _ in columns.values()]),
        ("Duplicates", [part.duplicates for part, _ in columns.values()]),
        ("Out of order", [part.out_of_order for part, _ in columns.values()]),
        ("Disconnects", [lost for _, lost in columns.values()]),
    ]
    table = tabulate(
        [[name, *values] for name, values in lines],
        headers=["", *columns],
        tablefmt="simple_outline",
        disable_numparse=True,
        colalign=["left"] + ["right"] * len(columns),
    )
    ledger = in_words(outcome.ledger)
    meanings = ["", _MEANINGS] if explain else []
    text = [f"Run {outcome.name}", table, *ledger, *_notes(outcome), *meanings, "", _verdict(outcome, folder)]
    return "\n".join(text)


def _notes(outcome: Outcome) -> list[str]:
    host, hub = outcome.machine, outcome.hub
    sanic = f"Sanic {host['sanic']}, " if host["sanic"] else ""
    rhythm = f"{outcome.rate_hz:g} events a second" if outcome.rate_hz else "all events at once"
    lags = [result["lag_p99_ms"] for result in outcome.fleet.values()]
    highest = max(result["lag_max_ms"] for result in outcome.fleet.values())
    notes = [
        f"Schedule: {rhythm}. Fleet lag: p99 {max(lags):.1f} ms, max {highest:.1f} ms.",
        f"Machine: {host['cpu']}, {host['cores']} cores, {host['system']}, load {host['load_1m']}.",
        f"Versions: broadcaster {host['broadcaster']}, Python {host['python']}, Redis {host['redis_server']}, "
        f"{sanic}uvloop {host['uvloop']}, websockets {host['websockets']}.",
    ]
    if "error" in hub:
        notes.append(f"Hub: {hub['error']}.")
    else:
        refused = sum(hub["invalid"].values())
        notes.append(
            f"Hub: {hub['events_received']} events received, {refused} refused, {hub['deliveries']} deliveries, "
            f"{hub['slow_closed']} closed as slow, {hub['redis_reconnects']} Redis reconnects."
        )
    lost = sum(sum(result["disconnects"].values()) for result in outcome.fleet.values())
    if lost:
        again = sum(result["reconnects"] for result in outcome.fleet.values())
        notes.append(f"Connections: {lost} were lost, {again} were made again.")
    if outcome.whole.negative:
        notes.append(f"{outcome.whole.negative} latencies are negative: the clocks cannot be trusted.")
    for number, result in outcome.fleet.items():
        notes.extend(f"fleet.{number}: {count} x {why}" for why, count in result["failures"].items())
    return notes


def _verdict(outcome: Outcome, folder: Path) -> str:
    where = f"Results: {folder}"
    if outcome.broken:
        return "\n".join([*(f"FAILED: {reason}" for reason in outcome.broken), where])
    return f"PASSED: all limits of [report] hold.\n{where}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
