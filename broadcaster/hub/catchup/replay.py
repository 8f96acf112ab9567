"""Replay: a subscription that resumes from an earlier position is brought up to the ring buffer from the log."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from dataclasses import replace
from functools import partial

from broadcaster import wire
from broadcaster.core.position import Cause, Gap, Position
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.hub.catchup.epochs import EpochOrder
from broadcaster.hub.catchup.event_log import Page, Unreadable
from broadcaster.hub.catchup.live_sequencer import LiveSequencer
from broadcaster.hub.catchup.page_cache import CachedPage, PageCache
from broadcaster.hub.catchup.sequencer import Sequencer, with_refused_cause
from broadcaster.hub.fanout.fanout import Fanout
from broadcaster.hub.fanout.message import Message
from broadcaster.hub.fanout.ring import Entry
from broadcaster.hub.fanout.slow import gap_entry
from broadcaster.hub.fanout.subscription import State, Subscription


class Replay:
    """Serves the subscriptions of one channel that resume.

    Attributes:
        resumed: How many subscriptions have begun at an earlier position.
        recovered: How many of them could go on right after it.
    """

    def __init__(
        self,
        fanout: Fanout,
        sequencer: Sequencer | LiveSequencer,
        pages: PageCache,
        terms: wire.Terms,
        runtime: Runtime = RUNTIME,
    ) -> None:
        """Prepare.

        Args:
            fanout: Of the channel.
            sequencer: Knows the order of its positions.
            pages: Of its log; never asked when events are not stored.
            terms: What a welcome announces.
            runtime: Time and limits.
        """
        self._fanout = fanout
        self._sequencer = sequencer
        self._pages = pages
        self._terms = terms
        self._limits = runtime.limits
        self._clock = runtime.clock
        self._loop = asyncio.get_running_loop()
        self._fresh: dict[Subscription, CachedPage] = {}  # just read for it, and not looked at yet
        self.resumed = 0
        self.recovered = 0

    def begin(self, subscription: Subscription) -> None:
        """Take in a subscription with `since`, which the sequencer must have looked up if it did not know it.

        Where events are not stored it may have asked for an instant instead.

        It is fed from the ring buffer if that reaches back so far, else from the log.
        """
        since, head = subscription.since, self._fanout.position
        self.resumed += subscription.asked
        if head is None or since is None:
            asked = (since.epoch, since.offset + 1) if since else (None, None)
            self._go_live(subscription, Gap(self._fanout.channel, Cause.NO_HISTORY, *asked))
        elif self._sequencer.order.is_after(since, head):
            gap = Gap(self._fanout.channel, Cause.POSITION_UNKNOWN, since.epoch, since.offset + 1, None, head)
            self._go_live(subscription, gap)
        elif since == head:
            self._welcome(subscription, since, recovered=True)
            self._fanout.join(subscription)
        else:
            self._fanout.join_replaying(subscription, since)
            self._enter_ring(subscription)

    def forget(self, subscription: Subscription) -> None:
        """It has been closed; does nothing the second time."""
        self._fresh.pop(subscription, None)

    def _go_live(self, subscription: Subscription, gap: Gap) -> None:
        self._welcome(subscription, gap.position, recovered=False)
        if subscription.sink.wants_control:
            subscription.sink.tell(wire.gap_frame(gap))
            self._fanout.join(subscription)
        else:
            self._fanout.end_for(gap, subscription)

    def step(self, subscription: Subscription) -> bool:
        """Feed the next piece of the log to a subscription without a cursor; whether there is more at once."""
        position = subscription.position
        assert position is not None
        if self._enter_ring(subscription):
            return True
        channel, first = self._fanout.channel, self._sequencer.order.next_offset(position)
        fresh = self._fresh.pop(subscription, None)
        head = self._fanout.position
        assert head is not None
        page = fresh or self._pages.get(channel, first, head.epoch)
        if page is not None and self._serve(subscription, page):
            return True
        subscription.state = State.AWAITING_PAGE
        # A page just read that does not help: the sequencer of this channel is about to bring what is missing.
        self._want(subscription, first, self._limits.page_retry_s if fresh else 0.0)
        return False

    def _enter_ring(self, subscription: Subscription) -> bool:
        """From here on it is fed from the ring buffer, if that reaches back to its position."""
        ring, position = self._fanout.ring, subscription.position
        assert position is not None
        if (number := ring.number_after(position)) is None:
            return False
        gap = ring.gap_at(number)
        self._welcome_once(subscription, missing=gap is not None)
        subscription.cursor = number
        if gap and gap.first is not None and gap.epoch == position.epoch and gap.first <= position.offset:
            # Another hub has given it some of what was missing here.
            subscription.cursor, subscription.position = number + 1, gap.position
            self._fanout.give(subscription, [gap_entry(replace(gap, first=position.offset + 1))])
        return True

    def _on_page(self, subscription: Subscription, page: CachedPage | Unreadable) -> None:
        if subscription.state is not State.AWAITING_PAGE:
            return
        if not isinstance(page, CachedPage):
            self._on_unreadable(subscription, page)
            return
        subscription.state = State.REPLAYING
        if subscription.sink.writable:
            self._fresh[subscription] = page
            subscription.sink.catch_up()

    def _on_unreadable(self, subscription: Subscription, error: Unreadable) -> None:
        """The log of this channel cannot be read: it is tried for a while."""
        if self._clock.loop_s() - subscription.behind_since > self._limits.unavailable_s:
            self._fanout.end_unavailable(subscription, f"its log cannot be read: {error}")
            return
        assert subscription.position is not None
        first = self._sequencer.order.next_offset(subscription.position)
        self._want(subscription, first, self._limits.page_retry_s)

    def _want(self, subscription: Subscription, first: int, delay_s: float) -> None:
        self._loop.call_later(delay_s, self._want_now, subscription, first)

    def _want_now(self, subscription: Subscription, first: int) -> None:
        floor = self._fanout.position  # a page of an older memory would be taken for what the log holds now
        self._pages.want(self._fanout.channel, first, floor, partial(self._on_page, subscription))

    def _serve(self, subscription: Subscription, found: CachedPage) -> bool:
        """Write what a page has for a subscription, up to `limits.write_bytes`; whether that made progress."""
        position, page, head = subscription.position, found.page, self._fanout.position
        assert position is not None
        assert head is not None  # nothing after it is given: it comes live
        order = self._sequencer.order  # which may remember epochs that Redis has forgotten
        if not order.knows(page.head.position.epoch):
            self._sequencer.check(page.head.position)
            return False  # it is from before Redis lost its memory, or from an epoch that is about to be announced
        if page.first > order.next_offset(position):
            return False  # since it was asked for, an epoch has begun that goes back
        run = found.run(position, self._limits.write_bytes)
        if run and run[-1].position is not None and not order.is_after(run[-1].position, head):
            self._welcome_once(subscription, missing=False)
            self._move(subscription, run[-1].position)
            self._fanout.give_run(subscription, run)
            return True
        entries: list[Entry] = []
        size = 0
        start = bisect_left(page.messages, order.next_offset(position), key=_offset)
        for frame, labels, own in page.messages[start:]:
            assert own is not None
            if (size and size + len(frame) > self._limits.write_bytes) or order.is_after(own, head):
                break
            if not order.is_after(own, position):
                continue
            entries += _told(order.gaps(position, own), page)
            entries.append(Entry(frame, labels, own, 0, 0.0))
            position = own
            size += len(frame)
        else:
            position, more = self._end_of(page, order, position, head)
            entries += _told(more, page)
        if position == subscription.position:
            return False
        self._welcome_once(subscription, missing=bool(entries) and entries[0].gap is not None)
        self._move(subscription, position)
        self._fanout.give(subscription, entries)
        return True

    def _move(self, subscription: Subscription, position: Position) -> None:
        subscription.position = position
        subscription.behind_since = self._clock.loop_s()

    def _end_of(
        self, page: Page, order: EpochOrder, position: Position, head: Position
    ) -> tuple[Position, list[Gap]]:
        """Where a reader stands that has read a page to its end, and what it must be told."""
        if not page.complete:
            end = page.last
            if end is None or order.is_after(end, head) or not order.is_after(end, position):
                return position, []
            return end, order.head_gaps(position, end)
        ring = self._fanout.ring
        oldest = ring.position_at(ring.tail)
        if oldest and not order.is_after(oldest, position) and ring.number_after(position) is None:
            oldest = ring.place_after(position, order.is_after)  # another hub has given it that epoch
        if oldest is None or order.is_after(oldest, page.head.position) or not order.is_after(oldest, position):
            return position, []  # the ring takes over, or the page is too old to say what is missing
        return oldest, order.head_gaps(position, oldest)

    def _welcome_once(self, subscription: Subscription, *, missing: bool) -> None:
        """The first piece has been found: now it is known whether something is missing before it."""
        if (since := subscription.since) is not None:
            self._welcome(subscription, since, recovered=not missing)

    def _welcome(self, subscription: Subscription, position: Position | None, *, recovered: bool) -> None:
        before, subscription.before = subscription.before, None
        recovered = recovered and before is None
        self.recovered += recovered and subscription.asked
        subscription.since = subscription.instant = None
        if subscription.sink.wants_control:
            told = recovered if subscription.asked else None
            frame = wire.welcome_frame(self._fanout.channel, position, self._terms, told)
            subscription.sink.tell(frame)
            if before is not None:
                subscription.sink.tell(wire.gap_frame(before))


def _told(gaps: list[Gap], page: Page) -> list[Entry]:
    """What tells of the gaps, each with its cause."""
    refused = set(page.refused)
    return [gap_entry(with_refused_cause(gap, refused)) for gap in gaps]


def _offset(message: Message) -> int:
    assert message.position is not None
    return message.position.offset
