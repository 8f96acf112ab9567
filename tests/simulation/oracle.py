"""Judges what clients were given and told by what Redis has taken. Shares no code with the product.

Every rule is of docs/contract.md. A client reads each channel from somewhere on: after its first `since`, or what
its first welcome said. From there on each event that Redis has accepted is given to it or told, in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from tests.simulation.books import (
    Beaten,
    Blind,
    Book,
    Closed,
    Connected,
    Entry,
    Given,
    Place,
    Refused,
    Told,
    Welcomed,
)
from tests.simulation.journal import Accepted, Journal

_ALWAYS_ALLOWED: Final = {1006, 1012}


@dataclass(frozen=True, slots=True)
class Failure:
    """A broken promise.

    Attributes:
        rule: Which, in a few words; the same for all of its kind.
        at: Loop time.
        who: The client, or the hub.
        what: What happened.
    """

    rule: str
    at: float
    who: str
    what: str

    def __str__(self) -> str:
        return f"{self.rule} [{self.at:.3f} s, {self.who}]: {self.what}"


@dataclass(eq=False)
class View:
    """How one client has seen one channel.

    Attributes:
        at: Up to where it was given or told everything; None before that is known.
        highest: Per epoch the highest offset that it was given.
        ids: Of the events that it was given.
        given: Their places.
        told: Closed ranges that were told.
        open_told: How many gaps without an end there were, by the epoch in which they begin.
        owes_gap: Whether a welcome has said that a gap follows first.
    """

    at: Place | None = None
    highest: dict[str, int] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    given: set[Place] = field(default_factory=set)
    told: list[Told] = field(default_factory=list)
    open_told: Counter[str] = field(default_factory=Counter)
    owes_gap: bool = False
    came_with: Place | None = None


class Oracle:
    """Judges each entry of each book when it is made, and all of them at the end.

    Args:
        journal: The truth.
        is_stored: Whether an event is in the log of the Redis that is in charge now.
        in_charge: The run_id of that Redis; empty while there is none, or another one is not gone.
        troubled: Whether anything was done to a client, a hub or Redis within so many seconds before now.
        told_s: Seconds within which a client learns that it is blind, by the settings.
        max_bytes: The largest event that the hubs deliver.

    Attributes:
        failures: What was found.
        counts: What was reached.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        is_stored: Callable[[Accepted], bool],
        in_charge: Callable[[], str],
        troubled: Callable[[str, float], bool],
        told_s: float,
        max_bytes: int,
    ) -> None:
        self._journal = journal
        self._is_stored = is_stored
        self._in_charge = in_charge
        self._troubled = troubled
        self._told_s = told_s
        self._max_bytes = max_bytes
        self._views: dict[tuple[Book, str], View] = {}
        self.failures: list[Failure] = []
        self.counts: Counter[str] = Counter()

    def fail(self, rule: str, now: float, who: str, what: str) -> None:
        """Note a broken promise."""
        self.failures.append(Failure(rule, now, who, what))

    def view(self, book: Book, channel: str) -> View:
        return self._views.setdefault((book, channel), View())

    def on_entry(self, book: Book, now: float, entry: Entry) -> None:
        """Judge what has reached a client."""
        match entry:
            case Connected():
                self._on_connected(book, entry)
            case Welcomed():
                self._on_welcomed(book, now, entry)
            case Given():
                self._on_given(book, now, entry)
            case Told():
                self._on_told(book, now, entry)
            case Beaten():
                self._on_beaten(book, now, entry)
            case Closed():
                self._on_closed(book, now, entry)
            case Refused():
                self._on_refused(book, now, entry)
            case Blind():
                self._on_blind(book, now, entry)

    def _on_connected(self, book: Book, entry: Connected) -> None:
        self.counts["connections"] += 1
        for channel, since in entry.since.items():
            view = self.view(book, channel)
            view.came_with = since
            view.owes_gap = False
            if view.at is None:
                view.at = since

    def _on_welcomed(self, book: Book, now: float, entry: Welcomed) -> None:
        view = self.view(book, entry.channel)
        self.counts[f"welcome, recovered {entry.recovered}".lower()] += 1
        if view.came_with is None:
            if entry.recovered is not None:
                self.fail("recovered without since", now, book.client, f"{entry}")
            view.at = entry.position
        elif entry.recovered is None:
            self.fail("since without recovered", now, book.client, f"{entry}")
        elif entry.recovered and entry.position != view.came_with:
            self.fail("recovered, but elsewhere", now, book.client, f"since {view.came_with}, {entry}")
        view.owes_gap = entry.recovered is False

    def _on_given(self, book: Book, now: float, entry: Given) -> None:
        self.counts["deliveries"] += 1
        view, place, channel = self.view(book, entry.channel), entry.place, entry.channel
        real = [each for each in self._journal.at[channel, *place] if each.event_id == entry.event_id]
        if not real or all(each.withdrawn for each in real):
            self.fail("never accepted", now, book.client, f"{entry}")
        elif book.wanted is not None and real[0].labels[0] != book.wanted:
            self.fail("held back by its filter", now, book.client, f"{entry}")
        if view.owes_gap:
            self.fail("recovered false, and no gap first", now, book.client, f"{entry}")
            view.owes_gap = False
        if place in view.given:
            self.fail("given twice", now, book.client, f"{entry}")
        elif place.offset <= view.highest.get(place.epoch, -1):
            self.fail("out of order", now, book.client, f"{entry} after {view.highest[place.epoch]}")
        elif any(gap.epoch == place.epoch and _covers(gap, place.offset) for gap in view.told):
            self.fail("given although told", now, book.client, f"{entry}")
        else:
            self._join(book, view, channel, Place(place.epoch, place.offset - 1), now, f"{entry}")
        view.given.add(place)
        view.ids.add(entry.event_id)
        view.highest[place.epoch] = max(place.offset, view.highest.get(place.epoch, -1))
        view.at = place

    def _join(self, book: Book, view: View, channel: str, upto: Place, now: float, why: str) -> None:
        """Everything between where a client is and `upto` must have been given, or is not for it."""
        at = view.at
        if at is None:
            view.at = upto
        elif at.epoch != upto.epoch:
            self.fail("another epoch, untold", now, book.client, f"{channel}: {at}, then {why}")
        elif upto.offset < at.offset:
            self.fail("back", now, book.client, f"{channel}: {at}, then {why}")
        else:
            for offset in range(at.offset + 1, min(upto.offset, at.offset + 1000) + 1):
                events = [e for e in self._journal.at[channel, at.epoch, offset] if not e.withdrawn]
                if not events:
                    self.fail("passed what was never given", now, book.client, f"{at.epoch}-{offset}: {why}")
                    return
                if all(self._owed(book, view, event) for event in events):
                    self.fail("lost, untold", now, book.client, f"{channel} {at.epoch}-{offset}: {why}")
                    return

    @staticmethod
    def _owed(book: Book, view: View, event: Accepted) -> bool:
        return event.event_id not in view.ids and book.wanted in (None, event.labels[0])

    def _on_told(self, book: Book, now: float, gap: Told) -> None:
        view = self.view(book, gap.channel)
        self.counts[f"gap {gap.cause}"] += 1
        view.owes_gap = False
        if gap.epoch is None or gap.first is None or gap.position is None:
            self.fail("a gap without numbers", now, book.client, f"{gap}")
            return
        if gap.cause in ("unexplained", "closed"):
            self.fail("unexplained", now, book.client, f"{gap}")
        before = Place(gap.epoch, gap.first - 1)
        if view.at is not None and before.epoch == view.at.epoch and before.offset < view.at.offset:
            self.fail("told from before its place", now, book.client, f"{view.at}: {gap}")
        else:
            self._join(book, view, gap.channel, before, now, f"{gap}")
        if gap.last is None:
            self._judge_open(book, view, gap, now)
        else:
            self._judge_closed(book, view, gap, now)
        view.at = gap.position

    def _judge_closed(self, book: Book, view: View, gap: Told, now: float) -> None:
        assert gap.epoch is not None
        assert gap.first is not None
        assert gap.last is not None
        view.told.append(gap)
        if gap.cause == "shed" and book.steady and not self._troubled(book.client, 12.0):
            self.fail("shed for one that is not slow", now, book.client, f"{gap}")
        if gap.last < gap.first or gap.position != Place(gap.epoch, gap.last):
            self.fail("a gap's position is not its end", now, book.client, f"{gap}")
        for offset in range(gap.first, min(gap.last, gap.first + 5000) + 1):
            place = Place(gap.epoch, offset)
            if place in view.given:
                self.fail("told although given", now, book.client, f"{place}: {gap}")
                return
            if gap.cause == "expired" and (gap.channel, *place) not in self._journal.removed:
                there = [each for each in self._journal.at[gap.channel, *place] if not each.withdrawn]
                if any(map(self._too_large, there)):
                    continue  # a range of which some were refused, and some have expired, is one
                what = "never left the log" if there else "was never accepted"
                self.fail(f"expired, but {what}", now, book.client, f"{place}: {gap}")
                return
            if gap.cause == "refused" and not any(map(self._too_large, self._journal.at[gap.channel, *place])):
                self.fail("refused, but sound", now, book.client, f"{place}: {gap}")
                return

    def _too_large(self, event: Accepted) -> bool:
        return event.size > self._max_bytes

    def _judge_open(self, book: Book, view: View, gap: Told, now: float) -> None:
        assert gap.epoch is not None
        assert gap.first is not None
        assert gap.position is not None
        journal, channel = self._journal, gap.channel
        order = journal.order(channel)
        mine, next_ = order.get(gap.epoch), order.get(gap.position.epoch)
        if next_ is None:
            self.fail("a gap to nowhere", now, book.client, f"{gap}")
            return
        if gap.cause == "position_unknown":
            return
        view.open_told[gap.epoch] += 1
        if view.open_told[gap.epoch] > 1:
            self.fail("two gaps without end in one epoch", now, book.client, f"{gap}")
        if mine is not None and mine >= next_:
            self.fail("no epoch has begun between", now, book.client, f"{gap}")
        began = journal.begun[channel, gap.position.epoch]
        for event in journal.accepted[channel]:
            rest = event.epoch == gap.epoch and event.offset >= gap.first and event.at < began
            skipped = event.epoch == gap.position.epoch and event.offset <= gap.position.offset
            between = mine is not None and mine < order[event.epoch] < next_
            could = not event.withdrawn and not self._too_large(event) and self._owed(book, view, event)
            if (rest or between or skipped) and could and self._is_stored(event):
                where = Place(event.epoch, event.offset)
                self.fail("told, but it could be given", now, book.client, f"{where}: {gap}")
                return

    def _on_beaten(self, book: Book, now: float, entry: Beaten) -> None:
        view = self.view(book, entry.channel)
        self.counts["beats"] += entry.is_claim
        if entry.position is None:
            return
        if view.owes_gap and entry.is_claim:
            self.fail("recovered false, and no gap first", now, book.client, f"{entry}")
            view.owes_gap = False
        self._join(book, view, entry.channel, entry.position, now, f"{entry}")
        view.at = entry.position
        if entry.is_claim and book.steady:
            self._judge_freshness(book, view, entry.channel, now)

    def _judge_freshness(self, book: Book, view: View, channel: str, now: float) -> None:
        """Who gets heartbeats has what Redis had a while ago."""
        run_id = self._in_charge()
        if not run_id or view.at is None or self._troubled(book.client, self._told_s):
            return
        for event in reversed(self._journal.accepted[channel]):
            if event.at > now - self._told_s or event.server != run_id or event.withdrawn:
                continue
            order = self._journal.order(channel)
            if event.epoch == view.at.epoch:
                late = event.offset > view.at.offset
            else:
                late = order.get(event.epoch, -1) > order.get(view.at.epoch, -1)
            if late:
                self.fail("a heartbeat although blind", now, book.client, f"{event} at {event.at:.3f}, {view.at}")
            return

    def _on_closed(self, book: Book, now: float, entry: Closed) -> None:
        self.counts[f"close {entry.code}"] += 1
        code, client = entry.code, book.client
        if code == 4009:
            if book.kind != "plain":
                self.fail("4009 for a client with gaps", now, client, f"{entry}")
            mine = [key for key in self._views if key[0] is book]
            if not any(self._is_cut(channel, self._views[book, channel]) for _, channel in mine):
                self.fail("4009 without a cause", now, client, f"{entry}")
            for key in mine:
                del self._views[key]
        elif code == 4008:
            if book.steady and not self._troubled(client, 12.0):
                self.fail("4008 for one that is not slow", now, client, f"{entry}")
        elif code in (1011, 4010):
            if not self._troubled(client, 60.0) and (book.steady or code != 1011):
                self.fail(f"{code} without a cause", now, client, f"{entry}")
        elif code not in _ALWAYS_ALLOWED:
            self.fail(f"close {code}", now, client, f"{entry}")

    def _is_cut(self, channel: str, view: View) -> bool:
        """Whether after the place of a client there is something that cannot be given."""
        journal, at = self._journal, view.at
        if at is None:  # it has got nothing yet
            return True
        order = journal.order(channel)
        began_after = order.get(at.epoch, -1) < len(order) - 1
        was_given = bool(journal.at[channel, *at]) or at.offset == 0
        rest = [
            event for event in journal.accepted[channel] if event.epoch == at.epoch and event.offset > at.offset
        ]
        gone = any(
            (channel, at.epoch, event.offset) in journal.removed or self._too_large(event) for event in rest
        )
        return began_after or gone or not was_given or bool(journal.forgotten)

    def _on_refused(self, book: Book, now: float, entry: Refused) -> None:
        self.counts[f"refused {entry.status}"] += 1
        if 400 <= entry.status < 500 and entry.status != 408:
            self.fail(f"refused with {entry.status}", now, book.client, f"{entry}")

    def _on_blind(self, book: Book, now: float, entry: Blind) -> None:
        self.counts["stale" if entry.blind else "fresh"] += 1
        # While what is refused is looked up in the log, there is no proof, and no heartbeat.
        refuses = any(isinstance(each, Told) and each.cause == "refused" for _, each in book.entries[-20:])
        # Who is behind gets no heartbeats either: on a slow link that may take long.
        if entry.blind and book.steady and not refuses and not self._troubled(book.client, 20.0):
            self.fail("stale without a cause", now, book.client, f"{entry}")

    def at_the_end(self, books: list[Book], last: dict[str, str], sent_at: float, now: float) -> None:
        """After the last fault: everybody has the last event of each channel (`last`: ids), or came later."""
        for book in books:
            connections = [(at, entry) for at, entry in book.entries if isinstance(entry, Connected)]
            for channel in book.channels:
                if any(at > sent_at and entry.since[channel] is None for at, entry in connections):
                    continue
                if last[channel] not in self.view(book, channel).ids:
                    at = self.view(book, channel).at
                    what = f"{channel}: stands at {at}"
                    self.fail("not caught up at the end", now, book.client, what)


def _covers(gap: Told, offset: int) -> bool:
    return gap.first is not None and gap.last is not None and gap.first <= offset <= gap.last
