"""Who is live on a channel, grouped by what they want: an event is matched once per group, not per listener."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Final

from broadcaster.hub.filters import EVERYTHING, Filter, Labels
from broadcaster.hub.listener import Listener

_KNOWN_LABELS: Final = 4096


class Audience:
    """All live listeners with the same filter: what one of them wants, all of them get."""

    __slots__ = ("filter", "live", "transports")

    def __init__(self, wanted: Filter) -> None:
        self.filter = wanted
        self.live: dict[Listener, None] = {}  # who came first is written first
        self.transports: list[asyncio.Transport] | None = None  # of the live ones; None when that has changed


class Audiences:
    """All live listeners of a channel.

    Attributes:
        everybody: Those without a filter.
    """

    def __init__(self) -> None:
        self.everybody = Audience(EVERYTHING)
        self._by_filter: dict[Filter, Audience] = {EVERYTHING: self.everybody}
        self._matching: dict[Labels, tuple[Audience, ...]] = {}

    def __len__(self) -> int:
        return len(self._by_filter)

    def __iter__(self) -> Iterator[Audience]:
        return iter(list(self._by_filter.values()))

    def join(self, listener: Listener) -> None:
        audience = self._by_filter.get(listener.filter)
        if audience is None:
            audience = self._by_filter[listener.filter] = Audience(listener.filter)
            self._matching.clear()
        listener.filter = audience.filter  # the same one for all of them
        audience.live[listener] = None
        audience.transports = None

    def leave(self, listener: Listener) -> bool:
        """Take a listener out; whether it was there."""
        audience = self._by_filter.get(listener.filter)
        if audience is None or listener not in audience.live:
            return False
        del audience.live[listener]
        audience.transports = None
        if not audience.live and audience is not self.everybody:
            del self._by_filter[listener.filter]
            self._matching.clear()
        return True

    def wanting(self, labels: Labels) -> tuple[Audience, ...]:
        """Whose filters let such an event through: asked once per distinct labels, not per event."""
        found = self._matching.get(labels)
        if found is None:
            if len(self._matching) >= _KNOWN_LABELS:
                self._matching.clear()
            found = tuple(audience for audience in self._by_filter.values() if audience.filter.wants(labels))
            self._matching[labels] = found
        return found
