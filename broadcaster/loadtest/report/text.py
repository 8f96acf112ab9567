"""The report as text, for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tabulate import tabulate

from broadcaster.loadtest.latency import SAMPLES_BEYOND, Figures, histogram
from broadcaster.loadtest.ledger import in_words
from broadcaster.loadtest.report import budget as hops
from broadcaster.loadtest.report.clocks import Clocks
from broadcaster.loadtest.report.outcome import Outcome, disconnects

_MEANINGS: Final = """\
Dropped: a delivery that was expected (every event published, to every client) and did not come.
Latency: from the moment the schedule meant an event to be published to the moment the read that brought it
  to a client returned; both on the same clock (CLOCK_MONOTONIC), so publisher, Redis, hub and network are in it.
p99: 99 of 100 deliveries were as fast or faster; max is the slowest of all. Each is a measured value, and told
  where at least ten lie beyond it.
Last subscriber: from the same moment to the read of the last subscriber; of events that all have received.
Fleet lag: how late the subscribers' own event loop ran a timer: the error bar of the figures.
VALID: the rig has judged itself (docs/measuring.md): it did not stand still, and others left the machine to it.
Ledger: every event that was to be published, for every client. What was lost was named by the hub (a gap), or
  the client had no connection and could not go on where it was, or the event could not be published."""

_BAR_LENGTH: Final = 40

_CLOCKS: Final = "publisher; publisher and Redis; Redis and hub; hub; hub and fleet; publisher and fleet"
"""Whose clocks the hops, in their order, and the latency are differences of."""


def columns(outcome: Outcome) -> dict[str, tuple[Figures, int]]:
    """The figures and disconnects of the whole run, and of each fleet process if there are several."""
    found = {"whole run": (outcome.whole, outcome.disconnects)}
    if len(outcome.per_process) > 1:
        for number, (part, _) in outcome.per_process.items():
            found[f"fleet.{number}"] = (part, disconnects(outcome.fleet[number]))
    return found


def rows(outcome: Outcome) -> list[tuple[str, list[Any]]]:
    """The rows of the table: a name, and a value for each column."""
    scopes, error_ms = columns(outcome), (outcome.clocks.error_ns or 0) / 1e6
    parts = [part for part, _ in scopes.values()]
    return [
        ("Clients", [part.clients for part in parts]),
        ("Events", [part.events for part in parts]),
        ("Expected deliveries", [part.expected for part in parts]),
        ("Received deliveries", [part.received for part in parts]),
        ("Dropped deliveries", [part.dropped for part in parts]),
        ("p50 latency (ms)", [_ms(part.p50_ms, error_ms) for part in parts]),
        ("p95 latency (ms)", [_ms(part.p95_ms, error_ms) for part in parts]),
        ("p99 latency (ms)", [_ms(part.p99_ms, error_ms) for part in parts]),
        ("max latency (ms)", [_ms(part.max_ms, error_ms) for part in parts]),
        ("Duplicates", [part.duplicates for part in parts]),
        ("Out of order", [part.out_of_order for part in parts]),
        ("Disconnects", [lost for _, lost in scopes.values()]),
        ("p90 latency (ms)", [_ms(part.p90_ms, error_ms) for part in parts]),
        ("p99.9 latency (ms)", [_ms(part.p999_ms, error_ms) for part in parts]),
        ("p50 to last subscriber (ms)", [_ms(part.last_p50_ms, error_ms) for part in parts]),
        ("p99 to last subscriber (ms)", [_ms(part.last_p99_ms, error_ms) for part in parts]),
        ("max to last subscriber (ms)", [_ms(part.last_max_ms, error_ms) for part in parts]),
    ]


def schedule(outcome: Outcome) -> str:
    return f"{outcome.rate_hz:g} events a second" if outcome.rate_hz else "all events at once"


def present(outcome: Outcome, folder: Path, *, explain: bool = False) -> str:
    """The report as text; with what its lines mean, if `explain`."""
    scopes = columns(outcome)
    table = tabulate(
        [[name, *values] for name, values in rows(outcome)],
        headers=["", *scopes],
        tablefmt="simple_outline",
        disable_numparse=True,
        colalign=["left"] + ["right"] * len(scopes),
    )
    meanings = ["", _MEANINGS] if explain else []
    text = [
        f"Run {outcome.name}",
        *(f"INVALID: {reason}." for reason in outcome.validity.reasons),
        table,
        *_histogram(outcome),
        *_hops(outcome),
        *in_words(outcome.ledger),
        *_notes(outcome),
        *(f"  {limit.line}" for limit in outcome.limits),
        *meanings,
        "",
        *_verdict(outcome),
        f"Results: {folder}",
    ]
    return "\n".join(text)


def _hops(outcome: Outcome) -> list[str]:
    if outcome.budget is None:
        return []
    table = tabulate(
        hops.table(outcome.budget),
        headers=hops.HEADS,
        tablefmt="simple_outline",
        disable_numparse=True,
        colalign=["left"] + ["right"] * (len(hops.HEADS) - 1),
    )
    return [table, hops.note(outcome.budget), _hop_errors(outcome.clocks), *hops.unknown(outcome.budget)]


def _hop_errors(clocks: Clocks) -> str:
    errors = ", ".join(
        f"{name} {'not known' if error_ns is None else 'exact' if not error_ns else f'± {error_ns / 1e6:.3f} ms'}"
        for name, error_ns in clocks.hop_errors_ns.items()
    )
    return f"Clocks of the hops ({_CLOCKS}): {errors}."


def _histogram(outcome: Outcome) -> list[str]:
    classes = histogram(outcome.latencies.ordered_ns)
    largest = max((count for _, _, count in classes), default=0)
    width = max((len(f"{to_ms:.2f}") for _, to_ms, _ in classes), default=0)
    return [
        f"{from_ms:{width}.2f} to {to_ms:{width}.2f} ms  {_bar(count / largest):<{_BAR_LENGTH}}  {count:,}"
        for from_ms, to_ms, count in classes
    ]


def _bar(share: float) -> str:
    whole, eighths = divmod(round(share * _BAR_LENGTH * 8), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip()


def _notes(outcome: Outcome) -> list[str]:
    host, hub = outcome.machine, outcome.hub
    sanic = f"Sanic {host['sanic']}, " if host["sanic"] else ""
    lags = [result["lag_p99_ms"] for result in outcome.fleet.values()]
    highest = max(result["lag_max_ms"] for result in outcome.fleet.values())
    notes = [
        f"Schedule: {schedule(outcome)}. Fleet lag: p99 {max(lags):.1f} ms, max {highest:.1f} ms.",
        f"Machine: {host['cpu']}, {host['cores']} cores, {host['system']}, load {host['load_1m']}.",
        f"Versions: broadcaster {host['broadcaster']}, Python {host['python']}, Redis {host['redis_server']}, "
        f"{sanic}uvloop {host['uvloop']}, websockets {host['websockets']}.",
    ]
    notes += _samples(outcome)
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
    return [*notes, *outcome.clocks.notes, *outcome.validity.notes]


def _samples(outcome: Outcome) -> list[str]:
    """What the percentiles are made of, and what the rig has used."""
    whole, rig = outcome.whole, outcome.validity.rig
    notes = []
    if whole.max_ms is not None:
        of = f"of {whole.beyond_p99_events:,} event{'s' if whole.beyond_p99_events != 1 else ''}"
        few = "" if whole.p99_ms is not None else f"; fewer than {SAMPLES_BEYOND} are too few, and told as -"
        notes.append(f"Beyond p99: {whole.beyond_p99:,} deliveries, {of}{few}.")
    if whole.complete != whole.events:
        notes.append(f"Events that every subscriber received: {whole.complete:,} of {whole.events:,}.")
    if rig.others_cpu_pct is not None:
        parts = [f"{role} {pct:.0f} %" for role, pct in rig.cpu_pct.items() if pct is not None]
        notes.append(
            f"CPU, of one core: {', '.join(parts) or 'not known'}. "
            f"Of the machine: others {rig.others_cpu_pct:.1f} %, steal {rig.steal_pct:.1f} %."
        )
    return notes


def _verdict(outcome: Outcome) -> list[str]:
    validity = outcome.validity
    if validity.reasons:
        lines = [
            "INVALID: the rig was disturbed, so these figures are not those of the system: see above the table."
        ]
    else:
        stall_ms, late_ms = max(validity.rig.stalls_ms.values()), validity.rig.late_ms
        lines = [f"VALID: no part of the rig stood still ({stall_ms:.0f} ms) or was late ({late_ms:.1f} ms)."]
    lines += [f"FAILED: {reason}" for reason in outcome.broken]
    if outcome.is_failure:
        return lines if outcome.broken else [*lines, "FAILED: the run is INVALID; all limits of [report] hold."]
    return [*lines, "PASSED: all limits of [report] hold."]


def _ms(value: float | None, error_ms: float = 0.0) -> str:
    """A latency, with its error where publisher and fleet are on different clocks: less is not claimed."""
    if value is None:
        return "-"
    if not error_ms:
        return f"{value:.2f}"
    return f"{value:.2f} ± {error_ms:.2f}" if value >= error_ms else f"< {error_ms:.2f}"
