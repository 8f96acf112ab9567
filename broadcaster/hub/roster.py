"""Everybody who is connected, and the one timer that pings them, beats, and holds them to their deadlines."""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import time
from typing import Final

from broadcaster import wire
from broadcaster.hub.channels import Channels
from broadcaster.hub.connection import Connection
from broadcaster.hub.freshness import Freshness
from broadcaster.hub.gate import Admission, Gate
from broadcaster.hub.lag import Lag
from broadcaster.hub.listener import Listener
from broadcaster.hub.pacer import Pacer
from broadcaster.settings import HubTable

TICK_S: Final = 0.1

_EXPIRY_TICKS: Final = 10
"""Everybody is looked at once in so many ticks: is his token still good?"""

WARN_AT: Final = 0.5
"""Share of what is allowed (`hub.behind_max_*`) at which a `broadcaster.v1` client is told that it is too slow."""

WARN_EVERY_S: Final = 1.0


class Roster:
    """All connections of the hub.

    Attributes:
        connected, peak: How many are connected, and were at most at one time.
        behind: Connections with a channel that is not live.
        slow_closed: Closed because they were too far behind (4008).
        talkers_closed: Closed because they said too much (1008).
        ping_timeouts: Cut because they gave no sign of life.
        expired: Closed because their token had expired (4001).
        aborted: Cut because they did not answer the close in time.
    """

    def __init__(
        self, settings: HubTable, channels: Channels, freshness: Freshness, gate: Gate, pacer: Pacer
    ) -> None:
        self.inbound_max_bytes = settings.inbound_max_bytes
        self.inbound_max_per_s = settings.inbound_max_per_s
        self._settings = settings
        self._most_behind = Lag.most(settings)
        self._channels = channels
        self._freshness = freshness
        self._gate = gate
        self._pacer = pacer
        self._clock = asyncio.get_running_loop().time
        # Each connection belongs to one of the slots; one slot is pinged per tick, so that a round of
        # pings is spread over the whole interval and never is a burst of its own. So are the beats.
        slots = max(1, round(settings.ping_interval_s / TICK_S))
        self._slots: list[set[Connection]] = [set() for _ in range(slots)]
        self._next_slot = itertools.cycle(range(slots))
        self._next_ping = itertools.cycle(self._slots)
        self._next_beat = itertools.cycle(range(max(1, round(settings.beat_interval_s / TICK_S))))
        self._beat_ticks = max(1, round(settings.beat_interval_s / TICK_S))
        self._closing: set[Connection] = set()
        self._next_expiry = itertools.cycle(range(_EXPIRY_TICKS))
        self.connected = 0
        self.peak = 0
        self.behind: set[Connection] = set()
        self.slow_closed = 0
        self.talkers_closed = 0
        self.ping_timeouts = 0
        self.aborted = 0
        self.expired = 0

    # Coming and going

    def add(self, connection: Connection, admission: Admission) -> None:
        """Take a connection in, and let it listen to what it asks for."""
        ask = admission.ask
        connection.address = sys.intern(admission.address)
        self._gate.enter(connection.address)
        connection.expires_at = admission.expires_at
        connection.slot = next(self._next_slot)
        self._slots[connection.slot].add(connection)
        self.connected += 1
        self.peak = max(self.peak, self.connected)
        ears = [Listener(connection, self._channels.get(name), ask.filter, since) for name, since in ask.channels]
        connection.listeners = tuple(sorted(ears, key=lambda listener: listener.channel.fanout.rank))
        for listener in connection.listeners:
            listener.channel.join(listener)

    def remove(self, connection: Connection) -> None:
        """Forget a connection that has ended; called once."""
        self._slots[connection.slot].discard(connection)
        self.connected -= 1
        self._gate.leave(connection.address)
        self._closing.discard(connection)
        self.behind.discard(connection)
        for listener in connection.listeners:
            listener.channel.leave(listener)
        connection.listeners = ()  # or the two would hold each other, and the transport, until the collector comes

    def leave(self, connection: Connection) -> None:
        """No more events for this one."""
        self.behind.discard(connection)
        for listener in connection.listeners:
            listener.channel.mute(listener)

    def begin_close(self, connection: Connection) -> None:
        """No more events for this one, and a deadline to be gone."""
        self.leave(connection)
        connection.close_deadline = self._clock() + self._settings.close_timeout_s
        self._closing.add(connection)

    def listen(self, connection: Connection) -> None:
        """It has said something: it is heard in its turn, so that many talkers cannot hold the events up."""
        self._pacer.add(connection.listen)

    def close_talker(self, connection: Connection) -> None:
        """Close with 1008: a subscriber has next to nothing to say."""
        if connection.close_deadline is None:
            self.talkers_closed += 1
            connection.close(wire.CloseCode.POLICY, f"more than {self.inbound_max_per_s:g} frames a second")

    # Those who are behind

    def fall_behind(self, connection: Connection) -> None:
        """Its socket is full: from now on it is fed from the ring."""
        if connection.close_deadline is None:
            self.behind.add(connection)
            for listener in connection.listeners:
                listener.channel.fanout.fall_behind(listener)

    def catch_up(self, connection: Connection) -> None:
        """It is behind, and its socket has room: it is fed in its turn."""
        if connection.close_deadline is None:
            self.behind.add(connection)
            self._pacer.add(connection.feed)

    def feed(self, connection: Connection) -> bool:
        """Write the next piece of the channel that goes first; whether there is more that can be written now."""
        for listener in connection.listeners:
            if connection.paused or connection.close_deadline is not None:
                return False
            if self._is_about_to_shed(listener):
                self._warn(listener)
            try:
                if listener.channel.feed(listener):
                    return not connection.paused
            except LookupError:
                self._close_slow(listener)
        if not connection.paused and not any(map(_is_behind, connection.listeners)):
            self.behind.discard(connection)
        return False

    def _is_about_to_shed(self, listener: Listener) -> bool:
        fanout = listener.channel.fanout
        if not _is_behind(listener) or not fanout.sheds_for(listener):
            return False
        return fanout.lag_of(listener).share_of(self._most_behind) > WARN_AT

    def _close_slow(self, listener: Listener) -> None:
        """Close with 4008 and say by how much it was too slow."""
        self.slow_closed += 1
        self._warn(listener)
        lag = listener.channel.fanout.lag_of(listener)
        listener.connection.close(wire.CloseCode.SLOW, f"too slow: {lag}")

    # The timer

    async def keep(self) -> None:
        """The shared timer; runs until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.tick()

    def tick(self) -> None:
        now = self._clock()
        self._gate.tick()
        for connection in [c for c in self._closing if c.close_deadline and c.close_deadline <= now]:
            self.aborted += 1
            self._closing.discard(connection)
            connection.abort()
        for connection in list(self.behind):
            self._hold_to_deadline(connection)
        for connection in list(next(self._next_ping)):
            self._ping(connection)
        self._close_expired()
        beats = range(next(self._next_beat), len(self._slots), self._beat_ticks)
        if self._freshness.proven:
            for connection in itertools.chain.from_iterable(self._slots[slot] for slot in beats):
                if connection.wants_control:
                    self._pacer.add(connection.beat)
        self._channels.close_idle()

    def _close_expired(self) -> None:
        """Whose token has expired has to come back with another one."""
        now = time.time()
        for slot in self._slots[next(self._next_expiry) :: _EXPIRY_TICKS]:
            for connection in [c for c in slot if c.expires_at is not None and c.expires_at <= now]:
                if connection.close_deadline is None:
                    self.expired += 1
                    connection.close(wire.CloseCode.EXPIRED, "the token has expired")

    def _hold_to_deadline(self, connection: Connection) -> None:
        for listener in connection.listeners:
            fanout = listener.channel.fanout
            if not _is_behind(listener) or listener.awaits_page:
                continue
            lag = fanout.lag_of(listener)
            if listener.resuming:  # it is held to making progress, however much there is for it
                lag = Lag(lag.ms, 0, 0)
            share = lag.share_of(self._most_behind)
            if share > WARN_AT:
                self._warn(listener)
            if fanout.sheds_for(listener):
                read_at = max(ear.behind_since for ear in connection.listeners)  # one may wait for another
                if self._clock() - read_at > self._settings.ping_interval_s:
                    self.ping_timeouts += 1
                    connection.close(wire.CloseCode.PING_TIMEOUT, "nothing is read")
                    return
            elif share > 1 or (fanout.is_overtaken(listener) and not listener.resuming):
                self._close_slow(listener)
                return

    def _warn(self, listener: Listener) -> None:
        """Tell a `broadcaster.v1` client that it is too slow, before anything happens to it; once a second."""
        now = self._clock()
        welcomed = listener.since is None
        if listener.connection.wants_control and welcomed and now - listener.warned_at > WARN_EVERY_S:
            listener.warned_at = now
            channel = listener.channel
            lag = channel.fanout.lag_of(listener)
            numbers = {"behind_ms": round(lag.ms), "behind_events": lag.events, "behind_bytes": lag.bytes}
            listener.connection.write(wire.control_frame("lag", channel.name, **numbers))

    def _ping(self, connection: Connection) -> None:
        if connection.close_deadline is not None or connection.paused:
            return  # each of them has a deadline of its own
        if connection.alive:
            connection.alive = False
            connection.write(wire.PING)
        else:
            self.ping_timeouts += 1
            connection.close(wire.CloseCode.PING_TIMEOUT, "no sign of life")

    def beat(self, connection: Connection) -> None:
        """Tell a `broadcaster.v1` client where it stands."""
        if connection.close_deadline is None and self._freshness.proven:
            for listener in connection.listeners:
                listener.channel.beat(listener)

    # The end

    async def drain(self, within_s: float) -> None:
        """Send everybody away, not all at once: nobody is to come back at the same moment as all others.

        A `broadcaster.v1` client is told at once, and how long to stay away after the close. Until its close each
        gets what comes.
        """
        everybody = self._everybody()
        random.shuffle(everybody)
        begun_at = self._clock()
        for number, connection in enumerate(everybody):
            if connection.wants_control and connection.listeners:  # it has not gone meanwhile
                away_s = round(random.uniform(0, max(within_s, 1.0)), 3)
                channel = connection.listeners[0].channel.name
                connection.drain(wire.control_frame("drain", channel, reconnect_after_s=away_s))
            if number % 100 == 99:
                await asyncio.sleep(0)
        for number, connection in enumerate(everybody):
            due = begun_at + within_s * number / len(everybody)
            while self.connected and (wait_s := due - self._clock()) > 0.005:
                await asyncio.sleep(min(wait_s, TICK_S))  # they may all leave by themselves meanwhile
            connection.close(wire.CloseCode.RESTART, "the hub is restarting")

    async def close_all(self, code: wire.CloseCode, reason: str, within_s: float) -> None:
        """Close everybody, wait until they are gone, cut whoever is left."""
        for connection in self._everybody():
            connection.close(code, reason)
        deadline = self._clock() + within_s
        while self.connected and self._clock() < deadline:
            await asyncio.sleep(0.01)
        for connection in self._everybody():
            connection.abort()

    def _everybody(self) -> list[Connection]:
        return list(itertools.chain.from_iterable(self._slots))


def _is_behind(listener: Listener) -> bool:
    return listener in listener.channel.fanout.behind
