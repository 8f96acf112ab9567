"""Stored events for who asks for them once: a part of the log, bounded in events and in bytes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from broadcaster.core.position import OLDEST, Beginning, Instant, Last, Position
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.hub.catchup.epochs import EpochOrder
from broadcaster.hub.catchup.event_log import EventLog, Page
from broadcaster.hub.catchup.times import Asked, Times
from broadcaster.hub.fanout.filters import Filter
from broadcaster.wire.frames import payload_of

_MOST_PAGES: Final = 16
"""Read for one request: some 30 ms of the hub's time, in slices. Who wants more goes on with `next`."""

_MOST_AT_ONCE: Final = 64


class Busy(Exception):
    """Too many requests for stored events are being answered."""


@dataclass(slots=True)
class Extract:
    """Stored events of a channel, in its order.

    Attributes:
        payloads: Those that are wanted, as they are stored.
        position: Up to where it reaches: what is wanted and comes later is after it. None of an unknown channel.
        more: Whether there may be more now.
        complete: Whether nothing is missing from where it was to begin up to `position`.
        size: Bytes of their frames.
    """

    payloads: list[bytes]
    position: Position | None
    more: bool = False
    complete: bool = True
    size: int = 0


class History:
    """Reads stored events, over the connection for pages, one page after another for all who ask."""

    def __init__(self, event_log: EventLog, times: Times, runtime: Runtime = RUNTIME) -> None:
        self._log = event_log
        self._times = times
        self._clock = runtime.clock
        self._limits = runtime.limits
        self._turn = asyncio.Lock()
        self._reading = 0

    async def read(self, channel: str, begins: Beginning, wanted: Filter, limit: int) -> Extract:
        """Events of a channel, from the first one on; nothing is opened, or begun in Redis.

        Args:
            channel: Which one.
            begins: Where; None: with the oldest event.
            wanted: Only these; others are read, and count for what one request may read.
            limit: The most events; `limits.page_bytes` are the most bytes, one larger event excepted.

        Raises:
            Busy: There are too many such requests.
            RedisUnavailable, RedisRefused: See `Broker`.
        """
        if self._reading >= _MOST_AT_ONCE:
            raise Busy
        self._reading += 1
        try:
            return await self._read(channel, begins or OLDEST, wanted, limit)
        finally:
            self._reading -= 1

    async def _read(self, channel: str, begins: Position | Last | Instant, wanted: Filter, limit: int) -> Extract:
        asked = Asked(begins, self._clock.loop_s()) if isinstance(begins, Instant) else None
        page = await self._page(channel, 0, 1)
        if page is None:
            return Extract([], None, complete=not isinstance(begins, Position))
        extract, order = Extract([], page.head.position), EpochOrder(channel, page.head.epochs)
        if asked is not None:
            async with self._turn:
                found = await self._times.find(channel, [asked])
            if found is not None:
                extract.position, extract.complete = found[0].position, found[0].before is None
        elif isinstance(begins, Last):
            extract.position = order.before(page.head.position, begins.events)
        elif isinstance(begins, Position):
            extract.position = begins
        for _ in range(_MOST_PAGES):
            assert extract.position is not None
            first = order.next_offset(extract.position)
            count = self._limits.page_events if wanted else limit + 1 - len(extract.payloads)
            if (page := await self._page(channel, first, count)) is None:
                break  # Redis has forgotten it meanwhile
            order = EpochOrder(channel, page.head.epochs)
            if self._take(extract, page, order, wanted, limit):
                break
        return extract

    async def _page(self, channel: str, first: int, count: int) -> Page | None:
        async with self._turn:
            return await self._log.peek(channel, first, count)

    def _take(self, extract: Extract, page: Page, order: EpochOrder, wanted: Filter, limit: int) -> bool:
        """Take what is wanted of a page; whether that is all."""
        position, head = extract.position, page.head.position
        assert position is not None
        if order.is_after(position, head):
            extract.position, extract.more, extract.complete = head, False, False  # it was never given
            return True
        for message in page.messages:
            own, size = message.position, len(message.frame)
            assert own is not None
            if not order.is_after(own, position):
                continue
            is_full = extract.payloads and extract.size + size > self._limits.page_bytes
            if len(extract.payloads) == limit or is_full:
                extract.position, extract.more = position, True
                return True
            extract.complete = extract.complete and not order.gaps(position, own)
            position = own
            if wanted.wants(message.labels):
                extract.payloads.append(payload_of(message.frame))
                extract.size += size
        end = head if page.complete else page.last
        if end is not None and order.is_after(end, position):
            extract.complete = extract.complete and not order.head_gaps(position, end)
            position = end
        has_ended = page.complete or position == extract.position
        extract.position, extract.more = position, not page.complete
        return has_ended or len(extract.payloads) == limit
