"""The order of a channel's positions across the restarts of Redis, and what is missing between two of them.

Pure arithmetic on the table of epochs (`Head`): offsets count on from one epoch to the next, but a
Redis that came back with older data gives offsets again that another epoch had given already.
"""

from __future__ import annotations

import itertools

from broadcaster.core.position import Cause, Gap, Position
from broadcaster.core.runtime import LIMITS


class EpochOrder:
    """The epochs of one channel, oldest first, each with its first offset.

    An epoch that is not among them is older than all of them: a reader that stands in it has been away for long,
    or stood in a Redis whose memory is gone.
    """

    def __init__(self, channel: str, epochs: tuple[Position, ...], known: int = LIMITS.known_epochs) -> None:
        self._channel = channel
        self._known = known
        self._epochs = epochs
        self._index = {epoch: index for index, (epoch, _) in enumerate(epochs)}

    def followed_by(self, epochs: tuple[Position, ...]) -> EpochOrder:
        """The order according to Redis, with those epochs in their place that only we remember.

        A Redis that crashes twice has never known of the epoch between, if its data is older than that.
        """
        merged = list(epochs)
        for before, epoch in itertools.pairwise(self._epochs):
            names = [name for name, _ in merged]
            if epoch.epoch not in names and before.epoch in names:
                merged.insert(names.index(before.epoch) + 1, epoch)
        return EpochOrder(self._channel, tuple(merged[-self._known :]), self._known)

    def knows(self, epoch: str) -> bool:
        return epoch in self._index

    def is_after(self, one: Position, other: Position) -> bool:
        """Whether `one` comes later in the channel than `other`."""
        if one.epoch == other.epoch:
            return one.offset > other.offset
        mine, theirs = self._rank(one), self._rank(other)
        return mine > theirs or mine == theirs == -1

    def has_given(self, position: Position, head: Position) -> bool:
        """Whether a channel that stands at `head` can have given a position."""
        return position.epoch in self._index and not self.is_after(position, head)

    def next_offset(self, position: Position) -> int:
        """The lowest offset in the log that may be the one after `position`."""
        rank = self._rank(position)
        if rank + 1 >= len(self._epochs):
            return position.offset + 1
        first_of_next = self._epochs[rank + 1].offset
        return min(position.offset + 1, first_of_next) if rank >= 0 else 0

    def gaps(self, position: Position, found: Position) -> list[Gap]:
        """What is missing when the event after `position` turns out to be `found`."""
        if position.epoch == found.epoch:
            if found.offset <= position.offset + 1:
                return []
            return [self._expired(found.epoch, position.offset + 1, found.offset - 1)]
        gaps = []
        epoch, first = position.epoch, position.offset + 1
        for next_epoch, next_first in self._epochs[self._rank(position) + 1 : self._rank(found) + 1]:
            continues_after = Position(next_epoch, next_first - 1)
            gaps.append(Gap(self._channel, Cause.REDIS_RESTARTED, epoch, first, None, continues_after))
            epoch, first = next_epoch, next_first
        if epoch == found.epoch and found.offset > first:
            gaps.append(self._expired(epoch, first, found.offset - 1))
        return gaps

    def head_gaps(self, position: Position, head: Position) -> list[Gap]:
        """What is missing when after `position` there is nothing more, and the channel stands at `head`."""
        return self.gaps(position, Position(head.epoch, head.offset + 1))

    def _expired(self, epoch: str, first: int, last: int) -> Gap:
        return Gap(self._channel, Cause.EXPIRED, epoch, first, last, Position(epoch, last))

    def _rank(self, position: Position) -> int:
        return self._index.get(position.epoch, -1)
