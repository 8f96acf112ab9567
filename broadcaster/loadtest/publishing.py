"""The publisher of a load test: awaits all subscribers, publishes on schedule, records what was published."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

from broadcaster.core.event import Draft
from broadcaster.core.runtime import CLOCK
from broadcaster.loadtest import records
from broadcaster.loadtest.records import PublishedRecord
from broadcaster.loadtest.run import Run
from broadcaster.loadtest.target import find_target
from broadcaster.publish.publisher import Publisher
from broadcaster.publish.schedule import BATCH, on_schedule, padding
from broadcaster.settings import Settings

log = logging.getLogger("broadcaster.publisher")

_SETTLE_S: Final = 0.3
"""Pause between the last connect and the first event: the run measures deliveries, not start-up."""


async def publish_run(settings: Settings) -> None:
    """Publish the events of this run and write `published.csv`, which also marks the end.

    Raises:
        HubUnavailable: The hub was not ready, or some subscribers not connected, in time.
        RedisUnavailable, RedisRefused: Redis was not available at the start. Later failures are recorded.
    """
    run = Run.current(settings.loadtest)
    run.refuse_if_there(run.published)
    target = await find_target(settings, run, subscribers=settings.fleet.clients)
    await asyncio.sleep(_SETTLE_S)
    loadtest = settings.loadtest
    rhythm = f"{loadtest.rate_hz:g} a second" if loadtest.rate_hz else "all at once"
    log.info("publishing %d events, %s", loadtest.events, rhythm)
    async with Publisher(settings, channel=target.channel) as publisher:
        rows = await _publish_all(publisher, settings)
    records.write(run.published, PublishedRecord, rows)
    log.info("%s", in_words(rows, "stored" if settings.history.enabled else "published"))


def in_words(rows: Sequence[PublishedRecord], done: str) -> str:
    """What became of the events, in one line: `all 50 stored and heard`, or how many were not.

    Args:
        rows: Of the events that were to be published.
        done: What was done with one that did not fail.
    """
    failed = sum(bool(row.error) for row in rows)
    unheard = sum(row.heard == 0 and not row.error for row in rows)
    unknown = sum(row.heard is None and not row.error for row in rows)
    if not failed + unheard + unknown:
        return f"all {len(rows)} {done} and heard"
    faults = {"failed": failed, "heard by nobody": unheard, "not known to be heard (sent again)": unknown}
    told = ", ".join(f"{count} {what}" for what, count in faults.items() if count)
    return f"{len(rows) - failed} of {len(rows)} {done}: {told}"


async def _publish_all(publisher: Publisher, settings: Settings) -> list[PublishedRecord]:
    rows: list[PublishedRecord] = []
    drafts = _drafts_ahead(publisher, settings)
    ready = deque(islice(drafts, BATCH))
    # The publisher shares the machine with what is measured. Once an event is written, this process must not
    # take a core from Redis and the hub, not even to read the reply: it sleeps, event loop included.
    aside_s = min(0.01, 0.25 / settings.loadtest.rate_hz) if settings.loadtest.rate_hz else 0.01
    wall_ahead_ns = CLOCK.wall_ns() - CLOCK.monotonic_ns()
    async for intended in on_schedule(settings.loadtest.events, settings.loadtest.rate_hz):
        batch = [ready.popleft() for _ in intended]
        published_ns = CLOCK.monotonic_ns()
        sent = publisher.send(batch)
        CLOCK.block(aside_s)
        for intended_ns, result in zip(intended, await publisher.settle(sent), strict=True):
            rows.append(
                PublishedRecord(
                    sequence=result.event.sequence,
                    event_id=result.event.event_id,
                    intended_mono_ns=intended_ns,
                    published_mono_ns=published_ns,
                    intended_wall_us=(intended_ns + wall_ahead_ns) // 1000,
                    published_wall_us=(published_ns + wall_ahead_ns) // 1000,
                    heard=result.heard,
                    error=result.error or "",
                    epoch=result.position.epoch if result.position else "",
                    offset=result.position.offset if result.position else None,
                )
            )
        ready.extend(islice(drafts, len(batch)))
    return rows


def _drafts_ahead(publisher: Publisher, settings: Settings) -> Iterator[Draft]:
    """The events of the run, made before they are due, so that making them delays none."""
    data = padding(settings)
    for _ in range(settings.loadtest.events):
        yield publisher.draft(settings.publisher.event_type, settings.publisher.source, data=data)
