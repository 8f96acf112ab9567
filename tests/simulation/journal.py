"""What the simulated Redis has taken, forgotten and kept: the truth, by which the oracle judges."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from tests.simulation.memory import Stream


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
    withdrawn: bool = False


@dataclass
class Journal:
    """Everything that all Redis processes of a simulation have stored.

    Attributes:
        accepted: Per channel, in the order of their acceptance.
        at: The events that were given a position: more than one if memory was set back.
        begun: When an epoch of a channel was first seen in Redis, in loop time; in the order in which they began.
        removed: When a position last left a log: trimmed, expired, evicted, deleted, forgotten.
        forgotten: When Redis has lost memory: set back, emptied, evicted, failed over; in loop time.
    """

    accepted: dict[str, list[Accepted]] = field(default_factory=lambda: defaultdict(list))
    at: dict[tuple[str, str, int], list[Accepted]] = field(default_factory=lambda: defaultdict(list))
    begun: dict[tuple[str, str], float] = field(default_factory=dict)
    removed: dict[tuple[str, str, int], float] = field(default_factory=dict)
    forgotten: list[float] = field(default_factory=list)

    def on_stored(self, payload: bytes, server: str, now: float) -> None:
        """An event was added to a log."""
        if (event := _read(payload)) is None:
            return
        channel, epoch, offset = event["channel"], event["epoch"], event["offset"]
        labels = (event["event_type"], event["source"], event["severity"])
        accepted = Accepted(channel, epoch, offset, event["event_id"], labels, len(payload), now, server)
        self.accepted[channel].append(accepted)
        self.at[channel, epoch, offset].append(accepted)
        self.on_epoch(channel, epoch, now)

    def on_epoch(self, channel: str, epoch: str, now: float) -> None:
        """An epoch was written to a channel's meta."""
        self.begun.setdefault((channel, epoch), now)

    def on_removed(self, entries: list[tuple[Any, list[bytes]]], now: float, *, withdrawn: bool = False) -> None:
        """Entries have left a log."""
        for _, fields in entries:
            if (event := _read(fields[1])) is None:
                continue
            place = event["channel"], event["epoch"], event["offset"]
            self.removed[place] = now
            if withdrawn:
                for accepted in self.at[place]:
                    accepted.withdrawn |= accepted.event_id == event["event_id"]

    def on_key_removed(self, key: bytes, value: Any, now: float) -> None:
        """A key was deleted, has expired or was evicted."""
        if isinstance(value, Stream):
            self.on_removed(value.entries, now)

    def order(self, channel: str) -> dict[str, int]:
        """The epochs of a channel by when they began: 0, 1, ..."""
        return {epoch: rank for rank, (_, epoch) in enumerate(key for key in self.begun if key[0] == channel)}


def _read(payload: bytes) -> dict[str, Any] | None:
    """A stored event; None if it is none."""
    try:
        event = json.loads(payload)
    except ValueError:
        return None
    return event if isinstance(event, dict) and {"channel", "epoch", "offset", "event_id"} <= set(event) else None
