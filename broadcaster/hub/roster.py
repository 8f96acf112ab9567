"""Everybody who is connected, and the one timer that pings them and holds them to their deadlines."""

from __future__ import annotations

import asyncio
import itertools
from typing import Final, Protocol

from broadcaster import wire
from broadcaster.hub.connection import Connection
from broadcaster.hub.fanout import Fanout
from broadcaster.settings import HubTable

TICK_S: Final = 0.1


class Expiring(Protocol):
    """A connection that has not finished its request; ordered by deadline, all wait equally long."""

    deadline: float

    def expire(self) -> None: ...


class Roster:
    """All connections of the hub.

    Attributes:
        fanout: The channel they all get.
        connected, peak: How many are connected, and were at most at one time.
        slow_closed: Closed because they were too far behind (4008).
        talkers_closed: Closed because they said too much (1008).
        ping_timeouts: Cut because they gave no sign of life.
        aborted: Cut because they did not answer the close in time.
    """

    def __init__(self, settings: HubTable, fanout: Fanout) -> None:
        self.fanout = fanout
        self.inbound_max_bytes = settings.inbound_max_bytes
        self.inbound_max_per_s = settings.inbound_max_per_s
        self._settings = settings
        self._clock = asyncio.get_running_loop().time
        # Each connection belongs to one of the slots; one slot is pinged per tick, so that a round of
        # pings is spread over the whole interval and never is a burst of its own.
        slots = max(1, round(settings.ping_interval_s / TICK_S))
        self._slots: list[set[Connection]] = [set() for _ in range(slots)]
        self._next_slot = itertools.cycle(range(slots))
        self._next_ping = itertools.cycle(self._slots)
        self._closing: set[Connection] = set()
        self._handshakes: dict[Expiring, None] = {}
        self.connected = 0
        self.peak = 0
        self.slow_closed = 0
        self.talkers_closed = 0
        self.ping_timeouts = 0
        self.aborted = 0

    @property
    def full(self) -> bool:
        return self.connected >= self._settings.max_connections

    def add(self, connection: Connection) -> None:
        connection.slot = next(self._next_slot)
        self._slots[connection.slot].add(connection)
        self.connected += 1
        self.peak = max(self.peak, self.connected)
        self.fanout.join(connection)

    def remove(self, connection: Connection) -> None:
        """Forget a connection that has ended; called once."""
        self._slots[connection.slot].discard(connection)
        self.connected -= 1
        self._closing.discard(connection)
        self.fanout.leave(connection)

    def begin_close(self, connection: Connection) -> None:
        """No more events for this one, and a deadline to be gone."""
        self.fanout.leave(connection)
        connection.close_deadline = self._clock() + self._settings.close_timeout_s
        self._closing.add(connection)

    def close_slow(self, connection: Connection) -> None:
        """Close with 4008 and say by how much it was too slow."""
        ring = self.fanout.ring
        events = ring.head - connection.cursor
        self.slow_closed += 1
        reason = f"too slow: {events} events, {self.fanout.behind_ms(connection):.0f} ms behind"
        connection.close(wire.CloseCode.SLOW, reason)

    def leave(self, connection: Connection) -> None:
        """No more events for this one."""
        self.fanout.leave(connection)

    def fall_behind(self, connection: Connection) -> None:
        """Its socket is full: from now on it is fed from the ring."""
        self.fanout.fall_behind(connection)

    def feed(self, connection: Connection) -> bool:
        """Write the next piece to a connection that is behind; whether there is more for it."""
        if connection not in self.fanout.behind:
            return False
        try:
            self.fanout.feed(connection)
        except LookupError:
            self.close_slow(connection)
        return connection in self.fanout.behind

    def close_talker(self, connection: Connection) -> None:
        """Close with 1008: a subscriber has next to nothing to say."""
        if connection.close_deadline is None:
            self.talkers_closed += 1
            connection.close(wire.CloseCode.POLICY, f"more than {self.inbound_max_per_s:g} frames a second")

    def watch_handshake(self, front: Expiring, *, watch: bool) -> None:
        """Begin or end holding an unfinished request to its deadline."""
        if watch:
            front.deadline = self._clock() + self._settings.handshake_timeout_s
            self._handshakes[front] = None
        else:
            self._handshakes.pop(front, None)

    async def keep(self) -> None:
        """The shared timer; runs until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.tick()

    def tick(self) -> None:
        now = self._clock()
        while (oldest := next(iter(self._handshakes), None)) and oldest.deadline <= now:
            del self._handshakes[oldest]
            oldest.expire()
        for connection in [c for c in self._closing if c.close_deadline and c.close_deadline <= now]:
            self.aborted += 1
            self._closing.discard(connection)
            connection.abort()
        for connection in list(self.fanout.behind):
            too_late = self.fanout.behind_ms(connection) > self._settings.behind_max_ms
            if too_late or connection.cursor < self.fanout.ring.tail:
                self.close_slow(connection)
        for connection in list(next(self._next_ping)):
            self._ping(connection)

    def _ping(self, connection: Connection) -> None:
        if connection.close_deadline is not None or connection in self.fanout.behind:
            return  # each of them has a deadline of its own
        if connection.alive:
            connection.alive = False
            connection.write(wire.PING)
        else:
            self.ping_timeouts += 1
            connection.close(wire.CloseCode.PING_TIMEOUT, "no sign of life")

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
