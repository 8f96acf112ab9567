"""The open-loop schedule: when events are due, and what they are padded with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Final

from broadcaster.core import event as events
from broadcaster.core.runtime import CLOCK, Clock
from broadcaster.settings import Settings

_COARSE_S: Final = 0.002
"""Timers of the event loop are 1 ms coarse: this close to the time an event is due, the whole process sleeps."""

_FINE_S: Final = 0.0002
"""That sleep ends some 0.1 ms late: the rest is a busy-wait, and no longer, as Redis and hub need the core."""

BATCH: Final = 512
"""Limit of events in one write to Redis, by default."""


def due_times(count: int, rate_hz: float) -> Iterator[float]:
    """Seconds from the start at which events are due; all 0 when `rate_hz` is 0. Endless for 0 events."""
    number = 0
    while not count or number < count:
        yield number / rate_hz if rate_hz else 0.0
        number += 1


async def on_schedule(
    count: int, rate_hz: float, *, most: int = BATCH, clock: Clock = CLOCK
) -> AsyncIterator[list[int]]:
    """Yield the intended times of all events that are due, as soon as they are (open loop).

    A late caller gets several at once, each with its intended time, so that waiting is measured and not omitted
    (no coordinated omission).

    Args:
        count: How many events; 0: without end.
        rate_hz: Events per second; 0: all at once.
        most: Limit of times that are yielded together.
        clock: The times are those of its `monotonic_ns`.
    """
    start_ns = clock.monotonic_ns()
    batch: list[int] = []
    for due_s in due_times(count, rate_hz):
        due_ns = start_ns + round(due_s * 1e9)
        if batch and (due_ns > clock.monotonic_ns() or len(batch) >= most):
            yield batch
            batch = []
        await _sleep_until(due_ns, clock)
        batch.append(due_ns)
    if batch:
        yield batch


async def _sleep_until(due_ns: int, clock: Clock) -> None:
    while (left_s := (due_ns - clock.monotonic_ns()) / 1e9) > 0:
        if left_s > _COARSE_S:
            await asyncio.sleep(left_s - _COARSE_S)
        elif left_s > _FINE_S:
            clock.block(left_s - _FINE_S)  # blocks the loop, for 2 ms at most


def padding(settings: Settings, source: str = "", /, **data: str) -> dict[str, str] | None:
    """`data` that brings an event of a source, by default the configured one, to `publisher.payload_bytes`."""
    table = settings.publisher
    bare = events.draft(table.event_type, source or table.source, 10**6, data={**data, "pad": ""})
    missing = table.payload_bytes - len(bare.unpublished.payload)
    return {**data, "pad": "x" * missing} if missing > 0 else data or None
