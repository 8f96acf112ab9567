"""The report of a run: waits for its files, makes the table of them, writes the summary and the archive.

Everything but the waiting is a function of the files: `broadcaster report results/<run>` prints it again.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tabulate import tabulate

from broadcaster.core.errors import ConfigurationError, HubUnavailable, OutputError, RunIncomplete, Unavailable
from broadcaster.core.runtime import CLOCK
from broadcaster.loadtest import archive, machine, records
from broadcaster.loadtest.latency import Figures
from broadcaster.loadtest.ledger import Ledger, in_words
from broadcaster.loadtest.outcome import Outcome, disconnects, hub_numbers, outcome_of
from broadcaster.loadtest.run import Run, results_folder
from broadcaster.redis import commands
from broadcaster.settings import Settings, dump
from broadcaster.subscribe import hub_status

_DELIVERY_BYTES: Final = 120
_PUBLISHED_BYTES: Final = 250
_OTHER_BYTES: Final = 200_000
"""At most about so many bytes a delivery, an event, and all the rest of a run take in its folder."""

_MEANINGS: Final = """\
Dropped: a delivery that was expected (every event published, to every client) and did not come.
Latency: from the moment the schedule meant an event to be published to the moment the read that brought it
  to a client returned; both on the same clock (CLOCK_MONOTONIC), so publisher, Redis, hub and network are in it.
p99: 99 of 100 deliveries were as fast or faster; max is the slowest of all. Each is a measured value.
Fleet lag: how late the subscribers' own event loop ran a timer (1 ms coarse): the error bar of the figures.
Ledger: every event that was to be published, for every client. What was lost was named by the hub (a gap), or
  the client had no connection and could not go on where it was, or the event could not be published."""


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
        ConfigurationError: Its results could not be kept; this is looked at first.
        RunIncomplete: A part did not deliver its result in time.
        RunDamaged: A part has delivered something else.
    """
    run = Run.current(settings.loadtest)
    run.refuse_if_there(run.config)
    check_results(settings)
    _write(run.config, dump(settings))
    await _wait_for_files(run, settings)
    hub = await _hub_says(settings)
    described = asdict(machine.describe(await _redis_version(settings)))
    outcome = outcome_of(run, hub, described)
    return Filed(run.folder, outcome, _file(run, outcome))


def _file(run: Run, outcome: Outcome) -> str:
    """Write what is known at the end of a run: each file, though another one cannot be written; what cannot be."""
    rows = summary_rows(outcome)
    problems = []
    for path, content in ((run.hub, outcome.hub), (run.machine, outcome.machine)):
        try:
            _write(path, json.dumps(content, indent=2))
        except OutputError as error:
            problems.append(str(error))
    try:
        archive.write_summary(run.summary, rows)
    except OutputError as error:
        problems.append(str(error))
    try:
        archive.append(run.archive, rows[0])
    except OutputError as error:
        kept = f"; the row of this run is in {run.summary}" if run.summary.exists() else ""
        problems.append(f"{error}{kept}")
    return problems[0] if problems else ""


def _write(path: Path, text: str) -> None:
    with records.result_file(path) as file:
        file.write(text)


def present(outcome: Outcome, folder: Path, *, explain: bool = False) -> str:
    """The report as text; with what its lines mean, if `explain`."""
    columns = {"whole run": (outcome.whole, outcome.disconnects)}
    if len(outcome.per_process) > 1:
        for number, (part, _) in outcome.per_process.items():
            columns[f"fleet.{number}"] = (part, disconnects(outcome.fleet[number]))
    lines: list[tuple[str, list[Any]]] = [
        ("Clients", [part.clients for part, _ in columns.values()]),
        ("Events", [part.events for part, _ in columns.values()]),
        ("Expected deliveries", [part.expected for part, _ in columns.values()]),
        ("Received deliveries", [part.received for part, _ in columns.values()]),
        ("Dropped deliveries", [part.dropped for part, _ in columns.values()]),
        ("p50 latency (ms)", [_ms(part.p50_ms) for part, _ in columns.values()]),
        ("p95 latency (ms)", [_ms(part.p95_ms) for part, _ in columns.values()]),
        ("p99 latency (ms)", [_ms(part.p99_ms) for part, _ in columns.values()]),
        ("max latency (ms)", [_ms(part.max_ms) for part, _ in columns.values()]),
        ("Duplicates", [part.duplicates for part, _ in columns.values()]),
        ("Out of order", [part.out_of_order for part, _ in columns.values()]),
        ("Disconnects", [lost for _, lost in columns.values()]),
    ]
    table = tabulate(
        [[name, *values] for name, values in lines],
        headers=["", *columns],
        tablefmt="simple_outline",
        disable_numparse=True,
        colalign=["left"] + ["right"] * len(columns),
    )
    ledger = in_words(outcome.ledger)
    meanings = ["", _MEANINGS] if explain else []
    text = [f"Run {outcome.name}", table, *ledger, *_notes(outcome), *meanings, "", _verdict(outcome, folder)]
    return "\n".join(text)


def _notes(outcome: Outcome) -> list[str]:
    host, hub = outcome.machine, outcome.hub
    sanic = f"Sanic {host['sanic']}, " if host["sanic"] else ""
    rhythm = f"{outcome.rate_hz:g} events a second" if outcome.rate_hz else "all events at once"
    lags = [result["lag_p99_ms"] for result in outcome.fleet.values()]
    highest = max(result["lag_max_ms"] for result in outcome.fleet.values())
    notes = [
        f"Schedule: {rhythm}. Fleet lag: p99 {max(lags):.1f} ms, max {highest:.1f} ms.",
        f"Machine: {host['cpu']}, {host['cores']} cores, {host['system']}, load {host['load_1m']}.",
        f"Versions: broadcaster {host['broadcaster']}, Python {host['python']}, Redis {host['redis_server']}, "
        f"{sanic}uvloop {host['uvloop']}, websockets {host['websockets']}.",
    ]
    if "error" in hub:
        notes.append(f"Hub: {hub['error']}.")
    else:
        refused = sum(hub["invalid"].values())
        notes.append(
            f"Hub: {hub['events_received']} events received, {refused} refused, {hub['deliveries']} deliveries, "
            f"{hub['slow_closed']} closed as slow, {hub['redis_reconnects']} Redis reconnects."
        )
    lost = sum(sum(result["disconnects"].values()) for result in outcome.fleet.values())
    if lost:
        again = sum(result["reconnects"] for result in outcome.fleet.values())
        notes.append(f"Connections: {lost} were lost, {again} were made again.")
    if outcome.whole.negative:
        notes.append(f"{outcome.whole.negative} latencies are negative: the clocks cannot be trusted.")
    for number, result in outcome.fleet.items():
        notes.extend(f"fleet.{number}: {count} x {why}" for why, count in result["failures"].items())
    return notes


def _verdict(outcome: Outcome, folder: Path) -> str:
    where = f"Results: {folder}"
    if outcome.broken:
        return "\n".join([*(f"FAILED: {reason}" for reason in outcome.broken), where])
    return f"PASSED: all limits of [report] hold.\n{where}"


def summary_rows(outcome: Outcome) -> list[dict[str, object]]:
    """The rows of `summary.csv`; the first is the run's row in the archive."""
    common: dict[str, object] = {
        "run": outcome.name,
        "verdict": "FAILED" if outcome.broken else "PASSED",
        "rate_hz": outcome.rate_hz,
        "publish_failed": outcome.publish_failed,
    }
    common |= {key: value for key, value in outcome.machine.items() if key in archive.COLUMNS}
    rows = [_row("run", outcome.whole, outcome.ledger, list(outcome.fleet.values()))]
    for number, (part, ledger) in outcome.per_process.items():
        rows.append(_row(f"fleet.{number}", part, ledger, [outcome.fleet[number]]))
    return [common | row for row in rows]


def _row(scope: str, part: Figures, ledger: Ledger, results: list[dict[str, Any]]) -> dict[str, object]:
    return {
        "scope": scope,
        **asdict(part),
        "disconnects": sum(disconnects(result) for result in results),
        "fleet_lag_p99_ms": max(result["lag_p99_ms"] for result in results),
        "fleet_lag_max_ms": max(result["lag_max_ms"] for result in results),
        "lost_named": ledger.named,
        "lost_unexplained": len(ledger.unexplained),
        "reconnects": sum(result["reconnects"] for result in results),
    }


async def _wait_for_files(run: Run, settings: Settings) -> None:
    loadtest, fleet = settings.loadtest, settings.fleet
    planned_s = loadtest.start_timeout_s + fleet.clients / fleet.ramp_per_s + fleet.drain_s
    planned_s += loadtest.events / loadtest.rate_hz if loadtest.rate_hz else 0
    within_s = planned_s + settings.report.timeout_s
    wanted = [run.published, *(run.fleet(number) for number in range(1, fleet.processes + 1))]
    deadline = CLOCK.loop_s() + within_s
    while missing := [path.name for path in wanted if not path.exists()]:
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
        return hub_numbers(await hub_status.statistics(url, tls_ca=settings.subscriber.tls_ca))
    except (HubUnavailable, ValueError) as error:
        return {"error": f"no statistics: {error}"}


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
