"""Brings a listener that begins at an earlier position up to the ring: what it gets, and what it is told."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from functools import partial
from typing import Final

from broadcaster import wire
from broadcaster.hub.arrival import Arrival
from broadcaster.hub.fanout import WRITE_BYTES, Fanout, close_for, gap_entry, gap_frame
from broadcaster.hub.listener import Listener
from broadcaster.hub.log import Page
from broadcaster.hub.order import Order
from broadcaster.hub.pages import LogPage, Pages
from broadcaster.hub.reader import PassingReader, Reader, because
from broadcaster.hub.ring import Entry
from broadcaster.position import Cause, Gap, Position

_AGAIN_S: Final = 0.05


class Resumption:
    """Serves the listeners of one channel from the log.

    Attributes:
        resumed: How many listeners have begun at an earlier position.
        recovered: How many of them have missed nothing.
    """

    def __init__(
        self,
        fanout: Fanout,
        reader: Reader | PassingReader,
        pages: Pages | None,
        beat_s: float,
    ) -> None:
        """Prepare.

        Args:
            fanout: The channel.
            reader: Who knows the order of its positions.
            pages: The log; None when events are not stored.
            beat_s: Seconds between beats, which a welcome announces.
        """
        self._fanout = fanout
        self._reader = reader
        self._pages = pages
        self._beat_s = beat_s
        self._loop = asyncio.get_running_loop()
        self.resumed = 0
        self.recovered = 0

    def begin(self, listener: Listener) -> None:
        """Take in a listener with `since`, which the reader must have looked for if it did not know it.

        It is fed from the ring if that reaches back so far, else from the log.
        """
        since, head = listener.since, self._fanout.position
        assert since is not None
        self.resumed += 1
        if self._pages is None or head is None:
            gap = Gap(self._fanout.channel, Cause.NO_HISTORY, since.epoch, since.offset + 1)
            self._go_live(listener, gap)
        elif since.epoch == head.epoch and since.offset > head.offset:
            gap = Gap(self._fanout.channel, Cause.POSITION_UNKNOWN, since.epoch, since.offset + 1, None, head)
            self._go_live(listener, gap)
        elif since == head:
            self._welcome(listener, since, recovered=True)
            self._fanout.join(listener)
        else:
            self._fanout.join_behind(listener, since)
            if listener.cursor is not None:
                self._welcome_once(listener, missing=listener.cursor <= self._fanout.last_gap)

    def _go_live(self, listener: Listener, gap: Gap) -> None:
        self._welcome(listener, gap.position, recovered=False)
        if listener.connection.wants_control:
            listener.connection.write(gap_frame(gap))
            self._fanout.join(listener)
        else:
            close_for(gap, listener)

    def step(self, listener: Listener) -> bool:
        """Give a listener that has no cursor the next piece of the log; whether it can be fed further at once."""
        place, pages = listener.place, self._pages
        assert place is not None
        assert pages is not None
        if (number := self._fanout.number_after(place)) is not None:
            self._welcome_once(listener, missing=number <= self._fanout.last_gap)
            listener.cursor = number
            return True
        first = self._reader.order.next_offset(place)
        fresh, listener.page = listener.page, None
        page = fresh or pages.get(self._fanout.channel, first)
        if page is not None and self._serve(listener, page):
            return True
        listener.awaits_page = True
        # A page just read that does not help: the reader of this channel is about to bring what is missing.
        delay_s = _AGAIN_S if fresh else 0.0
        self._loop.call_later(delay_s, pages.want, self._fanout.channel, first, partial(self._arrived, listener))
        return False

    def _arrived(self, listener: Listener, page: LogPage) -> None:
        listener.awaits_page = False
        if listener in self._fanout.behind and not listener.connection.paused:
            listener.page = page
            listener.connection.catch_up()

    def _serve(self, listener: Listener, found: LogPage) -> bool:
        """Write what a page has for a listener, up to `WRITE_BYTES`; whether that got it any further."""
        place, page, head = listener.place, found.page, self._fanout.position
        assert place is not None
        assert head is not None  # nothing after it is given: it comes live
        order = self._reader.order  # which may remember epochs that Redis has forgotten
        if not order.knows(page.head.position.epoch):
            self._reader.check(page.head.position)
            return False  # it is from before Redis lost its memory, or from an epoch that is about to be told
        run = found.run(place, WRITE_BYTES)
        if run and run[-1].position is not None and not order.is_after(run[-1].position, head):
            self._welcome_once(listener, missing=False)
            listener.place = run[-1].position
            listener.behind_since = self._loop.time()
            self._fanout.give_run(listener, run)
            return True
        entries: list[Entry] = []
        gaps: list[Gap] = []
        size = 0
        start = bisect_left(page.arrivals, order.next_offset(place), key=_offset)
        for frame, labels, position in page.arrivals[start:]:
            assert position is not None
            if (size and size + len(frame) > WRITE_BYTES) or order.is_after(position, head):
                break
            if not order.is_after(position, place):
                continue
            gaps += self._pass_over(entries, order.gaps(place, position), page)
            entries.append(Entry(frame, 0.0, 0, position.offset, labels))
            place = position
            size += len(frame)
        else:
            place, more = self._end_of(page, order, place, head)
            gaps += self._pass_over(entries, more, page)
        if place == listener.place:
            return False
        self._welcome_once(listener, missing=bool(gaps))
        listener.place = place
        listener.behind_since = self._loop.time()
        self._fanout.give(listener, entries)
        return True

    def _end_of(self, page: Page, order: Order, place: Position, head: Position) -> tuple[Position, list[Gap]]:
        """Where somebody stands who has read a page to its end, and what he has to be told."""
        if not page.complete:
            end = Position(place.epoch, page.last)
            if order.is_after(end, head):
                return place, []
            return max(place, end), order.head_gaps(place, end) if end > place else []
        ring = self._fanout.ring_place
        if ring is None or order.is_after(ring, page.head.position) or not order.is_after(ring, place):
            return place, []  # the ring takes over, or the page is too old to say what is missing
        return ring, order.head_gaps(place, ring)

    def _pass_over(self, entries: list[Entry], gaps: list[Gap], page: Page) -> list[Gap]:
        told = [because(gap, set(page.refused)) for gap in gaps]
        entries += [gap_entry(gap) for gap in told]
        return told

    def _welcome_once(self, listener: Listener, *, missing: bool) -> None:
        """The first piece has been found: now it is known whether something is missing before it."""
        if (since := listener.since) is not None:
            head = self._fanout.position
            self._welcome(
                listener, since, recovered=not missing and head is not None and since.epoch == head.epoch
            )

    def _welcome(self, listener: Listener, position: Position | None, *, recovered: bool) -> None:
        self.recovered += recovered
        listener.since = None
        if listener.connection.wants_control:
            frame = welcome_frame(self._fanout.channel, position, self._beat_s, recovered)
            listener.connection.write(frame)


def welcome_frame(channel: str, position: Position | None, beat_s: float, recovered: bool | None) -> bytes:
    """The first frame of a channel: from where it is delivered, and whether nothing is missing before it."""
    where = None if position is None else str(position)
    return wire.control_frame("welcome", channel, position=where, recovered=recovered, beat_interval_s=beat_s)


def _offset(arrival: Arrival) -> int:
    assert arrival.position is not None
    return arrival.position.offset
