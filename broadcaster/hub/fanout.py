"""Who gets the events of a channel; `broadcast` never waits for anybody.

A listener is *live* — it is up to date, and the next frame is written to it at once — or it is *behind*: its
socket did not take everything, or it resumes from an earlier position; it holds a cursor into the shared ring
and is fed from there as fast as it reads. Nobody has a queue of his own.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Final

from broadcaster import wire
from broadcaster.hub import shedding
from broadcaster.hub.arrival import Arrival
from broadcaster.hub.audience import Audience, Audiences
from broadcaster.hub.lag import Lag
from broadcaster.hub.listener import Listener
from broadcaster.hub.ring import Entry, Ring
from broadcaster.position import Cause, Gap, Position

WRITE_BYTES: Final = 65_536
"""Largest write to one connection in bytes (one larger frame excepted)."""


class Fanout:
    """One channel: its ring and its listeners.

    Attributes:
        channel: Its name.
        rank: Which channel goes first when several wait: the lowest.
        ring: The last frames.
        position: Where those who are live stand; None before it is known, or when events are not stored.
        behind: Listeners that hold a cursor.
        deliveries: Events written to listeners, each counted once per listener.
        filtered: Events held back by filters, each counted once per listener.
        sent_bytes: Bytes of the deliveries.
        gaps: Gaps told, by cause, each counted once per channel; `shed`, of which every slow listener has its
            own: once per listener.
        last_gap: Number of the last gap in the ring; -1 before there is one.
        shed_beyond: How far behind a slow listener may be before it loses the oldest events; None: it is closed.
        shed: Events that were shed, each counted once per listener: by severity, or as `overtaken` when they
            had left the ring before anybody could look.
    """

    def __init__(self, channel: str, ring_bytes: int, rank: int = 0, shed_beyond: Lag | None = None) -> None:
        self.channel = channel
        self.rank = rank
        self.ring = Ring(ring_bytes)
        self.position: Position | None = None
        self.behind: set[Listener] = set()
        self.deliveries = 0
        self.filtered = 0
        self.sent_bytes = 0
        self.gaps: Counter[str] = Counter()
        self.last_gap = -1
        self.shed_beyond = shed_beyond
        self.shed: Counter[str] = Counter()
        self._clock = asyncio.get_running_loop().time
        self._audiences = Audiences()
        self._gaps_at: list[int] = []  # numbers of the last gaps in the ring
        self._written = 0  # number of the next frame that the audience being served has not been given
        self._base: int | None = None  # number of the first frame of the batch that is being written
        self._given = 0  # how many of the batch the audience being served has been given
        self._eras: list[str] = []  # epochs, in the order in which they came
        self._offset = 0
        self._batch: Sequence[Arrival] = ()  # what is being written, and not in the ring yet

    def begin(self, position: Position) -> None:
        """The channel goes on after this position, which may be in another epoch."""
        if not self._eras:  # what came before anybody knew the place has none, and nobody was here to miss it
            self.ring.forget()
        self._go_on_after(position)
        self.ring.begin(len(self._eras), self._offset)

    def _go_on_after(self, position: Position) -> None:
        if not self._eras or self._eras[-1] != position.epoch:
            self._eras.append(position.epoch)
        self._offset = position.offset
        self.position = position

    # Who is here

    def join(self, listener: Listener) -> None:
        """Take a listener in, live from the next frame on."""
        self._audiences.join(listener)
        self.behind.discard(listener)
        listener.cursor = listener.place = None
        listener.resuming = False

    def join_behind(self, listener: Listener, place: Position | None) -> None:
        """Take a listener in that wants to begin at an earlier place; it is fed by whoever calls `feed`."""
        listener.place = place
        listener.cursor = self.number_after(place) if place else None
        listener.behind_since = self._clock()
        listener.resuming = True
        self.behind.add(listener)

    def leave(self, listener: Listener) -> None:
        """Forget a listener; does nothing the second time."""
        self._audiences.leave(listener)
        self.behind.discard(listener)

    # What they get

    def broadcast(self, arrivals: Sequence[Arrival]) -> None:
        """Give events to everybody who wants them: one write per connection and `WRITE_BYTES`, none awaited."""
        base = self.ring.head
        self._base = base
        self._batch = arrivals
        if len(self._audiences) == 1:
            self._serve(self._audiences.everybody, [arrival.frame for arrival in arrivals], None, base)
        else:
            wanted: dict[Audience, list[int]] = {}
            for index, arrival in enumerate(arrivals):
                for audience in self._audiences.wanting(arrival.labels):
                    wanted.setdefault(audience, []).append(index)
            for audience, indexes in wanted.items():
                self._serve(audience, [arrivals[index].frame for index in indexes], indexes, base)
            for audience in self._audiences:
                self.filtered += len(audience.live) * (len(arrivals) - len(wanted.get(audience, ())))
        self._base = None
        self._written = base + len(arrivals)
        now = self._clock()  # after the writes: nobody reads the ring before this turn of the loop ends
        era = len(self._eras)
        for frame, labels, position in arrivals:
            if position is not None:
                self._offset = position.offset
                self.position = position
            self.ring.append(Entry(frame, now, era, self._offset, labels, position is not None))
        self._batch = ()

    def _serve(self, audience: Audience, frames: list[bytes], indexes: list[int] | None, base: int) -> None:
        """Write frames to an audience in pieces; `indexes` are their places in the batch, None for 0, 1, 2 ..."""
        if not audience.live:
            return
        self._given = 0
        if len(frames) == 1:
            self._write(audience, frames[0], 1, base + (indexes[0] if indexes else 0) + 1)
            return
        start = size = 0
        for number, frame in enumerate(frames):
            if number > start and size + len(frame) > WRITE_BYTES:
                last = indexes[number - 1] if indexes else number - 1
                self._write(audience, b"".join(frames[start:number]), number - start, base + last + 1)
                start, size = number, 0
            size += len(frame)
        last = indexes[-1] if indexes else len(frames) - 1
        self._write(audience, b"".join(frames[start:]), len(frames) - start, base + last + 1)

    def _write(self, audience: Audience, data: bytes, frames: int, written: int) -> None:
        """Write to all of an audience. The one place where live frames leave."""
        self._given += frames
        self._written = written  # first: a connection that pauses inside its write has been given these
        transports = audience.transports
        if transports is None:
            transports = audience.transports = [listener.connection.transport for listener in audience.live]
        for transport in transports:
            try:
                transport.write(data)
            except RuntimeError:  # uvloop's transport is closed, and connection_lost is on its way
                continue
        self.deliveries += frames * len(transports)
        self.sent_bytes += len(data) * len(transports)

    def tell(self, gap: Gap) -> None:
        """Something is missing here. `broadcaster.v1` is told; a plain client, who cannot be, is closed (4009)."""
        frame = gap_frame(gap)
        if gap.position is not None:
            self._go_on_after(gap.position)
        self.gaps[gap.cause] += 1
        self.ring.append(Entry(frame, self._clock(), len(self._eras), self._offset, None, gap=gap))
        self._written = self.ring.head
        self.last_gap = self.ring.head - 1
        self._gaps_at.append(self.last_gap)
        del self._gaps_at[:-1000]
        for audience in self._audiences:
            for listener in list(audience.live):
                if listener.connection.wants_control:
                    listener.connection.write(frame)
                else:
                    close_for(gap, listener)

    # Who is behind

    def fall_behind(self, listener: Listener) -> None:
        """A listener's socket is full: from now on it reads from the ring."""
        if self._audiences.leave(listener):
            if self._base is not None:  # of the batch it has been given some; what came between was held back
                self.filtered += self._written - self._base - self._given
            listener.cursor = self._written  # which may not be in the ring yet, but soon is
            listener.place = self._place_before(self._written) if self.sheds_for(listener) else None
            listener.behind_since = self._clock()
            self.behind.add(listener)

    def feed(self, listener: Listener) -> None:
        """Write the next piece of the ring to a listener that is behind; live again at the head.

        Raises:
            LookupError: What it has to get next is no longer there.
        """
        assert listener.cursor is not None
        sheds = self.sheds_for(listener)
        if sheds and self.is_overtaken(listener):
            self._shed_overtaken(listener)
        begun_at = listener.cursor
        entries = self.ring.read(begun_at, WRITE_BYTES)
        listener.cursor += len(entries)
        listener.place = self._place(listener.cursor)
        if listener.resuming or sheds:
            listener.behind_since = self._clock()
        if sheds:
            entries = self._shed_some(listener, begun_at, entries)
        if listener.cursor == self.ring.head:
            self.join(listener)
        self.give(listener, entries)  # may fall behind again, at once and from the right place

    def is_overtaken(self, listener: Listener) -> bool:
        """Whether what a listener has to get next has left the ring."""
        return listener.cursor is not None and listener.cursor < self.ring.tail

    def sheds_for(self, listener: Listener) -> bool:
        """Whether a listener that is slow loses the oldest events: only who can be told, and has been live."""
        return self.shed_beyond is not None and listener.connection.wants_control and not listener.resuming

    def _shed_overtaken(self, listener: Listener) -> None:
        assert listener.cursor is not None
        gaps = bisect_left(self._gaps_at, self.ring.tail) - bisect_left(self._gaps_at, listener.cursor)
        self.shed["overtaken"] += self.ring.tail - listener.cursor - gaps
        listener.cursor = self.ring.tail
        self.gaps[Cause.SHED] += 1
        listener.connection.write(gap_frame(shedding.overtaken(self.channel, listener.place, self.ring_place)))

    def _shed_some(self, listener: Listener, begun_at: int, entries: Sequence[Entry]) -> list[Entry]:
        assert self.shed_beyond is not None
        wanted = [
            (entry, self._lag_at(number, entry))
            for number, entry in enumerate(entries, begun_at)
            if entry.labels is None or listener.filter.wants(entry.labels)
        ]
        self.filtered += len(entries) - len(wanted)
        kept, counts = shedding.shed(wanted, channel=self.channel, epochs=self._eras, most=self.shed_beyond)
        self.shed += counts
        if gaps := sum(isinstance(entry, Gap) for entry in kept):
            self.gaps[Cause.SHED] += gaps
        return [gap_entry(entry) if isinstance(entry, Gap) else entry for entry in kept]

    def _place_before(self, cursor: int) -> Position | None:
        """Where somebody stands who goes on at `cursor`, which may be in the middle of what is being written."""
        for arrival in reversed(self._batch[: max(0, cursor - self.ring.head)]):
            if arrival.position is not None:
                return arrival.position
        return self._place(min(cursor, self.ring.head))

    def give(self, listener: Listener, entries: Sequence[Entry]) -> None:
        """Write those entries that a listener wants, in one piece."""
        frames: list[bytes] = []
        hole: Gap | None = None
        events = 0
        for entry in entries:
            if entry.labels is None:
                if not listener.connection.wants_control:
                    hole = entry.gap
                    break
                frames.append(entry.frame)
            elif listener.filter.wants(entry.labels):
                frames.append(entry.frame)
                events += 1
            else:
                self.filtered += 1
        self._send(listener, frames, events)
        if hole is not None:
            close_for(hole, listener)

    def give_run(self, listener: Listener, arrivals: Sequence[Arrival]) -> None:
        """Write those events of the log that a listener wants, in one piece."""
        frames = [a.frame for a in arrivals if not listener.filter or listener.filter.wants(a.labels)]
        self.filtered += len(arrivals) - len(frames)
        self._send(listener, frames, len(frames))

    def _send(self, listener: Listener, frames: list[bytes], events: int) -> None:
        """Write to one listener; so many of the frames are events."""
        if frames:
            data = b"".join(frames)
            self.deliveries += events
            self.sent_bytes += len(data)
            listener.connection.write(data)

    def number_after(self, place: Position) -> int | None:
        """Number of the ring entry with which somebody goes on who stands at `place`; None if it is gone."""
        if place.epoch not in self._eras:
            return None
        era = len(self._eras) - self._eras[::-1].index(place.epoch)
        return self.ring.after(era, place.offset)

    def place_of(self, listener: Listener) -> Position | None:
        """Up to where everything was sent to a listener, held back by its filter, or told as a gap."""
        if listener not in self.behind:
            return self.position
        return listener.place if listener.cursor is None else self._place(listener.cursor)

    @property
    def ring_place(self) -> Position | None:
        """Where somebody stands who is given the whole ring."""
        return self._place(self.ring.tail)

    def _place(self, cursor: int) -> Position | None:
        if not self._eras:
            return None
        era, offset = self.ring.place(cursor)
        return Position(self._eras[era - 1], offset)

    def lag_of(self, listener: Listener) -> Lag:
        """How far a listener is behind; its milliseconds are those since its last progress while it resumes."""
        cursor = listener.cursor
        if cursor is None:  # it reads the log
            same = self.position and listener.place and self.position.epoch == listener.place.epoch
            events = self.position.offset - listener.place.offset if same else 0  # type: ignore[union-attr]
            return Lag(self._ms_since(listener.behind_since), events, 0)
        if cursor >= self.ring.head:  # it has been given everything, and its socket still holds some of it
            return Lag(self._ms_since(listener.behind_since), 0, 0)
        came_at = self.ring.came_at(cursor)
        since = came_at if self.sheds_for(listener) else max(listener.behind_since, came_at)
        return Lag(self._ms_since(since), self.ring.head - cursor, self.ring.bytes_from(cursor))

    def _lag_at(self, number: int, entry: Entry) -> Lag:
        return Lag(self._ms_since(entry.came_at), self.ring.head - number, self.ring.bytes_from(number))

    def _ms_since(self, then: float) -> float:
        return (self._clock() - then) * 1000


def gap_frame(gap: Gap) -> bytes:
    """A gap as `broadcaster.v1` is told of it."""
    fields = {"cause": str(gap.cause), "epoch": gap.epoch, "first": gap.first, "last": gap.last}
    return wire.control_frame("gap", gap.channel, **fields, position=gap.position and str(gap.position))


def gap_entry(gap: Gap) -> Entry:
    """A gap among the entries that one listener is given; it is in no ring, and has no number."""
    return Entry(gap_frame(gap), 0.0, 0, 0, None, gap=gap)


def close_for(gap: Gap, listener: Listener) -> None:
    """Close a plain client that cannot be told of a gap in a frame."""
    known = "" if gap.first is None else f", from {gap.epoch}-{gap.first}"
    listener.connection.close(wire.CloseCode.HOLE, f"events of {gap.channel} may be missing: {gap.cause}{known}")
