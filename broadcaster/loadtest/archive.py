"""The CSV archive: one row per run, the same columns for good, safe against two runs at once."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from broadcaster.errors import ConfigurationError
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
)
"""Columns of `archive.csv` and of each run's `summary.csv`. New ones are only ever added at the end."""

Row = Mapping[str, object]


def write_summary(path: Path, rows: Sequence[Row]) -> None:
    """Write a run's `summary.csv`: the whole run first, then one row per fleet process."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def append(path: Path, row: Row) -> None:
    """Add a run to the archive; the file is locked meanwhile, so that no two runs mix their rows.

    Raises:
        ConfigurationError: The archive has other columns; it is left as it is.
    """
    with locked(path.with_name(".lock")):
        is_new = not path.exists() or path.stat().st_size == 0
        if not is_new:
            with path.open(newline="") as file:
                header = next(csv.reader(file), [])
            if header != list(COLUMNS):
                raise ConfigurationError(f"{path} has other columns; move it away to begin a new archive")
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if is_new:
                writer.writeheader()
            writer.writerow(row)
