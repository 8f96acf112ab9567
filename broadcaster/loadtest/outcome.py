"""The outcome of a run, as a pure function of the files in its folder; what is damaged in them is named."""

from __future__ import annotations

import contextlib
import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broadcaster.core.errors import RunDamaged
from broadcaster.loadtest import records
from broadcaster.loadtest.latency import Figures, figures
from broadcaster.loadtest.ledger import Ledger, balance, complaint
from broadcaster.loadtest.records import DeliveryRecord, LossRecord, PublishedRecord
from broadcaster.loadtest.run import Run
from broadcaster.settings import LoadtestTable, ReportTable

Shape = dict[str, Callable[[Any], bool]]


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds) and not isinstance(value, bool)


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(type(count) is int for count in value.values())


_CONFIG: Final[Shape] = dict.fromkeys(("fleet", "loadtest", "report"), _is(dict))
_CLIENTS: Final[Shape] = dict.fromkeys(("processes", "clients"), _is(int))
_FLEET: Final[Shape] = {
    **dict.fromkeys(("clients", "connected", "reconnects"), _is(int)),
    **dict.fromkeys(("disconnects", "failures"), _are_counts),
    **dict.fromkeys(("lag_p99_ms", "lag_max_ms"), _is(int, float)),
}
_HUB: Final[Shape] = {
    **dict.fromkeys(("events_received", "deliveries", "slow_closed", "redis_reconnects"), _is(int)),
    "invalid": _are_counts,
}
_MACHINE: Final[Shape] = {
    **dict.fromkeys(("broadcaster", "system", "cpu", "python"), _is(str)),
    **dict.fromkeys(("sanic", "uvloop", "websockets", "redis_server"), _is(str)),
    **dict.fromkeys(("cores", "load_1m"), _is(int, float)),
}
"""What a report reads of the files that are no CSV."""


def shaped(value: Any, shape: Shape) -> dict[str, Any]:
    """`value`, which has all that a report reads.

    Raises:
        ValueError: It has not.
    """
    if not isinstance(value, dict):
        raise ValueError("is another file")
    for name, fits in shape.items():
        if name not in value or not fits(value[name]):
            raise ValueError(f"has {'a wrong' if name in value else 'no'} {name}")
    return value


def hub_numbers(value: Any) -> dict[str, Any]:
    """The counters of a hub, or why there are none.

    Raises:
        ValueError: It is neither.
    """
    return value if isinstance(value, dict) and isinstance(value.get("error"), str) else shaped(value, _HUB)


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


def newest_run(results: Path) -> Path:
    """The folder of the run that was begun last.

    Raises:
        RunDamaged: There is none.
    """
    with contextlib.suppress(OSError):
        begun = {path.parent: path.stat().st_mtime_ns for path in results.glob("*/broadcaster.toml")}
        if begun:
            return max(begun, key=lambda folder: (begun[folder], folder.name))
    raise RunDamaged(f"there is no run in {results}: broadcaster loadtest makes one; or give the folder of a run")


def read_run(folder: Path) -> Outcome:
    """Read a run from its folder.

    Raises:
        RunDamaged: It is no folder, or a file in it is missing or damaged.
    """
    if not folder.is_dir():
        raise RunDamaged(
            f"{folder} is a file, not the folder of a run" if folder.exists() else f"there is no {folder}"
        )
    return outcome_of(Run(folder))


def outcome_of(run: Run, hub: dict[str, Any] | None = None, described: dict[str, Any] | None = None) -> Outcome:
    """The outcome of a run, of which the counters of its hub and its machine need not be in its folder yet.

    Raises:
        RunDamaged: A file in it is missing or damaged.
    """
    config = _parsed(run.config, tomllib.loads, _settings)
    limits, loadtest = config["report"], config["loadtest"]
    processes = range(1, config["fleet"]["processes"] + 1)
    for path in map(run.losses, processes):
        if not path.exists():
            raise RunDamaged(
                f"{run.folder} has no {path.name}: not a complete run, or of version 0.1.0, which kept no ledger"
            )
    published = records.read(run.published, PublishedRecord)
    fleet = {
        number: _parsed(run.fleet(number), json.loads, lambda value: shaped(value, _FLEET)) for number in processes
    }
    deliveries = {number: records.read(run.deliveries(number), DeliveryRecord) for number in processes}
    losses = {number: records.read(run.losses(number), LossRecord) for number in processes}
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
        rate_hz=loadtest.rate_hz,
        whole=figures(published, everything, len(clients)),
        ledger=balance(published, everything, every_loss, clients),
        per_process=per_process,
        fleet=fleet,
        hub=hub or _parsed(run.hub, json.loads, hub_numbers),
        machine=described or _parsed(run.machine, json.loads, lambda value: shaped(value, _MACHINE)),
        publish_failed=sum(bool(row.error) for row in published),
        broken=[],
    )
    outcome.broken.extend(broken_limits(outcome, limits, loadtest))
    return outcome


def _parsed(path: Path, parse: Callable[[str], Any], check: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    try:
        return check(parse(records.read_text(path)))
    except json.JSONDecodeError as error:
        raise RunDamaged(f"{path}, line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise RunDamaged(f"{path}: {error}") from None


def _settings(value: Any) -> dict[str, Any]:
    tables = shaped(value, _CONFIG)
    shaped(tables["fleet"], _CLIENTS)
    try:
        return tables | {
            "report": ReportTable(**tables["report"]),
            "loadtest": LoadtestTable(**tables["loadtest"]),
        }
    except ValueError:
        raise ValueError("has settings of [report] or [loadtest] that this version does not know") from None


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
