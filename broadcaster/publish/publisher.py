"""The publisher library: publishes events from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from broadcaster.core import event as events
from broadcaster.core.bounded import BoundedDict
from broadcaster.core.errors import RedisUnavailable
from broadcaster.core.event import Draft, Event
from broadcaster.core.position import Position
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.publish.pipeline import Pending, PublishPipeline
from broadcaster.redis.stream import Stored
from broadcaster.settings import RedisTable, Settings, load


@dataclass(frozen=True, slots=True)
class Published:
    """The outcome of publishing one event.

    Attributes:
        event: The event.
        heard: How many Redis subscriptions received it; 0: none, None: not known (after a retry).
        error: Why it is not known whether it was published; None if it was.
        position: Its position; None if events are not stored, or with an error.
    """

    event: Event
    heard: int | None
    error: str | None = None
    position: Position | None = None


@dataclass(frozen=True, slots=True)
class Sent:
    """Events in flight: written, not yet answered."""

    channel: str
    drafts: Sequence[Draft]
    payloads: Sequence[bytes]
    at_us: int
    pending: Sequence[Pending]


class Publisher:
    """Publishes events: `async with Publisher() as publisher: await publisher.publish(...)`.

    One connection to Redis, opened on entering. When it breaks, a new one is opened, and everything that was not
    answered is sent again in its order with its `event_id`, for `publisher.publish_deadline_s`: an event that
    was stored already is not stored twice. (Without history nothing is sent twice: duplicates would go unnoticed.)
    """

    def __init__(
        self, settings: Settings | None = None, *, channel: str | None = None, runtime: Runtime = RUNTIME
    ) -> None:
        """Prepare a publisher.

        Args:
            settings: Where Redis is; None reads broadcaster.toml and the environment.
            channel: For events that are given no other; None takes the configured one.
            runtime: Time, chance and limits.

        Raises:
            ConfigurationError: A setting, or a file that `redis.url` names for TLS, is wrong.
            InvalidEvent: The name of the channel is wrong.
        """
        self._settings = settings or load().settings
        self._channel = events.check_channel(self._settings.event.channel if channel is None else channel)
        self._link = PublishPipeline(self._settings, runtime)
        self._sequences = BoundedDict[tuple[str, str], int](runtime.limits.publish_sources)
        self._clock = runtime.clock
        self._chance = runtime.chance

    async def __aenter__(self) -> Publisher:
        """Connect.

        Raises:
            RedisUnavailable, RedisRefused: Redis does not answer, or refuses this client.
        """
        await self._link.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def use(self, redis: RedisTable) -> None:
        """Log in as this table says on new connections: with another password; one that is open stays."""
        self._link.use(redis)

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
            source: Of the event.
            severity: `critical`, `warning` or `info`.
            data: Any JSON object of the publisher's own.
            to: The channel; None takes the publisher's.

        Raises:
            InvalidEvent: A field or the name of the channel is wrong, or the event is too large.
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
            InvalidEvent: A field or the name of the channel is wrong, or the event is too large.
        """
        key = (self._channel_of(to), str(source))
        sequence = self._sequences.get(key, 0) + 1
        draft = events.draft(
            event_type,
            source,
            sequence,
            severity=severity,
            data=data,
            max_bytes=self._settings.event.max_bytes,
            chance=self._chance,
        )
        self._sequences[key] = sequence  # of too many sources the one that published longest ago restarts at 1
        return draft

    async def publish_all(self, drafts: Sequence[Draft], to: str | None = None) -> list[Published]:
        """Publish events now and in order, in one write. Failures are in the result.

        Raises:
            InvalidEvent: The name of the channel is wrong; nothing was sent.
            RedisRefused: Redis does not permit publishing; what it has not answered may be published.
        """
        if not drafts:
            return []
        return await self.settle(self.send(drafts, to))

    def send(self, drafts: Sequence[Draft], to: str | None = None) -> Sent:
        """Stamp events with the current time and write them, in order; `settle` returns their outcomes.

        Raises:
            InvalidEvent: The name of the channel is wrong; nothing was sent.
        """
        channel = self._channel_of(to)
        now_us = self._clock.wall_ns() // 1000
        payloads = [draft.stamp(now_us) for draft in drafts]
        ids = [draft.unpublished.event_id for draft in drafts]
        pending = self._link.send(channel, list(zip(ids, payloads, strict=True)))
        return Sent(channel, drafts, payloads, now_us, pending)

    def _channel_of(self, to: str | None) -> str:
        return self._channel if to is None else events.check_channel(to)

    async def settle(self, sent: Sent) -> list[Published]:
        """Wait for the replies of Redis, sending again what was not answered. Failures are in the result.

        Raises:
            RedisRefused: Redis does not permit publishing; what it has not answered may be published.
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
    return Published(event, outcome.receivers, position=outcome.position)
