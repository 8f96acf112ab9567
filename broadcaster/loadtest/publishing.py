"""The publisher of a load test: awaits all subscribers, publishes on schedule, records what was published."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Final

from broadcaster.core.errors import RedisRefused, Unavailable
from broadcaster.core.event import Draft
from broadcaster.core.runtime import CLOCK
from broadcaster.loadtest import records, rig
from broadcaster.loadtest.records import ClockRecord, PublishedRecord
from broadcaster.loadtest.rig import Lag, LagMeter
from broadcaster.loadtest.run import Run
from broadcaster.loadtest.target import find_target, redis_clock
from broadcaster.publish.publisher import Published, Publisher, Sent
from broadcaster.publish.schedule import BATCH, on_schedule, padding
from broadcaster.redis import commands
from broadcaster.settings import Settings

log = logging.getLogger("broadcaster.publisher")

_SETTLE_S: Final = 0.3
"""Pause between the last connect, and again the warm-up, and what follows: the run measures no start-up."""

_WARMUP_EVERY_S: Final = 0.02


def planned_s(settings: Settings) -> float:
    """Seconds from the last connect to the last answer of Redis, at most, if it answers the warm-up at once."""
    table = settings.loadtest
    schedule_s = table.events / table.rate_hz if table.rate_hz else 0.0
    warmup_s = table.warmup_events * _WARMUP_EVERY_S
    return 2 * _SETTLE_S + warmup_s + schedule_s + settings.publisher.publish_deadline_s


@dataclass(frozen=True, slots=True)
class PublisherResult:
    """What the publisher has measured of itself.

    Attributes:
        late_p99_ms, late_max_ms: How late it wrote events, by its schedule, through its own fault: the time in
            which it waited for Redis to answer an earlier event is not in it. 0 without a schedule.
        lag: Of its event loop. It blocks that itself, for 12 ms at most, while an event is published.
        warmup_events: Events before the schedule.
    """

    late_p99_ms: float
    late_max_ms: float
    lag: Lag
    warmup_events: int


class OwnLateness:
    """How late each write was through the publisher's own fault: how late it would be had Redis answered at once.

    What its own work takes longer than the schedule allows adds up from write to write, as the backlog does.

    Attributes:
        late_ns: Of each write.
    """

    def __init__(self) -> None:
        self.late_ns: list[int] = []
        self._waited_ns = 0  # for Redis, as far as the backlog is made of it
        self._ready_ns = 0

    def on_write(self, due_ns: int, written_ns: int) -> None:
        """Events were written, the first of which was due then."""
        late_ns = written_ns - due_ns
        # If it was ready when this was due, nothing before has delayed it. And a wait that is longer than the
        # backlog, because that was caught up on, must not excuse work of its own that comes later.
        self._waited_ns = min(self._waited_ns, late_ns) if due_ns < self._ready_ns else 0
        self.late_ns.append(late_ns - self._waited_ns)

    def on_ready(self, waited_ns: int, ready_ns: int) -> None:
        """It can write again: Redis was waited for so long, and since then the next events were made."""
        self._waited_ns += waited_ns
        self._ready_ns = ready_ns


async def publish_run(settings: Settings) -> None:
    """Publish the events of this run; write `publisher.json`, and `published.csv`, which also marks the end.

    Raises:
        ConfigurationError: See `check_url`.
        HubUnavailable: The hub was not ready, or some subscribers not connected, in time.
        RedisUnavailable, RedisRefused: Redis was not available at the start. Later failures are recorded.
    """
    run = Run.current(settings.loadtest)
    run.refuse_if_there(run.published)
    rig.announce(run.folder, "publisher", os.getpid())
    target = await find_target(settings, run, subscribers=settings.fleet.clients)
    await _announce_what_is_here(run, target.hub_pid, settings)
    clocks = [await target.hub_clock(), await redis_clock(settings.redis)]
    await asyncio.sleep(_SETTLE_S)
    loadtest = settings.loadtest
    rhythm = f"{loadtest.rate_hz:g} a second" if loadtest.rate_hz else "all at once"
    meter = LagMeter()
    measuring = asyncio.create_task(meter.keep_measuring())
    async with Publisher(settings, channel=target.channel) as publisher:
        await _warm_up(publisher, settings)
        log.info("publishing %d events, %s", loadtest.events, rhythm)
        rows, late_ns = await _publish_all(publisher, run.source, settings)
        ended_ns = CLOCK.monotonic_ns()
        await asyncio.sleep(2 * _WARMUP_EVERY_S)  # a timer that was late is run, and measured
    measuring.cancel()
    clocks += [await target.hub_clock(), await redis_clock(settings.redis)]
    records.write(run.clocks("publisher"), ClockRecord, clocks)
    lag = meter.between(min((row.published_mono_ns for row in rows), default=0), ended_ns)
    late_ms = sorted(each / 1e6 for each in late_ns) or [0.0]
    result = PublisherResult(
        late_p99_ms=round(late_ms[int(len(late_ms) * 0.99)], 3),
        late_max_ms=round(late_ms[-1], 3),
        lag=lag,
        warmup_events=loadtest.warmup_events,
    )
    with records.result_file(run.publisher) as file:
        json.dump(asdict(result), file, indent=2)
    records.write(run.published, PublishedRecord, rows)
    done = "stored" if settings.history.enabled else "published"
    log.info("%s", in_words(rows, done, at_replicas=bool(settings.redis.subscribe_url)))
    if why := next((row.error for row in rows if row.error), ""):
        log.warning("the first that failed: %s", why)


async def _announce_what_is_here(run: Run, hub_pid: int, settings: Settings) -> None:
    """Say which processes hub and Redis are, if they are on this machine; the run's own hubs have said it."""
    if hub_pid not in rig.announced(run.folder, "hub") and rig.is_program(hub_pid, "broadcaster"):
        rig.announce(run.folder, "hub", hub_pid)
    with contextlib.suppress(Unavailable):  # then its CPU time is not known
        redis_pid = await commands.server_pid(settings.redis)
        if rig.is_program(redis_pid, "redis", "valkey"):
            rig.announce(run.folder, "redis", redis_pid)


async def _warm_up(publisher: Publisher, settings: Settings) -> None:
    """Publish events that do not count: scripts are loaded, caches warm, and the first measured event is none."""
    data = padding(settings, records.WARMUP_SOURCE)
    for _ in range(settings.loadtest.warmup_events):
        draft = publisher.draft(settings.publisher.event_type, records.WARMUP_SOURCE, data=data)
        [published] = await publisher.publish_all([draft])
        if published.error:  # the run itself will say it
            break
        await asyncio.sleep(_WARMUP_EVERY_S)
    if settings.loadtest.warmup_events:
        await asyncio.sleep(_SETTLE_S)


def in_words(rows: Sequence[PublishedRecord], done: str, *, at_replicas: bool = False) -> str:
    """What became of the events, in one line: `all 50 stored and heard`, or how many were not.

    Args:
        rows: Of the events that were to be published.
        done: What was done with one that did not fail.
        at_replicas: Hubs subscribe at replicas, and Redis does not count them: who has heard it is not known.
    """
    failed = sum(bool(row.error) for row in rows)
    unheard = sum(row.heard == 0 and not row.error for row in rows)
    unknown = sum(row.heard is None and not row.error for row in rows)
    if at_replicas:
        return f"{len(rows) - failed} of {len(rows)} {done}; hubs at replicas are not counted"
    if not failed + unheard + unknown:
        return f"all {len(rows)} {done} and heard"
    faults = {"failed": failed, "heard by nobody": unheard, "not known to be heard (sent again)": unknown}
    told = ", ".join(f"{count} {what}" for what, count in faults.items() if count)
    return f"{len(rows) - failed} of {len(rows)} {done}: {told}"


async def _publish_all(
    publisher: Publisher, source: str, settings: Settings
) -> tuple[list[PublishedRecord], list[int]]:
    """Publish on schedule; return the rows, and for each write on a schedule by how many ns it was late itself."""
    rows: list[PublishedRecord] = []
    late = OwnLateness()
    drafts = _drafts_ahead(publisher, source, settings)
    ready = deque(islice(drafts, BATCH))
    # The publisher shares the machine with what is measured. Once an event is written, this process must not
    # take a core from Redis and the hub, not even to read the reply: it sleeps, event loop included.
    aside_s = min(0.01, 0.25 / settings.loadtest.rate_hz) if settings.loadtest.rate_hz else 0.01
    wall_ahead_ns = CLOCK.wall_ahead_ns()
    async for intended in on_schedule(settings.loadtest.events, settings.loadtest.rate_hz):
        batch = [ready.popleft() for _ in intended]
        published_ns = CLOCK.monotonic_ns()
        late.on_write(intended[0], published_ns)
        sent = publisher.send(batch)
        sent_ns = CLOCK.monotonic_ns()
        CLOCK.block(aside_s)
        results = await _settled(publisher, sent)
        waited_ns = CLOCK.monotonic_ns() - sent_ns
        for intended_ns, result in zip(intended, results, strict=True):
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
        late.on_ready(waited_ns, CLOCK.monotonic_ns())
    return rows, late.late_ns if settings.loadtest.rate_hz else []


async def _settled(publisher: Publisher, sent: Sent) -> list[Published]:
    """The outcomes of events; a Redis that refuses them now is in each: what was measured before is kept."""
    try:
        return await publisher.settle(sent)
    except RedisRefused as error:  # some of them may have been stored before it
        return [Published(draft.unpublished, None, str(error)) for draft in sent.drafts]


def _drafts_ahead(publisher: Publisher, source: str, settings: Settings) -> Iterator[Draft]:
    """The events of the run, made before they are due, so that making them delays none."""
    data = padding(settings, source)
    for _ in range(settings.loadtest.events):
        yield publisher.draft(settings.publisher.event_type, source, data=data)
