"""The live subscriptions of a channel by filter and format: an event is matched and framed once per audience."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from broadcaster.core.bounded import BoundedDict
from broadcaster.core.runtime import LIMITS, Limits
from broadcaster.hub.fanout.filters import EVERYTHING, Filter, Labels
from broadcaster.hub.fanout.format import PLAIN, Format
from broadcaster.hub.fanout.subscription import Subscription


class Audience:
    """All live subscriptions with the same filter and format: what one of them wants, all of them get."""

    __slots__ = ("filter", "format", "live", "transports")

    def __init__(self, wanted: Filter, form: Format = PLAIN) -> None:
        self.filter = wanted
        self.format = form
        self.live: dict[Subscription, None] = {}  # the first to join is written first
        self.transports: list[asyncio.Transport] | None = None  # of the live ones; None when that has changed


class Audiences:
    """All live subscriptions of a channel.

    Attributes:
        unfiltered: The plain clients without a filter; this audience always exists.
    """

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.unfiltered = Audience(EVERYTHING)
        # The plain ones come first: they do not wait until another format is made.
        self._by_format: dict[Format, dict[Filter, Audience]] = {PLAIN: {EVERYTHING: self.unfiltered}}
        self._count = 1
        self._matching = BoundedDict[Labels, tuple[Audience, ...]](limits.known_labels)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Audience]:
        return iter([audience for audiences in self._by_format.values() for audience in audiences.values()])

    def __contains__(self, subscription: Subscription) -> bool:
        audience = self._by_format.get(subscription.sink.format, {}).get(subscription.filter)
        return audience is not None and subscription in audience.live

    def join(self, subscription: Subscription) -> None:
        audiences = self._by_format.setdefault(subscription.sink.format, {})
        audience = audiences.get(subscription.filter)
        if audience is None:
            audience = Audience(subscription.filter, subscription.sink.format)
            audiences[subscription.filter] = audience
            self._count += 1
            self._matching.clear()
        subscription.filter = audience.filter  # equal filters are one object
        audience.live[subscription] = None
        audience.transports = None

    def leave(self, subscription: Subscription) -> None:
        """Take a subscription out; does nothing if it is not live."""
        if subscription not in self:
            return
        audiences = self._by_format[subscription.sink.format]
        audience = audiences[subscription.filter]
        del audience.live[subscription]
        audience.transports = None
        if not audience.live and audience is not self.unfiltered:
            del audiences[subscription.filter]
            self._count -= 1
            self._matching.clear()

    def matching(self, labels: Labels) -> tuple[Audience, ...]:
        """The audiences that want such an event: computed once per distinct labels, not per event."""
        found = self._matching.get(labels)
        if found is None:
            found = tuple(audience for audience in self if audience.filter.wants(labels))
            self._matching[labels] = found
        return found
