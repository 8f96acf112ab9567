"""Brings the events of one channel into their order, and leaves no hole unfilled or untold.

`at` is the position up to which everything was handed on. It moves by exactly the next event from the
subscription, or by events from the log; anything else only wakes the one task that reads the log until `at`
has met the channel's head. The subscription itself never waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from broadcaster.bus import keep_trying
from broadcaster.hub.arrival import Arrival
from broadcaster.hub.fanout import Fanout
from broadcaster.hub.log import EventLog, Page
from broadcaster.hub.order import Order
from broadcaster.position import Cause, Gap, Position

log = logging.getLogger("broadcaster.hub")


class Reader:
    """One channel, from the subscription and from the log to the fan-out.

    Attributes:
        at: Up to where everything was handed on, or told as a gap; None before the first look.
        order: The order of this channel's positions.
        looks: How often it has begun to look where the channel stands.
        looked: The number of the last look after which everything was handed on.
        steady: Whether the subscription holds, and everything before it has been handed on.
        twins: Events that came again, or late, and were not handed on a second time.
        forged: Events whose position nobody has given them.
        recovered: Events that were read from the log because the subscription had not brought them.
    """

    def __init__(self, fanout: Fanout, events: EventLog, on_caught_up: Callable[[], None]) -> None:
        self._fanout = fanout
        self._channel = fanout.channel
        self._log = events
        self._on_caught_up = on_caught_up
        self._wake = asyncio.Event()
        self._confirmed = False
        self._changes = 0  # of the subscription
        self._skipped: Position | None = None  # the highest event that was not handed on since the last look
        self.looks = 0
        self.looked = 0
        self.at: Position | None = None
        self.order = Order(self._channel, ())
        self.steady = False
        self.twins = 0
        self.forged = 0
        self.recovered = 0

    def take(self, arrivals: Sequence[Arrival]) -> None:
        """Hand on what the subscription brought, if it is next. What is not stored passes at once."""
        at = self.at
        ready = []
        for arrival in arrivals:
            position = arrival.position
            if position is None:
                ready.append(arrival)
            elif at is not None and position.epoch == at.epoch and position.offset <= at.offset:
                self.twins += 1
            elif at is not None and position.epoch == at.epoch and position.offset == at.offset + 1:
                at = position
                ready.append(arrival)
            else:
                self._skip(position)
        self.at = at
        if ready:
            self._fanout.broadcast(ready)

    def _skip(self, position: Position) -> None:
        """It is not the next one: whatever it is, the log knows."""
        if self._skipped is None or position.offset > self._skipped.offset:
            self._skipped = position
        self._wake.set()

    def confirm(self) -> None:
        """The subscription holds from here on: what came before is in the log."""
        self._confirmed = True
        self._changes += 1
        self._wake.set()

    def interrupt(self) -> None:
        """The subscription is lost."""
        self._confirmed = self.steady = False
        self._changes += 1

    def check(self, head: Position | None) -> bool:
        """Whether everything up to `head`, which somebody has just read in Redis, was handed on; else: read on.

        None means that nobody knows where the channel stands.
        """
        if head and self.at and head.epoch == self.at.epoch and head.offset <= self.at.offset:
            return True
        self._wake.set()
        return False

    def can_place(self, position: Position) -> bool:
        """Whether it is known where a position is; else: look, and `on_caught_up` is called."""
        if self.at is not None and self.order.has_given(position, self.at):
            return True
        self._wake.set()
        return False

    async def run(self) -> None:
        """Read the log whenever it is necessary, until cancelled.

        Raises:
            RedisRefused: Redis will not let us read, and trying again would not help.
        """
        while True:
            await self._wake.wait()
            await keep_trying(self._catch_up, f"{self._channel}: cannot read the log")

    async def _catch_up(self) -> None:
        """Read until `at` is the head of the channel and nothing has been skipped meanwhile."""
        while True:
            self._wake.clear()
            changes, skipped, self._skipped = self._changes, self._skipped, None
            self.looks += 1
            head = await self._log.look(self._channel)
            self.order = self.order.followed_by(head.epochs)
            if self.at is None:
                self.at = head.position
                self._fanout.begin(self.at)
            if skipped is not None and not self.order.has_given(skipped, head.position):
                self._count_forged(skipped)
            while self.order.is_after(head.position, self.at):
                page = await self._log.page(self._channel, self.order.next_offset(self.at))
                head = page.head
                self.order = self.order.followed_by(head.epochs)
                self._read(page)
            if self._skipped is None:
                break
        self.looked = self.looks
        if self._confirmed and changes == self._changes and not self.steady:
            self.steady = True
        self._on_caught_up()

    def _read(self, page: Page) -> None:
        """Hand on the events of a page, and tell what is missing before, between and after them."""
        assert self.at is not None
        refused = set(page.refused)
        ready: list[Arrival] = []
        for arrival in page.arrivals:
            position = arrival.position
            assert position is not None
            if not self.order.is_after(position, self.at):
                continue  # the subscription has brought it meanwhile
            if gaps := self.order.gaps(self.at, position):
                self._hand_on(ready)
                ready = []
                self._tell(gaps, refused)
            self.at = position
            ready.append(arrival)
        self._hand_on(ready)
        if page.complete and self.order.is_after(page.head.position, self.at):
            self._tell(self.order.head_gaps(self.at, page.head.position), refused)
            self.at = page.head.position
        elif not page.complete and page.last > self.at.offset:  # all that is left of the page was refused
            end = Position(self.at.epoch, page.last)
            self._tell(self.order.head_gaps(self.at, end), refused)
            self.at = end

    def _hand_on(self, arrivals: list[Arrival]) -> None:
        if arrivals:
            self.recovered += len(arrivals)
            self._fanout.broadcast(arrivals)

    def _tell(self, gaps: Sequence[Gap], refused: set[Position]) -> None:
        for gap in gaps:
            log.warning("%s: events are missing: %s, %s-%s to %s", self._channel, gap.cause, gap.epoch, gap.first,
                        "an unknown end" if gap.last is None else gap.last)  # fmt: skip
            self._fanout.tell(because(gap, refused))

    def _count_forged(self, position: Position) -> None:
        self.forged += 1
        log.warning("%s: refused an event with the position %s, which nobody has given", self._channel, position)


def because(gap: Gap, refused: set[Position]) -> Gap:
    """The same gap, with the cause `refused` if that is why nobody can be given these events."""
    if gap.first is None or gap.last is None or gap.epoch is None:
        return gap
    offsets = {position.offset for position in refused}
    if not all(offset in offsets for offset in range(gap.first, min(gap.last, gap.first + len(offsets)) + 1)):
        return gap
    return replace(gap, cause=Cause.REFUSED)


class PassingReader:
    """Where events are not stored: everything passes at once, and an interruption is a gap without numbers.

    The same attributes as `Reader`, so far as they have a meaning.
    """

    at: Position | None = None
    order = Order("", ())
    twins = forged = recovered = 0
    looks = 0
    looked = 1

    def __init__(self, fanout: Fanout, on_caught_up: Callable[[], None]) -> None:
        self._fanout = fanout
        self._on_caught_up = on_caught_up
        self._ever_confirmed = False
        self.steady = False

    def take(self, arrivals: Sequence[Arrival]) -> None:
        self._fanout.broadcast([arrival._replace(position=None) for arrival in arrivals])

    def confirm(self) -> None:
        if self._ever_confirmed:
            self._fanout.tell(Gap(self._fanout.channel, Cause.REDIS_LINK_LOST))
        self._ever_confirmed = self.steady = True
        self._on_caught_up()

    def interrupt(self) -> None:
        self.steady = False

    def check(self, head: Position | None) -> bool:
        return True

    def can_place(self, position: Position) -> bool:
        return True

    async def run(self) -> None:
        """Nothing is ever read from a log."""
        await asyncio.Event().wait()
