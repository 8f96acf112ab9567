"""The trace: when the hub had read its last events, and when it first wrote each of them to a subscriber.

Bounded arrays for the whole hub, in the order in which events were handed on. A batch costs two readings of the
clock, each further piece one, and a delivery nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
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
    """The events of one broadcast while they are written.

    Attributes:
        read_ns: When they were read.
        written_ns: Per event, the instant before its first write; 0: not written yet.
        unwritten: How many are 0; no clock is read when there are none.
    """

    __slots__ = ("read_ns", "unwritten", "written_ns")

    def __init__(self, events: int, read_ns: int) -> None:
        self.read_ns = read_ns
        self.written_ns = [0] * events
        self.unwritten = events

    def note(self, now_ns: int, indexes: Sequence[int]) -> None:
        """A piece with these events of the batch was written from `now_ns` on."""
        written_ns = self.written_ns
        for index in indexes:
            if not written_ns[index]:
                written_ns[index] = now_ns
                self.unwritten -= 1


class Trace:
    """The last events of a hub, of all channels."""

    def __init__(self, events: int, clock: Clock = CLOCK) -> None:
        """Prepare; `events` is how many are kept, 0: none, and no clock is read."""
        self._size = events
        self._clock = clock
        self._read_now_ns = 0
        self._recorded = 0  # so far; the last of them are kept, each at its number modulo the size
        self._channels = [""] * events
        self._epochs = [""] * events
        self._offsets, self._read_ns, self._written_ns = (array("q", bytes(8 * events)) for _ in range(3))
        self._recovered = bytearray(events)

    def on_read(self) -> None:
        """A read from Redis has brought something."""
        if self._size:
            self._read_now_ns = self._clock.monotonic_ns()

    def begin(self, events: int, *, recovered: bool) -> BatchTrace:
        """A batch is about to be written; `recovered` if it does not come from the read of this moment."""
        if not self._size:
            return _UNTRACED
        return BatchTrace(events, self._clock.monotonic_ns() if recovered else self._read_now_ns)

    def record(self, channel: str, messages: Sequence[Message], batch: BatchTrace, *, recovered: bool) -> None:
        """Keep a batch that was written."""
        if not self._size:
            return
        for message, written_ns in zip(messages[-self._size :], batch.written_ns[-self._size :], strict=True):
            if message.position is None:
                continue
            at = self._recorded % self._size
            self._recorded += 1
            self._channels[at] = channel
            self._epochs[at], self._offsets[at] = message.position
            self._read_ns[at] = batch.read_ns
            self._written_ns[at] = written_ns
            self._recovered[at] = recovered

    def after(self, channel: str, position: Position | None, count: int) -> tuple[list[TracedEvent], bool]:
        """Events of a channel in the order in which they were handed on, and whether nothing comes after them.

        Args:
            channel: Its name.
            position: Only those behind the event at this position, if that is kept.
            count: The most events.
        """
        found: list[int] = []
        for number in range(self._recorded - 1, max(-1, self._recorded - 1 - self._size), -1):
            at = number % self._size
            if self._channels[at] != channel:
                continue
            if position is not None and position == (self._epochs[at], self._offsets[at]):
                break
            found.append(at)
        found.reverse()
        return [self._event(at) for at in found[:count]], len(found) <= count

    def _event(self, at: int) -> TracedEvent:
        position = Position(self._epochs[at], self._offsets[at])
        return TracedEvent(position, self._read_ns[at], self._written_ns[at] or None, bool(self._recovered[at]))


_UNTRACED = BatchTrace(0, 0)
