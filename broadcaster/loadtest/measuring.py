"""The fleet process of a load test, and a fleet alone against any hub."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from broadcaster.core import process
from broadcaster.core.errors import ConfigurationError, HubUnavailable, OutputError
from broadcaster.core.redaction import redact
from broadcaster.core.runtime import CLOCK
from broadcaster.loadtest import records, rig
from broadcaster.loadtest.fleet import Fleet
from broadcaster.loadtest.records import ClockRecord, DeliveryRecord, LossRecord, PublishedRecord, TraceRecord
from broadcaster.loadtest.run import Run
from broadcaster.loadtest.target import Target, TraceLog, find_target
from broadcaster.settings import Settings

log = logging.getLogger("broadcaster.fleet")

_LOOK_EVERY_S: Final = 0.5
_ASK_S: Final = 2.0
_TELL_LATEST_S: Final = 1.25
"""For so long the progress waits for a moment at which nothing arrives: in a burst there is none."""
_FIRST_S: Final = 0.001
"""For so long is parsed, if need be, to see how large an event is."""
_FETCH_AFTER: Final = 4000
"""Events after which a trace of the usual size (`hub.trace_events`) is read."""


async def measure_run(settings: Settings) -> None:
    """Connect this process' share of the clients, receive the run, write deliveries, losses and the result.

    Raises:
        ConfigurationError: More or fewer fleet processes were started than `fleet.processes` says; or see
            `check_url`.
        HubUnavailable: The hub was not ready in time, is another run's, or has refused every client.
    """
    number = process_number()
    run = Run.current(settings.loadtest)
    _check_number(number, settings)
    run.refuse_if_there(run.fleet(number))
    run.present(number).touch()
    rig.announce(run.folder, "fleet", os.getpid(), number)
    target = await find_target(settings, run)
    clocks = [await target.hub_clock()]
    trace = TraceLog(target)
    first, clients = share(settings.fleet.clients, settings.fleet.processes, number)
    fleet = Fleet(
        target.url,
        first=first,
        clients=clients,
        ramp_per_s=settings.fleet.ramp_per_s,
        subscriber=target.subscriber,
        source=run.source,
    )
    async with _background(
        fleet, *([_keep_telling(fleet, run.progress(number))] if settings.loadtest.progress else [])
    ):
        await fleet.connect()
        _check_connected(fleet)
        log.info("%d of %d subscribers connected", fleet.connected, clients)
        run.connected(number).touch()
        await _check_the_others(run, settings)
        fetching = asyncio.create_task(_keep_fetching(trace, fleet))
        await _wait_for_the_end(fleet, run.published, settings.fleet.drain_s)
        fetching.cancel()
        clocks.append(await _ask_at_the_end(trace, fleet, target))
    result = fleet.result(number)
    await fleet.close()
    records.write(run.deliveries(number), DeliveryRecord, fleet.deliveries)
    records.write(run.losses(number), LossRecord, fleet.losses())
    records.write(run.trace(number), TraceRecord, trace.rows(fleet.stored))
    records.write(run.clocks(f"fleet.{number}"), ClockRecord, clocks)
    with records.result_file(run.fleet(number)) as file:
        json.dump(asdict(result), file, indent=2)
    log.info("received %d deliveries", len(fleet.deliveries))


async def _ask_at_the_end(trace: TraceLog, fleet: Fleet, target: Target) -> ClockRecord:
    """Read the rest of the hub's trace, and its clock; a hub that has frozen must not hold the results up."""
    try:
        async with asyncio.timeout(_ASK_S):
            await trace.fetch(fleet.decoded)
            return await target.hub_clock()
    except TimeoutError:
        return ClockRecord("hub", "", CLOCK.wall_ahead_ns(), None, None, None, "the hub did not answer in time")


async def _keep_fetching(trace: TraceLog, fleet: Fleet) -> None:
    """Read the hub's trace before it overflows, and else not before the end: it costs the hub time."""
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        if fleet.decoded - trace.fetched_for >= _FETCH_AFTER:
            await trace.fetch(fleet.decoded)


async def watch(settings: Settings, stop: asyncio.Event) -> None:
    """Connect a fleet to any hub and print totals once a second until `stop`.

    Raises:
        HubUnavailable: No client could connect.
    """
    fleet = Fleet(
        settings.fleet_url,
        clients=settings.fleet.clients,
        ramp_per_s=settings.fleet.ramp_per_s,
        subscriber=settings.subscriber,
        only_count=True,  # it may run for days
    )
    async with _background(fleet):
        await process.unless_stopped(stop, fleet.connect())
        if not stop.is_set():
            _check_connected(fleet)
        log.info("%d of %d subscribers connected", fleet.connected, settings.fleet.clients)
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await stop.wait()
            waiting = f", {count} reads to count" if (count := len(fleet.inbox.arrivals)) else ""
            log.info("%d deliveries, %d connected%s", fleet.received, fleet.connected, waiting)
        await fleet.parse_all()
    result = fleet.result(1)
    await fleet.close()
    log.info("total: %d deliveries to %d subscribers; disconnects: %s; reconnects: %d; failures: %s",
             fleet.received, result.connected, result.disconnects or 0, result.reconnects,
             result.failures or 0)  # fmt: skip


def _check_connected(fleet: Fleet) -> None:
    if not fleet.connected:
        reasons = ", ".join(fleet.result(1).failures) or "all connections were lost"
        raise HubUnavailable(f"no subscriber could connect to {redact(fleet.url)}: {reasons}")


def process_number() -> int:
    """1 for fleet.1, and outside honcho."""
    name = os.environ.get("HONCHO_PROCESS_NAME", "")
    kind, _, number = name.partition(".")
    return int(number) if kind == "fleet" and number.isdigit() else 1


def share(clients: int, processes: int, process: int) -> tuple[int, int]:
    """First client and number of clients of one of several processes, as even as can be."""
    first = clients * (process - 1) // processes
    return first, clients * process // processes - first


def _check_number(process: int, settings: Settings) -> None:
    if process > settings.fleet.processes:
        raise ConfigurationError(
            f"this is fleet.{process}, but fleet.processes is {settings.fleet.processes}; "
            f"honcho's -c fleet=N must say the same"
        )


async def _check_the_others(run: Run, settings: Settings) -> None:
    """Check that all fleet processes have started: the load of a missing one would be missing, too."""
    within_s = settings.loadtest.start_timeout_s / 3  # before the publisher ends, which cannot name the missing
    deadline = CLOCK.loop_s() + within_s
    wanted = range(1, settings.fleet.processes + 1)
    while missing := [number for number in wanted if not run.present(number).exists()]:
        if CLOCK.loop_s() > deadline:
            names = ", ".join(f"fleet.{number}" for number in missing)
            raise ConfigurationError(
                f"fleet.processes is {settings.fleet.processes}, but there is no {names}; "
                f"start honcho with -c fleet={settings.fleet.processes}"
            )
        await asyncio.sleep(0.05)


async def _keep_telling(fleet: Fleet, progress: Path) -> None:
    """Write once a second how far this process is, when nothing arrives, if that is soon; runs until cancelled."""
    told_s, told = 0.0, 0
    while True:
        await asyncio.sleep(0.05)
        if CLOCK.monotonic_s() - told_s < (1.0 if fleet.is_quiet else _TELL_LATEST_S):
            continue
        events, received = so_far(fleet)
        if received == told:
            continue
        told_s, told = CLOCK.monotonic_s(), received
        said = {"events": events, "received": received, "latencies": dict(fleet.latencies)}
        with contextlib.suppress(OutputError), records.result_file(progress) as file:  # its end will say it
            json.dump(said, file)


def so_far(fleet: Fleet) -> tuple[int, int]:
    """How many events, and how many deliveries, have come.

    While they come without a pause nothing is parsed, and these are counted by their bytes: about right.
    """
    if (unread := fleet.inbox.events) is None:
        fleet.parse(_FIRST_S)  # then it is known how large one is
        unread = fleet.inbox.events
    received = fleet.received + (unread or 0)
    events = received // fleet.connected if fleet.connected else 0
    return max(fleet.highest_sequence, events), received


async def _wait_for_the_end(fleet: Fleet, published: Path, drain_s: float) -> None:
    """Wait until all events meant to be published have arrived, or no missing one has arrived for `drain_s`.

    Also an event whose publish failed may arrive; and what was announced as lost will not. Heartbeats, duplicates
    and clients that reconnect do not count as arrivals, or this might never end.
    """
    while not published.exists():
        await asyncio.sleep(0.05)
    rows = records.read(published, PublishedRecord)
    events = len(rows)
    fewest, began_at = fleet.awaiting(events), CLOCK.loop_s()
    changed_at = began_at
    while missing := fleet.awaiting(events):
        # The heartbeats of thousands of clients leave no quiet moment in which to parse what has arrived.
        if (fleet.inbox.events or 0) >= missing or CLOCK.loop_s() - began_at > drain_s:
            await fleet.parse_all()
            missing = fleet.awaiting(events)
        if missing < fewest:
            fewest, changed_at = missing, CLOCK.loop_s()
        elif CLOCK.loop_s() - changed_at > drain_s:
            log.warning("%d deliveries have not come, and nothing more comes", missing)
            break
        await asyncio.sleep(0.05)
    await fleet.parse_all()


@contextlib.asynccontextmanager
async def _background(fleet: Fleet, *more: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """The fleet's own tasks, for as long as the block lasts; if one fails, so does the block."""
    work = (fleet.keep_parsing(), fleet.keep_coming_back(), fleet.lag.keep_measuring(), *more)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part) for part in work]
            yield
            for task in tasks:
                task.cancel()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
