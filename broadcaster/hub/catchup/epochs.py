"""The order of a channel's positions across the restarts of Redis, and what is missing between two of them.

Pure arithmetic: the name of an epoch is the time at which it began, and orders it for ever. The
table of epochs (`Head`) only says where in the log each begins. Offsets count on from one epoch to the next, but a
Redis that came back with older data gives offsets again that another epoch had given already.

Epochs that an earlier version of the product has named are older than all others, and ordered by the table.
"""

from __future__ import annotations

import itertools

from broadcaster.core.position import Cause, Gap, Position, is_timed
from broadcaster.core.runtime import LIMITS

_UNKNOWN = (0, -1, "")
"""Sorts an epoch of an earlier version that is not listed before all others."""


class EpochOrder:
    """The epochs of one channel of which there are events, oldest first, each with its first offset.

    An epoch that is not among them has no events in the log: they have expired, or were in a memory that is gone.
    """

    def __init__(self, channel: str, epochs: tuple[Position, ...], known: int = LIMITS.known_epochs) -> None:
        self._channel = channel
        self._known = known
        self._epochs = epochs
        self._index = {epoch: index for index, (epoch, _) in enumerate(epochs)}

    def followed_by(self, epochs: tuple[Position, ...]) -> EpochOrder:
        """The order according to Redis, with those epochs in their place that only we remember, and have no time.

        A Redis that crashes twice has never known of the epoch between, if its data is older than that.
        """
        if all(is_timed(epoch) for epoch in self._index):
            return EpochOrder(self._channel, epochs, self._known)
        merged = list(epochs)
        for before, epoch in itertools.pairwise(self._epochs):
            names = [name for name, _ in merged]
            if epoch.epoch not in names and before.epoch in names and not is_timed(epoch.epoch):
                merged.insert(names.index(before.epoch) + 1, epoch)
        return EpochOrder(self._channel, tuple(merged[-self._known :]), self._known)

    def knows(self, epoch: str) -> bool:
        """Whether it is among them."""
        return epoch in self._index

    def is_after(self, one: Position, other: Position) -> bool:
        """Whether `one` comes later in the channel than `other`."""
        if one.epoch == other.epoch:
            return one.offset > other.offset
        mine, theirs = self._rank(one.epoch), self._rank(other.epoch)
        return mine > theirs or mine == theirs == _UNKNOWN

    def has_given(self, position: Position, head: Position) -> bool:
        """Whether a channel that stands at `head` can have given a position."""
        return position.epoch in self._index and not self.is_after(position, head)

    def next_offset(self, position: Position) -> int:
        """The lowest offset in the log that may be the one after `position`."""
        rank = self._rank(position.epoch)
        first_of_newer = next((first for epoch, first in self._epochs if self._rank(epoch) > rank), None)
        if first_of_newer is None:
            return position.offset + 1
        return min(position.offset + 1, first_of_newer) if position.epoch in self._index else first_of_newer

    def before(self, head: Position, events: int) -> Position:
        """The position so many events before `head`, or the first one of which there are events in the log."""
        offset = max(0, head.offset - events)
        epochs = [first for first in self._epochs if first.offset <= head.offset]
        if not epochs:
            return Position(head.epoch, offset)
        begun = next((first for first in reversed(epochs) if first.offset - 1 <= offset), epochs[0])
        return Position(begun.epoch, max(offset, begun.offset - 1))

    def gap_before(self, oldest: Position) -> Gap | None:
        """What there was before the oldest event that there is; since when it is missing cannot be told."""
        if oldest.offset <= 1:
            return None
        at = oldest._replace(offset=oldest.offset - 1)
        begun = next((first.offset for first in self._epochs if first.epoch == oldest.epoch), oldest.offset)
        if begun < oldest.offset:
            return Gap(self._channel, Cause.EXPIRED, oldest.epoch, None, at.offset, at)
        return Gap(self._channel, Cause.REDIS_RESTARTED, position=at)

    def gaps(self, position: Position, found: Position) -> list[Gap]:
        """What is missing when the event after `position` turns out to be `found`."""
        if position.epoch == found.epoch:
            return self._gone(found.epoch, position.offset + 1, found.offset - 1)
        gaps = []
        epoch, first = position.epoch, position.offset + 1
        mine, theirs = self._rank(position.epoch), self._rank(found.epoch)
        for next_epoch, next_first in self._epochs:
            if not mine < self._rank(next_epoch) <= theirs:
                continue
            continues_after = Position(next_epoch, next_first - 1)
            gaps.append(Gap(self._channel, Cause.REDIS_RESTARTED, epoch, first, None, continues_after))
            epoch, first = next_epoch, next_first
        if epoch != found.epoch:  # it is not in the table
            continues_after = Position(found.epoch, found.offset - 1)
            gaps.append(Gap(self._channel, Cause.REDIS_RESTARTED, epoch, first, None, continues_after))
        else:
            gaps += self._gone(epoch, first, found.offset - 1)
        return gaps

    def head_gaps(self, position: Position, head: Position) -> list[Gap]:
        """What is missing when after `position` there is nothing more, and the channel stands at `head`."""
        return self.gaps(position, Position(head.epoch, head.offset + 1))

    def _gone(self, epoch: str, first: int, last: int) -> list[Gap]:
        """What is missing within an epoch: it has expired, or was in a memory that is gone.

        Offsets count on, and the log loses the oldest first. So where a newer epoch begins with an offset of this
        one, or there are events of an older one and none of this, Redis has come back without it.
        """
        rank = self._rank(epoch)
        kept = min((begun - 1 for newer, begun in self._epochs if self._rank(newer) > rank), default=last)
        if epoch not in self._index and any(self._rank(older) < rank for older, _ in self._epochs):
            kept = first - 1
        ranges = ((Cause.EXPIRED, first, min(kept, last)), (Cause.REDIS_RESTARTED, max(kept + 1, first), last))
        return [
            Gap(self._channel, cause, epoch, begin, end, Position(epoch, end))
            for cause, begin, end in ranges
            if begin <= end
        ]

    def _rank(self, epoch: str) -> tuple[int, int, str]:
        """Of two epochs the older one has the lower rank."""
        return (1, 0, epoch) if is_timed(epoch) else (0, self._index.get(epoch, -1), "")
