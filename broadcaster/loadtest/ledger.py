"""The ledger of a run: each event, for each client, was delivered, filtered, or lost for a named cause.

A pure function of what was published, delivered and lost. What remains was lost silently, which must not
happen.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broadcaster.core.text import printable_or_repr
from broadcaster.loadtest.deliveries import Deliveries
from broadcaster.loadtest.records import DISCONNECTED, NEVER_CONNECTED, LossRecord, PublishedRecord

PUBLISH_FAILED: Final = "publish failed"
"""The cause of what was not delivered because it was not published."""


class Missing(NamedTuple):
    """A delivery that did not arrive, without a named cause.

    Attributes:
        client: Number of the client.
        sequence: Of the event.
        position: `<epoch>-<offset>` of the event; empty if it has none.
    """

    client: int
    sequence: int
    position: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """`expected` = `delivered` + `filtered` + `named` + `unexplained`, always, and `unexplained` should be empty.

    Attributes:
        expected: Clients × events that were meant to be published.
        delivered: Deliveries that arrived, each counted once.
        filtered: Deliveries that a client did not want; load tests set no filter yet.
        lost: Deliveries that did not arrive, by the named cause; the most frequent first.
        unexplained: Deliveries that did not arrive without a named cause, by client and sequence.
        unconfirmed: Of the delivered, those of events whose publish seemed to have failed.
    """

    expected: int
    delivered: int
    filtered: int
    lost: dict[str, int]
    unexplained: list[Missing]
    unconfirmed: int

    @property
    def named(self) -> int:
        """Losses with a cause."""
        return sum(self.lost.values())


def balance(
    published: Sequence[PublishedRecord],
    deliveries: Deliveries,
    losses: Iterable[LossRecord],
    clients: Sequence[int],
) -> Ledger:
    """Account for every event and client.

    What was not delivered has one cause, the first of these: its publish failed; the hub has announced a gap that
    it lies in; the client was not connected, and could not resume.

    Args:
        published: Events that were meant to be published, of one source.
        deliveries: What arrived.
        losses: Gaps that were announced to clients, and times without a connection.
        clients: The numbers of the clients that count; rows of others are ignored.
    """
    events = _Events(published)
    accounts = _accounts(events, deliveries, clients)
    by_client = dict(zip(clients, accounts, strict=True))
    delivered = int(accounts.sum())
    lost: Counter[str] = Counter()
    lost[PUBLISH_FAILED] = sum(_settle(account, events.failed) for account in accounts)
    for loss in sorted(losses, key=lambda row: not row.was_announced):
        if loss.client in by_client:
            lost[loss.cause] += _settle(by_client[loss.client], events.covered_by(loss))
    return Ledger(
        expected=len(published) * len(clients),
        delivered=delivered,
        filtered=0,
        lost={cause: count for cause, count in lost.most_common() if count},
        unexplained=[
            Missing(client, events.rows[index].sequence, events.rows[index].position)
            for client, account in by_client.items()
            for index in np.flatnonzero(~account)
        ],
        unconfirmed=len(events.failed) * len(clients) - lost[PUBLISH_FAILED],
    )


class _Events:
    """The events of a run in the order of their sequence; an index is that into `rows`.

    Attributes:
        rows: The events.
        indexes: Of the events in the order in which they were published.
        failed: Indexes of those whose publish failed.
    """

    def __init__(self, published: Sequence[PublishedRecord]) -> None:
        order = sorted(range(len(published)), key=lambda index: published[index].sequence)
        self.rows = [published[index] for index in order]
        self.indexes = np.argsort(np.array(order, np.int64))
        self.failed = [index for index, row in enumerate(self.rows) if row.error]
        self._sequences = [row.sequence for row in self.rows]
        self._stored: dict[str, list[tuple[int, int]]] = {}  # by epoch: offset and index, in order of the offsets
        for index, row in enumerate(self.rows):
            if row.offset is not None:
                self._stored.setdefault(row.epoch, []).append((row.offset, index))
        for stored in self._stored.values():
            stored.sort()

    def covered_by(self, loss: LossRecord) -> Sequence[int]:
        """Indexes of the events whose absence a loss explains."""
        if loss.first is not None:
            stored = self._stored.get(loss.epoch, [])
            start = bisect_left(stored, (loss.first, 0))
            end = len(stored) if loss.last is None else bisect_left(stored, (loss.last + 1, 0))
            return [index for _, index in stored[start:end]]
        if loss.resumed_after:  # a client that resumed misses nothing but announced gaps
            return ()
        after, before = loss.after_sequence, loss.before_sequence
        start = 0 if after is None else bisect_right(self._sequences, after)
        end = len(self.rows) if before is None else bisect_left(self._sequences, before)
        return range(start, end)


def _accounts(events: _Events, deliveries: Deliveries, clients: Sequence[int]) -> NDArray[np.bool_]:
    """A row for each client, with an element for each event: whether it is accounted for; now, if delivered."""
    accounts = np.zeros((len(clients), len(events.rows)), bool)
    order = np.argsort(np.array(clients, np.int64))
    ordered = np.array(clients, np.int64)[order]
    if accounts.size:
        at = np.minimum(np.searchsorted(ordered, deliveries.client), len(clients) - 1)
        counts = ordered[at] == deliveries.client
        accounts[order[at[counts]], events.indexes[deliveries.event[counts]]] = True
    return accounts


def _settle(account: NDArray[np.bool_], indexes: Sequence[int]) -> int:
    """Account for some events; return how many of them were not accounted for before."""
    at = np.array(indexes, np.int64)
    count = len(at) - int(account[at].sum())
    account[at] = True
    return count


# In words

_REASONS: Final = {
    PUBLISH_FAILED: "Redis has not confirmed it, and it did not come",
    NEVER_CONNECTED: "could not connect at all",
    f"{DISCONNECTED} 1001": "the hub was going away",
    f"{DISCONNECTED} 1006": "the connection just ended",
    f"{DISCONNECTED} 1011": "no sign of life",
    f"{DISCONNECTED} 1012": "the hub was restarting",
    f"{DISCONNECTED} 4008": "too slow",
    f"{DISCONNECTED} 4009": "a gap that a plain client cannot be told",
    f"{DISCONNECTED} 4010": "Redis refuses the hub the channel",
}
"""What the causes mean that a client knows by itself. All other causes are those of gaps."""

_MISSING_SHOWN: Final = 10


def in_words(ledger: Ledger) -> list[str]:
    """The equation, and a line per cause, as text for a report."""
    parts = f"{ledger.delivered:,} delivered + {ledger.filtered:,} filtered"
    lost = ledger.named + len(ledger.unexplained)
    if not lost:
        named = "0 lost."
    elif not ledger.unexplained:
        named = f"{lost:,} lost, all named:"
    else:
        named = f"{lost:,} lost, {len(ledger.unexplained):,} of them without a word:"
    # A foreign hub may have named any cause, and this goes to a terminal.
    counts = {f"{printable_or_repr(cause)} ({_reason(cause)})": count for cause, count in ledger.lost.items()}
    if ledger.unexplained:
        counts["unexplained (nobody said so: this must not happen)"] = len(ledger.unexplained)
    width = max((len(f"{count:,}") for count in counts.values()), default=0)
    lines = [f"Ledger: {ledger.expected:,} expected = {parts} + {named}"]
    lines += [f"  {count:{width},}  {cause}" for cause, count in counts.items()]
    if ledger.unconfirmed:
        lines.append(f"  {ledger.unconfirmed:,} of the delivered came though their publish seemed to have failed.")
    return lines


def _reason(cause: str) -> str:
    if cause.startswith(DISCONNECTED):
        return _REASONS.get(cause, "closed by the hub")
    return _REASONS.get(cause, "gap announced by the hub")


def complaint(ledger: Ledger) -> str:
    """One sentence on a ledger that does not balance, with the first deliveries that are missing."""
    count = len(ledger.unexplained)
    shown: dict[int, list[str]] = {}
    for client, sequence, position in ledger.unexplained[:_MISSING_SHOWN]:
        shown.setdefault(client, []).append(position or f"#{sequence}")
    where = "; ".join(f"client {client}: {', '.join(names)}" for client, names in shown.items())
    more = f" and {count - _MISSING_SHOWN:,} more" if count > _MISSING_SHOWN else ""
    are = "delivery is" if count == 1 else "deliveries are"
    return f"the ledger does not close: {count:,} {are} missing and nobody said so: {where}{more}"
