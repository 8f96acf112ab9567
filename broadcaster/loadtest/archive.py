"""The CSV archive: one row per run, permanent columns, safe against two runs at once."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from broadcaster.core.errors import ConfigurationError
from broadcaster.core.files import whole_file
from broadcaster.loadtest.run import locked

COLUMNS: Final = (
    "run",
    "scope",
    "verdict",
    "clients",
    "events",
    "rate_hz",
    "expected",
    "received",
    "dropped",
    "p50_ms",
    "p95_ms",
    "p99_ms",
    "max_ms",
    "duplicates",
    "out_of_order",
    "negative",
    "disconnects",
    "publish_failed",
    "fleet_lag_p99_ms",
    "fleet_lag_max_ms",
    "broadcaster",
    "python",
    "redis_server",
    "sanic",
    "uvloop",
    "system",
    "cpu",
    "cores",
    "lost_named",
    "lost_unexplained",
    "reconnects",
    "validity",
    "reasons",
    "p90_ms",
    "p999_ms",
    "last_p50_ms",
    "last_p99_ms",
    "commit",
    "settings_sha256",
    "steal_pct",
    "others_cpu_pct",
)
"""Columns of `archive.csv` and of each run's `summary.csv`. New ones are only ever added at the end."""

_LAST_OF_0_1_0: Final = "cores"

Row = Mapping[str, object]


def write_summary(path: Path, rows: Sequence[Row]) -> None:
    """Write a run's `summary.csv`: the whole run first, then one row per fleet process."""
    with whole_file(path) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def append(path: Path, row: Row) -> None:
    """Add a run to the archive; the file is locked meanwhile, so that no two runs mix their rows.

    An archive of an earlier version gets the columns that it lacks; they are empty in its rows.

    Raises:
        ConfigurationError: The archive has other columns; it is left as it is.
    """
    with locked(path.with_name(".lock")):
        is_new = not path.exists() or path.stat().st_size == 0
        if not is_new:
            _bring_up_to_date(path)
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if is_new:
                writer.writeheader()
            writer.writerow(row)


def _bring_up_to_date(path: Path) -> None:
    with path.open(newline="") as file:
        rows = csv.reader(file)
        header = tuple(next(rows, []))
        if header == COLUMNS:
            return
        if header != COLUMNS[: len(header)] or _LAST_OF_0_1_0 not in header:
            raise ConfigurationError(f"{path} has other columns; move it away to begin a new archive")
        kept = [row + [""] * (len(COLUMNS) - len(row)) for row in rows]
    with whole_file(path, durable=True) as draft:  # all earlier runs
        writer = csv.writer(draft)
        writer.writerow(COLUMNS)
        writer.writerows(kept)
