"""The report of a run: waits for its files, makes the table of them, writes the summary and the archive.

Everything but the waiting is a function of the files: `broadcaster report results/<run>` prints it again.
"""

from __future__ import annotations

import asyncio
import json
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tabulate import tabulate

from broadcaster.core.errors import HubUnavailable, RunIncomplete, Unavailable
from broadcaster.core.files import whole_file
from broadcaster.core.runtime import CLOCK
from broadcaster.loadtest import archive, machine, records
from broadcaster.loadtest.latency import Figures, figures
from broadcaster.loadtest.ledger import Ledger, balance, complaint, in_words
from broadcaster.loadtest.records import DeliveryRecord, LossRecord, PublishedRecord
from broadcaster.loadtest.run import Run
from broadcaster.redis import commands
from broadcaster.settings import LoadtestTable, ReportTable, Settings, dump
from broadcaster.subscribe import hub_status

_MEANINGS: Final = """\
Dropped: a delivery that was expected (every event published, to every client) and did not come.
Latency: from the moment the schedule meant an event to be published to the moment the read that brought it
  to a client returned; both on the same clock (CLOCK_MONOTONIC), so publisher, Redis, hub and network are in it.
p99: 99 of 100 deliveries were as fast or faster; max is the slowest of all. Each is a measured value.
Fleet lag: how late the subscribers' own event loop ran a timer (1 ms coarse): the error bar of the figures.
Ledger: every event that was to be published, for every client. What was lost was named by the hub (a gap), or
  the client had no connection and could not go on where it was, or the event could not be published."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The contents of a report, read from the files of a run."""

    name: str
    rate_hz: float
    whole: Figures
    ledger: Ledger
    per_process: dict[int, tuple[Figures, Ledger]]
    fleet: dict[int, dict[str, Any]]
    hub: dict[str, Any]
    machine: dict[str, Any]
    publish_failed: int
    broken: list[str]

    @property
    def disconnects(self) -> int:
        return sum(disconnects(result) for result in self.fleet.values())


def disconnects(result: dict[str, Any]) -> int:
    """Connections of a fleet process that were lost, and clients that never had one."""
    lost: int = sum(result["disconnects"].values())
    never: int = result["clients"] - result["connected"]
    return lost + never


async def report_run(settings: Settings) -> Path:
    """Wait for this run, complete its folder, add it to the archive; return the folder.

    Raises:
        RunIncomplete: A part did not deliver its result in time.
    """
    run = Run.current(settings.loadtest)
    run.refuse_if_there(run.config)
    _write(run.config, dump(settings))
    await _wait_for_files(run, settings)
    _write(run.hub, json.dumps(await _hub_says(settings), indent=2))
    _write(run.machine, json.dumps(asdict(machine.describe(await _redis_version(settings))), indent=2))
    rows = summary_rows(read_run(run.folder))
    archive.write_summary(run.summary, rows)
    archive.append(run.folder.parent / "archive.csv", rows[0])
    return run.folder


def _write(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text)


def read_run(folder: Path) -> Outcome:
    """Read a run from its folder.

    Raises:
        RunIncomplete: A file is missing or damaged.
    """
    try:
        return _read_run(Run(folder))
    except FileNotFoundError as error:
        raise RunIncomplete(f"{folder} is not a complete run: there is no {error.filename}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunIncomplete(f"{folder} is damaged: {error}") from None


def _read_run(run: Run) -> Outcome:
    config = _parsed(run.config, tomllib.loads)
    processes = range(1, config["fleet"]["processes"] + 1)
    for path in map(run.losses, processes):
        if not path.exists():
            raise RunIncomplete(
                f"{run.folder} has no {path.name}: not a complete run, or of version 0.1.0, which kept no ledger"
            )
    published = records.read(run.published, PublishedRecord)
    fleet = {number: _parsed(run.fleet(number), json.loads) for number in processes}
    deliveries = {number: records.read(run.deliveries(number), DeliveryRecord) for number in processes}
    losses = {number: records.read(run.losses(number), LossRecord) for number in processes}
    hub, described = _parsed(run.hub, json.loads), _parsed(run.machine, json.loads)
    clients = range(config["fleet"]["clients"])
    everything = [row for rows in deliveries.values() for row in rows]
    every_loss = [row for rows in losses.values() for row in rows]
    per_process = {}
    first = 0
    for number in processes:
        share = range(first, first + fleet[number]["clients"])
        first = share.stop
        per_process[number] = (
            figures(published, deliveries[number], len(share)),
            balance(published, deliveries[number], losses[number], share),
        )
    outcome = Outcome(
        name=run.name,
        rate_hz=config["loadtest"]["rate_hz"],
        whole=figures(published, everything, len(clients)),
        ledger=balance(published, everything, every_loss, clients),
        per_process=per_process,
        fleet=fleet,
        hub=hub,
        machine=described,
        publish_failed=sum(bool(row.error) for row in published),
        broken=[],
    )
    limits, loadtest = ReportTable(**config["report"]), LoadtestTable(**config["loadtest"])
    outcome.broken.extend(broken_limits(outcome, limits, loadtest))
    return outcome


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def broken_limits(outcome: Outcome, limits: ReportTable, loadtest: LoadtestTable) -> list[str]:
    """One sentence per limit that is exceeded."""
    whole = outcome.whole
    counted = {
        "dropped deliveries": (whole.dropped, limits.max_dropped),
        "duplicates": (whole.duplicates, limits.max_duplicates),
        "deliveries out of order": (whole.out_of_order, limits.max_out_of_order),
        "disconnects": (outcome.disconnects, limits.max_disconnects),
        "events that could not be published": (loadtest.events - whole.events, 0),
    }
    broken = [f"{count} {what}, {limit} allowed" for what, (count, limit) in counted.items() if count > limit]
    if limits.max_p99_ms and (whole.p99_ms is None or whole.p99_ms > limits.max_p99_ms):
        broken.append(f"p99 is {whole.p99_ms} ms, {limits.max_p99_ms:g} ms allowed")
    if outcome.ledger.unexplained:  # regardless of the limits
        broken.append(complaint(outcome.ledger))
    return broken


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
        return await hub_status.settled_statistics(url, tls_ca=settings.subscriber.tls_ca)
    except HubUnavailable as error:
        return {"error": f"no statistics: {error}"}


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
