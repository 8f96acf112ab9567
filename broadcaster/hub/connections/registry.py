"""The connection registry: who is connected, being closed, or behind, and how connections ended."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from typing import Final, Generic, Protocol, TypeVar

from broadcaster import wire
from broadcaster.hub.fanout.format import NAMES, Format

TICK_S: Final = 0.1
"""Seconds between two ticks of the hub's timer."""


def ticks(interval_s: float) -> int:
    """How many ticks an interval has; at least one."""
    return max(1, round(interval_s / TICK_S))


_CLOSE_EVERY_S: Final = 0.01
_CLOSE_AT_LEAST: Final = 10
"""So many are closed at a time, at least: 1,000 a second."""


class Member(Protocol):
    """What the registry knows of a connection."""

    slot: int
    address: str
    format: Format

    def close(self, code: wire.CloseCode, reason: str) -> None:
        """Begin the closing handshake."""

    def settle(self) -> None:
        """Act on having become unwritable."""


M = TypeVar("M", bound=Member)


class ConnectionRegistry(Generic[M]):
    """All connections of the hub.

    Attributes:
        slots: The connections, each in one of the slots; one slot is pinged per tick, so that a round of pings is
            spread over the whole interval. So are heartbeats.
        peak: Most connections at one time.
        by_address: How many there are per address.
        by_format: How many there are per name of a format.
        due: Those that are closed in their turn, with code and reason: any other close takes these.
        closing: Those whose closing handshake has begun.
        behind: Those with a subscription that is behind.
        unsettled: Those that stopped being writable in this turn of the event loop; see `Fanout`.
        opened: How many have come.
        closed: How many the hub has closed, by close code; counted when the close frame is sent.
        ending: Those that it has closed, and that are not gone yet.
        left: How many have gone without having been closed: by their own close, or because their connection ended.
        aborted: How many of the closed were cut because they did not answer in time.

    At any moment, opened + ending = connected + left + all that were closed.
    """

    def __init__(self, slots: int, spread_s: float = 0.0) -> None:
        """Prepare an empty registry.

        Args:
            slots: See above.
            spread_s: Most seconds over which closes are spread.
        """
        self.slots: list[set[M]] = [set() for _ in range(slots)]
        self._next_slot = itertools.cycle(range(slots))
        self._loop = asyncio.get_running_loop()
        self.connected = 0
        self.peak = 0
        self.by_address: Counter[str] = Counter()
        self.by_format = dict.fromkeys(NAMES, 0)
        self.due: dict[M, tuple[wire.CloseCode, str]] = {}
        self._spread_s = spread_s
        self._next_closes: asyncio.Handle | None = None
        self._closes = 0  # so many more may be closed at once
        self._pace = 0  # so many of those that are due are closed at a time
        self.closing: set[M] = set()
        self.behind: set[M] = set()
        self.unsettled: list[M] = []
        self.opened = self.left = 0
        self.closed: Counter[wire.CloseCode] = Counter()
        self.ending: set[M] = set()
        self.aborted = 0

    def add(self, connection: M) -> None:
        connection.slot = next(self._next_slot)
        self.slots[connection.slot].add(connection)
        self.connected += 1
        self.opened += 1
        self.peak = max(self.peak, self.connected)
        self.by_address[connection.address] += 1
        self.by_format[connection.format.name] += 1

    def remove(self, connection: M) -> None:
        """Forget a connection that has ended; called once."""
        self.slots[connection.slot].discard(connection)
        self.connected -= 1
        self.by_format[connection.format.name] -= 1
        self.left += connection not in self.ending
        self.ending.discard(connection)
        self.by_address[connection.address] -= 1
        if not self.by_address[connection.address]:
            del self.by_address[connection.address]
        self.due.pop(connection, None)
        self.closing.discard(connection)
        self.behind.discard(connection)

    def note_closed(self, connection: M, code: wire.CloseCode) -> None:
        """The hub has begun to close a connection; called once."""
        self.closed[code] += 1
        self.ending.add(connection)

    def everyone(self) -> list[M]:
        """All connections."""
        return list(itertools.chain.from_iterable(self.slots))

    def note_unwritable(self, connection: M) -> None:
        """A connection is full or being closed: it is settled before this turn of the loop ends.

        May be called inside a write, where nothing else may happen.
        """
        if not self.unsettled:
            self._loop.call_soon(self.settle)
        self.unsettled.append(connection)

    def settle(self) -> None:
        """Let every connection that stopped being writable act on it."""
        unsettled = self.unsettled[:]
        self.unsettled.clear()  # in place: the fan-outs hold this list
        for connection in unsettled:
            connection.settle()

    def close_in_turn(self, connection: M, code: wire.CloseCode, reason: str) -> bool:
        """Close a connection, at once or later: where many have to go, they go, and return, one after another.

        Returns:
            Whether it is closed; else it is `due`.
        """
        if self._next_closes is None:
            self._next_closes = self._loop.call_later(_CLOSE_EVERY_S, self._close_due)
            self._closes = _CLOSE_AT_LEAST
        if self._closes > 0 and connection not in self.due:
            self._closes -= 1
            connection.close(code, reason)
            return True
        self.due.setdefault(connection, (code, reason))
        return False

    def _close_due(self) -> None:
        if not self.due:
            self._next_closes = None
            self._pace = 0
            return
        self._next_closes = self._loop.call_later(_CLOSE_EVERY_S, self._close_due)
        turns = max(1.0, self._spread_s / _CLOSE_EVERY_S)
        self._pace = max(self._pace, _CLOSE_AT_LEAST, math.ceil(len(self.due) / turns))
        self._closes = 0
        for connection, (code, reason) in list(itertools.islice(self.due.items(), self._pace)):
            connection.close(code, reason)
            self.due.pop(connection, None)
