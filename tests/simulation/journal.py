"""What the simulated Redis has taken, forgotten and kept: the truth, by which the oracle judges."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Final

from tests.simulation.memory import Stream

_TIMED: Final = re.compile("T[0-9a-v]{9}[0-9a-f]{6}")
"""The name of an epoch, by the contract: the time at which it began, and something by chance."""


@dataclass(slots=True, eq=False)
class Accepted:
    """An event that Redis has stored.

    Attributes:
        channel: Its channel.
        epoch: Of its position.
        offset: Of its position.
        event_id: Its id.
        labels: Its type, source and severity.
        size: Bytes of the whole event.
        at: When, in loop time.
        server: The run_id of the process that stored it.
        stored_us: When, by Redis' clock, in microseconds since 1970; -1: it does not say.
        withdrawn: Whether the same script removed it again.
    """

    channel: str
    epoch: str
    offset: int
    event_id: str
    labels: tuple[str, str, str]
    size: int
    at: float
    server: str
    stored_us: int = -1
    withdrawn: bool = False


@dataclass
class Span:
    """What an epoch has had.

    Attributes:
        rank: The how many-th of its channel began.
        first: Where it began: the offset before its first event.
        highest: The highest offset that it has given.
        at: When it began, in loop time.
    """

    rank: int
    first: int
    highest: int
    at: float


@dataclass(frozen=True, slots=True)
class Loss:
    """Redis has lost memory: it was set back, emptied or failed over, or a channel's counter is gone.

    Attributes:
        at: When, in loop time.
        heads: Where each channel stood in what it has had since: epoch and offset.
        by_expiry: Whether nobody had used a channel for too long.
        left: The run_id of a master that goes on for itself: what it stores from then on is in no other memory.
    """

    at: float
    heads: dict[str, tuple[str, int]]
    by_expiry: bool = False
    left: str = ""


@dataclass
class Journal:
    """Everything that all Redis processes of a simulation have stored, or only published.

    Attributes:
        accepted: Per channel, in the order of their acceptance.
        at: The events that were given a position: more than one if memory was set back.
        doubled: Per channel, events at positions that others had been given before.
        epochs: Per channel the epochs that Redis has begun, in the order in which they began.
        removed: When a position last left a log: trimmed, expired, evicted, deleted.
        losses: When Redis has lost memory.
        resyncs: When replicas have copied their master's memory: what had not been passed on by then never is.
        misnamed: Epochs that a Redis has named before one that it knew.
        published: Per channel the events that were published and not stored: their position is 0.
    """

    accepted: dict[str, list[Accepted]] = field(default_factory=lambda: defaultdict(list))
    at: dict[tuple[str, str, int], list[Accepted]] = field(default_factory=lambda: defaultdict(list))
    doubled: dict[str, list[Accepted]] = field(default_factory=lambda: defaultdict(list))
    epochs: dict[str, dict[str, Span]] = field(default_factory=lambda: defaultdict(dict))
    removed: dict[tuple[str, str, int], float] = field(default_factory=dict)
    losses: list[Loss] = field(default_factory=list)
    resyncs: list[float] = field(default_factory=list)
    misnamed: list[str] = field(default_factory=list)
    published: dict[str, list[Accepted]] = field(default_factory=lambda: defaultdict(list))

    def on_stored(self, payload: bytes, server: str, now: float) -> None:
        """An event was added to a log."""
        if (event := _read(payload)) is None or not {"epoch", "offset"} <= set(event):
            return
        channel, epoch, offset = event["channel"], event["epoch"], event["offset"]
        rest = _labels(event), len(payload), now, server, event.get("stored_at_us", -1)
        accepted = Accepted(channel, epoch, offset, event["event_id"], *rest)
        here = self.at[channel, epoch, offset]
        if any(not each.withdrawn for each in here):
            self.doubled[channel].append(accepted)
        here.append(accepted)
        self.accepted[channel].append(accepted)
        span = self.on_epoch(channel, epoch, offset - 1, now)
        span.highest = max(span.highest, offset)

    def on_published(self, channel: str, payload: bytes, server: str, now: float) -> None:
        """An event was published, and not stored before."""
        if (event := _read(payload)) is not None and "offset" not in event:
            accepted = Accepted(channel, "", 0, event["event_id"], _labels(event), len(payload), now, server)
            self.published[channel].append(accepted)

    def on_epoch(self, channel: str, epoch: str, offset: int, now: float, before: str = "") -> Span:
        """An epoch was written to a channel's meta, or an event has it.

        Args:
            channel: Which one.
            epoch: Its epoch.
            offset: Where it began, if it is new.
            now: Loop time.
            before: The epoch that the meta had before.
        """
        spans = self.epochs[channel]
        if epoch not in spans:
            spans[epoch] = Span(len(spans), offset, offset, now)
            if is_named_before(epoch, before):
                self.misnamed.append(f"{channel}: {epoch} after {before}")
        return spans[epoch]

    def has_given(self, channel: str, epoch: str, offset: int) -> bool:
        """Whether a position was ever one of the channel's: of an event, or where an epoch began."""
        span = self.epochs[channel].get(epoch)
        return span is not None and span.first <= offset <= span.highest

    def may_be_lost(
        self, channel: str, epoch: str, offset: int, until: float, taken_at: float | None = None
    ) -> bool:
        """Whether a memory that Redis has had since does not reach up to a position.

        Of several events at one position the last one is meant, or the one that was taken at `taken_at`.
        """
        events = [event for event in self.at.get((channel, epoch, offset), ()) if not event.withdrawn]
        after = max((event.at for event in events), default=0.0) if taken_at is None else taken_at
        for loss in self.losses:
            if loss.left and loss.at <= until and any(event.server == loss.left for event in events):
                return True
            if not after <= loss.at <= until:
                continue
            head = loss.heads.get(channel)
            if head is None or is_named_before(head[0], epoch) or (head[0] == epoch and head[1] < offset):
                return True
        return False

    def on_removed(self, entries: list[tuple[Any, list[bytes]]], now: float, *, withdrawn: bool = False) -> None:
        """Entries have left a log."""
        for _, fields in entries:
            if (event := _read(fields[1])) is None or "offset" not in event:
                continue
            place = event["channel"], event["epoch"], event["offset"]
            self.removed[place] = now
            if withdrawn:
                self._withdraw(place, event["event_id"])

    def _withdraw(self, place: tuple[str, str, int], event_id: str) -> None:
        """The script that has stored an event has removed it again: its position was not given."""
        channel, epoch, offset = place
        for accepted in self.at[place]:
            accepted.withdrawn |= accepted.event_id == event_id
        if all(accepted.withdrawn for accepted in self.at[place]):
            span = self.epochs[channel][epoch]
            span.highest = min(span.highest, max(span.first, offset - 1))

    def on_key_removed(self, key: bytes, value: Any, now: float) -> None:
        """A key was deleted, has expired or was evicted."""
        if isinstance(value, Stream):
            self.on_removed(value.entries, now)


def is_named_before(epoch: str, other: str) -> bool:
    """Whether of two epochs the first is the older one, by the contract: by their names, if they have times.

    One without a time is older than all that have one; of two such it is not known.
    """
    if not _is_timed(other):
        return False
    return not _is_timed(epoch) or epoch < other


def _is_timed(epoch: str) -> bool:
    return bool(_TIMED.fullmatch(epoch))


def _labels(event: dict[str, Any]) -> tuple[str, str, str]:
    return event["event_type"], event["source"], event.get("severity", "critical")


def _read(payload: bytes) -> dict[str, Any] | None:
    """An event; None if it is none."""
    try:
        event = json.loads(payload)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event_id" in event else None
