"""What holds for a client and a channel whose events are stored. Shares no code with the product.

A client reads each channel from somewhere on: after its first `since`, or what its first welcome said. From there
on each event that Redis has accepted is given to it or told, in order.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Final

from tests.simulation.books import Beaten, Book, Connected, Given, Place, Told, Welcomed
from tests.simulation.journal import Accepted, is_named_before
from tests.simulation.oracle import Findings, Truth
from tests.simulation.times import Times
from tests.simulation.troubles import REDIS, source, way

_WORD_S: Final = 6.0
"""Seconds within which a client that has connected is told something of each of its channels."""

_CAUGHT_UP_S: Final = 5.0
"""So long after the last fault a hub may still be reading what it has missed."""

_SETTLED_S: Final = 15.0
"""After so many seconds without trouble what a client is told is of the memory that Redis has."""

_READ_S: Final = 0.05
"""So long a client may have to wait for each event from the log: a page may hold two, and many others read."""

_SPLIT: Final = ("redis_split", "redis_promote")
"""While these last, there may be two masters side by side."""

_FORGETFUL: Final = ("hub_kill", "hub_drain", "starts")
"""After these nobody may be left who has seen what a memory has lost."""


@dataclass(eq=False)
class View:
    """How one client has seen one channel.

    Attributes:
        at: Up to where it was given or told everything; None before that is known.
        began: Where it began to read, and when.
        highest: Per epoch the highest offset that it was given.
        ids: Of the events that it was given.
        ids_of_life: Of those that it was given in its present process.
        given: Their places.
        told: Closed ranges that were told.
        open_told: How many gaps without an end there were, by the epoch in which they begin.
        open_at: When the last one was told.
        owes_gap: Whether a welcome has said that a gap follows first.
        came_with: Its `since` of this connection: a place, or the one that was found for its time.
        asked: For which time it has asked instead, and when.
        connected_at: When it connected.
        asks_since: When it connected, if it has not been told anything yet.
        fresh_from: When it connected or was welcomed, and the time that reading the log needs: from then on it has
            what Redis had a while ago.
    """

    at: Place | None = None
    began: tuple[Place, float] | None = None
    highest: dict[str, int] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    ids_of_life: set[str] = field(default_factory=set)
    given: set[Place] = field(default_factory=set)
    told: list[Told] = field(default_factory=list)
    open_told: Counter[str] = field(default_factory=Counter)
    open_at: float = 0.0
    owes_gap: bool = False
    came_with: Place | None = None
    asked: tuple[str, float] | None = None
    connected_at: float = 0.0
    asks_since: float | None = None
    fresh_from: float = 0.0

    def go_back_to(self, place: Place) -> None:
        """Of two masters side by side a hub of the older one knows nothing of what the newer one has taken.

        So who comes to it from there stands at this place again, and what came after it may come once more.
        """
        epoch = place.epoch
        for later in [each for each in self.highest if is_named_before(epoch, each)]:
            del self.highest[later]
        if epoch in self.highest:
            self.highest[epoch] = min(self.highest[epoch], place.offset)
        self.given = {each for each in self.given if each.offset <= self.highest.get(each.epoch, -1)}
        told = [gap for gap in self.told if not is_named_before(epoch, str(gap.epoch))]
        self.told = [
            replace(gap, last=min(gap.last or 0, place.offset)) if gap.epoch == epoch else gap for gap in told
        ]
        for begun in [each for each in self.open_told if not is_named_before(each, epoch)]:
            del self.open_told[begun]


class StoredRules:
    """See `oracle.Rules`."""

    def __init__(self, truth: Truth, findings: Findings) -> None:
        self._truth = truth
        self._journal = truth.journal
        self._troubles = truth.troubles
        self._is_stored = truth.is_stored
        self._fail = findings.fail
        self._counts = findings.counts
        self._times = Times(truth, findings.fail)
        self._views: dict[tuple[Book, str], View] = {}

    def _view(self, book: Book, channel: str) -> View:
        return self._views.setdefault((book, channel), View())

    def on_connected(self, book: Book, now: float, entry: Connected) -> None:
        for channel, since in entry.since.items():
            view = self._view(book, channel)
            view.came_with = since
            view.asked = (entry.time, now) if entry.time and since is None and view.at is None else None
            view.owes_gap = False
            view.ids_of_life.clear()
            view.connected_at = view.fresh_from = now
            view.asks_since = now if book.kind == "v1" else None
            if since is not None:
                self._count_distance(channel, since)
            if view.at is None and since is not None:
                view.at, view.began = since, (since, now)

    def _count_distance(self, channel: str, since: Place) -> None:
        """How many epochs ago that was."""
        spans = self._journal.epochs[channel]
        away = len(spans) - 1 - spans[since.epoch].rank if since.epoch in spans else 0
        for many in (16, 64):
            self._counts[f"since over {many} epochs ago"] += away > many

    def _count_after(self, channel: str, since: Place | None) -> int:
        """How many events it may have to be given from the log."""
        if since is None:
            return 0
        accepted = self._journal.accepted[channel]
        return sum(event.epoch != since.epoch or event.offset > since.offset for event in accepted)

    def on_welcomed(self, book: Book, now: float, entry: Welcomed) -> None:
        view = self._view(book, entry.channel)
        view.asks_since = None
        view.fresh_from = now + _READ_S * self._count_after(entry.channel, view.came_with)
        if view.asked is not None:
            view.fresh_from = now + _READ_S * len(self._journal.accepted[entry.channel])
            if entry.recovered is None:
                self._fail("a time without recovered", now, book.client, f"{entry}")
            elif entry.recovered and entry.position is not None:
                self._begin(book, view, entry.channel, entry.position, now)
        elif view.came_with is None:
            if entry.recovered is not None:
                self._fail("recovered without since", now, book.client, f"{entry}")
            view.at = entry.position
            if view.at is not None:
                view.began = view.began or (view.at, now)
        elif entry.recovered is None:
            self._fail("since without recovered", now, book.client, f"{entry}")
        elif entry.recovered and entry.position != view.came_with:
            self._fail("recovered, but elsewhere", now, book.client, f"since {view.came_with}, {entry}")
        view.owes_gap = entry.recovered is False

    def _begin(self, book: Book, view: View, channel: str, place: Place, now: float) -> None:
        """It did not know yet where it stands."""
        if view.asked is not None:
            self._times.judge_beginning(book, channel, view.asked, place, now)
            view.came_with = place
        view.asked, view.at, view.began = None, place, view.began or (place, now)

    def on_given(self, book: Book, now: float, entry: Given) -> None:
        view, place, channel = self._view(book, entry.channel), entry.place, entry.channel
        if place is None:
            self._fail("an event without a position", now, book.client, f"{entry}")
            return
        real = [each for each in self._journal.at[channel, *place] if each.event_id == entry.event_id]
        if not real or all(each.withdrawn for each in real):
            self._fail("never accepted", now, book.client, f"{entry}")
        elif book.wanted is not None and real[0].labels[0] != book.wanted:
            self._fail("held back by its filter", now, book.client, f"{entry}")
        if view.owes_gap:
            self._fail("recovered false, and no gap first", now, book.client, f"{entry}")
            view.owes_gap = False
        if place in view.given:
            self._fail("given twice", now, book.client, f"{entry}")
        elif book.kind == "Subscriber" and entry.event_id in view.ids_of_life:
            self._fail("given again, in another epoch", now, book.client, f"{entry}")
        elif place.offset <= view.highest.get(place.epoch, -1):
            self._fail("out of order", now, book.client, f"{entry} after {view.highest[place.epoch]}")
        elif any(gap.epoch == place.epoch and _covers(gap, place.offset) for gap in view.told):
            self._fail("given although told", now, book.client, f"{entry}")
        else:
            self._join(book, view, channel, Place(place.epoch, place.offset - 1), now, f"{entry}")
        view.given.add(place)
        view.ids.add(entry.event_id)
        view.ids_of_life.add(entry.event_id)
        view.highest[place.epoch] = max(place.offset, view.highest.get(place.epoch, -1))
        view.at = place
        view.began = view.began or (place, now)
        view.asks_since = None

    def _join(self, book: Book, view: View, channel: str, upto: Place, now: float, why: str) -> None:
        """Everything between where a client is and `upto` must have been given, or is not for it."""
        at = view.at
        if at is None:
            self._begin(book, view, channel, upto, now)
        elif at.epoch != upto.epoch:
            self._fail("another epoch, untold", now, book.client, f"{channel}: {at}, then {why}")
        elif upto.offset < at.offset:
            self._fail("back", now, book.client, f"{channel}: {at}, then {why}")
        else:
            for offset in range(at.offset + 1, min(upto.offset, at.offset + 1000) + 1):
                events = [e for e in self._journal.at[channel, at.epoch, offset] if not e.withdrawn]
                if not events:
                    self._fail("passed what was never given", now, book.client, f"{at.epoch}-{offset}: {why}")
                    return
                if all(self._owed(book, view, event) for event in events):
                    self._fail("lost, untold", now, book.client, f"{channel} {at.epoch}-{offset}: {why}")
                    return

    @staticmethod
    def _owed(book: Book, view: View, event: Accepted) -> bool:
        return event.event_id not in view.ids and book.wanted in (None, event.labels[0])

    def _too_large(self, event: Accepted) -> bool:
        return event.size > self._truth.max_bytes

    # Gaps

    def on_told(self, book: Book, now: float, gap: Told) -> None:
        view = self._view(book, gap.channel)
        view.owes_gap = False
        view.asks_since = None
        if view.asked is not None and gap.first is None:
            self._times.judge_gap(book, gap, now)
            if gap.position is not None:
                self._begin(book, view, gap.channel, gap.position, now)
            return
        if gap.epoch is None or gap.first is None or gap.position is None:
            self._fail("a gap without numbers", now, book.client, f"{gap}")
            return
        if gap.cause in ("no_history", "redis_link_lost"):
            self._fail(f"{gap.cause} although there is history", now, book.client, f"{gap}")
        before = Place(gap.epoch, gap.first - 1)
        if view.at is not None and before.epoch == view.at.epoch and before.offset < view.at.offset:
            self._fail("told from before its place", now, book.client, f"{view.at}: {gap}")
        else:
            self._join(book, view, gap.channel, before, now, f"{gap}")
        if gap.cause == "position_unknown":
            self._judge_unknown(book, view, gap, now)
        elif gap.last is None:
            self._judge_open(book, view, gap, now)
        else:
            self._judge_closed(book, view, gap, now)
        if gap.last is None:
            view.open_at = now
        view.at = gap.position
        view.began = view.began or (gap.position, now)

    def _judge_unknown(self, book: Book, view: View, gap: Told, now: float) -> None:
        """Right where the client came with a position that was never given, or in a memory that is gone."""
        assert gap.epoch is not None
        assert gap.first is not None
        assert gap.position is not None
        since, channel = Place(gap.epoch, gap.first - 1), gap.channel
        view.go_back_to(gap.position)
        known = {view.came_with}
        if book.kind == "Subscriber":  # it connects again by itself, with the place where it is
            known.add(view.at)
            if view.at and since.epoch == view.at.epoch and self._journal.has_given(channel, *since):
                known.add(max(since, view.at))  # a heartbeat has brought it there
        if gap.last is not None or since not in known:
            self._fail("position_unknown, but not its since", now, book.client, f"{view.came_with}: {gap}")
            return
        given = self._journal.has_given(channel, *since)
        # A hub that is still with a master that was left behind knows nothing of what the new one has given.
        split = self._troubles.any([REDIS], now, 0.0, _SPLIT)
        taken_at: list[float | None] = [event.at for event in self._journal.at[channel, *since]]
        lost = any(self._journal.may_be_lost(channel, *since, now, at) for at in taken_at or [None])
        if given and not split and not lost:
            self._fail("position_unknown, but it was given", now, book.client, f"{gap}")
        if not self._journal.has_given(channel, *gap.position):
            self._fail("a gap to nowhere", now, book.client, f"{gap}")
        if gap.position.epoch == since.epoch and gap.position.offset >= since.offset:
            self._fail("position_unknown, but the channel is further", now, book.client, f"{gap}")

    def _judge_closed(self, book: Book, view: View, gap: Told, now: float) -> None:
        assert gap.epoch is not None
        assert gap.first is not None
        assert gap.last is not None
        view.told.append(gap)
        if gap.last < gap.first or gap.position != Place(gap.epoch, gap.last):
            self._fail("a gap's position is not its end", now, book.client, f"{gap}")
        for offset in range(gap.first, min(gap.last, gap.first + 5000) + 1):
            place = Place(gap.epoch, offset)
            if place in view.given:
                self._fail("told although given", now, book.client, f"{place}: {gap}")
                return
            if gap.cause == "expired" and not self._has_expired(book, gap, place, now):
                return
            if gap.cause == "redis_restarted" and not self._journal.may_be_lost(gap.channel, *place, now):
                self._fail("lost with its memory, but that is there", now, book.client, f"{place}: {gap}")
                return
            if gap.cause == "refused" and not any(map(self._too_large, self._journal.at[gap.channel, *place])):
                self._fail("refused, but sound", now, book.client, f"{place}: {gap}")
                return

    def _has_expired(self, book: Book, gap: Told, place: Place, now: float) -> bool:
        """Whether an event that is told as expired has left the log; else that is noted."""
        there = [each for each in self._journal.at[gap.channel, *place] if not each.withdrawn]
        if any(map(self._too_large, there)):
            return True  # a range of which some were refused, and some have expired, is one
        if (gap.channel, *place) not in self._journal.removed:
            if there and self._looks_expired(gap.channel, place, now):
                return True
            what = "never left the log" if there else "was never accepted"
            self._fail(f"expired, but {what}", now, book.client, f"{place}: {gap}")
            return False
        parts = [*way(book.client, book.hub), REDIS]
        if any(map(self._is_stored, there)) and not self._troubles.any(parts, now, _SETTLED_S):
            self._fail("expired, but it is stored", now, book.client, f"{place}: {gap}")
            return False
        return True

    def _looks_expired(self, channel: str, place: Place, now: float) -> bool:
        """Whether it was lost with Redis' memory, and all that was before it has left the log: nobody can tell."""
        if not self._journal.may_be_lost(channel, *place, now):
            return False
        accepted = self._journal.accepted[channel]
        return not any(is_named_before(event.epoch, place.epoch) and self._is_stored(event) for event in accepted)

    def _judge_open(self, book: Book, view: View, gap: Told, now: float) -> None:
        assert gap.epoch is not None
        assert gap.first is not None
        assert gap.position is not None
        journal, channel, end = self._journal, gap.channel, gap.position
        next_ = journal.epochs[channel].get(end.epoch)
        if next_ is None or not journal.has_given(channel, *end):
            self._fail("a gap to nowhere", now, book.client, f"{gap}")
            return
        self._judge_expiry(book, view, gap, now)
        view.open_told[gap.epoch] += 1
        if view.open_told[gap.epoch] > 1:
            self._fail("two gaps without end in one epoch", now, book.client, f"{gap}")
        if not is_named_before(gap.epoch, end.epoch):
            self._fail("no epoch has begun between", now, book.client, f"{gap}")
        if gap.cause == "shed":
            return
        # A hub that is, or just was, with a master that was left behind knows nothing of what the new one takes.
        split_at = self._troubles.begin([REDIS], now, 1.0, _SPLIT)
        for event in itertools.takewhile(lambda event: event.at < split_at, journal.accepted[channel]):
            rest = event.epoch == gap.epoch and event.offset >= gap.first and event.at < next_.at
            skipped = event.epoch == end.epoch and event.offset <= end.offset
            # An epoch is named before one that began earlier, if Redis' clock was set back and its memory lost.
            between = event.at < next_.at and is_named_before(gap.epoch, event.epoch)
            between &= is_named_before(event.epoch, end.epoch)
            could = not event.withdrawn and not self._too_large(event) and self._owed(book, view, event)
            if (rest or between or skipped) and could and self._is_stored(event):
                where = Place(event.epoch, event.offset)
                if journal.may_be_lost(channel, *where, now) or (channel, *where) in journal.removed:
                    continue  # Redis had forgotten it, and came back to a memory that has it
                self._fail("told, but it could be given", now, book.client, f"{where}: {gap}")
                return

    def _judge_expiry(self, book: Book, view: View, gap: Told, now: float) -> None:
        """A channel's position is not forgotten while somebody listens."""
        began = self._journal.epochs[gap.channel][gap.position.epoch].at if gap.position else now
        losses = [loss for loss in self._journal.losses if began - 1 <= loss.at <= began and loss.by_expiry]
        quiet_s = 7 * self._truth.idle_expire_s + 2
        parts = [*way(book.client, book.hub), *source(book.hub)]
        if losses and now - view.fresh_from > quiet_s and not self._troubles.any(parts, now, quiet_s):
            self._fail("forgotten although somebody listens", now, book.client, f"{gap}")

    # Heartbeats, and words that do not come

    def on_beaten(self, book: Book, now: float, entry: Beaten) -> None:
        view = self._view(book, entry.channel)
        if entry.position is None:
            if entry.is_claim:
                self._fail("a heartbeat without a position", now, book.client, f"{entry}")
            return
        if view.owes_gap and entry.is_claim and entry.position != view.came_with:
            self._fail("recovered false, and no gap first", now, book.client, f"{entry}")
            view.owes_gap = False
        self._join(book, view, entry.channel, entry.position, now, f"{entry}")
        view.at = entry.position
        view.began = view.began or (entry.position, now)
        if entry.is_claim and book.steady:
            self._judge_freshness(book, view, entry.channel, now)
            self._look_for_silence(book, now)

    def _judge_freshness(self, book: Book, view: View, channel: str, now: float) -> None:
        """Who gets heartbeats has what Redis had a while ago."""
        run_id, told_s = self._truth.in_charge(), self._truth.fresh_s(now)
        at = view.at
        if not run_id or at is None or now - view.fresh_from < told_s:
            return
        if self._troubles.any(way(book.client, book.hub), now, told_s):
            return
        for event in reversed(self._journal.accepted[channel]):
            if event.at > now - told_s or event.server != run_id or event.withdrawn:
                continue
            if self._journal.may_be_lost(channel, event.epoch, event.offset, now, event.at):
                continue  # whoever does not remember it cannot know of it
            spans = self._journal.epochs[channel]
            if event.epoch == at.epoch:
                late = event.offset > at.offset
            else:
                late = at.epoch not in spans or spans[event.epoch].rank > spans[at.epoch].rank
            if late:
                self._fail("a heartbeat although blind", now, book.client, f"{event} at {event.at:.3f}, {at}")
            return

    def _look_for_silence(self, book: Book, now: float) -> None:
        """A client that gets heartbeats of some channel hears of the others, too."""
        for channel in book.channels:
            view = self._view(book, channel)
            parts = [*way(book.client, book.hub), *source(book.hub)]
            if view.asks_since is not None and now - view.asks_since > _WORD_S:
                if not self._troubles.any(parts, now, 2 * _WORD_S):
                    what = f"{channel}: since {view.came_with}, for {now - view.asks_since:.1f} s"
                    self._fail("no word of a channel", now, book.client, what)
                view.asks_since = None

    # Plain clients, to which no gap can be told

    def may_be_cut(self, book: Book, now: float) -> bool:
        return any(self._is_cut(book, channel, self._view(book, channel), now) for channel in book.channels)

    def _is_cut(self, book: Book, channel: str, view: View, now: float) -> bool:
        """Whether right after the place of a client there is something that cannot be given."""
        journal, at = self._journal, view.at
        if at is None:  # it has got nothing yet, and nobody has told it where it stands
            lately = view.connected_at - self._truth.told_s
            if self._troubles.any(source(book.hub), view.connected_at, self._truth.told_s + _CAUGHT_UP_S):
                return True  # it stands where the hub did when that lost Redis
            began = any(span.at >= lately for span in journal.epochs[channel].values())
            removed = any(when >= lately for place, when in journal.removed.items() if place[0] == channel)
            large = any(map(self._too_large, journal.accepted[channel][-200:]))
            return began or removed or large or any(loss.at >= lately for loss in journal.losses)
        if not journal.has_given(channel, *at) or journal.may_be_lost(channel, *at, now):
            return True
        highest = journal.epochs[channel][at.epoch].highest
        for offset in range(at.offset + 1, highest + 1):
            events = [event for event in journal.at[channel, at.epoch, offset] if not event.withdrawn]
            gone = (channel, at.epoch, offset) in journal.removed
            if gone or any(map(self._too_large, events)) or not any(map(self._is_stored, events)):
                return True
            if journal.may_be_lost(channel, at.epoch, offset, now):
                return True  # Redis had forgotten it, and came back to a memory that has it
            if all(self._owed(book, view, event) for event in events):  # of two it may have passed the other one
                return False
        return any(is_named_before(at.epoch, epoch) for epoch in journal.epochs[channel])

    def forget(self, book: Book) -> None:
        for channel in book.channels:
            self._views.pop((book, channel), None)

    # The end

    def at_the_end(self, book: Book, last: dict[str, str], sent_at: float, now: float) -> None:
        connections = [(at, entry) for at, entry in book.entries if isinstance(entry, Connected)]
        for channel in book.channels:
            view = self._view(book, channel)
            self._judge_doubled(book, view, channel, now)
            if any(at > sent_at and entry.since[channel] is None for at, entry in connections):
                continue
            if book.channels[channel] is None and view.began is not None and view.began[1] > sent_at:
                continue  # it came before, but not as far as a welcome
            if last[channel] not in view.ids and view.open_at < sent_at:  # else it was told, and begins behind it
                self._fail("not caught up at the end", now, book.client, f"{channel}: stands at {view.at}")

    def _judge_doubled(self, book: Book, view: View, channel: str, now: float) -> None:
        """Of two events that were given one position, one has reached the client: the other one must be told."""
        if view.began is None:
            return
        (epoch, offset), began_at = view.began
        for event in self._journal.doubled[channel]:
            place = Place(event.epoch, event.offset)
            first = min(each.at for each in self._journal.at[channel, *place])
            alone = any(self._forgets(hub, first, event.at) for hub in self._hubs)
            later = began_at > event.at or (place.epoch == epoch and place.offset <= offset)
            if event.withdrawn or place not in view.given or not self._owed(book, view, event) or later or alone:
                continue
            here = self._journal.at[channel, *place]
            if any(each.event_id in view.ids and each.at > event.at for each in here) and self._is_unseen(event):
                continue  # a memory that no hub has handed on anything of went back
            if view.open_at < event.at and not self._is_out_of_sight(book, view, channel, event):
                self._fail("another event at its position, untold", now, book.client, f"{place}: {event}")
                return

    def _is_unseen(self, event: Accepted) -> bool:
        """Whether nobody was given an event."""
        return not any(event.event_id in view.ids for view in self._views.values())

    def _forgets(self, hub: str, first: float, second: float) -> bool:
        """Whether a hub ends that was given the first of two events, and could not have noticed the second."""
        noticed_at = self._troubles.end(source(hub), second, 2.0)
        return self._troubles.any([frozenset([hub])], noticed_at, noticed_at - first, _FORGETFUL)

    def _is_out_of_sight(self, book: Book, view: View, channel: str, event: Accepted) -> bool:
        """Whether all events at places that a hub has handed on left the log before it could read that again."""
        doubled = [each for each in self._journal.doubled[channel] if each.epoch == event.epoch]
        last = max(each.offset for each in doubled if Place(each.epoch, each.offset) in view.given)
        gone_at = self._journal.removed.get((channel, event.epoch, last), math.inf)
        for hub in book.hubs:
            there = self._troubles.any(source(hub), event.at, self._truth.told_s)
            if there and gone_at <= self._troubles.end(source(hub), event.at, self._truth.told_s):
                return True
        return False

    @property
    def _hubs(self) -> set[str]:
        return {hub for book, _ in self._views for hub in book.hubs}


def _covers(gap: Told, offset: int) -> bool:
    return gap.first is not None and gap.last is not None and gap.first <= offset <= gap.last
