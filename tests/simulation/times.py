"""What holds for a client that has asked for a channel by time. Shares no code with the product."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from tests.simulation.books import Book, Place, Told
from tests.simulation.journal import Accepted
from tests.simulation.oracle import Truth
from tests.simulation.troubles import REDIS

_BIRTH: Final = datetime(1970, 1, 1, tzinfo=UTC)

_ELSEWHERE: Final = ("redis_split", "redis_promote", "redis_fail_over")
"""For a while after these a hub may have looked in another memory than the one that is in charge."""

_LONG_S: Final = 10.0
"""So long finding a time may take: some fifteen reads, over slow links, after those of others."""


def instant(us: int) -> str:
    """An instant as clients write it."""
    return (_BIRTH + timedelta(microseconds=us)).isoformat()


class Times:
    """What was stored then or later, and is there, may not be left out."""

    def __init__(self, truth: Truth, fail: Callable[[str, float, str, str], None]) -> None:
        self._truth = truth
        self._fail = fail

    def judge_beginning(
        self, book: Book, channel: str, asked: tuple[str, float], place: Place, now: float
    ) -> None:
        """A client has asked for a time, and begins after a place.

        Args:
            book: Of the client.
            channel: Which one.
            asked: For which time, and when.
            place: Where it begins.
            now: Loop time.
        """
        text, asked_at = asked
        from_us = self._us_of(text, asked_at, now)
        if from_us is None or self._truth.troubles.any([REDIS], now, now - asked_at + _LONG_S, _ELSEWHERE):
            return
        for event in self._truth.journal.accepted[channel]:
            if event.at < asked_at and self._is_left_out(book, event, place, now) and event.stored_us >= from_us:
                what = f"{channel}: since {text} ({from_us}), begins after {place}, without {event}"
                self._fail("asked by time, and begins too late", now, book.client, what)
                return

    def _is_left_out(self, book: Book, event: Accepted, place: Place, now: float) -> bool:
        """Whether an event that it wants, and could be given, is before a place."""
        if event.withdrawn or book.wanted not in (None, event.labels[0]) or event.size > self._truth.max_bytes:
            return False
        spans = self._truth.journal.epochs[event.channel]
        if event.epoch == place.epoch:
            before = event.offset <= place.offset
        else:
            before = place.epoch in spans and spans[event.epoch].rank < spans[place.epoch].rank
        where = event.channel, event.epoch, event.offset
        # Else Redis had forgotten it, and came back to a memory that has it.
        kept = where not in self._truth.journal.removed and not self._truth.journal.may_be_lost(*where, now)
        return before and kept and self._truth.is_stored(event)

    def _us_of(self, text: str, asked_at: float, now: float) -> int | None:
        """The latest instant that can be meant, by Redis' clock; None: that cannot be said."""
        if text == "all":
            return 0
        if not text.endswith("s"):
            return (datetime.fromisoformat(text) - _BIRTH) // timedelta(microseconds=1)
        if self._truth.troubles.any([REDIS], now, now - asked_at + 1, ("clock_step",)):
            return None
        return self._truth.clock_us() - int(text[:-1]) * 1_000_000

    def judge_gap(self, book: Book, gap: Told, now: float) -> None:
        """It was told that what was before its beginning is gone, and not since when."""
        channel, at = gap.channel, gap.position
        if at is None or gap.first is not None or gap.cause not in ("expired", "redis_restarted"):
            self._fail("a gap without numbers", now, book.client, f"{gap}")
        elif (gap.epoch, gap.last) != ((at.epoch, at.offset) if gap.cause == "expired" else (None, None)):
            self._fail("a gap's position is not its end", now, book.client, f"{gap}")
        elif gap.cause == "expired" and not any(
            place[:2] == (channel, at.epoch) and place[2] <= at.offset for place in self._truth.journal.removed
        ):
            self._fail("expired, but nothing has left the log", now, book.client, f"{gap}")
