"""The contents of a report: a pure function of the files of a run."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from broadcaster.core.errors import RunIncomplete
from broadcaster.loadtest import deliveries, records
from broadcaster.loadtest.latency import Figures, Latencies, figures, latencies
from broadcaster.loadtest.ledger import Ledger, balance
from broadcaster.loadtest.records import LossRecord, PublishedRecord
from broadcaster.loadtest.report.limits import Limit, limits
from broadcaster.loadtest.report.validity import Rig, Validity, judge, used, wall_step_ms
from broadcaster.loadtest.rig import Lag, MachineSample, Stall
from broadcaster.loadtest.run import Run
from broadcaster.settings import LoadtestTable, ReportTable, is_loopback


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
    validity: Validity
    limits: list[Limit]
    published: list[PublishedRecord]
    losses: list[LossRecord]
    latencies: Latencies
    lags: dict[str, Lag]
    config: dict[str, Any]
    settings: str

    @property
    def broken(self) -> list[str]:
        """One sentence per limit that is exceeded."""
        return [limit.broken for limit in self.limits if not limit.holds]

    @property
    def is_failure(self) -> bool:
        """Whether a limit is broken, or the run is INVALID and may not be."""
        return bool(self.broken) or (bool(self.validity.reasons) and not self.config["report"]["allow_invalid"])

    @property
    def settings_sha256(self) -> str:
        return hashlib.sha256(self.settings.encode()).hexdigest()

    @property
    def verdict(self) -> str:
        return "FAILED" if self.is_failure else "PASSED"

    @property
    def disconnects(self) -> int:
        return sum(disconnects(result) for result in self.fleet.values())


def disconnects(result: dict[str, Any]) -> int:
    """Connections of a fleet process that were lost, and clients that never had one."""
    lost: int = sum(result["disconnects"].values())
    never: int = result["clients"] - result["connected"]
    return lost + never


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
    settings = run.config.read_text()
    config = _parsed(run.config, tomllib.loads)
    loadtest, report = LoadtestTable(**config["loadtest"]), ReportTable(**config["report"])
    processes = range(1, config["fleet"]["processes"] + 1)
    for path in (*map(run.losses, processes), run.publisher, run.rig):
        if not path.exists():
            raise RunIncomplete(f"{run.folder} has no {path.name}: not a complete run, or of an earlier version")
    published = records.read(run.published, PublishedRecord)
    fleet = {number: _parsed(run.fleet(number), json.loads) for number in processes}
    logs = {number: deliveries.read(run.deliveries(number), published) for number in processes}
    losses = {number: records.read(run.losses(number), LossRecord) for number in processes}
    everything = deliveries.merged([*logs.values()])
    every_loss = [row for rows in losses.values() for row in rows]
    clients = range(config["fleet"]["clients"])
    measured = latencies(published, everything)
    whole, ledger = figures(published, measured, len(clients)), balance(published, everything, every_loss, clients)
    per_process = {1: (whole, ledger)}
    first = 0
    for number in processes if len(processes) > 1 else ():
        share = range(first, first + fleet[number]["clients"])
        first = share.stop
        per_process[number] = (
            figures(published, latencies(published, logs[number]), len(share)),
            balance(published, logs[number], losses[number], share),
        )
    written = sum(result["deliveries"] + result["losses"] for result in fleet.values())
    lost_rows = written - everything.rows - len(every_loss)
    publisher = _parsed(run.publisher, json.loads)
    lags = {"publisher": _lag(publisher["lag"])}
    lags |= {f"fleet.{number}": _lag(result) for number, result in fleet.items()}
    lost = sum(disconnects(result) for result in fleet.values())
    return Outcome(
        name=run.name,
        rate_hz=loadtest.rate_hz,
        whole=whole,
        ledger=ledger,
        per_process=per_process,
        fleet=fleet,
        hub=_parsed(run.hub, json.loads),
        machine=_parsed(run.machine, json.loads),
        publish_failed=sum(bool(row.error) for row in published),
        validity=_validity(run, published, measured, publisher["late_max_ms"], lags, lost_rows, _local(config)),
        limits=limits(whole, ledger, lost, loadtest.events - whole.events, report),
        published=published,
        losses=every_loss,
        latencies=measured,
        lags=lags,
        config=config,
        settings=settings,
    )


def _validity(
    run: Run,
    published: list[PublishedRecord],
    measured: Latencies,
    late_ms: float,
    lags: dict[str, Lag],
    lost_rows: int,
    local: Collection[str],
) -> Validity:
    samples = records.read(run.rig, MachineSample)
    first_ns = min((row.published_mono_ns for row in published), default=0)
    last_ns = max(row.published_mono_ns for row in published) if published else 0
    if len(measured.received_ns):
        last_ns = int(measured.received_ns.max())
    rig = Rig(
        **used(samples, first_ns, last_ns, local)._asdict(),
        stalls_ms={name: max((each.still_ms for each in lag.stalls), default=0.0) for name, lag in lags.items()},
        lags_ms={name: lag.lag_usual_ms for name, lag in lags.items()},
        late_ms=late_ms,
        wall_step_ms=wall_step_ms(samples),
        lost_rows=lost_rows,
    )
    return judge(rig, lags)


def _local(config: dict[str, Any]) -> set[str]:
    """The parts of a run that are on the machine which reports it."""
    hosts = {"redis": _host(config["redis"]["url"]), "hub": _host(config["fleet"]["url"])}
    return {"publisher", "fleet", *(role for role, host in hosts.items() if not host or is_loopback(host))}


def _host(url: str) -> str:
    """The host of a URL; empty: this one."""
    return urlsplit(url).hostname or ""


def _lag(fields: dict[str, Any]) -> Lag:
    return Lag(
        lag_p50_ms=fields["lag_p50_ms"],
        lag_p99_ms=fields["lag_p99_ms"],
        lag_max_ms=fields["lag_max_ms"],
        lag_usual_ms=fields["lag_usual_ms"],
        busy_pct=fields["busy_pct"],
        stalls=[Stall(*stall) for stall in fields["stalls"]],
    )


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
