"""What a hub needs of the place where events are stored and published, in the hub's own words.

Implemented by `redis_broker.py` for a single Redis server; Sentinel and Cluster fit behind the same protocol.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from broadcaster.core.errors import RedisRefused, RedisUnavailable
from broadcaster.core.position import Head, Position
from broadcaster.core.subscription import SubscriptionHandlers
from broadcaster.publish.publisher import Published
from broadcaster.settings import RedisTable

Whereabouts = Position | None | RedisUnavailable | RedisRefused
"""Where a channel stands; None if that cannot be known; an error if Redis answers with one for this channel."""


class StoredEvents(NamedTuple):
    """A page of a channel's log as it is stored.

    Attributes:
        head: Where the channel stood when it was read.
        items: Offset and payload of each event, in order.
        complete: Whether nothing came after them.
    """

    head: Head
    items: list[tuple[int, bytes]]
    complete: bool


class Broker(Protocol):
    """Publish, subscribe, where-is, page, probe.

    Attributes:
        confirmed: Channels whose subscription holds now.
        refused: Channels to which the hub may not subscribe.
        reconnects: How often the subscriptions were restored.
        node: Where they are held, if that is not where events are published; else empty.
        moves: How often it was another node.
        moved: Which one was left last, and why; empty: none.
        lag_max_s: Seconds within which what was published has to come; None: until the round ends.

    Every coroutine but `run` raises `RedisUnavailable` when a retry may help, and `RedisRefused` when it will not.
    """

    @property
    def confirmed(self) -> Collection[str]: ...

    @property
    def refused(self) -> Collection[str]: ...

    @property
    def reconnects(self) -> int: ...

    @property
    def node(self) -> str: ...

    @property
    def moves(self) -> int: ...

    @property
    def moved(self) -> str: ...

    @property
    def lag_max_s(self) -> float | None: ...

    def distrust(self, why: str) -> str:
        """What was published has not come: subscribe at another node, if there is one.

        Returns:
            What is wrong, and where.
        """

    def use(self, redis: RedisTable) -> None:
        """Log in as this table says on new connections, and cut none."""

    async def run(self, handlers: SubscriptionHandlers) -> None:
        """Keep the subscriptions until cancelled.

        Raises:
            RedisRefused: No subscription is possible, and a retry would not help.
        """

    def subscribe(self, channel: str) -> None:
        """Subscribe to a channel, now or as soon as it is possible."""

    def unsubscribe(self, channel: str) -> None:
        """Give a channel up."""

    async def ensure_epoch(self, channel: str, floor: Position | None) -> Head:
        """Where a channel stands; its epoch is begun if that is due.

        Args:
            channel: Which one.
            floor: The newest position of it that this hub has seen: it is never before that.
        """

    async def page(
        self, channel: str, first: int, *, count: int, max_bytes: int, floor: Position | None
    ) -> StoredEvents:
        """Stored events of a channel from an offset on, and where it stands. Nothing else ever waits for a page.

        Args:
            channel: Which one.
            first: The lowest offset.
            count: The most events.
            max_bytes: The most bytes, one larger event excepted.
            floor: See `ensure_epoch`.
        """

    async def peek(self, channel: str, first: int, *, count: int, max_bytes: int) -> StoredEvents | None:
        """As `page`, but nothing is begun, or kept from being forgotten; None of a channel that is not known."""

    async def stamps(self, channel: str) -> tuple[int | None, int | None]:
        """The time by the clock that stamps events, and since which offset those of a channel are in its order.

        The time is in microseconds since 1970; None if it is not told. The offset is None if that is not known.
        """

    async def probe(
        self, own_channel: str, token: bytes, channels: Sequence[str], *, touch: bool
    ) -> dict[str, Whereabouts]:
        """Write, read where channels stand, publish `token` on `own_channel`, and confirm every subscription.

        When it returns, everything that was published before has been handed to the handlers or is on its way
        before `token`.

        Args:
            own_channel: A channel of this hub alone.
            token: What is published there.
            channels: Whose positions are read.
            touch: Whether these are also kept from being forgotten for being silent, and cleared of what they no
                longer need to know of their events.

        Returns:
            Per channel where it stands; one that fails does not fail the others.
        """

    async def announce(self, deployment: str, name: str, announcement: bytes) -> None:
        """Keep what a hub announces of itself, for some minutes, and let all hubs of its deployment find it."""

    async def withdraw(self, deployment: str, name: str) -> None:
        """Forget a hub that goes."""

    async def announced(self, deployment: str) -> tuple[dict[str, tuple[bytes | None, float]], set[int]]:
        """What the hubs of a deployment have announced.

        Returns:
            By name the announcement (None: what is kept there is none) and its age in seconds; and the numbers of
            all databases of the server in which there are hubs, of whatever deployment.
        """

    async def publish(
        self, event_type: str, source: str, *, severity: str, data: Mapping[str, Any] | None, to: str
    ) -> Published:
        """Publish one event; see `Publisher.publish`."""

    def close(self) -> None:
        """End all connections."""
