"""What was done to whom, and when. A promise of time may be broken only by what explains it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

Part = frozenset[str]
"""A process, or the link between two."""

REDIS: Final = Part(["redis"])

EVERY_CHANNEL: Final = "every channel"
"""To which Redis refuses a command."""


@dataclass(eq=False, slots=True)
class Trouble:
    """Something that was done.

    Attributes:
        kind: A fault, or what else there is: `starts`, a hub that has not been ready yet.
        part: To what.
        begin: From when, in loop time.
        end: Until when.
    """

    kind: str
    part: Part
    begin: float
    end: float = math.inf


@dataclass
class Troubles:
    """All that was done."""

    noted: list[Trouble] = field(default_factory=list)

    def note(self, kind: str, names: Collection[str], begin: float, end: float = math.inf) -> Trouble:
        """Something begins; the end may be set later."""
        trouble = Trouble(kind, Part(names), begin, end)
        self.noted.append(trouble)
        return trouble

    def any(
        self, parts: Collection[Part], now: float, within_s: float, kinds: Collection[str] | None = None
    ) -> bool:
        """Whether something was done to one of these parts within so many seconds before now."""
        return any(
            trouble.begin <= now and trouble.end >= now - within_s and trouble.part in parts
            for trouble in self.noted
            if kinds is None or trouble.kind in kinds
        )

    def end(self, parts: Collection[Part], begin: float, pause_s: float) -> float:
        """Until `pause_s` after the last thing that is done to one of these parts, with shorter pauses between."""
        end = begin + pause_s
        for trouble in sorted(self.noted, key=lambda each: each.begin):
            if trouble.part in parts and begin <= trouble.end and trouble.begin <= end:
                end = max(end, trouble.end + pause_s)
        return end

    def begin(self, parts: Collection[Part], now: float, within_s: float, kinds: Collection[str]) -> float:
        """Since when something is done to one of these parts, or was until so many seconds ago; else infinite."""
        found = (
            trouble.begin
            for trouble in self.noted
            if trouble.begin <= now and trouble.end >= now - within_s and trouble.part in parts
            if trouble.kind in kinds
        )
        return min(found, default=math.inf)


def way(client: str, hub: str) -> tuple[Part, ...]:
    """What lies between a client and what a hub sends it: both processes, and their link."""
    return Part([client]), Part([hub]), Part([client, hub])


def rights(channels: Collection[str]) -> list[Part]:
    """What is refused to a client of these channels when Redis refuses something by its rights."""
    return [Part(["redis", channel]) for channel in (*channels, EVERY_CHANNEL)]


def source(hub: str) -> tuple[Part, ...]:
    """Where a hub gets its events: Redis, and the link to it."""
    return REDIS, Part([hub, "redis"]), Part([hub])
