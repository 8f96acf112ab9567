"""The trace: when the hub had read its last events, and when it first wrote each of them to a subscriber.

Bounded for the whole hub, in the order in which events were handed on. A batch costs two readings of the clock,
each further piece one, and a delivery nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from broadcaster.core.position import Position
from broadcaster.core.runtime import CLOCK, Clock
from broadcaster.hub.fanout.message import Message


class TracedEvent(NamedTuple):
    """An event in the trace; CLOCK_MONOTONIC of the hub in ns.

    Attributes:
        position: Its position.
        read_mono_ns: When the read from Redis that brought it was parsed.
        written_mono_ns: The instant before the first write of the first piece that carried it; None if it was
            written to nobody as it came.
        recovered: It had to wait for the log, or was read from there: then it was read when it was handed on.
    """

    position: Position
    read_mono_ns: int
    written_mono_ns: int | None
    recovered: bool


class BatchTrace:
    """The events of one broadcast, and when they were written.

    Attributes:
        channel: On which.
        positions: Theirs; None for one that is not stored.
        read_ns: When they were read.
        written_ns: Per event, the instant before its first write; 0: not written yet.
        unwritten: How many are 0; no clock is read when there are none.
        recovered: As in `TracedEvent`.
    """

    __slots__ = ("channel", "positions", "read_ns", "recovered", "unwritten", "written_ns")

    def __init__(self, channel: str, positions: list[Position | None], read_ns: int, *, recovered: bool) -> None:
        self.channel = channel
        self.positions = positions
        self.read_ns = read_ns
        self.recovered = recovered
        self.unwritten = len(positions)
        self.written_ns = [0] * self.unwritten

    def note(self, now_ns: int, first: int, end: int) -> None:
        """A piece with the events from `first` up to `end` was written from `now_ns` on."""
        if any(self.written_ns[first:end]):
            self.note_some(now_ns, range(first, end))
        else:
            self.written_ns[first:end] = [now_ns] * (end - first)
            self.unwritten -= end - first

    def note_some(self, now_ns: int, indexes: Sequence[int]) -> None:
        """The same with those of the batch at these places."""
        written_ns = self.written_ns
        for index in indexes:
            if not written_ns[index]:
                written_ns[index] = now_ns
                self.unwritten -= 1


class Trace:
    """The last events of a hub, of all channels."""

    def __init__(self, events: int, clock: Clock = CLOCK) -> None:
        """Prepare; `events` is how many are kept, 0: none, and no clock is read."""
        self._most = events
        self._clock = clock
        self._read_now_ns = 0
        self._batches: deque[BatchTrace] = deque()
        self._events = 0  # in these batches; without the oldest of them there would be too few

    def on_read(self) -> None:
        """A read from Redis has brought something."""
        if self._most:
            self._read_now_ns = self._clock.monotonic_ns()

    def begin(self, channel: str, messages: Sequence[Message], *, recovered: bool) -> BatchTrace:
        """A batch is about to be written; `recovered` if it does not come from the read of this moment."""
        if not self._most:
            return _UNTRACED
        positions = [message.position for message in messages]
        batch = BatchTrace(
            channel, positions, self._clock.monotonic_ns() if recovered else self._read_now_ns, recovered=recovered
        )
        if any(positions):
            self._keep(batch)
        return batch

    def _keep(self, batch: BatchTrace) -> None:
        batches = self._batches
        batches.append(batch)
        self._events += len(batch.positions)
        while self._events - len(batches[0].positions) >= self._most:
            self._events -= len(batches.popleft().positions)

    def after(self, channel: str, position: Position | None, count: int) -> tuple[list[TracedEvent], bool]:
        """Events of a channel in the order in which they were handed on, and whether nothing comes after them.

        Args:
            channel: Its name.
            position: Only those behind the event at this position, if that is kept.
            count: The most events.
        """
        found: list[TracedEvent] = []
        for event in self._from_the_last(channel):
            if event.position == position:
                break
            found.append(event)
        found.reverse()
        return found[:count], len(found) <= count

    def _from_the_last(self, channel: str) -> Iterator[TracedEvent]:
        left = self._most
        for batch in reversed(self._batches):
            if batch.channel == channel:
                places = zip(batch.positions[::-1][:left], batch.written_ns[::-1][:left], strict=True)
                for position, written_ns in places:
                    if position is not None:
                        yield TracedEvent(position, batch.read_ns, written_ns or None, batch.recovered)
            left -= min(left, len(batch.positions))


_UNTRACED = BatchTrace("", [], 0, recovered=False)
