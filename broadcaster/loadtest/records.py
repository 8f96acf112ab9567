"""The rows of a run's CSV files: what was published, delivered, and lost. Recorded first, read later."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Final, TextIO, TypeVar

from broadcaster.core.errors import OutputError, RunDamaged
from broadcaster.core.files import whole_file
from broadcaster.core.text import reason

Row = TypeVar("Row", bound="Record")


@dataclass(frozen=True, slots=True)
class Record:
    """A row; its fields are the columns, units in their names."""


@dataclass(frozen=True, slots=True)
class PublishedRecord(Record):
    """One event the publisher meant to publish.

    Attributes:
        sequence: Its number at its source.
        event_id: Its id.
        intended_mono_ns: When it was due by the schedule; CLOCK_MONOTONIC, nanoseconds.
        published_mono_ns: When it was written to the socket of Redis; same clock.
        intended_wall_us: As `intended_mono_ns`, in microseconds since 1970.
        published_wall_us: As `published_mono_ns`, in microseconds since 1970.
        heard: Redis subscriptions that received it; empty if not known.
        error: Why it is not known whether it was published; empty if it was.
        epoch: In which epoch it is stored; empty if events are not stored, or with an error.
        offset: Its offset in that epoch; empty as `epoch`.
    """

    sequence: int
    event_id: str
    intended_mono_ns: int
    published_mono_ns: int
    intended_wall_us: int
    published_wall_us: int
    heard: int | None
    error: str
    epoch: str = ""
    offset: int | None = None

    @property
    def position(self) -> str:
        """`<epoch>-<offset>`; empty if it has none."""
        return "" if self.offset is None else f"{self.epoch}-{self.offset}"


@dataclass(frozen=True, slots=True)
class DeliveryRecord(Record):
    """One event received by one client.

    Attributes:
        client: Number of the client in the whole fleet, from 0.
        event_id: The event's id.
        sequence: Its number at its source.
        received_mono_ns: When the read that brought it returned; CLOCK_MONOTONIC, nanoseconds.
        received_wall_us: The same instant in microseconds since 1970.
    """

    client: int
    event_id: str
    sequence: int
    received_mono_ns: int
    received_wall_us: int


WARMUP_SOURCE: Final = "loadtest-warm-up"
"""The source of the events before the schedule, which are in no log."""


@dataclass(frozen=True, slots=True)
class TraceRecord(Record):
    """The way of one event, as far as it is known to a fleet process and to its hub.

    Attributes:
        event_id: The event's id.
        stored_at_us: When Redis stored it: its wall clock, microseconds since 1970. Empty if not known.
        read_mono_ns: When the hub had read it: the hub's CLOCK_MONOTONIC. Empty if it does not know.
        written_mono_ns: The instant before the hub first wrote it to a subscriber; same clock. Empty as before,
            and if it was written to none as it came.
        recovered: 1: the hub has read it from the log, not from its subscription.
    """

    event_id: str
    stored_at_us: int | None
    read_mono_ns: int | None
    written_mono_ns: int | None
    recovered: int


@dataclass(frozen=True, slots=True)
class ClockRecord(Record):
    """One comparison of a process' CLOCK_MONOTONIC with the clock of the hub, or of Redis.

    Attributes:
        of: `hub` (its CLOCK_MONOTONIC) or `redis` (its wall clock).
        instance: Which hub has answered; empty for Redis. Two of them: `several`.
        wall_ahead_ns: How far the process' own wall clock is ahead of its CLOCK_MONOTONIC.
        ahead_ns: How far the other clock is ahead of the process' CLOCK_MONOTONIC; empty if it did not answer.
        error_ns: The other clock lies within so much of it: half of the shortest round trip; empty as before.
        its_wall_ahead_ns: As `wall_ahead_ns`, of the hub; empty as before, and for Redis.
        why: Why it did not answer; empty if it did.
    """

    of: str
    instance: str
    wall_ahead_ns: int
    ahead_ns: int | None
    error_ns: int | None
    its_wall_ahead_ns: int | None
    why: str


DISCONNECTED: Final = "disconnected"
"""The cause of a lost connection; followed by the close code, 1006 if there was no close frame."""

NEVER_CONNECTED: Final = "never connected"
"""The cause of a client that could not connect at all."""


@dataclass(frozen=True, slots=True)
class LossRecord(Record):
    """What one client may have missed: a gap that the hub announced, or a time without a connection.

    Attributes:
        client: Number of the client in the whole fleet, from 0.
        cause: Of a gap as the hub named it; else `disconnected <close code>`, or `never connected`.
        epoch: Of a gap: in which epoch; empty if it is not known.
        first: Of a gap: the first missing offset; empty if it is not known.
        last: Of a gap: the last missing offset; empty if it reaches to the end of its epoch.
        after_sequence: Highest sequence that had arrived before; empty if none.
        before_sequence: First higher sequence that arrived afterwards; empty if none.
        resumed_after: Of a disconnected client: the position after which it asked its hub to resume, so that
            nothing need be missing; empty if it could not, or did not reconnect.
        from_mono_ns: When the gap was announced, or the connection lost; CLOCK_MONOTONIC, nanoseconds.
        to_mono_ns: When the client was connected again; empty if never. Of a gap: as `from_mono_ns`.
    """

    client: int
    cause: str
    epoch: str
    first: int | None
    last: int | None
    after_sequence: int | None
    before_sequence: int | None
    resumed_after: str
    from_mono_ns: int
    to_mono_ns: int | None

    @property
    def was_announced(self) -> bool:
        """Whether the hub has announced it; else the client was not connected, and knows it by itself."""
        return self.cause != NEVER_CONNECTED and not self.cause.startswith(DISCONNECTED)


@contextlib.contextmanager
def result_file(path: Path) -> Iterator[TextIO]:
    """Open a result for writing; it appears only when it is complete.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        with whole_file(path) as file:
            yield file
    except OSError as error:
        raise OutputError(path, error) from None


def write(path: Path, kind: type[Row], rows: Iterable[Row]) -> None:
    """Write a CSV with a header made from the record's fields; the file appears only when it is complete.

    Raises:
        OutputError: It cannot be written.
    """
    with result_file(path) as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(kind))
        writer.writerows(map(astuple, rows))


def read(path: Path, kind: type[Row]) -> list[Row]:
    """Read what `write` wrote.

    Raises:
        RunDamaged: It is not there, has other columns, or a value of another type, or is cut off.
    """
    names = [field.name for field in fields(kind)]
    readers = [_READERS[str(field.type)] for field in fields(kind)]
    found = []
    with _opened(path) as file:
        rows = csv.reader(_whole_lines(file))
        try:
            if next(rows, None) != names:
                raise ValueError(f"has other columns than this version writes ({', '.join(names)})")
            for row in rows:
                try:
                    found.append(kind(*(read(cell) for read, cell in zip(readers, row, strict=True))))
                except ValueError:
                    raise ValueError(_what_is_wrong(row, names, readers)) from None
        except UnicodeDecodeError:
            raise RunDamaged(f"{path}, line {rows.line_num + 1} or later: is no UTF-8") from None
        except (ValueError, csv.Error) as error:
            raise RunDamaged(f"{path}, line {max(rows.line_num, 1)}: {error}") from None
    return found


def _whole_lines(file: TextIO) -> Iterator[str]:
    for line in file:
        yield line
        if not line.endswith("\n"):
            raise ValueError("is cut off")


def _what_is_wrong(row: list[str], names: list[str], readers: list[Any]) -> str:
    if len(row) != len(names):
        return f"has {len(row)} columns, and should have {len(names)}"
    for name, read, cell in zip(names, readers, row, strict=True):
        with contextlib.suppress(ValueError):
            read(cell)
            continue
        return f"{name} is no whole number"
    raise AssertionError(row)


def read_text(path: Path) -> str:
    """The text of a file of a run.

    Raises:
        RunDamaged: It is not there, or is no text.
    """
    with _opened(path) as file:
        try:
            return file.read()
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise RunDamaged(f"{path}, line {line}: is no UTF-8") from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            yield file
    except FileNotFoundError:
        raise RunDamaged(f"{path.parent} is not a complete run: there is no {path.name}") from None
    except OSError as error:
        raise RunDamaged(f"{path} cannot be read: {reason(error)}") from None


_READERS: dict[str, Any] = {"int": int, "str": str, "int | None": lambda cell: int(cell) if cell else None}
