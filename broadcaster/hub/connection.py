"""One subscriber as the hub sees it.

No task, no lock, no queue: an idle connection is this object, its transport, and an entry in two tables.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from broadcaster import wire

if TYPE_CHECKING:
    from broadcaster.hub.roster import Roster


class Connection(asyncio.Protocol):
    """The protocol a transport is handed to after the upgrade.

    Attributes:
        transport: Where bytes leave; only ever by `transport.write`, which keeps them in order.
        wants_control: Whether the client speaks `broadcaster.v1`.
        slot: When in the round of pings it is pinged.
        cursor: Number of the next ring entry to write while behind; without meaning while live.
        behind_since: Loop time in seconds at which it fell behind.
        close_deadline: Loop time at which it is cut, once it has been closed; else None.
        alive: Whether anything was heard since the last ping.
    """

    __slots__ = (
        "_inbound",
        "_paused",
        "_roster",
        "alive",
        "behind_since",
        "close_deadline",
        "cursor",
        "slot",
        "transport",
        "wants_control",
    )

    def __init__(self, transport: asyncio.Transport, roster: Roster, *, wants_control: bool) -> None:
        self.transport = transport
        self._roster = roster
        self.wants_control = wants_control
        self._inbound: wire.Inbound | None = None
        self._paused = False
        self.slot = 0
        self.cursor = 0
        self.behind_since = 0.0
        self.close_deadline: float | None = None
        self.alive = True

    def write(self, data: bytes) -> None:
        """Write unless the transport is closing (uvloop raises when it is)."""
        if not self.transport.is_closing():
            self.transport.write(data)

    def close(self, code: wire.CloseCode, reason: str) -> None:
        """Send a close frame, once; whoever does not answer it in time is cut by the roster."""
        if self.close_deadline is None:
            self._roster.begin_close(self)
            self.write(wire.close_frame(code, reason))

    def abort(self) -> None:
        """Cut the connection at once. The only end that a peer who stopped reading cannot delay."""
        self._roster.fanout.leave(self)
        self.transport.abort()

    # asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        self.alive = True
        if self._inbound is None and wire.is_whole_control_frame(data):
            if not wire.is_pong(data):
                inbound = wire.Inbound(self._roster.inbound_max_bytes)
                self._converse(inbound, data)
                inbound.let_go()
            return
        if self._inbound is None:
            self._inbound = wire.Inbound(self._roster.inbound_max_bytes)
        self._converse(self._inbound, data)

    def _converse(self, inbound: wire.Inbound, data: bytes) -> None:
        if self.transport.is_closing():
            return
        reply = inbound.feed(data)
        if self.close_deadline is None:
            if reply:
                self.write(reply)
            if inbound.ended:
                self._roster.begin_close(self)
        if inbound.closed_by_client:
            self.transport.close()

    def pause_writing(self) -> None:
        self._paused = True
        self._roster.fanout.fall_behind(self)
        self.transport.pause_reading()  # who does not read us is not read: his pings cannot pile up pongs

    def resume_writing(self) -> None:
        self._paused = False
        self.transport.resume_reading()
        self._catch_up()

    def _catch_up(self) -> None:
        """Feed one piece per loop turn, so that a long way back delays nobody else."""
        fanout = self._roster.fanout
        if self._paused or self not in fanout.behind:
            return
        try:
            fanout.feed(self)
        except LookupError:
            self._roster.close_slow(self)
            return
        if self in fanout.behind:
            asyncio.get_running_loop().call_soon(self._catch_up)

    def eof_received(self) -> bool:
        if self.close_deadline is None:
            self._roster.begin_close(self)
        return False  # the transport closes itself, once it has flushed; the deadline holds it to that

    def connection_lost(self, error: Exception | None) -> None:
        if self._inbound is not None:
            self._inbound.let_go()
            self._inbound = None
        self._roster.remove(self)
