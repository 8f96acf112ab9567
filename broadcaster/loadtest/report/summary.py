"""The report for programs: `summary.json`, and the rows of `summary.csv` and of the archive.

The keys of `summary.json` are stable, with their units in their names; docs/measuring.md lists all of them. New
ones may come, and none changes its meaning.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

from broadcaster.loadtest import archive
from broadcaster.loadtest.latency import Figures, histogram, to_ms
from broadcaster.loadtest.ledger import Ledger
from broadcaster.loadtest.report.budget import as_summary, means_ms
from broadcaster.loadtest.report.outcome import Outcome, disconnects

SCHEMA: Final = 1
"""Of `summary.json`; a greater one would have keys that mean something else."""


def summary(outcome: Outcome) -> dict[str, Any]:
    """All that the text says."""
    validity, rig = outcome.validity, outcome.validity.rig
    return {
        "schema": SCHEMA,
        "run": outcome.name,
        "verdict": outcome.verdict,
        "limits": [
            {
                "name": limit.name,
                "what": limit.what,
                "unit": limit.unit,
                "value": limit.value,
                "allowed": limit.allowed,
                "holds": limit.holds,
                "broken": limit.broken,
            }
            for limit in outcome.limits
        ],
        "validity": {
            "verdict": validity.word,
            "reasons": validity.reasons,
            "notes": validity.notes,
            "others_cpu_pct": rig.others_cpu_pct,
            "steal_pct": rig.steal_pct,
            "cpu_pct": dict(rig.cpu_pct),
            "stalls_ms": rig.stalls_ms,
            "still_pct": rig.still_pct,
            "lags_ms": rig.lags_ms,
            "late_ms": rig.late_ms,
            "wall_step_ms": rig.wall_step_ms,
            "lost_rows": rig.lost_rows,
            "too_early": rig.too_early,
        },
        "schedule": {
            "rate_hz": outcome.rate_hz,
            "events": outcome.config["loadtest"].events,
            "warmup_events": outcome.config["loadtest"].warmup_events,
            "publish_failed": outcome.publish_failed,
        },
        "scopes": {"run": _scope(outcome.whole, outcome.ledger, list(outcome.fleet.values()))}
        | {
            f"fleet.{number}": _scope(part, ledger, [outcome.fleet[number]])
            for number, (part, ledger) in outcome.per_process.items()
        },
        "clocks": {
            "latency_error_ms": _error_ms(outcome.clocks.error_ns),
            "hop_errors_ms": {name: _error_ms(error) for name, error in outcome.clocks.hop_errors_ns.items()},
            "notes": list(outcome.clocks.notes),
        },
        "hops": None if outcome.budget is None else as_summary(outcome.budget),
        "histogram": [
            {"from_ms": low_ms, "to_ms": high_ms, "deliveries": count}
            for low_ms, high_ms, count in histogram(outcome.latencies.ordered_ns)
        ],
        "hub": outcome.hub,
        "machine": outcome.machine,
        "settings_sha256": outcome.settings_sha256,
    }


def _scope(part: Figures, ledger: Ledger, results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "clients": part.clients,
        "events": part.events,
        "expected": part.expected,
        "received": part.received,
        "dropped": part.dropped,
        "duplicates": part.duplicates,
        "out_of_order": part.out_of_order,
        "negative": part.negative,
        "disconnects": sum(disconnects(result) for result in results),
        "reconnects": sum(result["reconnects"] for result in results),
        "latency_ms": {
            "p50": part.p50_ms,
            "p90": part.p90_ms,
            "p95": part.p95_ms,
            "p99": part.p99_ms,
            "p99.9": part.p999_ms,
            "max": part.max_ms,
        },
        "beyond_p99": {"deliveries": part.beyond_p99, "events": part.beyond_p99_events},
        "to_last_ms": {"p50": part.last_p50_ms, "p99": part.last_p99_ms, "max": part.last_max_ms},
        "complete_events": part.complete,
        "fleet_lag_ms": {
            "p99": max(result["lag_p99_ms"] for result in results),
            "max": max(result["lag_max_ms"] for result in results),
        },
        "ledger": {
            "expected": ledger.expected,
            "delivered": ledger.delivered,
            "filtered": ledger.filtered,
            "lost": ledger.lost,
            "unexplained": len(ledger.unexplained),
            "unconfirmed": ledger.unconfirmed,
        },
    }


def _error_ms(error_ns: int | None) -> float | None:
    return None if error_ns is None else to_ms(error_ns)


def summary_rows(outcome: Outcome) -> list[dict[str, object]]:
    """The rows of `summary.csv`; the first is the run's row in the archive."""
    common: dict[str, object] = {
        "run": outcome.name,
        "verdict": outcome.verdict,
        "rate_hz": outcome.rate_hz,
        "publish_failed": outcome.publish_failed,
        "validity": outcome.validity.word,
        "reasons": "; ".join(outcome.validity.reasons),
        "settings_sha256": outcome.settings_sha256,
        "steal_pct": outcome.validity.rig.steal_pct,
        "others_cpu_pct": outcome.validity.rig.others_cpu_pct,
        **means_ms(outcome.budget),
    }
    common |= {key: value for key, value in outcome.machine.items() if key in archive.COLUMNS}
    rows = [_row("run", outcome.whole, outcome.ledger, list(outcome.fleet.values()))]
    for number, (part, ledger) in outcome.per_process.items():
        rows.append(_row(f"fleet.{number}", part, ledger, [outcome.fleet[number]]))
    return [common | row for row in rows]


def _row(scope: str, part: Figures, ledger: Ledger, results: list[dict[str, Any]]) -> dict[str, object]:
    return {
        "scope": scope,
        **{name: value for name, value in asdict(part).items() if name in archive.COLUMNS},
        "disconnects": sum(disconnects(result) for result in results),
        "fleet_lag_p99_ms": max(result["lag_p99_ms"] for result in results),
        "fleet_lag_max_ms": max(result["lag_max_ms"] for result in results),
        "lost_named": ledger.named,
        "lost_unexplained": len(ledger.unexplained),
        "reconnects": sum(result["reconnects"] for result in results),
    }
