"""The sequencer of a channel: brings its events into order, and leaves no hole unfilled or unannounced.

The channel's position is the one up to which everything was handed to the fan-out. It moves by exactly the next
event from the subscription, or by events from the log; anything else only wakes the one task that reads the log
until the position has met the channel's head. The subscription itself never waits.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from broadcaster.core.backoff import keep_trying
from broadcaster.core.errors import RedisRefused, RedisUnavailable
from broadcaster.core.logs import ThrottledLog
from broadcaster.core.position import MAX_OFFSET, Cause, Gap, Position
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.hub.catchup.epochs import EpochOrder
from broadcaster.hub.catchup.event_log import EventLog, Page, is_of_channel
from broadcaster.hub.fanout.fanout import Fanout
from broadcaster.hub.fanout.message import Message

log = logging.getLogger("broadcaster.hub")

ELSEWHERE: Final = (
    "events come that are not stored where this hub reads: does their publisher use another database (redis.url)?"
)


@dataclass(frozen=True, slots=True, eq=False)  # the same place can be doubted anew after it was looked up
class _Doubt:
    """Where Redis may have another event than the one that was handed on.

    Attributes:
        position: Of both.
        frame: The one that was handed on.
        was_last: Whether another one has come when nothing had been handed on behind the first: a log that has
            neither any more cannot clear the doubt.
    """

    position: Position
    frame: bytes
    was_last: bool


class Sequencer:
    """One channel, from the subscription and from the log to the fan-out.

    Attributes:
        order: The order of this channel's epochs.
        sync_round: How often it has begun to read where the channel stands.
        synced_round: The number of the last round after which everything was handed on.
        duplicates: Events that came again, or late, and were not handed on a second time.
        unknown_position: Events with a position that was never given; not handed on.
        unknown_at: Loop time of the last one.
        recovered: Events that were read from the log because the subscription had not brought them.
        problem: The error with which Redis answers whenever the log is to be read; None if it does not.
    """

    def __init__(
        self, fanout: Fanout, event_log: EventLog, on_caught_up: Callable[[], None], runtime: Runtime = RUNTIME
    ) -> None:
        """Prepare; nothing is read before `run`.

        Args:
            fanout: Takes the events, and knows the position.
            event_log: Where missing events are read.
            on_caught_up: Called whenever everything that is stored was handed on.
            runtime: Chance for the backoff, and limits.
        """
        self._fanout = fanout
        self._channel = fanout.channel
        self._log = event_log
        self._on_caught_up = on_caught_up
        self._clock = runtime.clock
        self._throttled = ThrottledLog(log, clock=runtime.clock)
        self._chance = runtime.chance
        self._limits = runtime.limits
        self._wake = asyncio.Event()
        self._confirmed_in: int | None = None  # the round in which the subscription was confirmed
        self._skipped: Position | None = None  # the highest event that was not handed on since the last round
        self._early: list[Message] = []  # of those that were not handed on, what may join on to the next page
        self._early_bytes = 0
        self._doubts: tuple[_Doubt, ...] = ()  # of those that were the last ones, and of the others, two each
        self.sync_round = 0
        self.synced_round = 0
        self.order = EpochOrder(self._channel, (), runtime.limits.known_epochs)
        self.duplicates = 0
        self.unknown_position = 0
        self.unknown_at = -math.inf
        self.recovered = 0
        self.problem: RedisUnavailable | RedisRefused | None = None

    @property
    def position(self) -> Position | None:
        """Up to where everything was handed on, or announced as a gap; None before the first round."""
        return self._fanout.position

    @property
    def caught_up(self) -> bool:
        """Whether the subscription holds, and everything before its confirmation has been handed on."""
        return self._confirmed_in is not None and self.synced_round > self._confirmed_in

    def take(self, messages: Sequence[Message]) -> None:
        """Hand on what the subscription brought, if it is next. What is not stored passes at once."""
        at = self._fanout.ring.position
        ready: list[Message] = []
        for message in messages:
            position = message.position
            if position is None:
                ready.append(message)
            elif at is not None and position.epoch == at.epoch and position.offset == at.offset + 1:
                at = position
                ready.append(message)
            elif at is not None and position.epoch == at.epoch and position.offset <= at.offset:
                if ready:
                    self._fanout.broadcast(ready)
                    ready = []
                # Before what comes behind it makes the ring drop the one that it is compared with.
                self._compare(message)
            else:
                self._skip(message)
        if ready:
            self._fanout.broadcast(ready)

    def _skip(self, message: Message) -> None:
        """It is not the next one: whatever it is, the log knows. It may be the next one when that was read."""
        position = message.position
        assert position is not None
        if self._skipped is None or position.offset > self._skipped.offset:
            self._skipped = position
        if self._early_bytes < self._limits.early_bytes:
            self._early.append(message)
            self._early_bytes += len(message.frame)
        self._wake.set()

    def _join_early(self) -> None:
        """Hand on what the subscription brought while the log was read, so far as it is next now.

        Else it would have to be read, too, and what came meanwhile again: with events without a pause, for ever.
        """
        early, self._early, self._early_bytes = self._early, [], 0
        at, ready = self._at, list[Message]()
        for message in early:
            position = message.position
            assert position is not None
            if position.epoch == at.epoch and position.offset == at.offset + 1:
                at = position
                ready.append(message)
            elif self.order.is_after(position, at):
                self._early.append(message)
                self._early_bytes += len(message.frame)
        if ready:
            self._fanout.broadcast(ready, recovered=True)

    def _forget_early(self, count: int, head: Position) -> None:
        """Drop what is not of this channel: so many came before Redis was asked, and it has not given them."""
        known = [
            each for each in self._early[:count] if each.position and self.order.has_given(each.position, head)
        ]
        self._early[:count] = known

    def _compare(self, message: Message) -> None:
        """If another event was handed on at its position, Redis may have been set back; or it is forged."""
        self.duplicates += 1
        position = message.position
        assert position is not None
        frame = self._fanout.ring.frame_at(position)
        if frame is not None and frame != message.frame:
            last = self._fanout.ring.last_stored
            self._suspect(_Doubt(position, frame, was_last=last is not None and last.position == position))

    def _suspect(self, doubt: _Doubt) -> None:
        """Look it up, with the first of its kind: what was handed on since may be of the memory that is there."""
        alike = [each for each in self._doubts if each.was_last == doubt.was_last]
        others = [each for each in self._doubts if each.was_last != doubt.was_last]
        self._doubts = (*others, *alike[:1], doubt)
        self._wake.set()

    def confirm(self) -> None:
        """The subscription holds from here on: what came before is in the log."""
        self._confirmed_in = self.sync_round
        last = self._fanout.ring.last_stored  # Redis may have been set back meanwhile, and have got further again
        if last is not None and last.position is not None:
            self._suspect(_Doubt(last.position, last.frame, was_last=False))
        self._wake.set()

    def interrupt(self) -> None:
        """The subscription is lost."""
        self._confirmed_in = None

    def check(self, head: Position | None, before: Position | None = None) -> bool:
        """Whether everything up to `head`, just read in Redis, was handed on; else the log is read.

        Args:
            head: Where the channel stands in Redis; None if that cannot be known.
            before: Where this hub stood before that. A head that is not there yet is of an older memory.
        """
        at = self.position
        is_older = head and before and head.epoch == before.epoch and head.offset < before.offset
        if head and at and head.epoch == at.epoch and head.offset <= at.offset and not is_older:
            return True
        self._wake.set()
        return False

    def knows(self, position: Position) -> bool:
        """Whether a position is known to have been given; else that is looked up, and `on_caught_up` is called."""
        at = self.position
        if at is not None and self.order.has_given(position, at):
            return True
        self._wake.set()
        return False

    async def run(self) -> None:
        """Read the log whenever it is necessary, until cancelled."""
        while True:
            await self._wake.wait()
            await keep_trying(self._catch_up, self._complain, self._chance, self._on_error)

    def _complain(self, said: str) -> None:
        self._throttled.log(
            logging.WARNING, said, "%s: cannot read the log: %s; trying again", self._channel, said
        )

    def _on_error(self, error: RedisUnavailable | RedisRefused) -> None:
        self.problem = error if is_of_channel(error) else None

    async def _catch_up(self) -> None:
        """Read until the position is the head: a round. What is skipped meanwhile wakes the next."""
        self._wake.clear()
        self.sync_round += 1
        doubts, skipped, early = self._doubts, self._skipped, len(self._early)
        head = await self._log.head(self._channel, await self._floor(doubts))
        self._doubts = tuple(each for each in self._doubts if each not in doubts)  # now that Redis was told
        self.order = self.order.followed_by(head.epochs)
        self._forget_early(early, head.position)
        if self.position is None:
            self._fanout.ring.begin(head.position)
        if skipped is not None and not self.order.has_given(skipped, head.position):
            self._count_unknown(skipped)
        if self._skipped is skipped:
            self._skipped = None
        while self.order.is_after(head.position, self._at):
            page = await self._log.page(self._channel, self.order.next_offset(self._at), self._at)
            head = page.head
            self.order = self.order.followed_by(head.epochs)
            if page.first <= self.order.next_offset(self._at):  # else an epoch has begun that goes back
                self._read(page)
            self._join_early()
        self._join_early()
        self.synced_round, self.problem = self.sync_round, None
        self._on_caught_up()

    async def _floor(self, doubts: Sequence[_Doubt]) -> Position | None:
        """The newest position that this hub has seen, so that Redis begins an epoch if its memory is older.

        If there are other events where this hub has handed some on, the memory was older, also if it has got
        further since: then it is the last position that there could be.
        """
        floor = self.position
        for doubt in doubts:
            if floor is None or doubt.position.epoch != floor.epoch:
                continue
            page = await self._log.page(self._channel, doubt.position.offset, floor)
            if self._is_confirmed(doubt, page):
                log.warning("%s: Redis has other events than those that were handed on", self._channel)
                return floor._replace(offset=MAX_OFFSET)
        return floor

    def _is_confirmed(self, doubt: _Doubt, page: Page) -> bool:
        """Whether the log, from the place of a doubt on, has other events than those that were handed on."""
        there: dict[Position | None, bytes] = {message.position: message.frame for message in page.messages}
        for position in [*there, *page.refused]:  # no event that this hub refuses was handed on
            assert position is not None
            frame = doubt.frame if position == doubt.position else self._fanout.ring.frame_at(position)
            if frame is not None and frame != there.get(position):
                return True
        return doubt.was_last and doubt.position not in there

    @property
    def _at(self) -> Position:
        position = self.position
        assert position is not None
        return position

    def _read(self, page: Page) -> None:
        """Hand on the events of a page, and announce what is missing before, between and after them."""
        at = self._at
        refused = set(page.refused)
        ready: list[Message] = []
        for message in page.messages:
            position = message.position
            assert position is not None
            if not self.order.is_after(position, at):
                continue  # the subscription has brought it meanwhile
            if gaps := self.order.gaps(at, position):
                self._hand_on(ready)
                ready = []
                self._announce(gaps, refused)
            at = position
            ready.append(message)
        self._hand_on(ready)
        if page.complete and self.order.is_after(page.head.position, at):
            self._announce(self.order.head_gaps(at, page.head.position), refused)
        elif not page.complete and page.last and self.order.is_after(page.last, at):  # the rest of it was refused
            self._announce(self.order.head_gaps(at, page.last), refused)

    def _hand_on(self, messages: list[Message]) -> None:
        if messages:
            self.recovered += len(messages)
            self._fanout.broadcast(messages, recovered=True)

    def _announce(self, gaps: Sequence[Gap], refused: set[Position]) -> None:
        for gap in gaps:
            log.warning("%s: events are missing: %s, %s-%s to %s", self._channel, gap.cause, gap.epoch, gap.first,
                        "an unknown end" if gap.last is None else gap.last)  # fmt: skip
            self._fanout.announce(with_refused_cause(gap, refused))

    def _count_unknown(self, position: Position) -> None:
        self.unknown_position += 1
        self.unknown_at = self._clock.loop_s()
        unknown = "%s: refused an event with the position %s, which nobody has given"
        self._throttled.log(logging.WARNING, "unknown", unknown, self._channel, position)
        self._throttled.log(logging.WARNING, "elsewhere", "%s: %s", self._channel, ELSEWHERE)


def with_refused_cause(gap: Gap, refused: set[Position]) -> Gap:
    """The same gap, with the cause `refused` if all of its events are stored, and not valid."""
    if gap.first is None or gap.last is None or gap.epoch is None:
        return gap
    last = min(gap.last, gap.first + len(refused))  # of a longer one not all are among them
    if not all(Position(gap.epoch, offset) in refused for offset in range(gap.first, last + 1)):
        return gap
    return replace(gap, cause=Cause.REFUSED)
