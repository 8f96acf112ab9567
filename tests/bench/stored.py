"""What the rows about stored events share: the product's publisher as a child, and a look into Redis."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Final

import redis

from broadcaster.core.position import Position
from broadcaster.redis import stream
from broadcaster.settings import EventTable
from tests.bench.hubs import clean_environment, redis_url
from tests.bench.processes import Process, TrialError

CHANNEL: Final = EventTable().channel


def publisher(
    redis_port: int, events: int, rate_hz: float, event_bytes: int, env: Mapping[str, str] | None = None
) -> Process:
    """The product's Publisher at work; it ends with the record PUBLISHED. A `rate_hz` of 0: all at once."""
    environment = {
        **clean_environment(redis_port),
        "BROADCASTER_LOADTEST__EVENTS": str(events),
        "BROADCASTER_LOADTEST__RATE_HZ": str(rate_hz),
        "BROADCASTER_PUBLISHER__PAYLOAD_BYTES": str(event_bytes),
        **(env or {}),
    }
    return Process("publisher", [sys.executable, "-m", "tests.bench.publisher"], env=environment, talks=True)


def store(redis_port: int, events: int, event_bytes: int) -> None:
    """Store events in a Redis that knows none, while nobody listens."""
    clear(redis_port)
    with publisher(redis_port, events, 0, event_bytes) as child:
        record = child.record("PUBLISHED", 15)
    if record["errors"] or head(redis_port).offset != events:
        raise TrialError(f"{head(redis_port).offset} of {events} events were stored")


def clear(redis_port: int) -> None:
    """Forget everything. This Redis belongs to the benchmark; nobody else's is ever asked."""
    with redis.Redis.from_url(redis_url(redis_port)) as client:
        client.flushall()


def head(redis_port: int) -> Position:
    """Where the channel stands."""
    with redis.Redis.from_url(redis_url(redis_port)) as client:
        epoch, offset, _ = client.execute_command(*stream.peek_head(CHANNEL))
    if epoch is None or offset is None:
        raise TrialError("nothing is stored")
    return Position(epoch.decode(), int(offset))
