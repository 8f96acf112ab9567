"""The ring buffer of a channel: the last frames, shared by all subscriptions that are behind."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from typing import NamedTuple

from broadcaster.core.bounded import BoundedDict
from broadcaster.core.position import Gap, Position
from broadcaster.core.runtime import LIMITS, Limits
from broadcaster.hub.fanout.filters import Labels
from broadcaster.hub.fanout.message import Message


class Entry(NamedTuple):
    """One frame in the ring.

    Attributes:
        frame: The bytes.
        labels: What filters match on; None for a gap.
        position: Where a reader stands after it; None while no position of the channel is known.
        epoch_index: Counts the epochs of this channel since it was opened.
        came_at: When it was received; loop time, seconds.
        stored: Whether the position is its own; else it is that of the last stored event before it.
        gap: What is missing here; None for an event.
    """

    frame: bytes
    labels: Labels | None
    position: Position | None
    epoch_index: int
    came_at: float
    stored: bool = True
    gap: Gap | None = None


class Ring:
    """Frames by their number: `tail` is the oldest still here, `head` the next to come.

    Bounded by `max_bytes`, and about 300 bytes more per frame: the oldest are dropped first. A reader is nothing
    but a number between tail and head (a cursor): how slow it is, and whether it can still be served, follows from
    that number.

    Attributes:
        tail, head: See above.
        bytes: Of the frames that are held.
        position: Where a reader stands who has read everything; None while no position is known.
    """

    def __init__(self, max_bytes: int, limits: Limits = LIMITS) -> None:
        self._entries: list[Entry | None] = []
        self._ends: list[int] = []  # with each entry: bytes of all frames up to its end, since the beginning
        self._end = 0
        self._dropped = 0  # entries at the front of the list that are None
        self._max_bytes = max_bytes
        self._limits = limits
        self._gaps_at: list[int] = []  # numbers of the last gaps
        self._shared = BoundedDict[Labels, Labels](limits.known_labels)
        self._epochs: list[str] = []  # in the order in which they came
        self._before_tail: tuple[int, Position | None] = (0, None)  # epoch_index and position
        self.position: Position | None = None
        self.tail = 0
        self.head = 0
        self.bytes = 0

    # Writing

    def begin(self, position: Position) -> None:
        """The channel continues after `position`, which may be in another epoch."""
        if not self._epochs:  # what came before has no position, and no reader was here to miss it
            self._clear()
        self._continue_after(position)
        if self.head == self.tail:
            self._before_tail = (len(self._epochs), position)

    def extend(self, messages: Iterable[Message], now: float) -> None:
        """Append events; `now` is the loop time."""
        entries, ends, epoch_index = self._entries, self._ends, len(self._epochs)
        position, end, count, shared = self.position, self._end, len(entries), self._shared
        for frame, labels, own in messages:
            # Equal labels and names of epochs are one object each: else they would double the bytes per event.
            if own is not None:
                same = position is not None and own.epoch == position.epoch
                position = Position(position.epoch, own.offset) if same else own  # type: ignore[union-attr]
            if (known := shared.get(labels)) is None:
                known = shared[labels] = labels
            end += len(frame)
            entries.append(Entry(frame, known, position, epoch_index, now, own is not None))
            ends.append(end)
        self.position = position
        self._account(end, len(entries) - count)

    def append_gap(self, gap: Gap, frame: bytes, now: float) -> None:
        """Append what is missing; the channel continues after the gap's position."""
        if gap.position is not None:
            self._continue_after(gap.position)
        self._gaps_at.append(self.head)
        del self._gaps_at[: -self._limits.known_gaps]
        self._entries.append(Entry(frame, None, self.position, len(self._epochs), now, gap=gap))
        self._ends.append(self._end + len(frame))
        self._account(self._end + len(frame), 1)

    def _account(self, end: int, appended: int) -> None:
        self.head += appended
        self.bytes += end - self._end
        self._end = end
        while self.bytes > self._max_bytes:
            oldest = self._entries[self._dropped]
            assert oldest is not None
            self._entries[self._dropped] = None
            self._dropped += 1
            self._before_tail = (oldest.epoch_index, oldest.position)
            self.bytes -= len(oldest.frame)
            self.tail += 1
        if self._dropped > self._limits.ring_slack and self._dropped * 2 > len(self._entries):
            del self._entries[: self._dropped]
            del self._ends[: self._dropped]
            self._dropped = 0

    def _continue_after(self, position: Position) -> None:
        if not self._epochs or self._epochs[-1] != position.epoch:
            self._epochs.append(position.epoch)
        self.position = position

    def _clear(self) -> None:
        self._entries.clear()
        self._ends.clear()
        self._end = self._dropped = self.bytes = 0
        self.tail = self.head

    # Reading

    def read(self, cursor: int, max_bytes: int) -> list[Entry]:
        """The entries from `cursor` on, which must not be before the tail.

        At least one if there is one, and no more than `max_bytes` unless one alone is.
        """
        assert cursor >= self.tail, f"frame {cursor} is gone, the oldest is {self.tail}"
        chunk: list[Entry] = []
        size = 0
        for index in range(self._dropped + cursor - self.tail, len(self._entries)):
            entry = self._entries[index]
            assert entry is not None
            size += len(entry.frame)
            if chunk and size > max_bytes:
                break
            chunk.append(entry)
        return chunk

    def number_after(self, position: Position) -> int | None:
        """Number of the first frame after a position; None if something after it is gone, or it is not known."""
        if position.epoch not in self._epochs:
            return None
        epoch_index = len(self._epochs) - self._epochs[::-1].index(position.epoch)
        after = (epoch_index, position.offset)
        if after < _order(*self._before_tail):
            return None
        found = bisect_right(self._entries, after, lo=self._dropped, key=_order_of)
        return found - self._dropped + self.tail

    def position_at(self, cursor: int) -> Position | None:
        """Where a reader at `cursor` stands."""
        if cursor <= self.tail:
            return self._before_tail[1]
        return self._entry(cursor - 1).position

    def bytes_from(self, cursor: int) -> int:
        """Bytes of the frames that a reader at `cursor` has not been given, of those that are still here."""
        index = self._dropped + max(cursor, self.tail) - self.tail
        return self._end - self._ends[index - 1] if index else self.bytes

    def came_at(self, cursor: int) -> float:
        """When the frame that a reader at `cursor` waits for was received (loop time, seconds)."""
        return self._entry(max(cursor, self.tail)).came_at

    def gaps_from(self, cursor: int) -> int:
        """How many gaps there are at `cursor` and later."""
        return len(self._gaps_at) - bisect_left(self._gaps_at, cursor)

    def frame_at(self, position: Position) -> bytes | None:
        """The stored event at a position, if it is here."""
        number = self.number_after(position._replace(offset=position.offset - 1))
        if number is None or number == self.head:
            return None
        entry = self._entry(number)
        return entry.frame if entry.labels is not None and entry.position == position else None

    @property
    def last_stored(self) -> Entry | None:
        """The newest stored event of the present epoch, if it is here."""
        for entry in reversed(self._entries):
            if entry is None or entry.epoch_index != len(self._epochs):
                break
            if entry.labels is not None and entry.stored:
                return entry
        return None

    def place_after(self, position: Position, is_after: Callable[[Position, Position], bool]) -> Position | None:
        """Where a reader goes on that is at a position of an epoch which never came here; None: nowhere.

        Args:
            position: Of the reader.
            is_after: Whether a position comes later than another one.
        """

        def is_later(entry: Entry | None) -> bool:
            return entry is not None and entry.position is not None and is_after(entry.position, position)

        found = bisect_left(self._entries, True, lo=self._dropped, key=is_later)
        entry = self._entries[found] if found < len(self._entries) else None
        return None if entry is None or entry.gap is None else entry.position  # a later epoch begins with a gap

    def gap_at(self, cursor: int) -> Gap | None:
        """The next thing that a reader at `cursor` is given, if that is a gap."""
        return self._entry(cursor).gap if cursor < self.head else None

    def _entry(self, number: int) -> Entry:
        entry = self._entries[self._dropped + number - self.tail]
        assert entry is not None
        return entry


def _order(epoch_index: int, position: Position | None) -> tuple[int, int]:
    return epoch_index, 0 if position is None else position.offset


def _order_of(entry: Entry | None) -> tuple[int, int]:
    assert entry is not None
    return _order(entry.epoch_index, entry.position)
