"""One subscriber as the hub sees it.

No task, no lock, no queue: an idle connection is this object, its transport, and an entry in two tables.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final, Protocol

from broadcaster import wire
from broadcaster.hub.listener import Listener

LISTEN_BYTES: Final = 512
"""Bytes of one subscriber that are heard in one piece, before others have their turn.

A frame may be as short as 6 bytes and costs some 15 µs: a flood of pings must not hold the events up.
"""


_NOTHING: Final = memoryview(b"")


class _Gone(asyncio.Transport):
    """What a connection that has ended would write to."""

    def is_closing(self) -> bool:
        return True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


_GONE: Final = _Gone()


class Keeper(Protocol):
    """What a connection needs of those who keep it: the roster, and through it the fan-out."""

    inbound_max_bytes: int
    inbound_max_per_s: float

    def listen(self, connection: Connection) -> None:
        """It has said something, which is to be heard in its turn."""

    def close_talker(self, connection: Connection) -> None:
        """It says too much."""

    def begin_close(self, connection: Connection) -> None:
        """No more events for this one, and a deadline to be gone."""

    def leave(self, connection: Connection) -> None:
        """No more events for this one."""

    def remove(self, connection: Connection) -> None:
        """It is gone."""

    def fall_behind(self, connection: Connection) -> None:
        """Its socket is full."""

    def catch_up(self, connection: Connection) -> None:
        """Its socket has room."""

    def feed(self, connection: Connection) -> bool:
        """Write the next piece of what it is behind; whether there is more that can be written now."""

    def beat(self, connection: Connection) -> None:
        """Tell it where it stands."""


class Connection(asyncio.Protocol):
    """The protocol a transport is handed to after the upgrade.

    Attributes:
        transport: Where bytes leave; only ever by `transport.write`, which keeps them in order.
        wants_control: Whether the client speaks `broadcaster.v1`.
        slot: When in the round of pings it is pinged.
        address: Where it comes from.
        expires_at: Until when it may stay, in seconds since 1970; None: for good.
        listeners: Its ears, one per channel; the channel of the highest priority first.
        paused: Whether its socket is full.
        close_deadline: Loop time at which it is cut, once it has been closed; else None.
        alive: Whether anything was heard since the last ping.
    """

    __slots__ = (
        "_inbound",
        "_keeper",
        "_said",
        "_said_at",
        "_unheard",
        "address",
        "alive",
        "close_deadline",
        "expires_at",
        "listeners",
        "paused",
        "slot",
        "transport",
        "wants_control",
    )

    def __init__(self, transport: asyncio.Transport, keeper: Keeper, *, wants_control: bool) -> None:
        self.transport = transport
        self._keeper = keeper
        self.wants_control = wants_control
        self._inbound: wire.Inbound | None = None
        self._unheard = _NOTHING
        self.paused = False
        self.slot = 0
        self.address = ""
        self.expires_at: float | None = None
        self.listeners: tuple[Listener, ...] = ()
        self.close_deadline: float | None = None
        self.alive = True
        self._said = self._said_at = 0.0

    def write(self, data: bytes) -> None:
        """Write unless the transport is closing (uvloop raises when it is)."""
        if not self.transport.is_closing():
            self.transport.write(data)

    def close(self, code: wire.CloseCode, reason: str) -> None:
        """Send a close frame, once; whoever does not answer it in time is cut by the roster."""
        if self.close_deadline is None:
            self._keeper.begin_close(self)
            self.write(wire.close_frame(code, reason))

    def drain(self, frame: bytes) -> None:
        """Tell a client that it will be closed soon."""
        if self.close_deadline is None:
            self.write(frame)

    def abort(self) -> None:
        """Cut the connection at once. The only end that a peer who stopped reading cannot delay."""
        self._keeper.leave(self)
        self.transport.abort()

    # asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        self.alive = True
        if self._inbound is not None and self._inbound.ignoring:
            if wire.is_whole_control_frame(data) and wire.is_close(data):
                self.transport.close()  # the answer to our close: nothing else is heard any more
            return
        silent_so_far = self._inbound is None and not self._unheard
        if silent_so_far and wire.is_whole_control_frame(data) and wire.is_pong(data):
            self._count(1)  # the answer to our ping: most never say anything else
            return
        self._unheard = memoryview(bytes(self._unheard) + data if self._unheard else data)
        self.transport.pause_reading()  # so that no more than one read waits here
        self._keeper.listen(self)

    def listen(self) -> bool:
        """For the pacer: hear the next of what was said, and answer; whether there is more."""
        if self.transport.is_closing():
            self._unheard = _NOTHING
            return False
        data, self._unheard = bytes(self._unheard[:LISTEN_BYTES]), self._unheard[LISTEN_BYTES:]
        if self._inbound is None and not self._unheard and wire.is_whole_control_frame(data):
            inbound = wire.Inbound(self._keeper.inbound_max_bytes)
            self._converse(inbound, data)
            inbound.let_go()
            self._count(1)
        else:
            inbound = self._inbound = self._inbound or wire.Inbound(self._keeper.inbound_max_bytes)
            before = inbound.frames
            self._converse(inbound, data)
            self._count(inbound.frames - before)
        if not self._unheard:
            self._read_on()
        return bool(self._unheard)

    def _count(self, frames: int) -> None:
        """So many more frames were said; who says too much is closed, and not heard any more.

        A second's worth may come at once, and silence is not saved up for later (a token bucket).
        """
        now, most = time.monotonic(), self._keeper.inbound_max_per_s
        self._said = max(0.0, self._said - (now - self._said_at) * most) + frames
        self._said_at = now
        if self._said > most and self.close_deadline is None:
            self._inbound = self._inbound or wire.Inbound(self._keeper.inbound_max_bytes)
            self._inbound.ignore()
            self._unheard = _NOTHING
            self._keeper.close_talker(self)
            self._end()

    def _end(self) -> None:
        """Nothing more is written. Closing at once could destroy our close frame on its way (RST)."""
        if not self.transport.is_closing() and self.transport.can_write_eof():
            self.transport.write_eof()

    def _read_on(self) -> None:
        """Who does not read us is not read, so that his pings cannot pile up pongs; nor who was not heard yet."""
        if not self.paused and not self._unheard:
            self.transport.resume_reading()

    def _converse(self, inbound: wire.Inbound, data: bytes) -> None:
        if self.transport.is_closing():
            return
        reply = inbound.feed(data)
        if self.close_deadline is None:
            if reply:
                self.transport.write(reply)
            if inbound.ended:
                self._keeper.begin_close(self)
                if not inbound.closed_by_client:
                    self._end()
        if inbound.closed_by_client:
            self.transport.close()

    def pause_writing(self) -> None:
        self.paused = True
        self._keeper.fall_behind(self)
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.paused = False
        self._read_on()
        self.catch_up()

    def catch_up(self) -> None:
        """It is behind: it is fed in its turn, if its socket has room."""
        if not self.paused:
            self._keeper.catch_up(self)

    def feed(self) -> bool:
        """For the pacer: the next piece of what this connection is behind; whether there is more."""
        return not self.paused and self.close_deadline is None and self._keeper.feed(self)

    def beat(self) -> bool:
        """For the pacer: say where this connection stands, once."""
        self._keeper.beat(self)
        return False

    def eof_received(self) -> bool:
        if self.close_deadline is None:
            self._keeper.begin_close(self)
        return False  # the transport closes itself, once it has flushed; the deadline holds it to that

    def connection_lost(self, error: Exception | None) -> None:
        self._unheard = _NOTHING
        if self._inbound is not None:
            self._inbound.let_go()
            self._inbound = None
        self._keeper.remove(self)
        self.transport = _GONE  # with TLS it knows us: what nobody takes apart stays, with all its buffers
