"""All channels of the hub: which may be subscribed to, which are open, and for how long."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from fnmatch import fnmatchcase
from typing import Any

from broadcaster.core.logs import ThrottledLog
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.core.subscription import HUB_CHANNELS
from broadcaster.hub.broker.broker import Broker
from broadcaster.hub.catchup.page_cache import PageCache
from broadcaster.hub.channels.channel import Channel
from broadcaster.hub.fanout.scheduler import Scheduler
from broadcaster.hub.fanout.subscription import Sink
from broadcaster.hub.fanout.trace import Trace
from broadcaster.settings import Settings

log = logging.getLogger("broadcaster.hub")

Work = Callable[[], Coroutine[Any, Any, None]]
Spawn = Callable[[Work, str], "asyncio.Task[None]"]
"""Runs a named task until it is cancelled, or ends the hub with it."""


class Channels:
    """The open channels by name: the default one always, others while they have subscriptions, and a while longer.

    Attributes:
        open: The channels.
        by_key: The same, by their names as Redis says them.
        default: Name of the one that is always open.
        trace: The last events of all of them.
    """

    def __init__(
        self,
        settings: Settings,
        broker: Broker,
        pages: PageCache,
        scheduler: Scheduler,
        spawn: Spawn,
        unsettled: Sequence[Sink] = (),
        runtime: Runtime = RUNTIME,
    ) -> None:
        """Open the default channel.

        Args:
            settings: Of the hub.
            broker: Where channels are subscribed to.
            pages: Of the log, if events are stored.
            scheduler: For work that may wait.
            spawn: See `Spawn`.
            unsettled: See `Fanout`.
            runtime: Time, chance and limits.
        """
        self._settings = settings
        self._broker = broker
        self._pages = pages
        self._scheduler = scheduler
        self._spawn = spawn
        self._unsettled = unsettled
        self._runtime = runtime
        self._log = ThrottledLog(log, clock=runtime.clock)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closed: Counter[str] = Counter()  # totals of channels that were closed
        self.open: dict[str, Channel] = {}
        self.by_key: dict[bytes, Channel] = {}
        self.default = settings.event.channel
        # What is not stored has no position, at which it could be found in the trace.
        self.trace = Trace(settings.hub.trace_events if settings.history.enabled else 0, runtime.clock)
        self._open(self.default)

    def is_allowed(self, name: str) -> bool:
        """Whether a client may subscribe to a channel."""
        return not name.startswith(HUB_CHANNELS) and self._settings.allows(name)

    def is_unavailable(self, name: str) -> bool:
        """Whether Redis refuses a channel to the hub now."""
        return name in self.open and self.open[name].refusal is not None

    def has_room_for(self, *names: str) -> bool:
        """Whether all of these channels can be open at the same time."""
        new = self._new(names)
        return not new or new <= self._free

    def may_open(self, address: str, *names: str) -> bool:
        """Whether these, opened for an address, do not take more than its share; those of others it may join."""
        new = self._new(names)
        if not new:
            return True
        held = sum(channel.opened_by == address for channel in self._listened_to)
        return held + new <= self._settings.channels.max_per_address

    def _new(self, names: Sequence[str]) -> int:
        """How many of them take room: nobody listens to them yet, and none is the default one."""
        return sum(name != self.default and not self._has_listeners(name) for name in names)

    def _has_listeners(self, name: str) -> bool:
        return name in self.open and self.open[name].listeners > 0

    @property
    def _listened_to(self) -> list[Channel]:
        """The channels with subscriptions; the others are closed as soon as their room is needed."""
        return [channel for channel in self.open.values() if channel.listeners and channel.name != self.default]

    @property
    def _free(self) -> int:
        return self._settings.channels.max_open - 1 - len(self._listened_to)

    def rank(self, name: str) -> int:
        """Which channel goes first: the lowest."""
        patterns = self._settings.channels.priority
        return next((n for n, pattern in enumerate(patterns) if fnmatchcase(name, pattern)), len(patterns))

    def rank_of(self, key: bytes) -> int:
        """The same for a name as Redis says it; what is no open channel goes last."""
        return self.by_key[key].rank if key in self.by_key else 1 + len(self._settings.channels.priority)

    def get(self, *names: str, address: str = "") -> list[Channel]:
        """Channels, opened if they are not open; those that nobody listens to this address holds from now on.

        When there are too many, the one closes to which nobody has listened for the longest time, none of these.
        """
        for name in names:
            if name not in self.open:
                self._make_room(names)
                self._open(name)
            if not self.open[name].listeners:
                self.open[name].opened_by = address
        return [self.open[name] for name in names]

    def _make_room(self, wanted: Sequence[str]) -> None:
        """Close a channel without listeners if there are too many; one that is `wanted` will have some."""
        idle = [channel for channel in self.open.values() if self._is_idle(channel) and channel.name not in wanted]
        if idle and len(self.open) >= self._settings.channels.max_open:
            self._close(min(idle, key=lambda channel: channel.idle_since))

    def _is_idle(self, channel: Channel) -> bool:
        return not channel.listeners and channel.name != self.default

    def _open(self, name: str) -> None:
        channel = Channel(
            name,
            self._settings,
            self._pages,
            self._scheduler,
            rank=self.rank(name),
            drops_oldest=any(fnmatchcase(name, pattern) for pattern in self._settings.channels.drop_oldest),
            unsettled=self._unsettled,
            trace=self.trace,
            runtime=self._runtime,
        )
        self.open[name] = self.by_key[name.encode()] = channel
        self._tasks[name] = self._spawn(channel.run, f"channel {name}")
        self._broker.subscribe(name)

    def close_idle(self) -> None:
        """Close the channels that have had no subscription for long enough."""
        before = self._runtime.clock.loop_s() - self._settings.channels.linger_s
        for channel in list(self.open.values()):
            if self._is_idle(channel) and channel.idle_since < before:
                self._close(channel)

    def _close(self, channel: Channel) -> None:
        name = channel.name
        self._broker.unsubscribe(name)
        self._closed.update(channel.totals())
        del self.open[name], self.by_key[name.encode()]
        self._tasks.pop(name).cancel()

    def end_unavailable(self) -> None:
        """Close the clients of channels that Redis has refused to the hub for some time."""
        for channel in self.open.values():
            channel.end_unavailable()

    def totals(self) -> Counter[str]:
        """What was counted since the hub began, also by channels that are closed now."""
        totals = self._closed.copy()
        for channel in self.open.values():
            totals.update(channel.totals())
        return totals

    def on_confirmed(self, name: str) -> None:
        if name in self.open:
            self._log.log(logging.INFO, name, "redis: subscribed to %s", name)
            self.open[name].sequencer.confirm()

    def on_lost(self, name: str) -> None:
        if name in self.open:
            self.open[name].sequencer.interrupt()
            self.open[name].suspect(f"the subscription to {name} is lost")
