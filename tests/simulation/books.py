"""What one client was given and told: everything that reached it, in order, over all of its connections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple


class Place(NamedTuple):
    """A position, as clients read it."""

    epoch: str
    offset: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.offset}"

    @classmethod
    def read(cls, text: object) -> Place | None:
        """`<epoch>-<offset>`; None for null."""
        if text is None:
            return None
        epoch, _, offset = str(text).rpartition("-")
        return cls(epoch, int(offset))


@dataclass(frozen=True, slots=True)
class Connected:
    """It asks a hub for its channels, each with the position after which it wants to go on.

    None: with a time, as it writes it; or now.
    """

    hub: str
    since: dict[str, Place | None]
    time: str | None = None


@dataclass(frozen=True, slots=True)
class Welcomed:
    channel: str
    position: Place | None
    recovered: bool | None


@dataclass(frozen=True, slots=True)
class Given:
    """An event; without a place where events are not stored."""

    channel: str
    place: Place | None
    event_id: str


@dataclass(frozen=True, slots=True)
class Told:
    """A gap."""

    channel: str
    cause: str
    epoch: str | None
    first: int | None
    last: int | None
    position: Place | None


@dataclass(frozen=True, slots=True)
class Beaten:
    """A heartbeat; or the position that a `Subscriber` says it has reached."""

    channel: str
    position: Place | None
    is_claim: bool = True


@dataclass(frozen=True, slots=True)
class Closed:
    """Its connection has ended; 1006: without a close, `by_itself`: because the client gave it up."""

    code: int
    reason: str
    by_itself: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """Its handshake was refused with this HTTP status; 0: there was nobody."""

    status: int


@dataclass(frozen=True, slots=True)
class Blind:
    """Heartbeats are missing (`Stale`), or come again."""

    blind: bool


Entry = Connected | Welcomed | Given | Told | Beaten | Closed | Refused | Blind


@dataclass(eq=False)
class Book:
    """The book of one client.

    Attributes:
        client: Its name.
        kind: `v1`, `plain` or `Subscriber`.
        channels: What it asks for, each with the position it first came with; None: with a time, or now.
        wanted: Filter: a type, or None for everything.
        steady: Whether it always reads at once: then it is never too slow.
        time: The time that it asks for, as it writes it, where it has no position; None: now.
        entries: With their loop time.
        listener: Called with each entry.
        at: Per channel up to where it was given or told everything; None before that is known.
        hub: The one that it has asked last.
        hubs: All that it has asked.
        blind: Whether it knows that it is blind.
    """

    client: str
    kind: str
    channels: dict[str, Place | None]
    wanted: str | None = None
    steady: bool = True
    time: str | None = None
    entries: list[tuple[float, Entry]] = field(default_factory=list)
    listener: Callable[[Book, float, Entry], None] = lambda book, now, entry: None
    at: dict[str, Place | None] = field(default_factory=dict)
    hub: str = ""
    hubs: set[str] = field(default_factory=set)
    blind: bool = False

    def asks(self, hub: str) -> None:
        """It is led to a hub."""
        self.hub = hub
        self.hubs.add(hub)

    def has_been_given(self, channel: str, place: Place) -> bool:
        """Whether it has got an event of this place."""
        return any(
            isinstance(entry, Given) and (entry.channel, entry.place) == (channel, place)
            for _, entry in self.entries
        )

    def note(self, now: float, entry: Entry) -> None:
        match entry:
            case Connected():
                self.asks(entry.hub)
                self.blind = False
            case Blind():
                self.blind = entry.blind
            case Welcomed() | Beaten(is_claim=True):
                self.blind = False
        self.entries.append((now, entry))
        self.listener(self, now, entry)
