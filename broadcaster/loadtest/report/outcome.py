"""The contents of a report: a pure function of the files of a run."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broadcaster.core.errors import RunIncomplete
from broadcaster.loadtest import records
from broadcaster.loadtest.latency import Figures, figures
from broadcaster.loadtest.ledger import Ledger, balance, complaint
from broadcaster.loadtest.records import DeliveryRecord, LossRecord, PublishedRecord
from broadcaster.loadtest.run import Run
from broadcaster.settings import LoadtestTable, ReportTable


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
