"""Who gets the events of a channel; `broadcast` never waits for anybody.

A connection is *live* — it is up to date, and the next frame is written to it at once — or it is *behind*:
its socket did not take everything, it holds a cursor into the shared ring, and it is fed from there as fast
as it reads. Nobody has a queue of his own.
"""

from __future__ import annotations

import asyncio
from typing import Final

from broadcaster import wire
from broadcaster.hub.connection import Connection
from broadcaster.hub.ring import Ring

WRITE_BYTES: Final = 65_536
"""Largest write to one connection in bytes (one larger frame excepted)."""


class Fanout:
    """One channel: its ring and its connections.

    Attributes:
        channel: Its name.
        ring: The last frames.
        behind: Connections that hold a cursor.
        deliveries: Events written to connections, each counted once per connection.
        sent_bytes: Bytes of these.
    """

    def __init__(self, channel: str, ring_bytes: int) -> None:
        self.channel = channel
        self.ring = Ring(ring_bytes)
        self.behind: set[Connection] = set()
        self.deliveries = 0
        self.sent_bytes = 0
        self._clock = asyncio.get_running_loop().time
        self._live: set[Connection] = set()
        self._transports: list[asyncio.Transport] | None = []  # of the live ones; None when that has changed
        self._written = 0  # number of the next frame that live connections have not been given
        self._interrupted: set[Connection] | None = set()  # None while the subscription holds
        self._welcome = wire.control_frame("welcome", channel, position=None)

    # Who is here

    def join(self, connection: Connection) -> None:
        """Take a connection in, live from the next frame on."""
        self._live.add(connection)
        self._transports = None
        if connection.wants_control and self._interrupted is None:
            connection.write(self._welcome)

    def leave(self, connection: Connection) -> None:
        """Forget a connection; does nothing the second time."""
        if connection in self._live:
            self._live.discard(connection)
            self._transports = None
        self.behind.discard(connection)
        if self._interrupted is not None:
            self._interrupted.discard(connection)

    # What they get

    def broadcast(self, frames: list[bytes]) -> None:
        """Give frames to everybody: one write per live connection and `WRITE_BYTES`, none awaited."""
        if len(frames) == 1:
            self._write(frames[0], 1)
        else:
            self._write_in_pieces(frames)
        now = self._clock()  # after the writes: nobody reads the ring before this turn of the loop ends
        for frame in frames:
            self.ring.append(frame, now)

    def _write_in_pieces(self, frames: list[bytes]) -> None:
        piece: list[bytes] = []
        size = 0
        for frame in frames:
            if piece and size + len(frame) > WRITE_BYTES:
                self._write(b"".join(piece), len(piece))
                piece, size = [], 0
            piece.append(frame)
            size += len(frame)
        self._write(b"".join(piece), len(piece))

    def _write(self, data: bytes, frames: int) -> None:
        """Write to all live connections. The one place where live frames leave."""
        self._written += frames  # first: a connection that pauses inside its write has been given these
        transports = self._transports
        if transports is None:
            transports = self._transports = [connection.transport for connection in self._live]
        for transport in transports:
            try:
                transport.write(data)
            except RuntimeError:  # uvloop's transport is closed, and connection_lost is on its way
                continue
        self.deliveries += frames * len(transports)
        self.sent_bytes += len(data) * len(transports)

    # Who is behind

    def fall_behind(self, connection: Connection) -> None:
        """A connection's socket is full: from now on it reads from the ring."""
        if connection in self._live:
            self._live.discard(connection)
            self._transports = None
            connection.cursor = self._written
            connection.behind_since = self._clock()
            self.behind.add(connection)

    def feed(self, connection: Connection) -> None:
        """Write the next piece of the ring to a connection that is behind; live again at the head.

        Raises:
            LookupError: What it has to get next is no longer there.
        """
        entries = self.ring.read(connection.cursor, WRITE_BYTES)
        connection.cursor += len(entries)
        events = [entry for entry in entries if not entry.control]
        wanted = entries if connection.wants_control else events
        if connection.cursor == self.ring.head:
            self.behind.discard(connection)
            self._live.add(connection)
            self._transports = None
        if data := b"".join(entry.frame for entry in wanted):
            connection.write(data)  # may fall behind again, at once and from the right place
        self.deliveries += len(events)
        self.sent_bytes += len(data)

    def behind_ms(self, connection: Connection) -> float:
        """Age of what a connection behind waits for: the next frame, or the emptying of its socket."""
        waits_since = connection.behind_since
        if connection.cursor < self.ring.head:
            waits_since = max(waits_since, self.ring.came_at(connection.cursor))
        return (self._clock() - waits_since) * 1000

    # When Redis was away

    def interrupt(self) -> None:
        """Events may be missed from here on, by all who are here now."""
        if self._interrupted is None:
            self._interrupted = {*self._live, *self.behind}

    def resume(self) -> None:
        """Nothing is missed from here on. Whoever was here before is told of the hole.

        `broadcaster.v1` gets a `gap`; a plain client, who cannot be told in a frame, is closed (4009).
        Who came meanwhile has missed nothing he was promised, and is welcomed.
        """
        interrupted, self._interrupted = self._interrupted or set(), None
        for connection in interrupted:
            if not connection.wants_control:
                connection.close(wire.CloseCode.HOLE, "the hub lost Redis: events may be missing")
        gap = wire.control_frame("gap", self.channel, cause="redis_link_lost", epoch=None, first=None, last=None)
        self.ring.append(gap, self._clock(), control=True)  # for those who are behind, in its place
        self._written += 1
        for connection in list(self._live):
            if connection.wants_control:
                connection.write(gap if connection in interrupted else self._welcome)
