"""The end of a run: waits for its files, completes its folder, adds it to the archive."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from broadcaster.auth.tokens import monitoring_token
from broadcaster.core.errors import ConfigurationError, HubUnavailable, OutputError, RunIncomplete, Unavailable
from broadcaster.core.runtime import CLOCK
from broadcaster.loadtest import archive, machine, publishing, records, rig
from broadcaster.loadtest.report.outcome import Outcome, outcome_of
from broadcaster.loadtest.report.progress import so_far
from broadcaster.loadtest.report.shapes import hub_numbers
from broadcaster.loadtest.report.summary import summary, summary_rows
from broadcaster.loadtest.rig import SAMPLE_EVERY_S, MachineMeter, MachineSample
from broadcaster.loadtest.run import Run, results_folder
from broadcaster.loadtest.target import check_url
from broadcaster.redis import commands
from broadcaster.settings import Settings, dump
from broadcaster.subscribe import hub_status

log = logging.getLogger("broadcaster.report")

_DELIVERY_BYTES: Final = 120
_PUBLISHED_BYTES: Final = 250
_OTHER_BYTES: Final = 1_000_000
"""At most about so many bytes a delivery, an event, and all the rest of a run take in its folder."""


@dataclass(frozen=True, slots=True)
class Filed:
    """A run that has ended: its folder, its outcome, and why not all of it could be kept (empty if it was)."""

    folder: Path
    outcome: Outcome
    problem: str


def check_results(settings: Settings) -> None:
    """Refuse a load test whose results could not be kept.

    Raises:
        ConfigurationError: Their folder cannot be written, its disk is too full, or the archive takes no row.
    """
    results = results_folder(settings.loadtest)
    archive.check(results / archive.NAME)
    events, clients = settings.loadtest.events, settings.fleet.clients
    needed = _OTHER_BYTES + events * (_PUBLISHED_BYTES + clients * _DELIVERY_BYTES)
    disk = shutil.disk_usage(results)
    if disk.total and disk.free < needed:  # some network disks say 0 of 0
        raise ConfigurationError(
            f"loadtest.results: {results} has {disk.free / 1e6:,.1f} MB left, and {events} events to {clients} "
            f"clients take about {needed / 1e6:,.1f} MB: make room, or give another folder"
        )


async def report_run(settings: Settings) -> Filed:
    """Wait for this run, complete its folder, add it to the archive.

    Raises:
        ConfigurationError: Its results could not be kept, or `check_url` refuses it; this is looked at first.
        RunIncomplete: A part did not deliver its result in time.
        RunDamaged: A part has delivered something else.
    """
    run = Run.current(settings.loadtest)
    run.refuse_if_there(run.config)
    check_results(settings)
    check_url(settings)
    _write(run.config, dump(settings))
    rig.announce(run.folder, "report", os.getpid())
    meter = MachineMeter(run.folder)
    samples = [meter.sample()]
    measuring = asyncio.create_task(_measure(meter, samples))
    incomplete: RunIncomplete | None = None
    try:
        await _wait_for_files(run, settings)
    except RunIncomplete as error:
        incomplete = error
    measuring.cancel()
    samples.append(meter.sample())
    hub = await _hub_says(settings)
    described = asdict(machine.describe(await _redis_version(settings)))
    # First what is known here: what is missing may be on another host, whose folder is merged with this one later.
    problems = _written(
        lambda: records.write(run.rig, MachineSample, samples),
        lambda: _write(run.hub, json.dumps(hub, indent=2)),
        lambda: _write(run.machine, json.dumps(described, indent=2)),
    )
    if incomplete is not None:
        raise incomplete
    outcome = outcome_of(run, hub, described, samples)
    problems += _filed(run, outcome)
    return Filed(run.folder, outcome, problems[0] if problems else "")


def _written(*writes: Callable[[], None]) -> list[str]:
    """Write each file, though another one cannot be written; which cannot be, and why."""
    problems = []
    for write in writes:
        try:
            write()
        except OutputError as error:
            problems.append(str(error))
    return problems


def _filed(run: Run, outcome: Outcome) -> list[str]:
    """Write the summary of a run, and add it to the archive; as `_written`."""
    rows = summary_rows(outcome)
    problems = _written(
        lambda: _write(run.summary_json, json.dumps(summary(outcome), indent=2)),
        lambda: archive.write_summary(run.summary, rows),
    )
    try:
        archive.append(run.archive, rows[0])
    except OutputError as error:
        kept = f"; the row of this run is in {run.summary}" if run.summary.exists() else ""
        problems.append(f"{error}{kept}")
    return problems


async def _measure(meter: MachineMeter, samples: list[MachineSample]) -> None:
    while True:
        await asyncio.sleep(SAMPLE_EVERY_S)
        samples.append(meter.sample())


def _write(path: Path, text: str) -> None:
    with records.result_file(path) as file:
        file.write(text)


def planned_s(settings: Settings) -> float:
    """Seconds that a run takes by plan, at most, from its start to the results of its parts."""
    loadtest, fleet = settings.loadtest, settings.fleet
    starting_s = loadtest.start_timeout_s + fleet.clients / fleet.ramp_per_s
    return starting_s + publishing.planned_s(settings) + fleet.drain_s


async def _wait_for_files(run: Run, settings: Settings) -> None:
    within_s = planned_s(settings) + settings.report.timeout_s
    wanted = [run.published, *(run.fleet(number) for number in range(1, settings.fleet.processes + 1))]
    deadline = CLOCK.loop_s() + within_s
    said, said_s = "", CLOCK.loop_s()
    while missing := [path.name for path in wanted if not path.exists()]:
        if settings.loadtest.progress and CLOCK.loop_s() - said_s >= 1:
            said_s = CLOCK.loop_s()
            if (line := so_far(run, settings)) != said:
                said = line
                log.info("%s", line)
        if CLOCK.loop_s() > deadline:
            raise RunIncomplete(f"waited {within_s:.0f} s for the run {run.name}: no {', '.join(missing)}")
        await asyncio.sleep(0.05)


async def _redis_version(settings: Settings) -> str:
    try:
        return await commands.server_version(settings.redis)
    except Unavailable:  # the measurement is no less valid
        return "unknown"


async def _hub_says(settings: Settings) -> dict[str, Any]:
    try:
        url = hub_status.base_url(settings.fleet_url)
        token = monitoring_token(settings)
        ca = settings.subscriber.tls_ca
        return hub_numbers(await hub_status.settled_statistics(url, tls_ca=ca, token=token))
    except (HubUnavailable, ValueError) as error:
        return {"error": f"no statistics: {error}"}
