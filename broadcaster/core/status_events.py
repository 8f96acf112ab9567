"""What a subscriber is told, in the place where it belongs among the events."""

from __future__ import annotations

from dataclasses import dataclass

from broadcaster.core.event import Event
from broadcaster.core.position import Gap


@dataclass(frozen=True, slots=True)
class Stale:
    """The hub has not beaten: whatever happens now, this subscriber does not see it.

    Attributes:
        silent_s: Seconds since the last beat.
    """

    silent_s: float


@dataclass(frozen=True, slots=True)
class Fresh:
    """The hub beats again; what was missed meanwhile has come, or was told as a gap."""


Received = Event | Gap | Stale | Fresh
"""What `Subscriber.receive` returns."""
