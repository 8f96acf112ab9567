"""The last built frames of a channel, shared by all who are behind."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import NamedTuple


class Entry(NamedTuple):
    """One frame in the ring: the bytes, when it came (loop time, seconds), whether only v1 gets it."""

    frame: bytes
    came_at: float
    control: bool


class Ring:
    """Frames by their number: `tail` is the oldest still here, `head` the next to come.

    Bounded by `max_bytes`: the oldest go first. A reader is nothing but a number between tail and head;
    how slow it is, and whether it still can be served, is arithmetic on that number.
    """

    def __init__(self, max_bytes: int) -> None:
        self._entries: deque[Entry] = deque()
        self._max_bytes = max_bytes
        self.tail = 0
        self.head = 0
        self.bytes = 0

    def append(self, frame: bytes, came_at: float, *, control: bool = False) -> None:
        self._entries.append(Entry(frame, came_at, control))
        self.head += 1
        self.bytes += len(frame)
        while self.bytes > self._max_bytes:
            self.bytes -= len(self._entries.popleft().frame)
            self.tail += 1

    def read(self, cursor: int, max_bytes: int) -> list[Entry]:
        """The entries from `cursor` on: at least one, and no more than `max_bytes` unless one alone is.

        Raises:
            LookupError: `cursor` is before the tail: what it wants is gone.
        """
        if cursor < self.tail:
            raise LookupError(f"frame {cursor} is gone, the oldest is {self.tail}")
        chunk: list[Entry] = []
        size = 0
        for entry in islice(self._entries, cursor - self.tail, None):
            size += len(entry.frame)
            if chunk and size > max_bytes:
                break
            chunk.append(entry)
        return chunk

    def came_at(self, cursor: int) -> float:
        """When the frame that a reader at `cursor` waits for came (loop time, seconds)."""
        return self._entries[max(cursor, self.tail) - self.tail].came_at
