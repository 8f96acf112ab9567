"""The report for programs: the rows of `summary.csv` and of the archive."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from broadcaster.loadtest import archive
from broadcaster.loadtest.latency import Figures
from broadcaster.loadtest.ledger import Ledger
from broadcaster.loadtest.report.outcome import Outcome, disconnects


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
