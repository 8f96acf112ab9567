"""The hub's one timer: pings, heartbeats, token expiry, and every deadline of a connection."""

from __future__ import annotations

import asyncio
import itertools

from broadcaster import wire
from broadcaster.hub.channels.channels import Channels
from broadcaster.hub.connections.admission import AdmissionControl
from broadcaster.hub.connections.connection import Connection, ConnectionContext
from broadcaster.hub.connections.registry import TICK_S, ticks
from broadcaster.settings import HubTable


class Timer:
    """Ticks ten times a second, and looks at a small part of all connections each time."""

    def __init__(
        self, settings: HubTable, context: ConnectionContext, channels: Channels, admission: AdmissionControl
    ) -> None:
        """Prepare; nothing happens before `run`.

        Args:
            settings: Intervals.
            context: Of the connections.
            channels: Idle ones are closed.
            admission: Handshakes that take too long are ended.
        """
        self._context = context
        self._registry = context.registry
        self._channels = channels
        self._admission = admission
        self._clock = context.runtime.clock
        self._beat_ticks = ticks(settings.beat_interval_s)
        self._comment_ticks = ticks(context.runtime.limits.comment_every_s)
        self._expiry_ticks = context.runtime.limits.expiry_ticks
        self._tick = itertools.count()

    async def run(self) -> None:
        """Tick until cancelled; raises what a tick raises.

        A callback, not a task that sleeps: that would be one more turn of the loop each time, in every idle hub.
        """
        loop = asyncio.get_running_loop()
        failed: asyncio.Future[None] = loop.create_future()
        timer: asyncio.TimerHandle

        def tick() -> None:
            nonlocal timer
            try:
                self.tick()
                timer = loop.call_later(TICK_S, tick)
            except Exception as error:
                if not failed.done():
                    failed.set_exception(error)

        timer = loop.call_later(TICK_S, tick)
        try:
            await failed
        finally:
            timer.cancel()

    def tick(self) -> None:
        number, slots = next(self._tick), self._registry.slots
        now = self._clock.loop_s()
        self._admission.evict_overdue()
        for connection in [each for each in self._registry.closing if _is_overdue(each, now)]:
            self._registry.aborted += connection in self._registry.ending  # else it is leaving by itself
            self._registry.closing.discard(connection)
            connection.abort()
        for connection in list(self._registry.behind):
            self._check_slow(connection)
        for connection in list(slots[number % len(slots)]):
            self._ping(connection)
        for slot in slots[number % self._comment_ticks :: self._comment_ticks]:
            for connection in [each for each in slot if not each.format.answers_pings]:
                connection.write(wire.COMMENT)
        self._close_expired(slots[number % self._expiry_ticks :: self._expiry_ticks])
        if self._context.is_proven():
            for connection in itertools.chain.from_iterable(slots[number % self._beat_ticks :: self._beat_ticks]):
                if connection.wants_control:
                    self._context.scheduler.add(connection.beat)
        self._channels.end_unavailable()
        self._channels.close_idle()

    def _check_slow(self, connection: Connection) -> None:
        if not connection.blocked:
            return  # what is behind waits for its turn in this hub, or for another channel: its client is not slow
        now_s = self._clock.loop_s() - connection.blocked_at
        for membership in connection.memberships:
            if connection.close_deadline is None:
                membership.channel.fanout.slow.check(membership, now_s, connection.blocked_before_s + now_s)

    def _ping(self, connection: Connection) -> None:
        if connection.close_deadline is not None or connection.blocked or not connection.format.answers_pings:
            return  # each of them has a deadline of its own
        if connection.alive:
            connection.alive = False
            connection.write(wire.PING)
        else:
            connection.close(wire.CloseCode.PING_TIMEOUT, "no sign of life")

    def _close_expired(self, slots: list[set[Connection]]) -> None:
        """A client whose token has expired has to reconnect with another one."""
        now = self._clock.wall_s()
        for slot in slots:
            for connection in [each for each in slot if each.grant.has_expired(now)]:
                connection.close(wire.CloseCode.EXPIRED, "the token has expired")


def _is_overdue(connection: Connection, now: float) -> bool:
    return connection.close_deadline is not None and connection.close_deadline <= now
