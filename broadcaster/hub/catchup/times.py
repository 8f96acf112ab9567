"""Finds where in the log of a channel a time is: an instant becomes the position after which a reader begins.

Events are found by their `stored_at_us`. As long as these rise, which the script that stores them keeps book of,
the log is bisected: some 14 reads of one event. Up to where Redis' clock was set back, or may have been, it is
read from its beginning: the first event that was stored then or later may stand before earlier ones.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from broadcaster.core.backoff import LONGEST_WAIT_S, SHORTEST_WAIT_S, backoff_s
from broadcaster.core.errors import RedisRefused, RedisUnavailable
from broadcaster.core.logs import ThrottledLog
from broadcaster.core.position import Gap, Instant, Position
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.hub.catchup.epochs import EpochOrder
from broadcaster.hub.catchup.event_log import EventLog, StampedPage, Unreadable, is_given_up

log = logging.getLogger("broadcaster.hub")

_SCANNED_EVENTS: Final = 64
"""Read at a time where a log is not bisected: some 0.1 ms of the hub's time."""


class Found(NamedTuple):
    """Where a reader begins that has asked for a time.

    Attributes:
        position: All events after it are given.
        before: What is no longer there and may have been stored then, or later; None if there is no such thing.
    """

    position: Position
    before: Gap | None


class Asked(NamedTuple):
    """An instant, and the loop time at which it was asked for: a duration counts back from then."""

    instant: Instant
    at_s: float


class _Want(NamedTuple):
    channel: str
    asked: Asked
    serve: Callable[[Found | Unreadable], None]


class Times:
    """Finds instants in the logs, one channel after another."""

    def __init__(self, event_log: EventLog, runtime: Runtime = RUNTIME) -> None:
        self._log = event_log
        self._clock = runtime.clock
        self._chance = runtime.chance
        self._limits = runtime.limits
        self._wanted: list[_Want] = []
        self._wake = asyncio.Event()
        self._throttled = ThrottledLog(log, clock=runtime.clock)

    def want(self, channel: str, asked: Asked, serve: Callable[[Found | Unreadable], None]) -> None:
        """Have an instant looked for; `serve` is called with what was found, or why it cannot be."""
        self._wanted.append(_Want(channel, asked, serve))
        self._wake.set()

    async def run(self) -> None:
        """Find what is wanted until cancelled: all that is asked of one channel meanwhile with the same reads."""
        waits_s = self._backoff()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._wanted:
                channel = self._wanted[0].channel
                wants = [want for want in self._wanted if want.channel == channel]
                self._wanted = [want for want in self._wanted if want.channel != channel]
                try:
                    found = await self.find(channel, [want.asked for want in wants])
                    if found is None:
                        raise RedisUnavailable("Redis knows nothing of the channel")  # its epoch is about to begin
                except (RedisUnavailable, RedisRefused) as error:
                    if self._put_back(wants, error):
                        await asyncio.sleep(next(waits_s))
                else:
                    waits_s = self._backoff()
                    for want, result in zip(wants, found, strict=True):
                        want.serve(result)

    def _backoff(self) -> Iterator[float]:
        return backoff_s(SHORTEST_WAIT_S, LONGEST_WAIT_S, self._chance)

    def _put_back(self, wants: list[_Want], error: Unreadable) -> bool:
        """The log of their channel cannot be read: the others come first now; whether some of them wait on."""
        channel, said = wants[0].channel, str(error)
        text = "%s: cannot look for a time in the log: %s"
        self._throttled.log(logging.WARNING, channel + said, text, channel, said)
        now = self._clock.loop_s()
        waiting, told = list[_Want](), list[_Want]()
        for want in wants:
            gives_up = is_given_up(error, now - want.asked.at_s, self._limits)
            (told if gives_up else waiting).append(want)
        self._wanted += waiting
        for want in told:
            want.serve(error)
        return bool(waiting)

    async def find(self, channel: str, asked: Sequence[Asked]) -> list[Found] | None:
        """Where each of these instants is; None if Redis knows nothing of the channel.

        Raises:
            RedisUnavailable, RedisRefused: See `Broker`.
        """
        first = await self._log.stamped(channel, 0, 1)
        if first is None:
            return None
        # After the head, up to which it will be bisected: the clock may be set back between the two.
        told_us, rising = await self._log.stamps(channel)
        now_us, now_s = self._clock.wall_ns() // 1000 if told_us is None else told_us, self._clock.loop_s()
        if not first.events:
            return [_beginning(channel, first)] * len(asked)
        oldest, oldest_us = first.events[0]
        instants = [_us_of(each, now_us, now_s) for each in asked]
        later = sorted({us for us in instants if oldest_us is not None and oldest_us < us})
        head = first.head.position
        found = await self._scan(channel, oldest, head, later, head.offset + 1 if rising is None else rising)
        places = dict(zip(later, found, strict=True))
        last = _known(await self._log.stamped(channel, 0, 1)) if later else first
        begin = _beginning(channel, last)
        if begin != _beginning(channel, first):  # events have left the log, perhaps before they were read
            order = EpochOrder(channel, last.head.epochs)
            places = {us: place for us, place in places.items() if order.is_after(place, begin.position)}
        return [Found(places[us], None) if us in places else begin for us in instants]

    async def _bisect(
        self, channel: str, before_all: int, head: Position, instants: Sequence[int]
    ) -> list[Position]:
        """Per instant the position before the first event then or later, which comes after an offset."""
        read: dict[int, tuple[Position, int | None] | None] = {}  # many who ask at once ask for nearly the same

        async def event_at(offset: int) -> tuple[Position, int | None] | None:
            """The first event from an offset on; None if there is none."""
            if offset not in read:
                page = _known(await self._log.stamped(channel, offset, 1))
                read[offset] = page.events[0] if page.events else None
            return read[offset]

        places = []
        for us in instants:
            await asyncio.sleep(0)  # where nothing has to be read any more
            before, end = before_all, head.offset + 1
            place = head
            while before + 1 < end:
                middle = (before + end) // 2
                event = await event_at(middle)
                if event is not None and event[1] is not None and event[1] < us:
                    before = event[0].offset
                else:
                    end = middle
                    place = head if event is None else event[0]._replace(offset=event[0].offset - 1)
            places.append(place)
        return places

    async def _scan(
        self, channel: str, oldest: Position, head: Position, instants: Sequence[int], rising: int
    ) -> list[Position]:
        """The same, where stamps may have fallen up to the offset from which on they rise; the instants rise.

        The oldest event was stored before them.
        """
        places = list[Position]()
        offset = oldest.offset
        while len(places) < len(instants) and offset < rising:
            page = _known(await self._log.stamped(channel, offset, _SCANNED_EVENTS))
            for position, stored_us in page.events:
                while len(places) < len(instants) and (stored_us is None or instants[len(places)] <= stored_us):
                    places.append(position._replace(offset=position.offset - 1))
            if page.complete or not page.events:
                places += [head] * (len(instants) - len(places))
            else:
                offset = page.events[-1][0].offset + 1
        rest = instants[len(places) :]
        return places + await self._bisect(channel, max(oldest.offset, rising - 1), head, rest)


def _beginning(channel: str, page: StampedPage) -> Found:
    """Where the log begins, by its first event; at its head, if there is none."""
    head = page.head.position
    oldest = page.events[0][0] if page.events else head._replace(offset=head.offset + 1)
    before = EpochOrder(channel, page.head.epochs).gap_before(oldest)
    return Found(oldest._replace(offset=oldest.offset - 1), before)


def _us_of(asked: Asked, now_us: int, now_s: float) -> int:
    """The instant that is meant, by Redis' clock."""
    if not asked.instant.ago:
        return asked.instant.us
    return now_us - asked.instant.us - round((now_s - asked.at_s) * 1_000_000)


def _known(page: StampedPage | None) -> StampedPage:
    if page is None:
        raise RedisUnavailable("Redis has forgotten the channel meanwhile")
    return page
