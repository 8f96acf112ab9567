"""Publishing events: from Python, from the command line, and on a fixed schedule."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final

from broadcaster import event as events
from broadcaster.errors import RedisUnavailable
from broadcaster.event import Draft, Event
from broadcaster.history import Stored
from broadcaster.position import Position
from broadcaster.publish_link import Pending, PublishLink
from broadcaster.settings import Settings, load

_COARSE_S: Final = 0.002
"""Timers of the event loop are 1 ms coarse: nearer to the time an event is due, the process itself sleeps ..."""

_FINE_S: Final = 0.0002
"""... as that wakes up some 0.1 ms late, it turns for the rest: not longer, Redis and hub need the core."""

_SOURCES: Final = 10_000
"""Sources per publisher whose last number is remembered."""

BATCH: Final = 512
"""Most events in one write to Redis."""


@dataclass(frozen=True, slots=True)
class Published:
    """What became of one event.

    Attributes:
        event: The event.
        heard: How many Redis subscriptions heard it; 0 means nobody, None that it is not known (after a retry).
        error: Why it is not known whether it was published; None if it was.
        position: Where it is stored; None if events are not stored, or with an error.
    """

    event: Event
    heard: int | None
    error: str | None = None
    position: Position | None = None


@dataclass(frozen=True, slots=True)
class Sent:
    """Events on their way: written, not yet answered."""

    channel: str
    drafts: Sequence[Draft]
    payloads: Sequence[bytes]
    at_us: int
    pending: Sequence[Pending]


class Publisher:
    """Publishes events: `async with Publisher() as publisher: await publisher.publish(...)`.

    One connection to Redis, made on entering. When it breaks, a new one is made, and everything that was not
    answered is sent again in its order with its `event_id`, for `publisher.publish_deadline_s`: an event that
    was stored already is not stored twice. (Without history nothing is sent twice: nobody could tell.)
    """

    def __init__(self, settings: Settings | None = None, *, channel: str | None = None) -> None:
        """Prepare a publisher.

        Args:
            settings: Where Redis is; None reads broadcaster.toml and the environment.
            channel: Where to publish what is not said to go elsewhere; None takes the configured one.
        """
        self._settings = settings or load().settings
        self._channel = events.check_channel(self._settings.event.channel if channel is None else channel)
        self._link = PublishLink(self._settings)
        self._sequences: Counter[tuple[str, str]] = Counter()

    async def __aenter__(self) -> Publisher:
        """Connect.

        Raises:
            RedisUnavailable, RedisRefused: Redis does not answer, or will not have us.
        """
        await self._link.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; of what is not answered it stays unknown whether it was published."""
        self._link.close()

    async def publish(
        self,
        event_type: str,
        source: str,
        *,
        severity: str = "critical",
        data: Mapping[str, Any] | None = None,
        to: str | None = None,
    ) -> Published:
        """Publish one event now; its sequence is one more than the last of this source on this channel here.

        Args:
            event_type: Of the event.
            source: Who says so.
            severity: `critical`, `warning` or `info`.
            data: Any JSON object of the publisher's own.
            to: The channel; None takes the publisher's.

        Raises:
            InvalidEvent: A field is wrong, or the event is too large.
            RedisUnavailable: It is not known whether it was published.
        """
        draft = self.draft(event_type, source, severity=severity, data=data, to=to)
        [published] = await self.publish_all([draft], to)
        if published.error is not None:
            raise RedisUnavailable(
                f"event {published.event.event_id} may not have been published: {published.error}"
            )
        return published

    def draft(
        self,
        event_type: str,
        source: str,
        *,
        severity: str = "critical",
        data: Mapping[str, Any] | None = None,
        to: str | None = None,
    ) -> Draft:
        """Prepare the next event of a source, for `publish_all`.

        Raises:
            InvalidEvent: A field is wrong, or the event is too large.
        """
        key = (to or self._channel, str(source))
        draft = events.draft(
            event_type,
            source,
            self._sequences[key] + 1,
            severity=severity,
            data=data,
            max_bytes=self._settings.event.max_bytes,
        )
        self._sequences[key] += 1
        if len(self._sequences) > _SOURCES:
            del self._sequences[next(iter(self._sequences))]  # the one that began first begins again
        return draft

    async def publish_all(self, drafts: Sequence[Draft], to: str | None = None) -> list[Published]:
        """Publish events now and in order, in one write. Failures are in the result.

        Raises:
            RedisRefused: Redis will not let us publish.
        """
        if not drafts:
            return []
        return await self.settle(self.send(drafts, to))

    def send(self, drafts: Sequence[Draft], to: str | None = None) -> Sent:
        """Stamp events with this instant and write them, in order; `settle` says what became of them."""
        now_us = time.time_ns() // 1000
        payloads = [draft.stamp(now_us) for draft in drafts]
        ids = [draft.unpublished.event_id for draft in drafts]
        channel = to or self._channel
        pending = self._link.send(channel, list(zip(ids, payloads, strict=True)))
        return Sent(channel, drafts, payloads, now_us, pending)

    async def settle(self, sent: Sent) -> list[Published]:
        """Wait for Redis' replies, sending again what was not answered. Failures are in the result.

        Raises:
            RedisRefused: Redis will not let us publish.
        """
        outcomes = await self._link.settle(sent.pending)
        return [
            _published(draft.published(sent.at_us, payload), sent.channel, outcome)
            for draft, payload, outcome in zip(sent.drafts, sent.payloads, outcomes, strict=True)
        ]


def _published(event: Event, channel: str, outcome: Stored | RedisUnavailable) -> Published:
    if isinstance(outcome, RedisUnavailable):
        return Published(event, None, str(outcome))
    if outcome.position is not None:
        event = replace(event, channel=channel, position=outcome.position)
    return Published(event, outcome.heard, position=outcome.position)


def due_times(events_: int, rate_hz: float) -> Iterator[float]:
    """Seconds from the start at which events are due; all 0 when `rate_hz` is 0. Endless for 0 events."""
    number = 0
    while not events_ or number < events_:
        yield number / rate_hz if rate_hz else 0.0
        number += 1


async def on_schedule(events_: int, rate_hz: float) -> AsyncIterator[list[int]]:
    """Open loop: yield the intended times of all events that are due, as soon as they are.

    Times are CLOCK_MONOTONIC in nanoseconds. Whoever is late gets several at once, each with the time it was
    meant for, so that waiting is measured and not forgotten (no coordinated omission).
    """
    start_ns = time.monotonic_ns()
    batch: list[int] = []
    for due_s in due_times(events_, rate_hz):
        due_ns = start_ns + round(due_s * 1e9)
        if batch and (due_ns > time.monotonic_ns() or len(batch) >= BATCH):
            yield batch
            batch = []
        await _sleep_until(due_ns)
        batch.append(due_ns)
    if batch:
        yield batch


async def _sleep_until(due_ns: int) -> None:
    while (left_s := (due_ns - time.monotonic_ns()) / 1e9) > 0:
        if left_s > _COARSE_S:
            await asyncio.sleep(left_s - _COARSE_S)
        elif left_s > _FINE_S:
            time.sleep(left_s - _FINE_S)  # noqa: ASYNC251 - blocks the loop, for 2 ms at most


def padding(settings: Settings) -> dict[str, str] | None:
    """`data` that brings an event of the configured source and type to `publisher.payload_bytes`."""
    table = settings.publisher
    bare = len(events.draft(table.event_type, table.source, 10**6).unpublished.payload)
    missing = table.payload_bytes - bare - len(',"data":{"pad":""}')
    return {"pad": "x" * missing} if missing > 0 else None
