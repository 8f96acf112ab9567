"""One client's connection after the handshake: what it says, what it is sent, how it ends.

No task, no lock, no queue: an idle connection is this object, its transport, and an entry in two tables.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from broadcaster import wire
from broadcaster.auth.access import UNRESTRICTED, Grant
from broadcaster.core.logs import ThrottledLog
from broadcaster.core.position import Beginning
from broadcaster.core.ratelimit import leaked
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.hub.channels.channel import Channel
from broadcaster.hub.connections.closed import CLOSED
from broadcaster.hub.connections.membership import Membership, after_feeding, by_priority
from broadcaster.hub.connections.registry import ConnectionRegistry
from broadcaster.hub.fanout.filters import Filter
from broadcaster.hub.fanout.format import PLAIN, Format, Formats
from broadcaster.hub.fanout.scheduler import Scheduler
from broadcaster.settings import HubTable

_NOTHING: Final = memoryview(b"")


@dataclass(frozen=True, slots=True)
class ConnectionContext:
    """What all connections of a hub share.

    Attributes:
        registry: Who is connected.
        scheduler: Where reading, feeding and heartbeats wait for their turn.
        settings: Limits and deadlines.
        is_proven: Whether the delivery probe comes back; heartbeats are sent only then.
        log: Of what happens to single clients.
        runtime: Time, chance and limits.
        formats: What clients can be sent.
    """

    registry: ConnectionRegistry[Connection]
    scheduler: Scheduler
    settings: HubTable
    is_proven: Callable[[], bool]
    log: ThrottledLog
    runtime: Runtime = RUNTIME
    formats: Formats = field(default_factory=Formats)


class Connection(asyncio.Protocol):
    """The protocol a transport is handed to after the handshake; the `Sink` of its subscriptions.

    Attributes:
        transport: Where bytes leave; only ever by `transport.write`, which keeps them in order.
        format: How the client gets events and control frames.
        wants_control: Whether it gets control frames (it speaks `broadcaster.v1`).
        slot: When in the round of pings it is pinged.
        address: Where it comes from.
        grant: What its token allows, and for how long.
        memberships: Its subscriptions, in the order in which they are fed.
        blocked: Whether its socket is full (backpressure).
        blocked_at: Loop time since which it is; as long as it is, the client reads nothing.
        blocked_before_s: Seconds for which it was so before, since a subscription of it was last behind.
        close_deadline: Loop time at which it is cut, once it is being closed; else None.
        alive: Whether anything was received since the last ping.
    """

    __slots__ = (
        "_context",
        "_inbound",
        "_rate_at",
        "_rate_level",
        "_unread",
        "address",
        "alive",
        "blocked",
        "blocked_at",
        "blocked_before_s",
        "close_deadline",
        "format",
        "grant",
        "memberships",
        "slot",
        "transport",
        "wants_control",
    )

    def __init__(
        self,
        transport: asyncio.Transport,
        context: ConnectionContext,
        *,
        wants_control: bool,
        address: str = "",
        grant: Grant = UNRESTRICTED,
        form: Format = PLAIN,
    ) -> None:
        self.transport = transport
        self._context = context
        self.wants_control = wants_control
        self.address = address
        self.grant = grant
        self.format = form
        self._inbound: wire.Inbound | None = None
        self._unread = _NOTHING
        self.blocked = False
        self.blocked_at = self.blocked_before_s = 0.0
        self.slot = 0
        self.memberships: tuple[Membership, ...] = ()
        self.close_deadline: float | None = None
        self.alive = True
        self._rate_level = self._rate_at = 0.0

    def open(self, channels: Iterable[tuple[Channel, Beginning]], wanted: Filter) -> None:
        """Register, and begin to deliver; called once.

        Args:
            channels: Which, each with where it is to begin; None: now.
            wanted: The filter for all of them.
        """
        self._context.registry.add(self)
        memberships = [Membership(self, channel, wanted, since) for channel, since in channels]
        self.memberships = by_priority(memberships)
        for membership in self.memberships:
            membership.channel.subscribe(membership)

    @property
    def name(self) -> str:
        """Whose it is, for logs: the holder of the token, and the address."""
        address = self.address or "a client"
        return f"{self.grant.name}@{address}" if self.grant.name else address

    # As the sink of its subscriptions

    @property
    def closing(self) -> bool:
        return self.close_deadline is not None or self.transport is CLOSED

    @property
    def writable(self) -> bool:
        return not self.blocked and self.close_deadline is None and self.transport is not CLOSED

    def write(self, data: bytes) -> bool:
        """Write unless the close frame is sent, or the transport is closing (uvloop raises when it is)."""
        if self.close_deadline is not None or self.transport.is_closing():
            return False
        self.transport.write(data)
        return True

    def tell(self, frame: bytes) -> bool:
        return self.write(self.format.control(frame))

    def close(self, code: wire.CloseCode, reason: str) -> None:
        """Send a close frame, once; a client that does not answer it in time is cut by the timer."""
        if not self.closing:
            registry = self._context.registry
            code, reason = registry.due.pop(self, (code, reason))
            registry.note_closed(self, code)
            self._context.log.log(logging.INFO, f"closed {code}", "closed %s: %d %s", self.name, code, reason)
            self.say_goodbye(code, reason)
            self._begin_close()

    def say_goodbye(self, code: wire.CloseCode, reason: str) -> None:
        """The last that is written."""
        self.write(wire.close_frame(code, reason))

    def close_in_turn(self, code: wire.CloseCode, reason: str) -> None:
        if not self.closing and not self._context.registry.close_in_turn(self, code, reason):
            self._unsubscribe()

    def _begin_close(self) -> None:
        """No more events, and a deadline to be gone."""
        context = self._context
        self.close_deadline = context.runtime.clock.loop_s() + context.settings.close_timeout_s
        context.registry.closing.add(self)
        context.registry.behind.discard(self)
        context.registry.note_unwritable(self)

    def abort(self) -> None:
        """Cut the connection at once: the only end that a peer that stopped reading cannot delay."""
        self._unsubscribe()
        self.transport.abort()

    def _unsubscribe(self) -> None:
        self._context.registry.behind.discard(self)
        for membership in self.memberships:
            membership.channel.unsubscribe(membership)

    def pause_writing(self) -> None:
        """The socket is full (asyncio calls this inside of `transport.write`, where nothing else may happen)."""
        self.blocked = True
        self.blocked_at = self._context.runtime.clock.loop_s()
        self._context.registry.note_unwritable(self)

    def settle(self) -> None:
        """Between two writes: act on having become unwritable."""
        if self.blocked:
            self.transport.pause_reading()  # or a client that does not read could pile up pongs
            for membership in self.memberships:
                membership.channel.replay.forget(membership)  # or it could hold a page for as long
        if self.closing:
            self._unsubscribe()
        elif self.blocked:
            self._context.registry.behind.add(self)
            for membership in self.memberships:
                membership.channel.fanout.fall_behind(membership)

    def resume_writing(self) -> None:
        self.blocked = False
        self.blocked_before_s += self._context.runtime.clock.loop_s() - self.blocked_at
        self._resume_reading()
        self.catch_up()

    def catch_up(self) -> None:
        """It is behind: it is fed in its turn, if its socket has room."""
        if self.writable:
            self._context.registry.behind.add(self)
            self._context.scheduler.add(self.feed)

    def feed(self) -> bool:
        """For the scheduler: write the next piece of the channel that goes first; whether there is more."""
        for membership in self.memberships:
            if not self.writable:
                return False
            if membership.channel.feed(membership):
                if len(self.memberships) > 1:
                    now = self._context.runtime.clock.loop_s()
                    self.memberships = after_feeding(membership, self.memberships, now)
                return self.writable
        if self.writable and not any(membership.is_behind for membership in self.memberships):
            self._context.registry.behind.discard(self)
            self.blocked_before_s = 0.0
        return False

    def beat(self) -> bool:
        """For the scheduler: send a heartbeat per channel, once."""
        if self.close_deadline is None and self._context.is_proven():
            for membership in self.memberships:
                membership.channel.beat(membership)
        return False

    # What the client says

    def data_received(self, data: bytes) -> None:
        self.alive = True
        if self._inbound is not None and self._inbound.ignoring:
            if wire.is_whole_control_frame(data) and wire.is_close(data):
                self.transport.close()  # the answer to our close: nothing else is read any more
            return
        silent_so_far = self._inbound is None and not self._unread
        if silent_so_far and wire.is_whole_control_frame(data) and wire.is_pong(data):
            self._limit_rate(1)  # the answer to our ping: most clients never say anything else
            return
        self._unread = memoryview(bytes(self._unread) + data if self._unread else data)
        self.transport.pause_reading()  # so that no more than one read waits here
        self._context.scheduler.add(self.read)  # in turn: many talkative clients must not hold the events up

    def read(self) -> bool:
        """For the scheduler: parse the next of what the client said, and answer; whether there is more."""
        if self.transport.is_closing():
            self._unread = _NOTHING
            return False
        context = self._context
        most = context.runtime.limits.read_bytes
        data, self._unread = bytes(self._unread[:most]), self._unread[most:]
        if self._inbound is None and not self._unread and wire.is_whole_control_frame(data):
            inbound = self._parser()
            self._answer(inbound, data)
            inbound.dispose()
            self._limit_rate(1)
        else:
            inbound = self._inbound = self._inbound or self._parser()
            before = inbound.frames
            self._answer(inbound, data)
            self._limit_rate(inbound.frames - before)
        if not self._unread:
            self._resume_reading()
        return bool(self._unread)

    def _parser(self) -> wire.Inbound:
        return wire.Inbound(self._context.settings.inbound_max_bytes, compressed=self.format.compressed)

    def _answer(self, inbound: wire.Inbound, data: bytes) -> None:
        if self.transport.is_closing():
            return
        reply = inbound.feed(data)
        if self.close_deadline is None:
            if reply:
                self.transport.write(reply)
            if inbound.ended:
                if (code := inbound.closed_with) is not None:
                    self._context.registry.note_closed(self, code)
                self._begin_close()
                if not inbound.closed_by_client:
                    self._end_output()
        if inbound.closed_by_client:
            self.transport.close()

    def _limit_rate(self, frames: int) -> None:
        """So many more frames were sent; a client that sends too many is closed (1008), and not read any more."""
        context = self._context
        now, per_s = context.runtime.clock.monotonic_s(), context.settings.inbound_max_per_s
        self._rate_level = leaked(self._rate_level, now - self._rate_at, per_s) + frames
        self._rate_at = now
        if self._rate_level > per_s and self.close_deadline is None:
            self._inbound = self._inbound or self._parser()
            self._inbound.ignore()
            self._unread = _NOTHING
            self.close(wire.CloseCode.POLICY, f"more than {per_s:g} frames a second")
            self._end_output()

    def _end_output(self) -> None:
        """Nothing more is written. Closing at once could destroy our close frame on its way (RST)."""
        if not self.transport.is_closing() and self.transport.can_write_eof():
            self.transport.write_eof()

    def _resume_reading(self) -> None:
        """Read on, unless the client does not read us, or something that it said waits for its turn."""
        if not self.blocked and not self._unread:
            self.transport.resume_reading()

    # The end

    def eof_received(self) -> bool:
        if self.close_deadline is None:
            self._begin_close()
        return False  # the transport closes itself, once it has flushed; the deadline holds it to that

    def connection_lost(self, error: Exception | None) -> None:
        self._unread = _NOTHING
        if self._inbound is not None:
            self._inbound.dispose()
            self._inbound = None
        self._context.registry.remove(self)
        for membership in self.memberships:
            membership.channel.leave(membership)
        self.memberships = ()  # or they and the connection would hold each other until the collector comes
        self.transport = CLOSED  # with TLS it knows us: a cycle that is not broken stays, with all its buffers
