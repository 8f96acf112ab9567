"""The end of a run: waits for its files, completes its folder, adds it to the archive."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from broadcaster.core.errors import HubUnavailable, RunIncomplete, Unavailable
from broadcaster.core.files import whole_file
from broadcaster.core.runtime import CLOCK
from broadcaster.loadtest import archive, machine, records, rig
from broadcaster.loadtest.report.outcome import read_run
from broadcaster.loadtest.report.progress import so_far
from broadcaster.loadtest.report.summary import summary, summary_rows
from broadcaster.loadtest.rig import SAMPLE_EVERY_S, MachineMeter, MachineSample
from broadcaster.loadtest.run import Run
from broadcaster.redis import commands
from broadcaster.settings import Settings, dump
from broadcaster.subscribe import hub_status

log = logging.getLogger("broadcaster.report")


async def report_run(settings: Settings) -> Path:
    """Wait for this run, complete its folder, add it to the archive; return the folder.

    Raises:
        RunIncomplete: A part did not deliver its result in time.
    """
    run = Run.current(settings.loadtest)
    run.refuse_if_there(run.config)
    _write(run.config, dump(settings))
    rig.announce(run.folder, "report", os.getpid())
    meter = MachineMeter(run.folder)
    samples = [meter.sample()]
    measuring = asyncio.create_task(_measure(meter, samples))
    await _wait_for_files(run, settings)
    measuring.cancel()
    samples.append(meter.sample())
    records.write(run.rig, MachineSample, samples)
    _write(run.hub, json.dumps(await _hub_says(settings), indent=2))
    _write(run.machine, json.dumps(asdict(machine.describe(await _redis_version(settings))), indent=2))
    outcome = read_run(run.folder)
    rows = summary_rows(outcome)
    _write(run.summary_json, json.dumps(summary(outcome), indent=2))
    archive.write_summary(run.summary, rows)
    archive.append(run.folder.parent / "archive.csv", rows[0])
    return run.folder


async def _measure(meter: MachineMeter, samples: list[MachineSample]) -> None:
    while True:
        await asyncio.sleep(SAMPLE_EVERY_S)
        samples.append(meter.sample())


def _write(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text)


async def _wait_for_files(run: Run, settings: Settings) -> None:
    loadtest, fleet = settings.loadtest, settings.fleet
    planned_s = loadtest.start_timeout_s + fleet.clients / fleet.ramp_per_s + fleet.drain_s
    planned_s += loadtest.events / loadtest.rate_hz if loadtest.rate_hz else 0
    within_s = planned_s + settings.report.timeout_s
    wanted = [run.published, *(run.fleet(number) for number in range(1, fleet.processes + 1))]
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
        return await hub_status.statistics(url, tls_ca=settings.subscriber.tls_ca)
    except HubUnavailable as error:
        return {"error": f"no statistics: {error}"}
