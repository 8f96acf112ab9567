"""What a slow listener is not given where the policy is to drop the oldest: the least severe first.

How far behind a listener may be with an event depends on the event's severity. There is no other state: what is
shed follows from the cursor and the clock, and every range is told as a gap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from broadcaster.hub.lag import Lag
from broadcaster.hub.ring import Entry
from broadcaster.position import Cause, Gap, Position

SHARE: Final = {"info": 0.5, "warning": 0.75, "critical": 1.0}
"""Of what is allowed (`hub.behind_max_*`): how far behind an event of a severity may be before it is shed."""


def shed(
    entries: Iterable[tuple[Entry, Lag]],
    *,
    channel: str,
    epochs: list[str],
    most: Lag,
) -> tuple[list[Entry | Gap], Counter[str]]:
    """Take out of ring entries what is too far behind, and put gaps in its place.

    Args:
        entries: What the listener wants of what it would be given next, each with how far it is behind there.
        channel: For the gaps.
        epochs: By `era`, the first one being 1.
        most: How far behind a critical event may be.

    Returns:
        Entries and gaps in order, and how many events were shed, by severity.
    """
    kept: list[Entry | Gap] = []
    counts: Counter[str] = Counter()
    for entry, lag in entries:
        if entry.labels is None or lag.share_of(most) <= SHARE[entry.labels.severity]:
            kept.append(entry)
            continue
        counts[entry.labels.severity] += 1
        last = kept[-1] if kept else None
        epoch = epochs[entry.era - 1] if entry.stored else None
        if not isinstance(last, Gap) or last.epoch != epoch:
            kept.append(_gap(channel, epoch, entry.offset, entry.offset))
        elif last.first is not None:
            kept[-1] = _gap(channel, epoch, last.first, entry.offset)
    return kept, counts


def overtaken(channel: str, stood_at: Position | None, goes_on_at: Position | None) -> Gap:
    """The ring has moved on past a listener: what was between its place and the ring's oldest entry is shed."""
    if stood_at is None or goes_on_at is None or stood_at == goes_on_at:  # none of them had a place
        return Gap(channel, Cause.SHED, position=goes_on_at)
    last = goes_on_at.offset if stood_at.epoch == goes_on_at.epoch else None
    return Gap(channel, Cause.SHED, stood_at.epoch, stood_at.offset + 1, last, goes_on_at)


def _gap(channel: str, epoch: str | None, first: int, last: int) -> Gap:
    if epoch is None:  # an event that was only PUBLISHed has no place that could be told
        return Gap(channel, Cause.SHED)
    return Gap(channel, Cause.SHED, epoch, first, last, Position(epoch, last))
