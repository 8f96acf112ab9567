"""How far somebody is behind, and how far he may be."""

from __future__ import annotations

from typing import NamedTuple

from broadcaster.settings import HubTable


class Lag(NamedTuple):
    """Measured of a listener, or the most that is allowed to one.

    Attributes:
        ms: Age of what it waits for, in milliseconds.
        events: Events that it has not been given.
        bytes: Bytes of their frames.
    """

    ms: float
    events: float
    bytes: float

    @classmethod
    def most(cls, settings: HubTable) -> Lag:
        """What is allowed."""
        return cls(settings.behind_max_ms, settings.behind_max_events, settings.behind_max_bytes)

    def share_of(self, most: Lag) -> float:
        """How much of what is allowed is used up, by whichever of the three is worst: above 1 it is too much."""
        return max(self.ms / most.ms, self.events / most.events, self.bytes / most.bytes)

    def __str__(self) -> str:
        return f"{self.events:.0f} events, {self.bytes:.0f} bytes, {self.ms:.0f} ms behind"
