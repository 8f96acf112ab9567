"""Judges what clients were given and told by what Redis has taken. Shares no code with the product.

Every rule is of docs/contract.md. What a client is given and told of a channel is judged by `stored`, or by `live`
where events are not stored; here is what concerns its connections: why they end, and whether it knows that it is
blind.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from tests.simulation.books import (
    Beaten,
    Blind,
    Book,
    Closed,
    Connected,
    Entry,
    Given,
    Refused,
    Told,
    Welcomed,
)
from tests.simulation.journal import Accepted, Journal
from tests.simulation.troubles import REDIS, Part, Troubles, rights, source, way

_FORGETTING: Final = (
    *("redis_restart_older", "redis_restart_empty", "redis_set_back", "redis_evict", "clock_step"),
    *("redis_fail_over", "redis_split", "redis_promote"),
)
"""Kinds of trouble after which Redis may not know an event that it has stored."""

_SLOW_REDIS: Final = ("redis_slow", "redis_freeze", "replica_lag", "replica_freeze")
"""Kinds of trouble in which a round of a hub's probe takes long, and succeeds all the same."""

_LASTED_S: Final = 5.0
"""A connection that has neither lasted so long nor brought an event counts as a failed attempt."""

_LONGEST_WAIT_S: Final = 30.0
"""The bound of the wait after many of them; after the first it is 1 s, and doubles with each."""

_DRAIN_S: Final = 1.0
"""So much longer a hub that drains may ask a client to stay away."""

_BURST: Final = 100
"""So many events may have waited."""

_SLOW_WAYS: Final = ("throttle", "delay", "black_hole", "one_way", "half_open", "client_sleep", "hub_freeze")
"""Kinds of trouble between a hub and a client that make the client slow."""


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


@dataclass
class Truth:
    """What is known of a simulation, and by nobody in it.

    Attributes:
        journal: What Redis has taken.
        troubles: What was done to whom.
        is_stored: Whether an event is in the log of the Redis that is in charge now.
        in_charge: The run_id of that Redis; empty while there is none, or another one is not gone.
        silent_s: For how many seconds a hub has been running, and could not reach Redis.
        told_s: Seconds within which a hub that cannot reach Redis says so, by the settings.
        round_s: Seconds that a round of a hub's probe takes at most: what it proves is as old as that.
        beat_s: Seconds between heartbeats.
        ping_s: Seconds between pings.
        idle_expire_s: Seconds of silence after which a channel's events expire.
        dedupe_s: Seconds within which an event that is sent again is stored only once.
        max_bytes: The largest event that the hubs deliver.
        behind_max_events: So many events the hubs keep for a client that does not take them.
        clock_us: The clock of the Redis that is in charge, in microseconds since 1970.
        connections: When the connections of a client began and ended, of those that have, as far as that is seen.
    """

    journal: Journal
    troubles: Troubles
    is_stored: Callable[[Accepted], bool]
    in_charge: Callable[[], str]
    silent_s: Callable[[str], float]
    told_s: float
    round_s: float
    beat_s: float
    ping_s: float
    idle_expire_s: int
    dedupe_s: int
    max_bytes: int
    behind_max_events: int
    clock_us: Callable[[], int]
    connections: Callable[[str], list[tuple[float, float]]] = lambda client: []

    def fresh_s(self, now: float) -> float:
        """Seconds within which who gets heartbeats has what Redis has taken."""
        slow = self.troubles.any([REDIS], now, self.told_s + self.round_s, _SLOW_REDIS)
        return self.told_s + (self.round_s if slow else 0.0)


class Rules(Protocol):
    """What holds for what a client is given and told of its channels. Called with an entry's time."""

    def on_connected(self, book: Book, now: float, entry: Connected) -> None: ...
    def on_welcomed(self, book: Book, now: float, entry: Welcomed) -> None: ...
    def on_given(self, book: Book, now: float, entry: Given) -> None: ...
    def on_told(self, book: Book, now: float, entry: Told) -> None: ...
    def on_beaten(self, book: Book, now: float, entry: Beaten) -> None: ...

    def may_be_cut(self, book: Book, now: float) -> bool:
        """Whether a plain client must be told just now that what follows cannot be given."""
        ...

    def forget(self, book: Book) -> None:
        """It was told so: it begins anew."""
        ...

    def at_the_end(self, book: Book, last: dict[str, str], sent_at: float, now: float) -> None:
        """After the last fault: it has the last event of each channel (`last`: ids), or came later."""
        ...


@dataclass
class Findings:
    """What was found.

    Attributes:
        failures: Broken promises.
        counts: What was reached.
    """

    failures: list[Failure] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def fail(self, rule: str, now: float, who: str, what: str) -> None:
        """Note a broken promise."""
        self.failures.append(Failure(rule, now, who, what))


class Oracle:
    """Judges each entry of each book when it is made, and all of them at the end.

    Args:
        truth: What is so.
        rules: Of the channels.
        findings: Shared with the rules.
    """

    def __init__(self, truth: Truth, rules: Rules, findings: Findings) -> None:
        self._truth = truth
        self._troubles = truth.troubles
        self._rules = rules
        self._counts = findings.counts
        self.failures = findings.failures
        self.fail = findings.fail

    def on_entry(self, book: Book, now: float, entry: Entry) -> None:
        """Judge what has reached a client."""
        judge: dict[type[Entry], Any] = {
            Connected: self._on_connected,
            Welcomed: self._on_welcomed,
            Given: self._on_given,
            Told: self._on_told,
            Beaten: self._on_beaten,
            Closed: self._on_closed,
            Refused: self._on_refused,
            Blind: self._on_blind,
        }
        judge[type(entry)](book, now, entry)

    def _on_connected(self, book: Book, now: float, entry: Connected) -> None:
        self._counts["connections"] += 1
        self._rules.on_connected(book, now, entry)

    def _on_welcomed(self, book: Book, now: float, entry: Welcomed) -> None:
        self._counts[f"welcome, recovered {entry.recovered}".lower()] += 1
        self._rules.on_welcomed(book, now, entry)

    def _on_given(self, book: Book, now: float, entry: Given) -> None:
        self._counts["deliveries"] += 1
        self._rules.on_given(book, now, entry)

    def _on_told(self, book: Book, now: float, entry: Told) -> None:
        self._counts[f"gap {entry.cause}"] += 1
        if entry.cause in ("unexplained", "closed"):
            self.fail("unexplained", now, book.client, f"{entry}")
        if entry.cause == "shed" and book.steady and not self._is_slow(book, now):
            self.fail("shed for one that is not slow", now, book.client, f"{entry}")
        self._rules.on_told(book, now, entry)

    def _is_slow(self, book: Book, now: float) -> bool:
        """Whether something keeps a client from reading all at once, or more comes than a hub keeps for it.

        So much is what has waited for Redis.
        """
        if self._truth.behind_max_events < _BURST and self._troubles.any([REDIS], now, 12.0):
            return True
        return self._troubles.any(way(book.client, book.hub), now, 12.0, _SLOW_WAYS)

    def _on_beaten(self, book: Book, now: float, entry: Beaten) -> None:
        self._counts["beats"] += entry.is_claim
        silent_s = self._truth.silent_s(book.hub) if book.steady and entry.is_claim else 0.0
        told_s = self._truth.told_s
        # What a slow link has taken before it was cut still arrives.
        slow = self._troubles.any(source(book.hub), now, silent_s + told_s, ("throttle", "delay"))
        if silent_s > told_s and not slow and not self._troubles.any(way(book.client, book.hub), now, 5.0):
            self.fail("a heartbeat without Redis", now, book.client, f"for {silent_s:.1f} s: {entry}")
        self._rules.on_beaten(book, now, entry)

    def _on_closed(self, book: Book, now: float, entry: Closed) -> None:
        self._counts[f"close {entry.code}"] += 1
        code, client, here = entry.code, book.client, way(book.client, book.hub)
        silent_s = 3 * self._truth.ping_s + 5  # after so long a peer that is not there is noticed for sure
        match code:
            case 4009:
                if book.kind != "plain":
                    self.fail("4009 for a client with gaps", now, client, f"{entry}")
                excused = self._rules.may_be_cut(book, now)
                self._rules.forget(book)
            case 4008:
                excused = not book.steady or self._is_slow(book, now)
            case 4010:
                excused = self._troubles.any([REDIS], now, 5.0, ("redis_oom", "redis_evict"))
                excused |= self._was_denied(book, now, 5.0)
                away = self._troubles.any(source(book.hub), now, 2.0)
                excused |= "its log cannot be read" in entry.reason and away
            case 1011:
                excused = not book.steady or self._troubles.any(here, now, silent_s)
            case 1012:
                excused = self._is_leaving(here, now) or self._troubles.any([REDIS], now, 10.0, ("redis_deny",))
            case 1006:
                excused = (
                    entry.by_itself or not book.steady or self._troubles.any(here, now, 3 * self._truth.ping_s + 5)
                )
            case _:
                excused = False
        if not excused:
            self.fail(f"{code} without a cause", now, client, f"{entry}")

    def _is_leaving(self, here: tuple[Part, ...], now: float) -> bool:
        """Whether the hub was told to end, which it cannot obey while it is frozen."""
        frozen = self._troubles.any(here, now, 10.0, ("hub_freeze",))
        return self._troubles.any(here, now, 200.0 if frozen else 10.0, ("hub_drain",))

    def _was_denied(self, book: Book, now: float, within_s: float) -> bool:
        """Whether a right of its channels was missing, as far as its hub can know: what is frozen gives none."""
        parts = rights(book.channels)
        denials = [each for each in self._troubles.noted if each.kind == "redis_deny" and each.part in parts]
        return any(
            each.begin <= now <= self._troubles.end(source(book.hub), each.end, within_s) for each in denials
        )

    def _on_refused(self, book: Book, now: float, entry: Refused) -> None:
        self._counts[f"refused {entry.status}"] += 1
        here = way(book.client, book.hub)
        match entry.status:
            case 0 | 408:
                denied = self._troubles.any([REDIS], now, 10.0, ("redis_deny",))  # which may end a hub
                excused = denied or self._troubles.any(here, now, 10.0)
            case 503:
                denied = self._troubles.any([REDIS], now, 10.0, ("redis_oom",)) or self._was_denied(
                    book, now, 10.0
                )
                excused = denied or self._is_leaving(here, now)
            case _:
                excused = False
        if not excused:
            self.fail(f"refused with {entry.status}", now, book.client, f"{entry}")

    def _on_blind(self, book: Book, now: float, entry: Blind) -> None:
        self._counts["stale" if entry.blind else "fresh"] += 1
        if entry.blind is _was_blind(book):
            rule = "stale twice" if entry.blind else "fresh, but it was not stale"
            self.fail(rule, now, book.client, f"{entry}")
        if not entry.blind or not book.steady:
            return
        # While what is refused is looked up in the log, there is no proof, and no heartbeat.
        within_s = 3 * self._truth.beat_s + self._truth.told_s + 3
        refuses = any(self._is_refused_since(channel, now - within_s) for channel in book.channels)
        # A balancer may have led it from one to another since.
        hubs = book.hubs if book.kind == "Subscriber" else {book.hub}
        parts = [part for hub in hubs for part in (*way(book.client, hub), *source(hub))]
        if not refuses and not self._troubles.any(parts, now, within_s):
            self.fail("stale without a cause", now, book.client, f"{entry}")

    def _is_refused_since(self, channel: str, then: float) -> bool:
        """Whether events that hubs refuse have come lately."""
        for event in reversed(self._truth.journal.accepted[channel]):
            if event.at < then:
                return False
            if event.size > self._truth.max_bytes:
                return True
        return False

    def at_the_end(self, books: list[Book], last: dict[str, dict[str, str]], sent_at: float, now: float) -> None:
        """After the last fault.

        Args:
            books: Of all clients.
            last: Per filter ("": none), the id of the last event of each channel.
            sent_at: When these were published.
            now: Loop time.
        """
        for book in books:
            if book.blind and self._backs_off(book, now):
                self._counts["backs off at the end"] += 1
                continue
            self._rules.at_the_end(book, last[book.wanted or ""], sent_at, now)
            if book.blind:
                self.fail("blind at the end", now, book.client, f"{book.kind}")
        for said in self._truth.journal.misnamed:
            self.fail("an epoch named before another one", now, "redis", said)
        for accepted in self._truth.journal.accepted.values():
            self._judge_dedupe(accepted, now)

    def _backs_off(self, book: Book, now: float) -> bool:
        """Whether a `Subscriber` may still be waiting before its next attempt: its connections were in vain."""
        if book.kind != "Subscriber":
            return False
        born = max((at for at, entry in book.entries if isinstance(entry, Connected)), default=now)
        events = [at for at, entry in book.entries if isinstance(entry, Given)]
        in_vain, until = 0, -math.inf
        for began, ended in self._truth.connections(book.client):
            if began < born:
                continue
            brought = any(began <= at <= ended for at in events)
            in_vain = 0 if brought or ended - began >= _LASTED_S else in_vain + 1
            # An attempt may have been refused meanwhile: that makes two waits.
            wait_s = min(2.0 ** (in_vain - 1), _LONGEST_WAIT_S) if in_vain else 0.0
            until = ended + 2 * wait_s + _DRAIN_S
        return now < until

    def _judge_dedupe(self, accepted: list[Accepted], now: float) -> None:
        """An event is stored once, however often it is sent, unless the first one was forgotten."""
        first: dict[str, Accepted] = {}
        for event in accepted:
            if event.withdrawn:
                continue
            before = first.setdefault(event.event_id, event)
            if before is event or event.at - before.at > self._truth.dedupe_s:
                continue
            forgot = self._troubles.any([REDIS], event.at, event.at - before.at, _FORGETTING)
            if not forgot:
                self.fail("stored twice", now, "redis", f"{before} at {before.at:.3f}, {event} at {event.at:.3f}")
                return


def _was_blind(book: Book) -> bool:
    """What a client knew of that before its last entry, in this life."""
    before = itertools.islice(reversed(book.entries), 1, None)
    last = next((entry for _, entry in before if isinstance(entry, Blind | Connected)), None)
    return isinstance(last, Blind) and last.blind
