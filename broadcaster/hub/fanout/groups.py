"""The live subscriptions of a channel, grouped by filter: an event is matched once per group."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from broadcaster.core.bounded import BoundedDict
from broadcaster.core.runtime import LIMITS, Limits
from broadcaster.hub.fanout.filters import EVERYTHING, Filter, Labels
from broadcaster.hub.fanout.subscription import Subscription


class FilterGroup:
    """All live subscriptions with the same filter: what one of them wants, all of them get."""

    __slots__ = ("filter", "live", "transports")

    def __init__(self, wanted: Filter) -> None:
        self.filter = wanted
        self.live: dict[Subscription, None] = {}  # the first to join is written first
        self.transports: list[asyncio.Transport] | None = None  # of the live ones; None when that has changed


class FilterGroups:
    """All live subscriptions of a channel.

    Attributes:
        unfiltered: The group of those without a filter; it always exists.
    """

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.unfiltered = FilterGroup(EVERYTHING)
        self._by_filter: dict[Filter, FilterGroup] = {EVERYTHING: self.unfiltered}
        self._matching = BoundedDict[Labels, tuple[FilterGroup, ...]](limits.known_labels)

    def __len__(self) -> int:
        return len(self._by_filter)

    def __iter__(self) -> Iterator[FilterGroup]:
        return iter(list(self._by_filter.values()))

    def __contains__(self, subscription: Subscription) -> bool:
        group = self._by_filter.get(subscription.filter)
        return group is not None and subscription in group.live

    def join(self, subscription: Subscription) -> None:
        group = self._by_filter.get(subscription.filter)
        if group is None:
            group = self._by_filter[subscription.filter] = FilterGroup(subscription.filter)
            self._matching.clear()
        subscription.filter = group.filter  # equal filters are one object
        group.live[subscription] = None
        group.transports = None

    def leave(self, subscription: Subscription) -> None:
        """Take a subscription out; does nothing if it is not live."""
        if subscription not in self:
            return
        group = self._by_filter[subscription.filter]
        del group.live[subscription]
        group.transports = None
        if not group.live and group is not self.unfiltered:
            del self._by_filter[subscription.filter]
            self._matching.clear()

    def matching(self, labels: Labels) -> tuple[FilterGroup, ...]:
        """The groups whose filter such an event passes: computed once per distinct labels, not per event."""
        found = self._matching.get(labels)
        if found is None:
            found = tuple(group for group in self._by_filter.values() if group.filter.wants(labels))
            self._matching[labels] = found
        return found
