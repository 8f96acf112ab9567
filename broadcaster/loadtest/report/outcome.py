"""The contents of a report: a pure function of the files of a run."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from broadcaster.core.errors import RunDamaged
from broadcaster.loadtest import deliveries, hops, records
from broadcaster.loadtest.hops import Budget
from broadcaster.loadtest.latency import Figures, Latencies, figures, latencies, too_early, unknown, without
from broadcaster.loadtest.ledger import Ledger, balance
from broadcaster.loadtest.records import ClockRecord, LossRecord, PublishedRecord, TraceRecord
from broadcaster.loadtest.report import shapes
from broadcaster.loadtest.report.clocks import ONE_CLOCK, SAME, Clocks, compare
from broadcaster.loadtest.report.limits import Limit, limits
from broadcaster.loadtest.report.validity import Rig, Validity, judge, still_pct, used, wall_step_ms
from broadcaster.loadtest.rig import Lag, MachineSample, Stall
from broadcaster.loadtest.run import Run
from broadcaster.settings import is_loopback


@dataclass(frozen=True, slots=True)
class Outcome:
    """The contents of a report, read from the files of a run.

    Where clocks cannot be compared `latencies` has no deliveries, and there is no `budget`.
    """

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
    budget: Budget | None = None
    clocks: Clocks = ONE_CLOCK

    @property
    def broken(self) -> list[str]:
        """One sentence per limit that is exceeded."""
        return [limit.broken for limit in self.limits if not limit.holds]

    @property
    def is_failure(self) -> bool:
        """Whether a limit is broken, or the run is INVALID and may not be."""
        return bool(self.broken) or (bool(self.validity.reasons) and not self.config["report"].allow_invalid)

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
    check_folder(folder)
    return outcome_of(Run(folder))


def check_folder(folder: Path) -> None:
    """Refuse what is no folder.

    Raises:
        RunDamaged: It is none.
    """
    if not folder.is_dir():
        raise RunDamaged(
            f"{folder} is a file, not the folder of a run" if folder.exists() else f"there is no {folder}"
        )


def outcome_of(
    run: Run,
    hub: dict[str, Any] | None = None,
    described: dict[str, Any] | None = None,
    samples: Sequence[MachineSample] | None = None,
) -> Outcome:
    """The outcome of a run; what is given need not be in its folder yet.

    Args:
        run: Its folder.
        hub: The counters of its hub.
        described: Its machine.
        samples: Of its machine.

    Raises:
        RunDamaged: A file in it is missing or damaged, or its fleet had other clients than its settings say.
    """
    config = shapes.read_settings(run)
    loadtest, report = config["loadtest"], config["report"]
    processes = range(1, config["fleet"]["processes"] + 1)
    for path in (*map(run.losses, processes), run.publisher, *(() if samples is not None else (run.rig,))):
        if not path.exists():
            raise RunDamaged(f"{run.folder} has no {path.name}: not a complete run, or of an earlier version")
    published = records.read(run.published, PublishedRecord)
    fleet = {number: shapes.read_fleet(run, number) for number in processes}
    _check_clients(run, sum(result["clients"] for result in fleet.values()), config["fleet"]["clients"])
    clocks = _clocks(run, processes, _host(config, "redis"))
    logs = {number: deliveries.read(run.deliveries(number), published) for number in processes}
    losses = {number: records.read(run.losses(number), LossRecord) for number in processes}
    for number, (ahead_ns, _) in clocks.fleets.items():  # all onto the publisher's clock
        if ahead_ns:
            logs[number] = replace(logs[number], received_ns=logs[number].received_ns - ahead_ns)
            losses[number] = [_earlier(row, ahead_ns) for row in losses[number]]
    everything = deliveries.merged([*logs.values()])
    every_loss = [row for rows in losses.values() for row in rows]
    clients = range(config["fleet"]["clients"])
    measured = latencies(published, everything)
    alone = {number: latencies(published, log) for number, log in logs.items()} if len(logs) > 1 else {1: measured}
    whole, ledger = figures(published, measured, len(clients)), balance(published, everything, every_loss, clients)
    per_process = {1: (whole, ledger)}
    first = 0
    parts = []
    for number in processes:
        share = range(first, first + fleet[number]["clients"])
        first = share.stop
        if run.trace(number).exists():
            traces = records.read(run.trace(number), TraceRecord)
            at = hops.instants(published, traces, clocks.hubs[number].ahead_ns, clocks.redis.ahead_ns)
            at = at.without(stored=clocks.redis.is_known, hub=clocks.hubs[number].is_known)
            parts.append(hops.Part(share.start, len(share), at, losses[number]))
        if len(processes) > 1:
            per_process[number] = (
                figures(published, alone[number], len(share)),
                balance(published, logs[number], losses[number], share),
            )
    if clocks.error_ns is None:
        whole, measured, parts = unknown(whole), without(measured), []
        per_process = {number: (unknown(part), account) for number, (part, account) in per_process.items()}
    written = sum(result["deliveries"] + result["losses"] for result in fleet.values())
    lost_rows = written - everything.rows - len(every_loss)
    publisher = shapes.read_publisher(run)
    first_ns = min((row.published_mono_ns for row in published), default=0)
    lags = {"publisher": _lag(publisher["lag"], first_ns)}
    for number, result in fleet.items():
        clock = clocks.fleets[number]
        since_ns = first_ns if clock.is_known else _first_delivery(logs[number])
        lags[f"fleet.{number}"] = _lag(result, since_ns, clock.ahead_ns)
    lost = sum(disconnects(result) for result in fleet.values())
    return Outcome(
        name=run.name,
        rate_hz=loadtest.rate_hz,
        whole=whole,
        ledger=ledger,
        per_process=per_process,
        fleet=fleet,
        hub=hub or shapes.read_hub(run),
        machine=described or shapes.read_machine(run),
        publish_failed=sum(bool(row.error) for row in published),
        validity=_validity(
            records.read(run.rig, MachineSample) if samples is None else samples,
            published,
            measured,
            publisher["late_max_ms"],
            lags,
            lost_rows,
            sum(too_early(alone[number], clocks.fleets[number].error_ns) for number in processes),
            _local(config),
            [f"fleet.{number}" for number, clock in clocks.fleets.items() if clock != SAME],
        ),
        limits=limits(
            whole, ledger, lost, loadtest.events - whole.events, report, clocks_known=clocks.error_ns is not None
        ),
        published=published,
        losses=every_loss,
        latencies=measured,
        lags=lags,
        config=config,
        settings=records.read_text(run.config),
        budget=hops.budget(published, measured, parts) if parts else None,
        clocks=clocks,
    )


def _check_clients(run: Run, had: int, configured: int) -> None:
    """Refuse what cannot be counted: what comes to clients that are not expected would hide what was lost."""
    if had != configured:
        raise RunDamaged(
            f"{run.folder}: all fleet processes had {had} clients, and fleet.clients is {configured} in its "
            f"{run.config.name}: give all parts of a run the same settings"
        )


def _clocks(run: Run, processes: Iterable[int], redis_host: str) -> Clocks:
    """The clocks of a run; one of an earlier version has compared none.

    Raises:
        RunDamaged: Some parts have compared theirs, and others not.
    """
    paths = {number: run.clocks(f"fleet.{number}") for number in processes}
    if not any(path.exists() for path in (run.clocks("publisher"), *paths.values())):
        return ONE_CLOCK
    return compare(
        records.read(run.clocks("publisher"), ClockRecord),
        {number: records.read(path, ClockRecord) for number, path in paths.items()},
        redis_is_here=not redis_host or is_loopback(redis_host),
    )


def _earlier(row: LossRecord, by_ns: int) -> LossRecord:
    """The same time on a clock that is behind."""
    to_ns = None if row.to_mono_ns is None else row.to_mono_ns - by_ns
    return replace(row, from_mono_ns=row.from_mono_ns - by_ns, to_mono_ns=to_ns)


def _validity(
    samples: Sequence[MachineSample],
    published: list[PublishedRecord],
    measured: Latencies,
    late_ms: float,
    lags: dict[str, Lag],
    lost_rows: int,
    early: int,
    local: Collection[str],
    elsewhere: Sequence[str],
) -> Validity:
    first_ns = min((row.published_mono_ns for row in published), default=0)
    last_ns = max(row.published_mono_ns for row in published) if published else 0
    if len(measured.received_ns):
        last_ns = int(measured.received_ns.max())
    rig = Rig(
        **used(samples, first_ns, last_ns, local)._asdict(),
        stalls_ms={name: max((each.still_ms for each in lag.stalls), default=0.0) for name, lag in lags.items()},
        still_pct={name: still_pct(lag, (last_ns - first_ns) / 1e6) for name, lag in lags.items()},
        lags_ms={name: lag.lag_usual_ms for name, lag in lags.items()},
        late_ms=late_ms,
        wall_step_ms=wall_step_ms(samples),
        lost_rows=lost_rows,
        too_early=early,
    )
    validity = judge(rig, lags)
    if elsewhere:
        validity.notes.append(
            f"What others have used on the hosts of {', '.join(elsewhere)} is not known, and was not judged."
        )
    return validity


def _local(config: dict[str, Any]) -> set[str]:
    """The parts of a run that are on the machine which reports it."""
    hosts = {"redis": _host(config, "redis"), "hub": _host(config, "fleet")}
    return {"publisher", "fleet", *(role for role, host in hosts.items() if not host or is_loopback(host))}


def _host(config: dict[str, Any], table: str) -> str:
    """The host of the URL of a table; empty: this one."""
    try:
        return urlsplit(str(config[table]["url"])).hostname or ""
    except (KeyError, TypeError, ValueError):  # a secret may be hidden in it
        return ""


def _first_delivery(log: deliveries.Deliveries) -> int:
    """When it came: all that is known of the first publish where clocks cannot be compared."""
    return int(log.received_ns.min()) if len(log.received_ns) else 0


def _lag(fields: dict[str, Any], since_ns: int, ahead_ns: int = 0) -> Lag:
    """The lag of a process, and its stalls since an instant, on the clock that its own one is ahead of."""
    stalls = [Stall(ended_ns - ahead_ns, still_ms) for ended_ns, still_ms in fields["stalls"]]
    return Lag(
        lag_p50_ms=fields["lag_p50_ms"],
        lag_p99_ms=fields["lag_p99_ms"],
        lag_max_ms=fields["lag_max_ms"],
        lag_usual_ms=fields["lag_usual_ms"],
        busy_pct=fields["busy_pct"],
        stalls=[stall for stall in stalls if stall.ended_mono_ns >= since_ns],
    )
