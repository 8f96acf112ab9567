"""The hub in numbers: one frozen value, as `GET /stats` shows it."""

from __future__ import annotations

from dataclasses import dataclass

from broadcaster.hub.channel import Channel


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """One open channel.

    Attributes:
        position: Up to where events were handed on; None before Redis has answered, or without history.
        listeners: Who listens now.
        behind: Those of them that are fed from the ring or the log.
        received: Valid events that the subscription brought.
        recovered: Events read from the log because the subscription had not brought them.
        twins: Events that came a second time, and were not delivered again.
        forged: Events with a position that nobody had given them; not delivered.
        gaps: Ranges that could not be given, by cause.
        deliveries: Events written to listeners, once per listener.
        filtered: Events held back by a listener's filter, once per listener.
        sent_bytes: Bytes of the deliveries.
        shed: Events that slow listeners were not given, by severity, once per listener.
        resumed: Listeners that began at an earlier position.
        resumed_whole: Those of them that had missed nothing.
        ring_bytes: Bytes of recent frames held.
    """

    position: str | None
    listeners: int
    behind: int
    received: int
    recovered: int
    twins: int
    forged: int
    gaps: dict[str, int]
    deliveries: int
    filtered: int
    sent_bytes: int
    shed: dict[str, int]
    resumed: int
    resumed_whole: int
    ring_bytes: int

    @classmethod
    def of(cls, channel: Channel) -> ChannelStatistics:
        fanout, reader, resumption = channel.fanout, channel.reader, channel.resumption
        return cls(
            position=None if reader.at is None else str(reader.at),
            listeners=channel.listeners,
            behind=len(fanout.behind),
            received=channel.received,
            recovered=reader.recovered,
            twins=reader.twins,
            forged=reader.forged,
            gaps=dict(fanout.gaps),
            deliveries=fanout.deliveries,
            filtered=fanout.filtered,
            sent_bytes=fanout.sent_bytes,
            shed=dict(fanout.shed),
            resumed=resumption.resumed,
            resumed_whole=resumption.recovered,
            ring_bytes=fanout.ring.bytes,
        )


@dataclass(frozen=True, slots=True)
class HubStatistics:
    """Counters since the start of the process, and gauges of this moment.

    Attributes:
        version: Of this package.
        pid: Process id of the hub.
        uptime_s: Seconds since it began to listen.
        ready: Whether delivery is proven; see `/health/ready`.
        channel: The default channel.
        connected: Subscribers now.
        peak: Most subscribers at one time.
        behind: Subscribers now that are fed from a ring or a log.
        events_received: Valid events from Redis.
        invalid: Refused payloads by cause.
        published: Events that came over HTTP, and that Redis has taken.
        deliveries: Events written to subscribers, once per subscriber.
        filtered: Events held back by filters, once per subscriber.
        shed: Events that slow subscribers were not given, once per subscriber.
        sent_bytes: Bytes of the deliveries.
        slow_closed: Subscribers closed as too slow (4008).
        talkers_closed: Subscribers closed because they said too much (1008).
        ping_timeouts: Subscribers cut without a sign of life.
        expired: Subscribers closed because their token had expired (4001).
        refused: Subscribers that were not let in, by cause.
        aborted: Subscribers cut because they did not answer a close.
        redis_reconnects: How often the subscription was restored.
        proofs: How often delivery was proven.
        pages_read: Pages of the log read for those who resume.
        ring_bytes: Bytes of recent frames held for slow subscribers.
        channels: Per open channel.
    """

    version: str
    pid: int
    uptime_s: float
    ready: bool
    channel: str
    connected: int
    peak: int
    behind: int
    events_received: int
    invalid: dict[str, int]
    published: int
    deliveries: int
    filtered: int
    shed: int
    sent_bytes: int
    slow_closed: int
    talkers_closed: int
    ping_timeouts: int
    expired: int
    refused: dict[str, int]
    aborted: int
    redis_reconnects: int
    proofs: int
    pages_read: int
    ring_bytes: int
    channels: dict[str, ChannelStatistics]
