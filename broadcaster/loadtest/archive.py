"""The CSV archive: one row per run, permanent columns, safe against two runs at once."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from broadcaster.core.errors import ConfigurationError, OutputError
from broadcaster.core.files import whole_file
from broadcaster.core.text import reason
from broadcaster.loadtest.records import result_file
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
    "schedule_mean_ms",
    "to_redis_mean_ms",
    "to_hub_mean_ms",
    "in_hub_mean_ms",
    "fanout_mean_ms",
)
"""Columns of `archive.csv` and of each run's `summary.csv`. New ones are only ever added at the end."""

NAME: Final = "archive.csv"

_LAST_OF_0_1_0: Final = "cores"

_LONGEST_HEADER: Final = 65_536

_DECIMAL_COMMA: Final = re.compile(r"-?[0-9]+,[0-9]+").fullmatch

_MOVE: Final = "move it away to begin a new archive"

Row = Mapping[str, object]


def write_summary(path: Path, rows: Sequence[Row]) -> None:
    """Write a run's `summary.csv`: the whole run first, then one row per fleet process.

    Raises:
        OutputError: It cannot be written.
    """
    with result_file(path) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def check(path: Path) -> None:
    """Refuse an archive to which no row can be added: asked before a run, whose row would be lost.

    Raises:
        ConfigurationError: It cannot be written, or is something else; it is left as it is.
    """
    try:
        if path.exists():
            if _header(path):
                _rows(path)
            path.open("r+b").close()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: {_why(error)}") from None


def append(path: Path, row: Row) -> None:
    """Add a run to the archive; the file is locked meanwhile, so that no two runs mix their rows.

    An archive of an earlier version gets the columns that it lacks; they are empty in its rows. Else the rows that
    are there are never written again, so none is at risk. A row that cannot be written whole is not written.

    Raises:
        OutputError: It cannot be written, or has become something else; it is left as it is.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    try:
        with locked(path.with_name(".lock")):
            header = _header(path) if path.exists() else ()
            if not header:
                writer.writeheader()
            elif header != COLUMNS:
                _bring_up_to_date(path)
            writer.writerow(row)
            _add(path, text.getvalue().encode())
    except (OSError, UnicodeDecodeError, _Foreign) as error:
        raise OutputError(path, _why(error)) from None


class _Foreign(ValueError):
    """The archive is not one that a row can be added to."""


def _why(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return reason(error)
    return f"is no UTF-8; {_MOVE}" if isinstance(error, UnicodeDecodeError) else str(error)


def _header(path: Path) -> tuple[str, ...]:
    """The columns of an archive; none if it is empty.

    Raises:
        OSError: It cannot be read.
        UnicodeDecodeError, _Foreign: It is no archive that a row can be added to.
    """
    if not path.is_file():
        raise _Foreign(f"is no file; {_MOVE}")
    with path.open("rb") as file:
        line = file.readline(_LONGEST_HEADER)
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _spreadsheet("it is UTF-16")
    if line.startswith(codecs.BOM_UTF8):
        raise _spreadsheet("it begins with a byte order mark")
    text, _, rest = line.partition(b"\r")
    header = tuple(next(csv.reader([text.decode()]), []))
    for delimiter, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and _is_ours(tuple(header[0].split(delimiter))):
            raise _spreadsheet(f"it has {name} between the columns")
    if rest not in (b"", b"\n") and _is_ours(header):
        raise _spreadsheet("its lines end with a carriage return only")
    if line and not _is_ours(header):
        raise _Foreign(f"has other columns; {_MOVE}")
    return header


def _rows(path: Path) -> list[list[str]]:
    """All rows below the header; raises as that one."""
    lines = csv.reader(io.StringIO(path.read_bytes().decode(), newline=""))
    try:
        header, *rows = lines
    except csv.Error as error:
        raise _Foreign(f"line {lines.line_num}: {error}; {_MOVE}") from None
    for row in rows:
        for name, cell in zip(header, row, strict=False):
            if name != "run" and _DECIMAL_COMMA(cell):
                raise _spreadsheet(f"{name} of the run {row[0]} has a decimal comma")
    return rows


def _spreadsheet(seen: str) -> _Foreign:
    return _Foreign(
        f"was saved by a spreadsheet ({seen}): save it as UTF-8 with commas between the columns and decimal "
        f"points, or {_MOVE}"
    )


def _is_ours(header: tuple[str, ...]) -> bool:
    """Whether these are the columns, or those of an earlier version."""
    return header == COLUMNS[: len(header)] and _LAST_OF_0_1_0 in header


def _bring_up_to_date(path: Path) -> None:
    rows = _rows(path)
    with whole_file(path, durable=True) as draft:  # all earlier runs
        writer = csv.writer(draft)
        writer.writerow(COLUMNS)
        writer.writerows(row + [""] * (len(COLUMNS) - len(row)) for row in rows)


def _add(path: Path, row: bytes) -> None:
    """Add all of some bytes, on a line of their own, or nothing."""
    with path.open("ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":  # as an editor may leave it
                row = b"\r\n" + row
        try:
            while row:
                row = row[file.write(row) :]
        except OSError:
            file.truncate(size)
            raise
