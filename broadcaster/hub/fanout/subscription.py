"""One subscription: a client's interest in one channel, and how far delivery to it has come."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Sequence
from typing import Final, Protocol

from broadcaster import wire
from broadcaster.core.position import Beginning, Gap, Instant, Last, Position
from broadcaster.hub.fanout.filters import EVERYTHING, Filter
from broadcaster.hub.fanout.format import Format


class Sink(Protocol):
    """Where a subscription's frames go: a client's connection, as the fan-out sees it."""

    transport: asyncio.Transport
    format: Format
    wants_control: bool

    @property
    def memberships(self) -> Sequence[Subscription]:
        """All subscriptions with this sink, one per channel."""

    @property
    def closing(self) -> bool:
        """Whether it is being closed, or lost: nothing is delivered any more."""

    @property
    def writable(self) -> bool:
        """Whether frames may be written: it is not closing, and its socket is not full (backpressure)."""

    def write(self, data: bytes) -> bool:
        """Write frames. Nothing else happens within: a socket that fills up is acted on between two writes.

        Returns:
            Whether they were taken; else the connection is being closed, or has ended.
        """

    def tell(self, frame: bytes) -> bool:
        """Write a control frame in the format of this sink; as `write`."""

    def close(self, code: wire.CloseCode, reason: str) -> None:
        """Begin the closing handshake, once; nothing is delivered any more."""

    def close_in_turn(self, code: wire.CloseCode, reason: str) -> None:
        """The same, but where many have to go, one after another; nothing is delivered meanwhile."""

    def catch_up(self) -> None:
        """There is something to feed a subscription that is behind."""


class State(enum.Enum):
    """The state of a subscription; docs/design.md draws the transitions."""

    WAITING = "waiting"
    """The channel is not caught up yet, or the requested position is not known yet."""
    LIVE = "live"
    """Up to date: the next frame is written to it at once."""
    BEHIND = "behind"
    """A slow consumer: its socket was full, and it is fed from the ring buffer at its cursor."""
    REPLAYING = "replaying"
    """It resumes from an earlier position, fed from the log, or from the ring buffer once it has a cursor."""
    AWAITING_PAGE = "awaiting page"
    """It resumes, and the next page of the log is being read for it."""
    CLOSED = "closed"
    """Nothing is delivered to it any more."""


_REPLAYING: Final = (State.REPLAYING, State.AWAITING_PAGE)
_BEHIND: Final = (State.BEHIND, *_REPLAYING)


class Subscription:
    """Its state is changed by the fan-out and the replay of its channel only.

    Attributes:
        sink: Where its frames go.
        filter: Which events of the channel it wants.
        asked: Whether its client has asked to begin earlier than now.
        back: So many events before the newest one it begins, if that is earlier than `since`.
        instant: When what it begins with was stored; None once that is a position, and if it was not asked for.
        since: The position after which it begins; None for "now", and once it has been welcomed.
        before: What is missing before `since` of what it has asked for by time; None: nothing, or it was told.
        state: See `State`.
        cursor: While behind: number of the next ring entry to write; None while it has to read the log.
        position: While behind: where it stands; None if nobody needs to know, or events are not stored.
        behind_since: Loop time at which it came, then fell behind; while it replays, of its last progress.
        warned_at: Loop time of the last warning that it is slow.
    """

    __slots__ = (
        "asked",
        "back",
        "before",
        "behind_since",
        "cursor",
        "filter",
        "instant",
        "position",
        "since",
        "sink",
        "state",
        "warned_at",
    )

    def __init__(self, sink: Sink, wanted: Filter = EVERYTHING, since: Beginning = None) -> None:
        self.sink = sink
        self.filter = wanted
        self.asked = since is not None
        self.back = since.events if isinstance(since, Last) else 0
        self.instant = since if isinstance(since, Instant) else None
        self.since = since if isinstance(since, Position) else None
        self.before: Gap | None = None
        self.state = State.WAITING
        self.cursor: int | None = None
        self.position: Position | None = None
        self.behind_since = 0.0
        self.warned_at = 0.0

    @property
    def is_behind(self) -> bool:
        """Whether it is fed from the ring buffer or the log."""
        return self.state in _BEHIND

    @property
    def is_replaying(self) -> bool:
        """Whether it resumes and has not been live yet: it must make progress, but need not be up to date."""
        return self.state in _REPLAYING
