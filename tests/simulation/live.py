"""What holds for a client and a channel whose events are not stored. Shares no code with the product.

There are no positions: an event is known by its id, and its place is the one in which Redis has published it. What
lies between two events that a client was given, and was not given to it, must have been told meanwhile; it may be
lost untold only where the client itself has come anew, or an old master has published what nobody else could hear.
What a replica has dropped when it copied its master is told as soon as the hub has asked it, which is later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from tests.simulation.books import Beaten, Book, Connected, Given, Told, Welcomed
from tests.simulation.journal import Accepted
from tests.simulation.oracle import Findings, Truth
from tests.simulation.troubles import source, way

_MOVING_S: Final = 30.0
"""For so long another hub may bring what this one has given already: without history nothing says which it was."""

_WITHOUT_NUMBERS: Final = ("redis_link_lost", "no_history", "shed")


@dataclass(eq=False)
class View:
    """How one client has seen one channel.

    Attributes:
        next: Number of the first event that it may be given, in the order of publishing; None: not known yet.
        told: Whether it was told, or knows, that something is missing since it was given an event.
        came_with: Whether it has come with a `since`.
        welcomed_at: When this connection was welcomed; None: it was not.
        ids: Of the events that it was given.
        hub: That it is connected to.
        moved_at: Since when, if it was at another one before.
        owed: What it misses and has to be told, and by when.
    """

    next: int | None = None
    told: bool = True
    came_with: bool = False
    welcomed_at: float | None = None
    ids: set[str] = field(default_factory=set)
    hub: str = ""
    moved_at: float = -math.inf
    owed: tuple[str, float] | None = None


class LiveRules:
    """See `oracle.Rules`."""

    def __init__(self, truth: Truth, findings: Findings) -> None:
        self._truth = truth
        self._published = truth.journal.published
        self._troubles = truth.troubles
        self._fail = findings.fail
        self._views: dict[tuple[Book, str], View] = {}
        self._numbers: dict[str, dict[str, int]] = {}

    def _view(self, book: Book, channel: str) -> View:
        return self._views.setdefault((book, channel), View())

    def _number(self, channel: str, event_id: str) -> int | None:
        """The how many-th event of its channel an event is."""
        numbers, events = self._numbers.setdefault(channel, {}), self._published[channel]
        for number in range(len(numbers), len(events)):
            numbers[events[number].event_id] = number
        return numbers.get(event_id)

    def on_connected(self, book: Book, now: float, entry: Connected) -> None:
        for channel, since in entry.since.items():
            view = self._view(book, channel)
            view.told, view.owed, view.came_with, view.welcomed_at = True, None, since is not None, None
            before, view.hub = view.hub, entry.hub
            if before not in ("", entry.hub):
                view.moved_at = now
                if book.kind != "Subscriber":  # which knows what it was given
                    view.ids = set()

    def on_welcomed(self, book: Book, now: float, entry: Welcomed) -> None:
        view = self._view(book, entry.channel)
        view.welcomed_at = now
        if entry.position is not None:
            self._fail("a position without history", now, book.client, f"{entry}")
        if entry.recovered is not (False if view.came_with else None):
            self._fail("recovered without history", now, book.client, f"{entry}")

    def on_given(self, book: Book, now: float, entry: Given) -> None:
        view, channel = self._view(book, entry.channel), entry.channel
        self._collect(book, view, now)
        number = self._number(channel, entry.event_id)
        if entry.place is not None:
            self._fail("a position without history", now, book.client, f"{entry}")
        if number is None:
            self._fail("never published", now, book.client, f"{entry}")
            return
        event = self._published[channel][number]
        if book.wanted is not None and event.labels[0] != book.wanted:
            self._fail("held back by its filter", now, book.client, f"{entry}")
        if entry.event_id in view.ids:
            self._fail("given twice", now, book.client, f"{entry}")
        elif view.next is not None and number < view.next:
            if now - view.moved_at > _MOVING_S:
                self._fail("out of order", now, book.client, f"{entry}")
        elif view.next is not None and not view.told:
            for missing in self._published[channel][view.next : number]:
                if missing.server == event.server and self._owed(book, missing):
                    view.owed = view.owed or (f"{missing.event_id}: {entry}", self._told_by(missing, now))
                    break
            self._collect(book, view, now)
        view.ids.add(entry.event_id)
        view.next, view.told = max(number + 1, view.next or 0), False

    def _told_by(self, missing: Accepted, now: float) -> float:
        """When it has to be told at the latest that an event is lost."""
        resyncs = (at for at in self._truth.journal.resyncs if missing.at <= at <= now)
        return max((at + self._truth.told_s for at in resyncs), default=-math.inf)

    def _collect(self, book: Book, view: View, now: float) -> None:
        """Complain of what is owed for too long."""
        if view.owed is not None and now > view.owed[1]:
            self._fail("lost, untold", now, book.client, view.owed[0])
            view.owed = None

    def _owed(self, book: Book, event: Accepted) -> bool:
        return book.wanted in (None, event.labels[0]) and event.size <= self._truth.max_bytes

    def on_told(self, book: Book, now: float, gap: Told) -> None:
        view = self._view(book, gap.channel)
        view.told, view.owed = True, None
        if gap.cause == "no_history":  # it has connected again, perhaps to another hub
            view.moved_at = now
        if gap.cause not in _WITHOUT_NUMBERS or gap.position is not None or gap.last is not None:
            self._fail("a gap with numbers, without history", now, book.client, f"{gap}")
        hubs = book.hubs if gap.cause == "no_history" else {book.hub}  # it was at another one before
        parts = [part for hub in sorted(hubs) for part in (*way(book.client, hub), *source(hub))]
        if gap.cause == "shed" or (gap.cause == "no_history" and not book.steady):
            return  # one that sleeps answers no ping, is closed for that, and comes back
        if not self._troubles.any(parts, now, 30.0) and not view.came_with:
            self._fail(f"{gap.cause} without a cause", now, book.client, f"{gap}")

    def on_beaten(self, book: Book, now: float, entry: Beaten) -> None:
        view, run_id, told_s = self._view(book, entry.channel), self._truth.in_charge(), self._truth.fresh_s(now)
        self._collect(book, view, now)
        if entry.position is not None and entry.is_claim:
            self._fail("a position without history", now, book.client, f"{entry}")
        if not run_id or not book.steady or view.told or view.next is None or not entry.is_claim:
            return
        if self._troubles.any(way(book.client, book.hub), now, told_s):
            return
        for event in self._published[entry.channel][view.next :]:
            if event.at < now - told_s and event.server == run_id and self._owed(book, event):
                self._fail("a heartbeat although blind", now, book.client, f"{event} at {event.at:.3f}")
                return

    def may_be_cut(self, book: Book, now: float) -> bool:
        came_with = any(self._view(book, channel).came_with for channel in book.channels)
        return came_with or self._troubles.any([*way(book.client, book.hub), *source(book.hub)], now, 30.0)

    def forget(self, book: Book) -> None:
        for channel in book.channels:
            view = self._view(book, channel)
            view.told, view.owed = True, None

    def at_the_end(self, book: Book, last: dict[str, str], sent_at: float, now: float) -> None:
        since = [entry for at, entry in book.entries if at > sent_at]
        came_late = any(isinstance(entry, Connected) for entry in since)
        if book.kind == "Subscriber" and not book.blind:  # it may have been told to stay away for some seconds
            connections = self._truth.connections(book.client)
            came_late |= not any(began <= sent_at < ended for began, ended in connections)
        for channel in book.channels:
            self._collect(book, self._view(book, channel), now)
            was_told = any(isinstance(entry, Told) and entry.channel == channel for entry in since)
            if last[channel] not in self._view(book, channel).ids and not came_late and not was_told:
                self._fail("not live at the end", now, book.client, f"{channel}")
