"""The fan-out of a channel: `broadcast` writes events to every live subscription and waits for none.

A subscription is *live* — it is up to date, and the next frame is written to it at once — or it is *behind*: its
socket was full (backpressure), or it resumes from an earlier position; it holds a cursor into the shared ring
buffer and is fed from there as fast as its client reads. No subscription has a queue of its own.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from broadcaster import wire
from broadcaster.core.position import Gap, Position
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.hub.fanout.audiences import Audience, Audiences
from broadcaster.hub.fanout.format import PLAIN
from broadcaster.hub.fanout.message import Message, framed
from broadcaster.hub.fanout.ring import Entry, Ring
from broadcaster.hub.fanout.slow import SlowConsumers
from broadcaster.hub.fanout.subscription import Sink, State, Subscription
from broadcaster.hub.fanout.trace import BatchTrace, Trace
from broadcaster.settings import HubTable

_Batch = tuple[Sequence[Message], int, Position | None, BatchTrace]
"""The events of a broadcast, the number of the first of them, where the channel stood before it, and its trace."""


class Fanout:
    """One channel: its ring buffer and its subscriptions.

    Attributes:
        channel: Its name.
        ring: The last frames; knows where the channel stands.
        slow: The slow-consumer policy.
        behind: Subscriptions that are fed from the ring or the log.
        deliveries: Events written to subscriptions, each counted once per subscription; what a connection that has
            ended did not take does not count.
        filtered: Events held back by filters, each counted once per subscription.
        sent_bytes: Bytes of the deliveries.
        gaps: Gaps announced, by cause, each counted once per channel.
    """

    def __init__(
        self,
        channel: str,
        settings: HubTable,
        *,
        drops_oldest: bool = False,
        unsettled: Sequence[Sink] = (),
        trace: Trace | None = None,
        runtime: Runtime = RUNTIME,
    ) -> None:
        """Prepare a channel without subscriptions.

        Args:
            channel: Its name.
            settings: Bytes of the ring, and how far behind a subscription may be.
            drops_oldest: Whether a slow consumer loses the oldest events; else it is closed.
            unsettled: Sinks that have stopped being writable and are not settled yet. It is read after each
                piece: subscriptions leave the live set between two writes, never inside one.
            trace: Of the hub; None: nothing is traced.
            runtime: Time and limits.
        """
        self.channel = channel
        self.ring = Ring(settings.ring_bytes, runtime.limits)
        self.slow = SlowConsumers(channel, self.ring, settings, drops_oldest=drops_oldest, runtime=runtime)
        self.behind: set[Subscription] = set()
        self.deliveries = 0
        self.filtered = 0
        self.sent_bytes = 0
        self.gaps: Counter[str] = Counter()
        self._audiences = Audiences(runtime.limits)
        self._unsettled = unsettled
        self._write_bytes = runtime.limits.write_bytes
        self._clock = runtime.clock
        self._trace = trace or Trace(0)

    @property
    def position(self) -> Position | None:
        """Where live subscriptions stand; None before it is known, or when events are not stored."""
        return self.ring.position

    # Subscriptions come, change and go

    def join(self, subscription: Subscription) -> None:
        """Make a subscription live from the next frame on."""
        subscription.cursor = subscription.position = None
        self._enter(subscription, State.LIVE)
        self._audiences.join(subscription)

    def join_replaying(self, subscription: Subscription, position: Position) -> None:
        """Take in a subscription that begins after an earlier position; it is fed by calls of `feed`."""
        subscription.position = position
        subscription.cursor = None
        subscription.behind_since = self._clock.loop_s()
        self._enter(subscription, State.REPLAYING)

    def fall_behind(self, subscription: Subscription) -> None:
        """The socket of a subscription is full: if it is live, it is fed from the ring buffer from now on."""
        if subscription.state is State.LIVE:
            self._fall_behind(subscription, self.ring.head, self.ring.position)

    def leave(self, subscription: Subscription) -> None:
        """Deliver nothing more to a subscription; does nothing the second time."""
        self._audiences.leave(subscription)
        self._enter(subscription, State.CLOSED)

    def end(self, subscription: Subscription, code: wire.CloseCode, reason: str) -> None:
        """Deliver nothing more to a subscription, and close its client in its turn."""
        self.leave(subscription)
        subscription.sink.close_in_turn(code, reason)

    def end_for(self, gap: Gap, subscription: Subscription) -> None:
        """End a subscription whose plain client cannot be told of a gap in a frame: it gets nothing after it."""
        known = "" if gap.first is None else f", from {gap.epoch}-{gap.first}"
        self.end(subscription, wire.CloseCode.GAP, f"events of {gap.channel} may be missing: {gap.cause}{known}")

    def end_unavailable(self, subscription: Subscription, why: str) -> None:
        """End a subscription because the hub cannot serve its channel."""
        reason = f"the channel {self.channel} cannot be served: {why}"
        self.end(subscription, wire.CloseCode.UNAVAILABLE, reason)

    def subscriptions(self) -> list[Subscription]:
        """All that are live or behind."""
        return [*itertools.chain.from_iterable(audience.live for audience in self._audiences), *self.behind]

    def _fall_behind(self, subscription: Subscription, cursor: int, position: Position | None) -> None:
        self._audiences.leave(subscription)
        subscription.cursor = cursor
        subscription.position = position if self.slow.sheds_for(subscription) else None
        subscription.behind_since = self._clock.loop_s()
        self._enter(subscription, State.BEHIND)

    def _enter(self, subscription: Subscription, state: State) -> None:
        subscription.state = state
        if subscription.is_behind:
            self.behind.add(subscription)
        else:
            self.behind.discard(subscription)

    # Live

    def broadcast(self, messages: Sequence[Message], *, recovered: bool = False) -> None:
        """Write events to every live subscription that wants them: one write per connection and piece.

        Args:
            messages: The events.
            recovered: They come from the log, or had to wait for it.
        """
        if self._unsettled:
            self._let_unwritable_fall_behind()
        trace = self._trace.begin(self.channel, messages, recovered=recovered)
        batch = (messages, self.ring.head, self.ring.position, trace)
        try:
            if len(self._audiences) == 1:
                self._write_pieces(
                    self._audiences.unfiltered, [message.frame for message in messages], None, batch
                )
            else:
                self._write_by_audience(messages, batch)
        finally:  # after the writes: the ring is not read before this turn of the loop ends
            self.ring.extend(messages, self._clock.loop_s())

    def _write_by_audience(self, messages: Sequence[Message], batch: _Batch) -> None:
        wanted: dict[Audience, list[int]] = {}
        for index, message in enumerate(messages):
            for audience in self._audiences.matching(message.labels):
                wanted.setdefault(audience, []).append(index)
        for audience in self._audiences:
            indexes = wanted.get(audience, [])
            if indexes:
                frames = framed([messages[index] for index in indexes], audience.format)
                self._write_pieces(audience, frames, indexes, batch)
            self.filtered += len(audience.live) * (len(messages) - len(indexes))

    def _write_pieces(
        self, audience: Audience, frames: list[bytes], indexes: list[int] | None, batch: _Batch
    ) -> None:
        """Write frames to an audience; `indexes` are their places in the batch, None for 0, 1, 2 ..."""
        if not audience.live:
            return
        if len(frames) == 1:
            self._write(audience, frames, 1, indexes, batch)
            return
        start = size = 0
        for number, frame in enumerate(frames):
            if number > start and size + len(frame) > self._write_bytes:
                self._write(audience, frames[start:number], number, indexes, batch)
                start, size = number, 0
            size += len(frame)
        self._write(audience, frames[start:], len(frames), indexes, batch)

    def _write(
        self, audience: Audience, frames: list[bytes], given: int, indexes: list[int] | None, batch: _Batch
    ) -> None:
        """Write one piece to all of an audience: the only place where live frames leave.

        Args:
            audience: To whom.
            frames: What.
            given: How many events of the batch the audience has been given by then.
            indexes: The places in the batch of all that the audience is given, as above.
            batch: The events that are broadcast.
        """
        trace = batch[3]
        transports = audience.transports
        if transports is None:
            transports = audience.transports = [subscription.sink.transport for subscription in audience.live]
        data = b"".join(frames) if len(frames) > 1 else frames[0]
        unsettled, written = len(self._unsettled), len(transports)
        now_ns = self._clock.monotonic_ns() if trace.unwritten else 0
        for transport in transports:
            try:
                transport.write(data)
            except RuntimeError:  # uvloop's transport is closed, and connection_lost is on its way
                written -= 1
        self.deliveries += len(frames) * written
        self.sent_bytes += len(data) * written
        if now_ns:
            first = given - len(frames)
            if indexes is None:
                trace.note(now_ns, first, given)
            else:
                trace.note_some(now_ns, indexes[first:given])
        end = _after(indexes, given)  # so many it has been given, or does not want: those whose socket is full now
        for sink in self._unsettled[unsettled:]:  # continue there
            for subscription in sink.memberships:
                if subscription in audience.live:
                    self._fall_behind(subscription, batch[1] + end, _position_after(batch, end))
                    self.filtered += end - given

    def announce(self, gap: Gap) -> None:
        """Announce a gap to every live subscription; a plain client, which cannot be told, is closed (4009)."""
        if self._unsettled:
            self._let_unwritable_fall_behind()
        frame = wire.gap_frame(gap)
        self.ring.append_gap(gap, frame, self._clock.loop_s())
        self.gaps[gap.cause] += 1
        for audience in self._audiences:
            for subscription in list(audience.live):
                if subscription.sink.wants_control:
                    subscription.sink.tell(frame)
                else:
                    self.end_for(gap, subscription)

    def _let_unwritable_fall_behind(self) -> None:
        """Subscriptions that became unwritable earlier in this turn of the loop are not written to."""
        for sink in self._unsettled:
            for subscription in () if sink.writable else sink.memberships:
                if subscription in self._audiences:
                    self._fall_behind(subscription, self.ring.head, self.ring.position)

    # Behind

    def feed(self, subscription: Subscription) -> None:
        """Write the next piece of the ring to a subscription that is behind; at the head it is live again.

        What it has to get next must not have left the ring, unless it sheds.
        """
        sheds = self.slow.sheds_for(subscription)
        if sheds and self.slow.is_overtaken(subscription):
            self.slow.skip_overtaken(subscription)
        begun_at = subscription.cursor
        assert begun_at is not None
        entries = self.ring.read(begun_at, self._write_bytes)
        subscription.cursor = cursor = begun_at + len(entries)
        subscription.position = self.ring.position_at(cursor)
        if sheds or subscription.is_replaying:
            subscription.behind_since = self._clock.loop_s()
        if sheds:
            numbered = enumerate(entries, begun_at)
            wanted = [(number, entry) for number, entry in numbered if _wants(subscription, entry)]
            self.filtered += len(entries) - len(wanted)
            entries = self.slow.select(wanted)
        if cursor == self.ring.head:
            self.join(subscription)
        self.give(subscription, entries)

    def give(self, subscription: Subscription, entries: Sequence[Entry]) -> None:
        """Write those entries that a subscription wants, in one piece."""
        form = subscription.sink.format
        plain = form is PLAIN
        frames: list[bytes] = []
        untold: Gap | None = None
        events = size = 0
        for entry in entries:
            if entry.labels is None:
                if not subscription.sink.wants_control:
                    untold = entry.gap
                    break
                frames.append(form.control(entry.frame))
            elif subscription.filter.wants(entry.labels):
                frame = entry.frame
                if not plain:
                    frame = form.event(frame, entry.position if entry.stored else None)
                frames.append(frame)
                events += 1
                size += len(frame)
            else:
                self.filtered += 1
        self._send(subscription, b"".join(frames), events, size)
        if untold is not None:
            self.end_for(untold, subscription)

    def give_run(self, subscription: Subscription, messages: Sequence[Message]) -> None:
        """Write those events of the log that a subscription wants, in one piece."""
        wanted, count = subscription.filter, len(messages)
        if wanted:
            messages = [message for message in messages if wanted.wants(message.labels)]
        self.filtered += count - len(messages)
        frames = framed(messages, subscription.sink.format)
        data = b"".join(frames)
        self._send(subscription, data, len(frames), len(data))

    def _send(self, subscription: Subscription, data: bytes, events: int, size: int) -> None:
        """Write to one subscription; in the data are so many events, of so many bytes."""
        if data and subscription.sink.write(data):
            self.deliveries += events
            self.sent_bytes += size

    def position_of(self, subscription: Subscription) -> Position | None:
        """Up to where everything was sent to it, held back by its filter, or announced as a gap."""
        if not subscription.is_behind:
            return self.position
        cursor = subscription.cursor
        return subscription.position if cursor is None else self.ring.position_at(cursor)


def _position_after(batch: _Batch, count: int) -> Position | None:
    """Where a reader stands that has been given so many events of a batch, which the ring does not hold yet."""
    messages, _, before, _ = batch
    stored = (message.position for message in reversed(messages[:count]) if message.position is not None)
    return next(stored, before)


def _after(indexes: list[int] | None, count: int) -> int:
    """In the batch: the place after the `count`-th frame of an audience."""
    return count if indexes is None else indexes[count - 1] + 1


def _wants(subscription: Subscription, entry: Entry) -> bool:
    return entry.labels is None or subscription.filter.wants(entry.labels)
