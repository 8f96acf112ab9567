"""Formats: how events and control frames look on the wire of one kind of client.

All of the hub handles events as plain WebSocket frames (`Message.frame`, `Entry.frame`). Where clients of another
format are given them, live, from the ring buffer or from a page, that frame is put into their format: once for all
of them, as what was made is kept for a while.
"""

from __future__ import annotations

from typing import Final

from broadcaster import wire
from broadcaster.core.position import Position
from broadcaster.core.runtime import LIMITS, Limits

NAMES: Final = ("plain", "deflate", "sse")


class Format:
    """Frames as they are: those of a WebSocket, not compressed.

    Attributes:
        name: In `/stats`.
        compressed: Whether the client may compress what it sends.
        answers_pings: Whether a client that is there answers a ping; else it is sent comments.
    """

    name = "plain"
    compressed = False
    answers_pings = True

    def event(self, frame: bytes, position: Position | None) -> bytes:
        """An event; `position` is its own, None if it is not stored."""
        return frame

    def control(self, frame: bytes) -> bytes:
        """A control frame."""
        return frame


PLAIN: Final = Format()


class Deflate(Format):
    """Frames of a WebSocket, of which those are compressed that are worth it.

    Attributes:
        made: How many events were compressed.
    """

    name = "deflate"
    compressed = True

    def __init__(self, min_bytes: int, limits: Limits = LIMITS) -> None:
        """Prepare: events of `min_bytes` and more are compressed."""
        self._min_bytes, self._max_bytes = (
            len(wire.text_frame(bytes(size))) for size in (min_bytes, limits.compress_bytes)
        )
        self._kept = KeptFrames(limits.made_bytes)
        self.made = 0

    def event(self, frame: bytes, position: Position | None) -> bytes:
        if not self._min_bytes <= len(frame) <= self._max_bytes:
            return frame
        found = self._kept.get(frame)
        if found is None:
            found = self._kept[frame] = wire.deflated_frame(frame)
            self.made += 1
        return found


class ServerSentEvents(Format):
    """Events of an event stream."""

    name = "sse"
    answers_pings = False

    def __init__(self, limits: Limits = LIMITS) -> None:
        self._kept = KeptFrames(limits.made_bytes)

    def event(self, frame: bytes, position: Position | None) -> bytes:
        found = self._kept.get(frame)
        if found is None:
            found = self._kept[frame] = wire.sse_event(frame, position)
        return found

    def control(self, frame: bytes) -> bytes:
        found = self._kept.get(frame)
        if found is None:
            found = self._kept[frame] = wire.sse_control(frame)
        return found


class KeptFrames(dict[bytes, bytes]):
    """What was made of frames, for the others that are given them; of too many bytes the oldest are dropped."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self._max_bytes = max_bytes
        self._bytes = 0

    def __setitem__(self, frame: bytes, made: bytes) -> None:
        super().__setitem__(frame, made)
        self._bytes += len(frame) + len(made)
        while self._bytes > self._max_bytes and len(self) > 1:
            oldest = next(iter(self))
            self._bytes -= len(oldest) + len(self.pop(oldest))


class Formats:
    """The formats of one hub.

    Attributes:
        deflate: For clients that have agreed to compression.
        sse: For those that listen over plain HTTP.
    """

    def __init__(self, compress_min_bytes: int = 1024, limits: Limits = LIMITS) -> None:
        self.deflate = Deflate(compress_min_bytes, limits)
        self.sse = ServerSentEvents(limits)
