"""One connection's ear for one channel: where it stands, and what it wants to hear."""

from __future__ import annotations

from typing import TYPE_CHECKING

from broadcaster.hub.filters import EVERYTHING, Filter
from broadcaster.position import Position

if TYPE_CHECKING:
    from broadcaster.hub.channel import Channel
    from broadcaster.hub.connection import Connection
    from broadcaster.hub.pages import LogPage


class Listener:
    """Live, behind, or (while the channel is not open) waiting: the fan-out knows which.

    Attributes:
        connection: Whose it is.
        channel: Where it listens.
        filter: What of the channel it wants.
        since: After which position it wants to begin; None for: now.
        cursor: While behind: number of the next ring entry to write; None when it has to read the log first.
        place: While it resumes: where it stands; None when events are not stored.
        behind_since: Loop time at which it fell behind; while it resumes, of its last progress.
        resuming: Whether it has not been live yet: it is held to making progress, not to being up to date.
        awaits_page: Whether it waits for events to be read from the log.
        page: Such events, just read.
        warned_at: Loop time at which it was last told that it is slow.
    """

    __slots__ = (
        "awaits_page",
        "behind_since",
        "channel",
        "connection",
        "cursor",
        "filter",
        "page",
        "place",
        "resuming",
        "since",
        "warned_at",
    )

    def __init__(
        self,
        connection: Connection,
        channel: Channel,
        wanted: Filter = EVERYTHING,
        since: Position | None = None,
    ) -> None:
        self.connection = connection
        self.channel = channel
        self.filter = wanted
        self.since = since
        self.cursor: int | None = None
        self.place: Position | None = None
        self.behind_since = 0.0
        self.resuming = False
        self.awaits_page = False
        self.page: LogPage | None = None
        self.warned_at = 0.0
