"""The hub in numbers: one frozen value, as `GET /stats` shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HubStatistics:
    """Counters since the start of the process, and gauges of this moment.

    Attributes:
        version: Of this package.
        pid: Process id of the hub.
        uptime_s: Seconds since it began to listen.
        ready: Whether the subscription is confirmed and the hub is not stopping.
        channel: The Redis channel.
        connected: Subscribers now.
        peak: Most subscribers at one time.
        behind: Subscribers now that are fed from the ring.
        events_received: Valid events from Redis.
        invalid: Refused payloads by cause.
        deliveries: Events written to subscribers, once per subscriber.
        sent_bytes: Bytes of these deliveries.
        slow_closed: Subscribers closed as too slow (4008).
        talkers_closed: Subscribers closed because they said too much (1008).
        ping_timeouts: Subscribers cut without a sign of life.
        aborted: Subscribers cut because they did not answer a close.
        redis_reconnects: How often the subscription was restored.
        ring_bytes: Bytes of recent frames held for slow subscribers.
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
    deliveries: int
    sent_bytes: int
    slow_closed: int
    talkers_closed: int
    ping_timeouts: int
    aborted: int
    redis_reconnects: int
    ring_bytes: int
