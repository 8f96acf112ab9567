"""The stored events of all channels, as the hub reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from broadcaster import history
from broadcaster.bus import CommandLink
from broadcaster.errors import InvalidEvent
from broadcaster.history import Head
from broadcaster.hub.arrival import Arrival, read
from broadcaster.position import Position
from broadcaster.settings import HistoryTable

PAGE_EVENTS: Final = 256
"""Events read from Redis at a time: some 2 ms of the hub's time, and of Redis' much less."""


@dataclass(frozen=True, slots=True)
class Page:
    """Stored events that follow each other in the log.

    Attributes:
        head: Where the channel stood when it was read.
        arrivals: The valid events.
        refused: Offsets of those that are not valid, which must be told as missing.
        last: Offset of the last one, valid or not; the first one asked for, less one, if there is none.
        complete: Whether there was nothing after it.
    """

    head: Head
    arrivals: tuple[Arrival, ...]
    refused: tuple[Position, ...]
    last: int
    complete: bool


class EventLog:
    """Reads channels out of Redis."""

    def __init__(self, commands: CommandLink, table: HistoryTable, max_bytes: int) -> None:
        self._commands = commands
        self._table = table
        self._max_bytes = max_bytes

    async def look(self, channel: str) -> Head:
        """Where a channel stands; its epoch is begun if that is due.

        Raises:
            RedisUnavailable, RedisRefused: See `CommandLink.execute`.
        """
        [reply] = await self._commands.execute(history.look(channel, self._table))
        return history.read_head(reply)

    async def page(self, channel: str, first: int) -> Page:
        """The stored events from an offset on, at most `PAGE_EVENTS`.

        Args:
            channel: Of which channel.
            first: The lowest offset.

        Raises:
            RedisUnavailable, RedisRefused: See `CommandLink.execute`.
        """
        looked, listed = await self._commands.execute(
            history.look(channel, self._table), history.page(channel, first, PAGE_EVENTS)
        )
        head = history.read_head(looked)
        arrivals, refused, epoch = list[Arrival](), list[Position](), head.epochs[0].epoch
        items = history.read_page(listed)
        for offset, payload in items:
            try:
                arrival = read(payload, self._max_bytes)
            except InvalidEvent:
                refused.append(Position(epoch, offset))
                continue
            if arrival.position is None or arrival.position.offset != offset:
                refused.append(Position(epoch, offset))
                continue
            arrivals.append(arrival)
            epoch = arrival.position.epoch
        last = items[-1][0] if items else first - 1
        return Page(head, tuple(arrivals), tuple(refused), last, len(items) < PAGE_EVENTS)
