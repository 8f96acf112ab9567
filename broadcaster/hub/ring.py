"""The last built frames of a channel, shared by all who are not up to date."""

from __future__ import annotations

from bisect import bisect_right
from typing import Final, NamedTuple

from broadcaster.hub.filters import Labels
from broadcaster.position import Gap

_SLACK: Final = 1024
"""Dropped entries that may stand at the front of the list before it is moved."""


class Entry(NamedTuple):
    """One frame in the ring.

    Attributes:
        frame: The bytes.
        came_at: When it came; loop time, seconds.
        era: Counts the epochs of this channel since it was opened.
        offset: With `era`: where a reader stands who has been given this; that of the event before it for one
            that is not stored.
        labels: What filters look at; None for a gap.
        stored: Whether it has a place of its own.
        gap: What is missing here, for `broadcaster.v1`; None for an event.
    """

    frame: bytes
    came_at: float
    era: int
    offset: int
    labels: Labels | None
    stored: bool = True
    gap: Gap | None = None


class Ring:
    """Frames by their number: `tail` is the oldest still here, `head` the next to come.

    Bounded by `max_bytes`: the oldest go first. A reader is nothing but a number between tail and head;
    how slow it is, and whether it still can be served, is arithmetic on that number.

    Attributes:
        tail, head: See above.
        bytes: Of the frames that are held.
    """

    def __init__(self, max_bytes: int) -> None:
        self._entries: list[Entry | None] = []
        self._ends: list[int] = []  # with each entry: bytes of all frames up to its end, since the beginning
        self._end = 0
        self._dropped = 0  # entries at the front of the list that are None
        self._max_bytes = max_bytes
        self._before: tuple[int, int] = (0, 0)  # era and offset just before the tail
        self.tail = 0
        self.head = 0
        self.bytes = 0

    def begin(self, era: int, offset: int) -> None:
        """Nothing is here, and the next to come is the event after this place."""
        if self.head == self.tail:
            self._before = (era, offset)

    def forget(self) -> None:
        """What has come so far is for nobody."""
        self._entries.clear()
        self._ends.clear()
        self._end = self._dropped = self.bytes = 0
        self.tail = self.head

    def append(self, entry: Entry) -> None:
        self._entries.append(entry)
        self._end += len(entry.frame)
        self._ends.append(self._end)
        self.head += 1
        self.bytes += len(entry.frame)
        while self.bytes > self._max_bytes:
            oldest = self._entries[self._dropped]
            assert oldest is not None
            self._entries[self._dropped] = None
            self._dropped += 1
            self._before = (oldest.era, oldest.offset)
            self.bytes -= len(oldest.frame)
            self.tail += 1
        if self._dropped > _SLACK and self._dropped * 2 > len(self._entries):
            del self._entries[: self._dropped]
            del self._ends[: self._dropped]
            self._dropped = 0

    def read(self, cursor: int, max_bytes: int) -> list[Entry]:
        """The entries from `cursor` on: at least one, and no more than `max_bytes` unless one alone is.

        Raises:
            LookupError: `cursor` is before the tail: what it wants is gone.
        """
        if cursor < self.tail:
            raise LookupError(f"frame {cursor} is gone, the oldest is {self.tail}")
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

    def after(self, era: int, offset: int) -> int | None:
        """Number of the first frame after a place; None if something after it is gone."""
        if (era, offset) < self._before:
            return None
        found = bisect_right(self._entries, (era, offset), lo=self._dropped, key=_place)
        return found - self._dropped + self.tail

    def place(self, cursor: int) -> tuple[int, int]:
        """Era and offset at which a reader at `cursor` stands."""
        if cursor <= self.tail:
            return self._before
        entry = self._entries[self._dropped + cursor - self.tail - 1]
        assert entry is not None
        return entry.era, entry.offset

    def bytes_from(self, cursor: int) -> int:
        """Bytes of the frames that a reader at `cursor` has not been given, of those that are still here."""
        index = self._dropped + max(cursor, self.tail) - self.tail
        return self._end - self._ends[index - 1] if index else self.bytes

    def came_at(self, cursor: int) -> float:
        """When the frame that a reader at `cursor` waits for came (loop time, seconds)."""
        entry = self._entries[self._dropped + max(cursor, self.tail) - self.tail]
        assert entry is not None
        return entry.came_at


def _place(entry: Entry | None) -> tuple[int, int]:
    assert entry is not None
    return entry.era, entry.offset
