"""A connection's subscription to one channel, and the order in which its channels are fed."""

from __future__ import annotations

from collections.abc import Sequence

from broadcaster.core.position import Beginning
from broadcaster.hub.channels.channel import Channel
from broadcaster.hub.fanout.filters import Filter
from broadcaster.hub.fanout.subscription import Sink, Subscription


class Membership(Subscription):
    """A subscription of a connection, and the channel that it is of."""

    __slots__ = ("channel",)

    def __init__(self, connection: Sink, channel: Channel, wanted: Filter, since: Beginning) -> None:
        super().__init__(connection, wanted, since)
        self.channel = channel


def by_priority(memberships: Sequence[Membership]) -> tuple[Membership, ...]:
    """That of the channel with the highest priority first; equal ones as they are."""
    return tuple(sorted(memberships, key=lambda each: each.channel.rank))


def after_feeding(fed: Membership, memberships: Sequence[Membership], now: float) -> tuple[Membership, ...]:
    """The order for the next piece, now that one has had its own: those of its priority go first.

    None of the others is slow because it has waited for this one.
    """
    others = [each for each in memberships if each is not fed]
    for each in others:
        if each.is_behind:
            each.behind_since = now
    return by_priority([*others, fed])
