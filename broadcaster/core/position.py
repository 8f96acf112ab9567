"""Positions in a channel, and gaps: ranges of events that cannot be delivered.

A *position* is `<epoch>-<offset>`. Within an epoch the offsets of stored events rise by one. A Redis that
was restarted begins a new epoch, because what it has lost cannot be known.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

MAX_OFFSET: Final = 2**53 - 1
"""The last integer that JavaScript reads exactly."""


class Position(NamedTuple):
    """A point in a channel, after the stored event with this offset; offset 0 is before the first one ever."""

    epoch: str
    offset: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Read `<epoch>-<offset>`.

        Raises:
            ValueError: `text` has another form.
        """
        match = _POSITION(text)
        if not match or int(match[2]) > MAX_OFFSET:
            raise ValueError(f"a position is <epoch>-<offset>, got {text[:100]!r}")
        return cls(match[1], int(match[2]))


class Last(NamedTuple):
    """Where to begin: so many events before the newest one."""

    events: int


class Instant(NamedTuple):
    """Where to begin: with the first event that was stored then, or later; all by Redis' clock.

    Attributes:
        us: Microseconds since 1970, at 0 with the oldest event there is; or, if `ago`, microseconds before now.
        ago: Whether it counts back from now.
    """

    us: int
    ago: bool = False


OLDEST: Final = Instant(0)

Beginning = Position | Last | Instant | None
"""Where a reader of a channel begins; None: now."""

_SINCE: Final = "a position, a duration such as 10m, a time such as 2026-11-27T02:00:00Z, or all"


def read_since(text: str) -> Position | Instant:
    """Read where to begin: a position, a duration back from now (s, m, h, d), a time (ISO 8601), or `all`.

    Raises:
        ValueError: It is none of these, or a time without its zone. The message continues a sentence that begins
            with the name of the parameter.
    """
    if (position := read_position(text)) is not None:
        return position
    if text == "all":
        return OLDEST
    if duration := _DURATION(text):
        return Instant(int(duration[1]) * _UNITS_US[duration[2]], ago=True)
    try:
        # The + of a zone is a space in a query that was not escaped.
        at = datetime.fromisoformat(_UNESCAPED_ZONE.sub(r"\1+", text) if text.isascii() else "")
    except ValueError:
        raise ValueError(f"is {_SINCE}, got {text[:100]!r}") from None
    if at.tzinfo is None:
        raise ValueError(f"is a time without its zone: end it with Z, or as in +02:00, got {text[:100]!r}")
    return Instant(max(0, (at - _EPOCH_BEGAN) // _MICROSECOND))


def is_timed(epoch: str) -> bool:
    """Whether the name of an epoch is the time at which it began.

    Then it orders the epoch for ever: `T`, milliseconds since 1970 as 9 digits to the base of 32, and 6 digits by
    chance, so that the later of two is the greater text. A name of another form is of an earlier version of the
    product, and older than all of these.
    """
    return _TIMED(epoch) is not None


def is_within(position: Position, known: Position) -> bool:
    """Whether everything up to `known` includes a position, for certain.

    Epochs without a time are older than those with one, and of two of them it is not known which is the older one.
    """
    if position.epoch == known.epoch:
        return position.offset <= known.offset
    return is_timed(known.epoch) and (not is_timed(position.epoch) or position.epoch < known.epoch)


def is_epoch(value: object) -> bool:
    return type(value) is str and _EPOCH(value) is not None


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a channel in Redis: its epochs with their first offsets, oldest first, and the last offset."""

    epochs: tuple[Position, ...]
    offset: int

    @property
    def position(self) -> Position:
        return Position(self.epochs[-1].epoch, self.offset)


class Cause(enum.StrEnum):
    """Why events are missing."""

    REDIS_LINK_LOST = "redis_link_lost"
    """The hub had no connection to Redis, and events are not stored: it is unknown whether there were any."""
    REDIS_RESTARTED = "redis_restarted"
    """Redis was restarted (or its data of the channel was lost): what it had not kept is lost."""
    EXPIRED = "expired"
    """The events have left the retention window (`history.max_events`, `history.idle_expire_s`)."""
    SHED = "shed"
    """The client was too slow, and the channel drops the oldest events of slow clients instead of closing them."""
    REFUSED = "refused"
    """What is stored there is no valid event, or too large for the hub."""
    POSITION_UNKNOWN = "position_unknown"
    """The requested position was never issued."""
    UNEXPLAINED = "unexplained"
    """A subscriber found a hole that its hub did not announce. A correct hub causes none."""
    CLOSED = "closed"
    """A subscriber was closed (4009) because its hub could not deliver what follows."""
    NO_HISTORY = "no_history"
    """Events are not stored here, so no client can resume."""


@dataclass(frozen=True, slots=True)
class Gap:
    """A range of events of a channel that cannot be delivered.

    Attributes:
        channel: Name of the channel.
        cause: Why they are missing; one of `Cause`.
        epoch: Epoch of the range; None when events are not stored.
        first: The first missing offset; None when it is not known.
        last: The last missing offset; None when it is not known whether and how many there were.
        position: The position after which delivery continues; None when events are not stored.
    """

    channel: str
    cause: str
    epoch: str | None = None
    first: int | None = None
    last: int | None = None
    position: Position | None = None

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Gap:
        """Read the fields of a `gap` frame; a value of another type counts as unknown."""

        def number(name: str) -> int | None:
            return value if type(value := fields.get(name)) is int else None

        epoch, position = fields.get("epoch"), fields.get("position")
        return cls(
            channel=str(fields.get("channel")),
            cause=str(fields.get("cause")),
            epoch=epoch if is_epoch(epoch) else None,
            first=number("first"),
            last=number("last"),
            position=read_position(position),
        )


def read_position(value: object) -> Position | None:
    """The position in a field of a frame; None if the value is null, or no position."""
    try:
        return Position.parse(value) if isinstance(value, str) else None
    except ValueError:
        return None


def read_place(payload: bytes) -> tuple[str, Position] | None:
    """Channel and position of a stored event, also of one that is not valid; None if it does not say them.

    They stand in front of what was published, whatever that was.
    """
    match = _PLACE(payload)
    position = read_position(f"{match[2].decode()}-{match[3].decode()}") if match else None
    return None if match is None or position is None else (match[1].decode(), position)


def read_stamp(payload: bytes) -> int | None:
    """When a stored event was stored: microseconds since 1970 by Redis' clock; None if it does not say."""
    match = _PLACE(payload)
    stamp = _STAMP(payload, match.end()) if match else None
    return None if stamp is None else int(stamp[1])


_EPOCH: Final = re.compile(r"[0-9A-Za-z]{1,64}").fullmatch
_TIMED: Final = re.compile(r"T[0-9a-v]{9}[0-9a-f]{6}").fullmatch
_POSITION: Final = re.compile(r"([0-9A-Za-z]{1,64})-([0-9]{1,16})", re.ASCII).fullmatch
_PLACE: Final = re.compile(
    rb'\{\s*"channel":\s*"([A-Za-z0-9._:-]{1,128})",\s*"epoch":\s*"([0-9A-Za-z]{1,64})",\s*"offset":\s*([1-9][0-9]{0,15})\s*[,}]'
).match
_STAMP: Final = re.compile(rb'\s*"stored_at_us":\s*([0-9]{1,16})\s*[,}]').match
_DURATION: Final = re.compile(r"([0-9]{1,9})([smhd])", re.ASCII).fullmatch
_UNITS_US: Final = {"s": 10**6, "m": 60 * 10**6, "h": 3_600 * 10**6, "d": 86_400 * 10**6}
_UNESCAPED_ZONE: Final = re.compile(r"(T[^ ]*) (?=[0-9]{2}(:?[0-9]{2})?$)")
_EPOCH_BEGAN: Final = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
_MICROSECOND: Final = datetime.resolution
