"""The slow-consumer policy of a channel, all of it: warn, then shed the oldest events, or close.

How far behind a subscription is, and what follows from it, is arithmetic on its cursor and the clock; there is no
other state. Where the policy is to drop the oldest, the least severe events go first, and each range that is shed
is announced as a gap in its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final, NamedTuple

from broadcaster import wire
from broadcaster.core.position import Cause, Gap, Position
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.hub.fanout.ring import Entry, Ring
from broadcaster.hub.fanout.subscription import State, Subscription
from broadcaster.settings import HubTable

SHARE: Final = {"info": 0.5, "warning": 0.75, "critical": 1.0}
"""Of what is allowed (`hub.behind_max_*`): how far behind an event of a severity may be before it is shed."""


class Lag(NamedTuple):
    """How far a subscription is behind, or how far it may be.

    Attributes:
        ms: Age of what it waits for, in milliseconds.
        events: Events that it has not been given.
        bytes: Bytes of their frames.
    """

    ms: float
    events: float
    bytes: float

    @classmethod
    def allowed(cls, settings: HubTable) -> Lag:
        """The limits `hub.behind_max_*`."""
        return cls(settings.behind_max_ms, settings.behind_max_events, settings.behind_max_bytes)

    def share_of(self, allowed: Lag) -> float:
        """How much of the limits is used up, by whichever of the three is worst: above 1 it is too much."""
        return max(self.ms / allowed.ms, self.events / allowed.events, self.bytes / allowed.bytes)

    def __str__(self) -> str:
        return f"{self.events:.0f} events, {self.bytes:.0f} bytes, {self.ms:.0f} ms behind"


class SlowConsumers:
    """What becomes of subscriptions whose socket does not keep up.

    Attributes:
        shed: Events that were shed, each counted once per subscription: by severity, or as `overtaken` when they
            had left the ring buffer before they could be looked at.
        gaps: Gaps announced for them.
    """

    def __init__(
        self,
        channel: str,
        ring: Ring,
        settings: HubTable,
        *,
        drops_oldest: bool = False,
        runtime: Runtime = RUNTIME,
    ) -> None:
        """Prepare the policy of one channel.

        Args:
            channel: Its name.
            ring: Its ring buffer.
            settings: How far behind a subscription may be.
            drops_oldest: Whether a slow consumer loses the oldest events; else it is closed.
            runtime: Time, and when a `broadcaster.v1` client is warned.
        """
        self._channel = channel
        self._ring = ring
        self._allowed = Lag.allowed(settings)
        self._idle_s = settings.ping_interval_s
        self._drops_oldest = drops_oldest
        self._limits = runtime.limits
        self._clock = runtime.clock
        self.shed: Counter[str] = Counter()
        self.gaps = 0

    # How slow

    def sheds_for(self, subscription: Subscription) -> bool:
        """Whether it loses the oldest events: only one that can be told, and that has been live."""
        return self._drops_oldest and subscription.sink.wants_control and not subscription.is_replaying

    def is_overtaken(self, subscription: Subscription) -> bool:
        """Whether what it has to get next has left the ring buffer."""
        return subscription.cursor is not None and subscription.cursor < self._ring.tail

    def lag_of(self, subscription: Subscription) -> Lag:
        """How far it is behind; while it replays, the milliseconds are those since its last progress."""
        ring, cursor = self._ring, subscription.cursor
        if cursor is None:  # it reads the log
            head, position = ring.position, subscription.position
            same = head is not None and position is not None and head.epoch == position.epoch
            events = head.offset - position.offset if same else 0  # type: ignore[union-attr]
            return Lag(self._ms_since(subscription.behind_since), events, 0)
        if cursor >= ring.head:  # it has been given everything, and its socket still holds some of it
            return Lag(self._ms_since(subscription.behind_since), 0, 0)
        came_at = ring.came_at(cursor)
        since = came_at if self.sheds_for(subscription) else max(subscription.behind_since, came_at)
        return Lag(self._ms_since(since), ring.head - cursor, ring.bytes_from(cursor))

    def _ms_since(self, then: float) -> float:
        return (self._clock.loop_s() - then) * 1000

    # What follows

    def check(self, subscription: Subscription, blocked_s: float, blocked_in_all_s: float) -> None:
        """Once per tick, for one that is behind and whose socket is full: warn it, or close it.

        Args:
            subscription: Which one.
            blocked_s: Seconds for which its socket has been full, and its client has read nothing.
            blocked_in_all_s: The same and before, since it fell behind. The rest of its lag is not the client's:
                it was waiting for its turn in the hub.
        """
        if not subscription.is_behind or subscription.state is State.AWAITING_PAGE:
            return
        lag = self.lag_of(subscription)
        if subscription.is_replaying:  # it is held to making progress, however much there is for it
            lag = Lag(min(lag.ms, blocked_s * 1000), 0, 0)
        else:
            lag = lag._replace(ms=min(lag.ms, blocked_in_all_s * 1000))
        share = lag.share_of(self._allowed)
        if share > self._limits.warn_at:
            self.warn(subscription)
        if self.sheds_for(subscription):
            if blocked_s > self._idle_s:
                subscription.sink.close(wire.CloseCode.PING_TIMEOUT, "nothing is read")
        elif share > 1 or (self.is_overtaken(subscription) and not subscription.is_replaying):
            self.close(subscription)

    def warn_before_shedding(self, subscription: Subscription) -> None:
        """Warn a subscription that is about to lose events."""
        if (
            self.sheds_for(subscription)
            and self.lag_of(subscription).share_of(self._allowed) > self._limits.warn_at
        ):
            self.warn(subscription)

    def warn(self, subscription: Subscription) -> None:
        """Tell a `broadcaster.v1` client that it is too slow, before anything happens to it; once a second."""
        now = self._clock.loop_s()
        welcomed = subscription.since is None
        if (
            subscription.sink.wants_control
            and welcomed
            and now - subscription.warned_at > self._limits.warn_every_s
        ):
            subscription.warned_at = now
            lag = self.lag_of(subscription)
            subscription.sink.tell(wire.lag_frame(self._channel, lag.ms, lag.events, lag.bytes))

    def close(self, subscription: Subscription) -> None:
        """Close it with 4008; the reason says by how much it was too slow."""
        self.warn(subscription)
        subscription.sink.close(wire.CloseCode.SLOW, f"too slow: {self.lag_of(subscription)}")

    def skip_overtaken(self, subscription: Subscription) -> None:
        """Shed what has left the ring buffer before a subscription could read it."""
        ring, cursor = self._ring, subscription.cursor
        assert cursor is not None
        gaps = ring.gaps_from(cursor) - ring.gaps_from(ring.tail)
        self.shed["overtaken"] += ring.tail - cursor - gaps
        subscription.cursor = ring.tail
        self.gaps += 1
        gap = overtaken(self._channel, subscription.position, ring.position_at(ring.tail))
        subscription.sink.tell(wire.gap_frame(gap))

    def select(self, entries: Iterable[tuple[int, Entry]]) -> list[Entry]:
        """Of numbered ring entries what is delivered to a subscription that sheds: the others become gaps."""
        lagging = [(entry, self._lag_at(number, entry)) for number, entry in entries]
        kept, counts = shed(lagging, channel=self._channel, allowed=self._allowed)
        self.shed += counts
        self.gaps += sum(entry.gap is not None and entry.gap.cause == Cause.SHED for entry in kept)
        return kept

    def _lag_at(self, number: int, entry: Entry) -> Lag:
        ring = self._ring
        return Lag(self._ms_since(entry.came_at), ring.head - number, ring.bytes_from(number))


def shed(entries: Iterable[tuple[Entry, Lag]], *, channel: str, allowed: Lag) -> tuple[list[Entry], Counter[str]]:
    """Take out of ring entries what is too far behind, and put gaps in its place.

    Args:
        entries: What a subscription would be given next, each with how far it is behind there.
        channel: For the gaps.
        allowed: How far behind a critical event may be.

    Returns:
        Entries in order, gaps among them, and how many events were shed, by severity.
    """
    kept: list[Entry] = []
    counts: Counter[str] = Counter()
    for entry, lag in entries:
        if entry.labels is None or lag.share_of(allowed) <= SHARE[entry.labels.severity]:
            kept.append(entry)
            continue
        counts[entry.labels.severity] += 1
        last = kept[-1].gap if kept and kept[-1].came_at < 0 else None
        own = entry.position if entry.stored else None
        if last is None or last.epoch != (own and own.epoch):
            kept.append(gap_entry(_gap(channel, own, own)))
        elif last.first is not None and own is not None:
            kept[-1] = gap_entry(_gap(channel, own._replace(offset=last.first), own))
    return kept, counts


def overtaken(channel: str, stood_at: Position | None, continues_at: Position | None) -> Gap:
    """The ring has moved on past a reader: what was between its position and the oldest entry is shed."""
    if stood_at is None or continues_at is None or stood_at == continues_at:  # none of it had a position
        return Gap(channel, Cause.SHED, position=continues_at)
    last = continues_at.offset if stood_at.epoch == continues_at.epoch else None
    return Gap(channel, Cause.SHED, stood_at.epoch, stood_at.offset + 1, last, continues_at)


def gap_entry(gap: Gap) -> Entry:
    """A gap among the entries that one subscription is given; it is in no ring, and came at no time."""
    return Entry(wire.gap_frame(gap), None, gap.position, 0, -1.0, gap=gap)


def _gap(channel: str, first: Position | None, last: Position | None) -> Gap:
    if first is None or last is None:  # an event that was only PUBLISHed has no position that could be told
        return Gap(channel, Cause.SHED)
    return Gap(channel, Cause.SHED, first.epoch, first.offset, last.offset, last)
