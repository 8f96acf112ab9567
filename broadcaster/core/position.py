"""Where somebody stands in a channel, and what he was told is missing.

A *position* is `<epoch>-<offset>`. Within an epoch the offsets of stored events rise by one. A Redis that
was restarted begins a new epoch, because nobody can know what it has forgotten.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

MAX_OFFSET: Final = 2**53 - 1
"""The last integer that JavaScript reads exactly."""


class Position(NamedTuple):
    """After which stored event somebody stands; offset 0 is before the first one ever."""

    epoch: str
    offset: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Read `<epoch>-<offset>`.

        Raises:
            ValueError: If `text` has another form.
        """
        match = _POSITION(text)
        if not match or int(match[2]) > MAX_OFFSET:
            raise ValueError(f"a position is <epoch>-<offset>, got {text[:100]!r}")
        return cls(match[1], int(match[2]))


def is_epoch(value: object) -> bool:
    return type(value) is str and _EPOCH(value) is not None


@dataclass(frozen=True, slots=True)
class Head:
    """Where a channel stands in Redis: its epochs with their first offsets, oldest first, and the last offset."""

    epochs: tuple[Position, ...]
    offset: int

    @property
    def position(self) -> Position:
        return Position(self.epochs[-1].epoch, self.offset)


class Cause(enum.StrEnum):
    """Why events are missing."""

    REDIS_LINK_LOST = "redis_link_lost"
    """The hub was without Redis, and events are not stored: nobody knows whether there were any."""
    REDIS_RESTARTED = "redis_restarted"
    """Redis was restarted (or its memory of the channel was lost): what it had not kept is gone."""
    EXPIRED = "expired"
    """The events have left the retention window (`history.max_events`, `history.idle_expire_s`)."""
    SHED = "shed"
    """You were too slow, and the channel drops the oldest events of the slow instead of closing them."""
    REFUSED = "refused"
    """What is stored there is no valid event, or too large for the hub."""
    POSITION_UNKNOWN = "position_unknown"
    """Nobody has ever issued the position that was given."""
    UNEXPLAINED = "unexplained"
    """A subscriber has found a hole that its hub did not announce. There is none as long as hubs are right."""
    CLOSED = "closed"
    """A subscriber was closed (4009) because its hub could not give what follows."""
    NO_HISTORY = "no_history"
    """Events are not stored here, so nobody can resume."""


@dataclass(frozen=True, slots=True)
class Gap:
    """A range of a channel that could not be given.

    Attributes:
        channel: Of which channel.
        cause: Why; one of `Cause`.
        epoch: In which epoch; None when events are not stored.
        first: The first missing offset; None when it is not known.
        last: The last missing offset; None when it is not known whether and how many there were.
        position: Where the channel goes on; None when events are not stored.
    """

    channel: str
    cause: str
    epoch: str | None = None
    first: int | None = None
    last: int | None = None
    position: Position | None = None

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Gap:
        """Read the fields of a `gap` frame; what is not as expected counts as not known."""

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
    """A position out of a frame; None if it is null, or none."""
    try:
        return Position.parse(value) if isinstance(value, str) else None
    except ValueError:
        return None


_EPOCH: Final = re.compile(r"[0-9A-Za-z]{1,64}").fullmatch
_POSITION: Final = re.compile(r"([0-9A-Za-z]{1,64})-([0-9]{1,16})", re.ASCII).fullmatch
