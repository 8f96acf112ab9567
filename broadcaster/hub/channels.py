"""All channels of the hub: which may be asked for, which are open, and for how long."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from fnmatch import fnmatchcase
from typing import Any, Final

from broadcaster.bus import Subscription
from broadcaster.hub.channel import Channel
from broadcaster.hub.log import EventLog
from broadcaster.hub.pacer import Pacer
from broadcaster.hub.pages import Pages
from broadcaster.settings import Settings

OWN: Final = "broadcaster.hub."
"""Channels of hubs themselves begin like this; nobody else can subscribe to them."""

log = logging.getLogger("broadcaster.hub")

Spawn = Callable[[Coroutine[Any, Any, None], str], "asyncio.Task[None]"]


class Channels:
    """The open channels by name: the default one always, others while somebody listens, and a while longer.

    Attributes:
        open: The channels.
        by_key: The same, by their names as Redis says them.
        default: The one that is always open.
    """

    def __init__(
        self,
        settings: Settings,
        stored: tuple[EventLog, Pages] | None,
        pacer: Pacer,
        spawn: Spawn,
    ) -> None:
        """Prepare; nothing is open before `begin`.

        Args:
            settings: Of the hub.
            stored: Where events are stored; None when they are not.
            pacer: For work that may wait.
            spawn: Runs a task until it is cancelled, or ends the hub with it.
        """
        self._settings = settings
        self._stored = stored
        self._pacer = pacer
        self._spawn = spawn
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._clock = asyncio.get_running_loop().time
        self._subscription: Subscription | None = None
        self._past: Counter[str] = Counter()
        self.open: dict[str, Channel] = {}
        self.by_key: dict[bytes, Channel] = {}
        self.default = settings.event.channel

    def begin(self, subscription: Subscription) -> None:
        """Open the default channel; from now on channels can be joined."""
        self._subscription = subscription
        self._open(self.default)

    def is_allowed(self, name: str) -> bool:
        """Whether a subscriber may ask for a channel."""
        if name.startswith(OWN):
            return False
        return name == self.default or any(fnmatchcase(name, pattern) for pattern in self._settings.channels.allow)

    def has_room_for(self, *names: str) -> bool:
        """Whether all of these channels can be open at the same time."""
        new = sum(name not in self.open for name in names)
        return not new or len(self.open) + new <= self._settings.channels.max_open

    def rank(self, name: str) -> int:
        """Which channel goes first: the lowest."""
        patterns = self._settings.channels.priority
        return next((n for n, pattern in enumerate(patterns) if fnmatchcase(name, pattern)), len(patterns))

    def rank_of(self, key: bytes) -> int:
        """The same for a name as Redis says it; what is no open channel goes last."""
        return self.by_key[key].fanout.rank if key in self.by_key else 1 + len(self._settings.channels.priority)

    def get(self, name: str) -> Channel:
        """A channel, opened if it is not open."""
        return self.open.get(name) or self._open(name)

    def _open(self, name: str) -> Channel:
        assert self._subscription is not None
        sheds = any(fnmatchcase(name, pattern) for pattern in self._settings.channels.drop_oldest)
        channel = Channel(name, self.rank(name), self._settings, self._stored, self._pacer, sheds=sheds)
        self.open[name] = self.by_key[name.encode()] = channel
        self._tasks[name] = self._spawn(channel.run(), f"channel {name}")
        self._subscription.hold(name)
        return channel

    def close_idle(self) -> None:
        """Close the channels that nobody has listened to for long enough."""
        before = self._clock() - self._settings.channels.linger_s
        for name, channel in list(self.open.items()):
            if not channel.listeners and channel.idle_since < before and name != self.default:
                assert self._subscription is not None
                self._subscription.release(name)
                self._past += channel.totals()
                del self.open[name], self.by_key[name.encode()]
                self._tasks.pop(name).cancel()

    def totals(self) -> Counter[str]:
        """What was counted since the hub began, also by channels that are closed now."""
        return sum((channel.totals() for channel in self.open.values()), self._past)

    def on_confirmed(self, name: str) -> None:
        if name in self.open:
            log.info("redis: subscribed to %s", name)
            self.open[name].reader.confirm()

    def on_lost(self, name: str) -> None:
        if name in self.open:
            self.open[name].reader.interrupt()
