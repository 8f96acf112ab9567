"""Pages of the log for those that resume from before the ring buffer; read once for all of them.

A subscription that waits for a page owns nothing but its place in the queue. Pages are read one after another:
however many clients reconnect at once, Redis and the event loop see one request at a time. A page begins where
a subscription needs it, and serves all that stand in it: those that were cut at different events go on together.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from broadcaster.core.backoff import LONGEST_WAIT_S, SHORTEST_WAIT_S, backoff_s
from broadcaster.core.errors import RedisRefused, RedisUnavailable
from broadcaster.core.logs import ThrottledLog
from broadcaster.core.position import Position
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.hub.catchup.event_log import EventLog, Page, Unreadable, is_given_up
from broadcaster.hub.catchup.times import Times
from broadcaster.hub.fanout.message import Message

log = logging.getLogger("broadcaster.hub")

Serve = Callable[["CachedPage | Unreadable"], None]
"""Called with a page that was read, or with the error because of which it cannot be."""


@dataclass(frozen=True, slots=True)
class CachedPage:
    """A page of a channel's log, and what is worked out once for all that read it.

    Attributes:
        page: The page.
        ends: Per event: bytes of all frames up to and with its own.
        whole: Whether its events are of one epoch and follow each other without a hole.
    """

    page: Page
    ends: list[int]
    whole: bool

    @classmethod
    def of(cls, page: Page) -> CachedPage:
        ends = list(itertools.accumulate(len(message.frame) for message in page.messages))
        positions = [message.position for message in page.messages]
        steps = itertools.pairwise(positions)
        whole = all(a and b and b.epoch == a.epoch and b.offset == a.offset + 1 for a, b in steps)
        return cls(page, ends, whole and not page.refused)

    @property
    def size(self) -> int:
        return self.ends[-1] if self.ends else 0

    def reaches(self, first: int) -> bool:
        """Whether this is where to look for the first event from an offset on."""
        last = self.page.last
        return self.page.first <= first and last is not None and first <= last.offset

    def run(self, position: Position, max_bytes: int) -> Sequence[Message]:
        """The events right after `position`, if nothing is missing before, between or behind them; else nothing.

        At least one, and no more than `max_bytes` unless one alone is.
        """
        if not self.whole or not self.page.messages:
            return ()
        first = self.page.messages[0].position
        assert first is not None
        start = position.offset + 1 - first.offset
        if position.epoch != first.epoch or not 0 <= start < len(self.ends):
            return ()
        before = self.ends[start - 1] if start else 0
        return self.page.messages[start : max(start + 1, bisect_right(self.ends, before + max_bytes))]


class _Want(NamedTuple):
    """Who waits for the page in which to look for an offset, since which loop time."""

    since_s: float
    channel: str
    first: int
    floor: Position | None
    serve: Serve


class PageCache:
    """Reads and keeps pages.

    Attributes:
        log: Where they are read.
        times: Finds the time in the log at which a reader wants to begin.
        read: How many were read.
    """

    def __init__(self, event_log: EventLog, runtime: Runtime = RUNTIME) -> None:
        self.log = event_log
        self.times = Times(event_log, runtime)
        self._clock = runtime.clock
        self._chance = runtime.chance
        self._limits = runtime.limits
        self._kept: OrderedDict[tuple[str, int], CachedPage] = OrderedDict()  # by channel and first offset
        self._kept_bytes = 0
        self._wanted: deque[_Want] = deque()
        self._throttled = ThrottledLog(log, clock=runtime.clock)
        self._wake = asyncio.Event()
        self.read = 0

    def get(self, channel: str, first: int, epoch: str) -> CachedPage | None:
        """The page in which to look for an offset, if it is kept, and of the epoch in which the channel stands.

        Since then no other memory has taken the place of the one that was read.
        """
        for key, page in reversed(self._kept.items()):
            if key[0] == channel and page.reaches(first) and page.page.head.position.epoch == epoch:
                self._kept.move_to_end(key)
                return page
        return None

    def want(self, channel: str, first: int, floor: Position | None, serve: Serve) -> None:
        """Have the page in which to look for an offset read anew; `serve` is called with it.

        The floor is the newest position of the channel that this hub has seen.
        """
        self._wanted.append(_Want(self._clock.loop_s(), channel, first, floor, serve))
        self._wake.set()

    async def run(self) -> None:
        """Read what is wanted, one page at a time, until cancelled."""
        waits_s = self._backoff()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._wanted:
                want = self._wanted[0]
                try:
                    page = await self._read(want)
                except (RedisUnavailable, RedisRefused) as error:
                    if self._put_back(want.channel, error):
                        await asyncio.sleep(next(waits_s))
                else:
                    waits_s = self._backoff()
                    self._serve(want, page)

    def _backoff(self) -> Iterator[float]:
        return backoff_s(SHORTEST_WAIT_S, LONGEST_WAIT_S, self._chance)

    def _serve(self, want: _Want, page: CachedPage) -> None:
        """Serve all that are helped by a page that was read for one of them."""
        served, waiting = list[_Want](), deque[_Want]()
        for each in self._wanted:
            helps = each.first == want.first or page.reaches(each.first)
            (served if helps and each.channel == want.channel else waiting).append(each)
        self._wanted = waiting
        for each in served:
            each.serve(page)

    def _put_back(self, channel: str, error: Unreadable) -> bool:
        """The log of a channel cannot be read: the others come first now; whether some of it wait on."""
        self._complain(channel, str(error))
        now = self._clock.loop_s()
        others, waiting, told = list[_Want](), list[_Want](), list[_Want]()
        for each in self._wanted:
            gives_up = is_given_up(error, now - each.since_s, self._limits)
            (others if each.channel != channel else told if gives_up else waiting).append(each)
        self._wanted = deque([*others, *waiting])
        for each in told:
            each.serve(error)
        return bool(waiting)

    async def _read(self, want: _Want) -> CachedPage:
        page = CachedPage.of(await self.log.page(want.channel, want.first, want.floor))
        self.read += 1
        self._keep((want.channel, want.first), page)
        return page

    def _complain(self, channel: str, said: str) -> None:
        self._throttled.log(
            logging.WARNING, channel + said, "%s: cannot read the log for those that resume: %s", channel, said
        )

    def _keep(self, key: tuple[str, int], page: CachedPage) -> None:
        if (old := self._kept.pop(key, None)) is not None:
            self._kept_bytes -= old.size
        self._kept[key] = page
        self._kept_bytes += page.size
        limits = self._limits
        while len(self._kept) > limits.kept_pages or (
            self._kept_bytes > limits.kept_page_bytes and len(self._kept) > 1
        ):
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.size
