"""Status changes of a subscriber, delivered in order among the events."""

from __future__ import annotations

from dataclasses import dataclass

from broadcaster.core.event import Event
from broadcaster.core.position import Gap


@dataclass(frozen=True, slots=True)
class Stale:
    """Heartbeats of the hub are missing: this subscriber does not see what happens now.

    Attributes:
        silent_s: Seconds since the last heartbeat.
    """

    silent_s: float


@dataclass(frozen=True, slots=True)
class Fresh:
    """Heartbeats have resumed; what was missed meanwhile was delivered, or announced as a gap."""


Received = Event | Gap | Stale | Fresh
"""What `Subscriber.receive` returns."""
