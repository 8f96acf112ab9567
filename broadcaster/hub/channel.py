"""One channel of the hub: reader, fan-out and resumption put together, and who waits for it to be open."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Final

from broadcaster import wire
from broadcaster.hub.arrival import Arrival
from broadcaster.hub.fanout import Fanout
from broadcaster.hub.lag import Lag
from broadcaster.hub.listener import Listener
from broadcaster.hub.log import EventLog
from broadcaster.hub.pacer import Pacer
from broadcaster.hub.pages import Pages
from broadcaster.hub.reader import PassingReader, Reader
from broadcaster.hub.resume import Resumption, welcome_frame
from broadcaster.settings import Settings

_OPENING_S: Final = 2.0
"""A channel that is opened because somebody asks for it may take so long before the hub is not ready."""


class Channel:
    """One channel.

    Attributes:
        name: Its name.
        fanout, reader, resumption: Its parts.
        listeners: How many there are.
        idle_since: Loop time at which the last of them left.
        received: Valid events taken in from the subscription.
        opening: Whether it has just been opened, and is not expected to be steady yet.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        settings: Settings,
        stored: tuple[EventLog, Pages] | None,
        pacer: Pacer,
        *,
        sheds: bool = False,
    ) -> None:
        """Prepare a channel; nothing happens before `run`.

        Args:
            name: Its name.
            rank: Which channel goes first when several wait: the lowest.
            settings: Of the hub.
            stored: Where events are stored; None when they are not.
            pacer: For work that may wait.
            sheds: Whether who is slow loses the oldest events; else he is closed.
        """
        self.name = name
        self.fanout = Fanout(name, settings.hub.ring_bytes, rank, Lag.most(settings.hub) if sheds else None)
        self.reader: Reader | PassingReader
        if stored is None:
            self.reader = PassingReader(self.fanout, self._on_caught_up)
        else:
            self.reader = Reader(self.fanout, stored[0], self._on_caught_up)
        self._beat_s = settings.hub.beat_interval_s
        pages = stored and stored[1]
        self.resumption = Resumption(self.fanout, self.reader, pages, self._beat_s)
        self._clock = asyncio.get_running_loop().time
        self._pacer = pacer
        self._waiting: dict[Listener, int] = {}  # and how many looks had begun when it came
        self._beat: tuple[object, bytes] = (None, b"")
        self._ever_steady = False
        self._opened_at = self._clock()
        self.listeners = 0
        self.idle_since = self._clock()
        self.received = 0

    def take(self, arrivals: list[Arrival]) -> None:
        """Take in valid events from the subscription, in its order."""
        self.received += len(arrivals)
        self.reader.take(arrivals)

    def totals(self) -> Counter[str]:
        """What was counted since it was opened."""
        fanout = self.fanout
        return Counter(
            received=self.received,
            deliveries=fanout.deliveries,
            filtered=fanout.filtered,
            shed=fanout.shed.total(),
            sent_bytes=fanout.sent_bytes,
        )

    async def run(self) -> None:
        """Read the log whenever it is necessary, until cancelled.

        Raises:
            RedisRefused: Redis will not let us read.
        """
        await self.reader.run()

    # Who listens

    def join(self, listener: Listener) -> None:
        """Take a listener in; it waits until this channel is open, and until its position has been looked up."""
        self.listeners += 1
        if listener.connection.close_deadline is not None:
            return
        since = listener.since
        if self.reader.steady and (since is None or self.reader.can_place(since)):
            self._start(listener)
        else:
            if since is None:  # whatever comes from now on is promised, also what the subscription may miss
                listener.since = self.reader.at
            self._waiting[listener] = self.reader.looks

    def leave(self, listener: Listener) -> None:
        """Forget a listener, for good."""
        self.listeners -= 1
        self.idle_since = self._clock()
        self.mute(listener)

    def mute(self, listener: Listener) -> None:
        """No more events for this one."""
        self._waiting.pop(listener, None)
        self.fanout.leave(listener)

    @property
    def opening(self) -> bool:
        return not self._ever_steady and self._clock() - self._opened_at < _OPENING_S

    def _on_caught_up(self) -> None:
        self._ever_steady = self._ever_steady or self.reader.steady
        if self._waiting and self.reader.steady:
            if self.reader.at is None:  # nothing is stored: who waits must not miss what comes next
                while self._start_one():
                    pass
            else:
                self._pacer.add(self._start_one)

    def _start_one(self) -> bool:
        """Start one of those who wait; whether there are more."""
        if self._waiting and self.reader.steady:
            listener = next(iter(self._waiting))
            asked = self._waiting.pop(listener)
            since = listener.since
            if since is not None and self.reader.looked <= asked and not self.reader.can_place(since):
                self._waiting[listener] = asked  # until a look that was begun after it came
                return False
            self._start(listener)
        return bool(self._waiting) and self.reader.steady

    def _start(self, listener: Listener) -> None:
        if listener.since is None:
            if listener.connection.wants_control:
                position = self.fanout.position
                listener.connection.write(welcome_frame(self.name, position, self._beat_s, None))
            self.fanout.join(listener)
        else:
            self.resumption.begin(listener)
        if listener.connection.paused:
            self.fanout.fall_behind(listener)
        if listener in self.fanout.behind:
            listener.connection.catch_up()

    def feed(self, listener: Listener) -> bool:
        """Write the next piece to a listener that is behind; whether there is more that can be written at once.

        Raises:
            LookupError: It was too slow: what it has to get next is no longer in the ring.
        """
        if listener.awaits_page or listener not in self.fanout.behind:
            return False
        if listener.cursor is None:
            return self.resumption.step(listener)
        try:
            self.fanout.feed(listener)
        except LookupError:
            if not listener.resuming or listener.place is None:
                raise
            listener.cursor = None  # the ring has moved on while it read: back to the log
        return listener in self.fanout.behind

    def beat(self, listener: Listener) -> None:
        """Tell a listener up to where everything was given to it, held back by its filter, or told as a gap."""
        if listener in self._waiting or listener.since is not None or not self.reader.steady:
            return  # it has not been welcomed yet, or nobody knows whether everything has come
        if self.fanout.is_overtaken(listener):
            return  # it is about to be told, or closed
        position = self.fanout.place_of(listener)
        if self._beat[0] != position or not self._beat[1]:
            where = None if position is None else str(position)
            self._beat = (position, wire.control_frame("beat", self.name, position=where))
        listener.connection.write(self._beat[1])
