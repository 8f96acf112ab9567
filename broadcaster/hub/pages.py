"""Pages of the log for those who resume from so far back that the ring cannot help; read once for all of them.

A listener that waits for a page owns nothing but its place in the queue. Pages are read one after another:
however many come back at once, Redis and the event loop see one request at a time.
"""

from __future__ import annotations

import asyncio
import itertools
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from broadcaster.bus import keep_trying
from broadcaster.hub.arrival import Arrival
from broadcaster.hub.log import PAGE_EVENTS, EventLog, Page
from broadcaster.position import Position

KEPT_PAGES: Final = 32
"""Pages that are kept for others who may want them."""

KEPT_BYTES: Final = 16 * 2**20
"""Bytes of these pages; the oldest go first."""


@dataclass(frozen=True, slots=True)
class LogPage:
    """A page of a channel's log, and what is worked out once for all who read it.

    Attributes:
        page: The page.
        ends: Per event: bytes of all frames up to and with its own.
        whole: Whether its events are of one epoch and follow each other without a hole.
    """

    page: Page
    ends: list[int]
    whole: bool

    @classmethod
    def of(cls, page: Page) -> LogPage:
        ends = list(itertools.accumulate(len(arrival.frame) for arrival in page.arrivals))
        positions = [arrival.position for arrival in page.arrivals]
        steps = itertools.pairwise(positions)
        whole = all(a and b and b.epoch == a.epoch and b.offset == a.offset + 1 for a, b in steps)
        return cls(page, ends, whole and not page.refused)

    @property
    def size(self) -> int:
        return self.ends[-1] if self.ends else 0

    def run(self, place: Position, max_bytes: int) -> Sequence[Arrival]:
        """The events right after `place`, if nothing is missing before, between or behind them; else nothing.

        At least one, and no more than `max_bytes` unless one alone is.
        """
        if not self.whole or not self.page.arrivals:
            return ()
        first = self.page.arrivals[0].position
        assert first is not None
        start = place.offset + 1 - first.offset
        if place.epoch != first.epoch or not 0 <= start < len(self.ends):
            return ()
        before = self.ends[start - 1] if start else 0
        return self.page.arrivals[start : max(start + 1, bisect_right(self.ends, before + max_bytes))]


class Pages:
    """Reads and keeps pages.

    Attributes:
        read: How many pages were read.
    """

    def __init__(self, events: EventLog) -> None:
        self._log = events
        self._kept: OrderedDict[tuple[str, int], LogPage] = OrderedDict()
        self._kept_bytes = 0
        self._wanted: OrderedDict[tuple[str, int], list[Callable[[LogPage], None]]] = OrderedDict()
        self._wake = asyncio.Event()
        self.read = 0

    def get(self, channel: str, first: int) -> LogPage | None:
        """The page in which to look for an offset, if it is at hand."""
        key = _key(channel, first)
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def want(self, channel: str, first: int, serve: Callable[[LogPage], None]) -> None:
        """Have the page in which to look for an offset read anew; `serve` is called with it."""
        self._wanted.setdefault(_key(channel, first), []).append(serve)
        self._wake.set()

    async def run(self) -> None:
        """Read what is wanted, one page at a time, until cancelled.

        Raises:
            RedisRefused: Redis will not let us read.
        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._wanted:
                key = next(iter(self._wanted))
                page = await self._read(*key)
                for serve in self._wanted.pop(key, ()):
                    serve(page)

    async def _read(self, channel: str, first: int) -> LogPage:
        page = await keep_trying(lambda: self._log.page(channel, first), f"{channel}: cannot read the log")
        self.read += 1
        found = LogPage.of(page)
        self._keep((channel, first), found)
        return found

    def _keep(self, key: tuple[str, int], page: LogPage) -> None:
        if (old := self._kept.pop(key, None)) is not None:
            self._kept_bytes -= old.size
        self._kept[key] = page
        self._kept_bytes += page.size
        while len(self._kept) > KEPT_PAGES or (self._kept_bytes > KEPT_BYTES and len(self._kept) > 1):
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.size


def _key(channel: str, first: int) -> tuple[str, int]:
    """Pages begin at round offsets, so that those who were cut at different events share them."""
    return channel, first - first % PAGE_EVENTS
