"""The report: a pure function of a run's files, printed the same each time, and red when a limit is broken."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from broadcaster.core.errors import RunDamaged
from broadcaster.loadtest import archive, machine, records
from broadcaster.loadtest.records import DeliveryRecord, LossRecord, PublishedRecord
from broadcaster.loadtest.report.outcome import read_run
from broadcaster.loadtest.report.summary import summary_rows
from broadcaster.loadtest.report.text import present
from broadcaster.loadtest.rig import MachineSample
from broadcaster.loadtest.run import Run
from broadcaster.redis.server import RedisServer
from broadcaster.settings import dump, load
from tests.support import WHOLE_RUN_S, CommandLine, broadcaster, eventually, finished, free_port

MS = 1_000_000
MACHINE = {
    "broadcaster": "0.1.0", "system": "Linux 6", "cpu": "Test CPU", "cores": 2, "load_1m": 0.5, "python": "3.11.7",
    "sanic": "25.12.1", "uvloop": "0.23.0", "websockets": "17.4", "redis_py": "8.1.0", "hiredis": "3.5.0",
    "redis_server": "6.2.14", "commit": "0123456789ab",
}  # fmt: skip
HUB = {
    "events_received": 4, "invalid": {"field": 1, "not_json": 2}, "deliveries": 16, "slow_closed": 0,
    "redis_reconnects": 0,
}  # fmt: skip


def fleet_result(process: int, clients: int, **changes: Any) -> dict[str, Any]:
    return {
        "process": process, "clients": clients, "connected": clients, "disconnects": {}, "failures": {},
        "foreign": 0, "lag_p50_ms": 0.5, "lag_p99_ms": 1.5 * process, "lag_max_ms": 2.0 * process, "reconnects": 0,
        "lag_usual_ms": 1.5 * process, "busy_pct": 12.5, "stalls": [], "deliveries": clients * 4, "losses": 0,
    } | changes  # fmt: skip


def publisher_result(late_max_ms: float = 0.5, **lag: Any) -> dict[str, Any]:
    calm: dict[str, Any] = {"lag_p50_ms": 0.2, "lag_p99_ms": 0.4, "lag_max_ms": 12.0, "lag_usual_ms": 0.4}
    calm |= {"busy_pct": 1.0, "stalls": []}
    return {"late_p99_ms": 0.1, "late_max_ms": late_max_ms, "lag": calm | lag, "warmup_events": 10}


def sample(at_ms: int, **changes: Any) -> MachineSample:
    """What a machine of two cores has used: in each second 100 ms by the run and 10 ms by others."""
    ours = {f"{role}_ms": at_ms // 50 for role in ("redis", "hub", "publisher", "fleet", "report")}
    whole = {"user_ms": at_ms // 10 + at_ms // 100, "steal_ms": 0, "wall_ahead_us": 10**15, "cores": 2}
    return MachineSample(at_mono_ns=at_ms * MS, **(whole | ours | changes))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A perfect run: 4 events to 3 + 1 clients in two processes; client c gets event n after c + n ms."""
    folder = tmp_path / "results" / "20260101-120000-1-2"
    folder.mkdir(parents=True)
    run = Run(folder)
    write_config(run)
    numbers = range(1, 5)
    published = [PublishedRecord(n, f"e{n}", n * 100 * MS, n * 100 * MS, 0, 0, 1, "", "a1b2", n) for n in numbers]
    records.write(run.published, PublishedRecord, published)
    for process, clients in ((1, [0, 1, 2]), (2, [3])):
        rows = [DeliveryRecord(c, f"e{n}", n, (n * 100 + c + n) * MS, 0) for n in numbers for c in clients]
        records.write(run.deliveries(process), DeliveryRecord, rows)
        records.write(run.losses(process), LossRecord, [])
        run.fleet(process).write_text(json.dumps(fleet_result(process, len(clients))))
    run.publisher.write_text(json.dumps(publisher_result()))
    records.write(run.rig, MachineSample, [sample(at_ms) for at_ms in range(0, 2000, 250)])
    run.hub.write_text(json.dumps(HUB))
    run.machine.write_text(json.dumps(MACHINE))
    return run


def write_config(run: Run, **report: Any) -> None:
    """The settings of the run, with other limits if given."""
    overrides = {"fleet": {"clients": 4, "processes": 2}, "loadtest": {"events": 4}, "report": report}
    run.config.write_text(dump(load(overrides=overrides).settings))


def change(run: Run, process: int, change_rows: Callable[[list[DeliveryRecord]], list[DeliveryRecord]]) -> None:
    """Write another delivery log for one fleet process."""
    path = run.deliveries(process)
    records.write(path, DeliveryRecord, change_rows(records.read(path, DeliveryRecord)))
    count_rows(run, process)


def count_rows(run: Run, process: int) -> None:
    """Let the fleet process have written as many rows as there are."""
    result = json.loads(run.fleet(process).read_text())
    result["deliveries"] = len(records.read(run.deliveries(process), DeliveryRecord))
    result["losses"] = len(records.read(run.losses(process), LossRecord))
    run.fleet(process).write_text(json.dumps(result))


def table_of(text: str) -> dict[str, list[str]]:
    """The cells of the printed table by the name of their line."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in rows}


def printed(run: Run) -> str:
    return present(read_run(run.folder), run.folder)


# The table


def test_the_table_has_the_users_lines(run: Run) -> None:
    """All lines, in their order, for the run and for each fleet process, with the figures of the files."""
    table = table_of(printed(run))
    assert table.pop("") == ["whole run", "fleet.1", "fleet.2"]
    assert list(table.items()) == [
        ("Clients", ["4", "3", "1"]),
        ("Events", ["4", "4", "4"]),
        ("Expected deliveries", ["16", "12", "4"]),
        ("Received deliveries", ["16", "12", "4"]),
        ("Dropped deliveries", ["0", "0", "0"]),
        ("p50 latency (ms)", ["-", "-", "-"]),
        ("p95 latency (ms)", ["-", "-", "-"]),
        ("p99 latency (ms)", ["-", "-", "-"]),
        ("max latency (ms)", ["7.00", "6.00", "7.00"]),
        ("Duplicates", ["0", "0", "0"]),
        ("Out of order", ["0", "0", "0"]),
        ("Disconnects", ["0", "0", "0"]),
        ("p90 latency (ms)", ["-", "-", "-"]),
        ("p99.9 latency (ms)", ["-", "-", "-"]),
        ("p50 to last subscriber (ms)", ["-", "-", "-"]),
        ("p99 to last subscriber (ms)", ["-", "-", "-"]),
        ("max to last subscriber (ms)", ["7.00", "6.00", "7.00"]),
    ]


def longer(run: Run, events: int) -> None:
    """Make it a run of so many events to one client and in one process; event n arrives after n ms."""
    overrides = {"fleet": {"clients": 1}, "loadtest": {"events": events}}
    run.config.write_text(dump(load(overrides=overrides).settings))
    numbers = range(1, events + 1)
    published = [PublishedRecord(n, f"e{n}", n * MS, n * MS, 0, 0, 1, "", "a1b2", n) for n in numbers]
    records.write(run.published, PublishedRecord, published)
    rows = [DeliveryRecord(0, f"e{n}", n, 2 * n * MS, 0) for n in numbers]
    records.write(run.deliveries(1), DeliveryRecord, rows)
    run.fleet(1).write_text(json.dumps(fleet_result(1, 1, deliveries=events)))


def test_percentiles_of_enough_samples_are_told(run: Run) -> None:
    """Of 1,000 deliveries p99 has the ten beyond it that it needs, p99.9 has not; these are counted in events."""
    longer(run, 1000)
    text = printed(run)
    table = table_of(text)
    told = {name.partition(" ")[0]: values[0] for name, values in table.items() if "latency (ms)" in name}
    assert told == {
        "p50": "500.00",
        "p90": "900.00",
        "p95": "950.00",
        "p99": "990.00",
        "p99.9": "-",
        "max": "1000.00",
    }
    assert [table[f"{which} to last subscriber (ms)"][0] for which in ("p50", "p99", "max")] == [
        "500.00",
        "990.00",
        "1000.00",
    ]
    assert "Beyond p99: 10 deliveries, of 10 events.\n" in text


def test_a_histogram_stands_under_the_table(run: Run) -> None:
    """Ten classes, each delivery in one of them."""
    lines = re.findall(r"^ *([\d.]+) to +([\d.]+) ms +([█▏▎▍▌▋▊▉]*) +(\d+)$", printed(run), re.MULTILINE)
    assert len(lines) == 10
    assert (lines[0][0], lines[-1][1]) == ("1.00", "7.00")
    assert [later[0] for later in lines[1:]] == [earlier[1] for earlier in lines[:-1]]
    assert sum(int(count) for *_, count in lines) == 16
    assert max(len(bar) for *_, bar, _ in lines) == 40


def test_what_stands_around_the_table(run: Run) -> None:
    """The run's name, the schedule, the fleet's own lag, the machine, the versions, the hub, and where it is."""
    text = printed(run)
    assert text.startswith("Run 20260101-120000-1-2\n")
    assert "Schedule: 10 events a second. Fleet lag: p99 3.0 ms, max 4.0 ms." in text
    assert "Machine: Test CPU, 2 cores, Linux 6, load 0.5." in text
    assert "broadcaster 0.1.0, Python 3.11.7, Redis 6.2.14, Sanic 25.12.1, uvloop 0.23.0, websockets 17.4" in text
    assert "Hub: 4 events received, 3 refused, 16 deliveries, 0 closed as slow, 0 Redis reconnects." in text
    assert "Ledger: 16 expected = 16 delivered + 0 filtered + 0 lost.\nSchedule:" in text
    assert "CPU, of one core: redis 2 %, hub 2 %, publisher 2 %, fleet 2 %, report 2 %." in text
    assert "Of the machine: others 0.5 %, steal 0.0 %." in text
    assert text.endswith(f"PASSED: all limits of [report] hold.\nResults: {run.folder}")
    assert "\nVALID: no part of the rig stood still (0 ms) or was late (0.5 ms).\nPASSED: " in text


def test_a_hub_elsewhere_needs_no_sanic_here(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The load test of another machine's hub describes this one without it."""

    def version(name: str) -> str:
        if name == "sanic":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(machine, "version", version)
    run.machine.write_text(json.dumps(asdict(machine.describe("6.2.14"))))
    assert "Redis 6.2.14, uvloop 1.0, websockets 1.0." in printed(run)


def test_what_the_lines_mean_is_said_when_it_is_asked_for(run: Run) -> None:
    """`--explain` adds a glossary."""
    plain, explained = printed(run), present(read_run(run.folder), run.folder, explain=True)
    for word in ("Dropped:", "Latency:", "p99:", "Fleet lag:", "Ledger:"):
        meaning = re.compile(rf"^{word} [\w ]+", re.MULTILINE)
        assert meaning.search(explained), f"{word} is not explained"
        assert len(meaning.findall(plain)) == (word == "Ledger:"), f"{word} is explained unasked"


def test_one_process_needs_no_columns_of_its_own(run: Run) -> None:
    """With one fleet process the run is the only column."""
    run.config.write_text(dump(load(overrides={"fleet": {"clients": 3}, "loadtest": {"events": 4}}).settings))
    table = table_of(printed(run))
    assert table[""] == ["whole run"]
    assert table["Received deliveries"] == ["12"]


def test_a_run_without_deliveries_has_no_latency(run: Run) -> None:
    """Nothing came: a dash and not a number stands where the latency would, and the run has failed."""
    for process in (1, 2):
        change(run, process, lambda rows: [])
    text = printed(run)
    assert table_of(text)["p99 latency (ms)"] == ["-", "-", "-"]
    assert table_of(text)["Dropped deliveries"] == ["16", "12", "4"]
    assert "FAILED: 16 dropped deliveries, 0 allowed" in text
    assert (
        "FAILED: the ledger does not close: 16 deliveries are missing and nobody said so: client 0: a1b2-1" in text
    )


def test_what_went_wrong_is_noted(run: Run) -> None:
    """Negative latencies, a hub that gave no statistics, and clients that could not connect are said in words."""
    change(run, 2, lambda rows: [DeliveryRecord(3, "e1", 1, 99 * MS, 0), *rows[1:]])
    run.hub.write_text(json.dumps({"error": "no statistics: no answer (timed out)"}))
    failures = {"refused: 503 Service Unavailable": 2}
    run.fleet(1).write_text(json.dumps(fleet_result(1, 3, connected=1, failures=failures)))
    write_fleet(run, disconnects={"1006": 3, "4008": 1}, reconnects=3)
    text = printed(run)
    assert "Connections: 4 were lost, 3 were made again." in text
    assert "1 latencies are negative: the clocks cannot be trusted." in text
    assert "Hub: no statistics: no answer (timed out)." in text
    assert "fleet.1: 2 x refused: 503 Service Unavailable" in text
    assert table_of(text)["Disconnects"] == ["6", "2", "4"]


# The limits


def write_fleet(run: Run, **changes: Any) -> None:
    run.fleet(2).write_text(json.dumps(fleet_result(2, 1, **changes)))
    count_rows(run, 2)


def publish_with_errors(run: Run) -> None:
    rows = records.read(run.published, PublishedRecord)
    failed = PublishedRecord(4, "e4", 0, 0, 0, 0, None, "Redis closed the connection")
    records.write(run.published, PublishedRecord, [*rows[:3], failed])
    change(run, 1, lambda rows: [row for row in rows if row.sequence < 4])


def publish_more_than_meant(run: Run) -> None:
    run.config.write_text(run.config.read_text().replace("\nevents = 4\n", "\nevents = 3\n"))


def announce(run: Run, process: int, *losses: LossRecord) -> None:
    records.write(run.losses(process), LossRecord, losses)
    count_rows(run, process)


def gap(client: int, first: int, last: int | None = None) -> LossRecord:
    return LossRecord(client, "redis_restarted", "a1b2", first, last, None, None, "", 0, 0)


def lose_two(run: Run) -> None:
    """Clients 0 and 1 do not get the first event, and both are told."""
    change(run, 1, lambda rows: rows[2:])
    announce(run, 1, gap(0, 1, 1), gap(1, 1, 1))


def lose_everything(run: Run) -> None:
    """Nothing comes, and everybody is told."""
    write_config(run, max_p99_ms=1.0, max_dropped=1000)
    for process, clients in ((1, [0, 1, 2]), (2, [3])):
        change(run, process, lambda rows: [])
        announce(run, process, *(gap(client, 1) for client in clients))


def lose_silently(run: Run) -> None:
    """Clients 0 and 1 do not get the first event, nobody is told, and the limits would allow it."""
    write_config(run, max_dropped=1000)
    change(run, 1, lambda rows: rows[2:])


def slow(**report: Any) -> Callable[[Run], None]:
    """A run of 1,000 deliveries, the n-th after n ms, with these limits."""

    def spoil(run: Run) -> None:
        longer(run, 1000)
        config = {"fleet": {"clients": 1}, "loadtest": {"events": 1000}, "report": report}
        run.config.write_text(dump(load(overrides=config).settings))

    return spoil


BROKEN: dict[str, tuple[Callable[[Run], None], str]] = {
    "dropped": (lose_two, "2 dropped deliveries, 0 allowed"),
    "silently_lost": (
        lose_silently,
        "the ledger does not close: 2 deliveries are missing and nobody said so: client 0: a1b2-1; client 1",
    ),
    "duplicates": (lambda run: change(run, 1, lambda rows: [*rows, rows[-1]]), "1 duplicates, 0 allowed"),
    "out_of_order": (
        lambda run: change(run, 2, lambda rows: [rows[1], rows[0], *rows[2:]]),
        "1 deliveries out of order, 0 allowed",
    ),
    "disconnected": (
        lambda run: write_fleet(run, disconnects={"1006": 1, "4008": 2}),
        "3 disconnects, 0 allowed",
    ),
    "never_connected": (lambda run: write_fleet(run, connected=0), "1 disconnects, 0 allowed"),
    "not_published": (
        publish_with_errors,
        "1 events that could not be published, 0 allowed",
    ),
    "more_published_than_meant": (
        publish_more_than_meant,
        "events that could not be published are -1: more was counted than there can have been",
    ),
    "slow": (slow(max_p99_ms=989.9), "p99 is 990.0 ms, 989.9 ms allowed"),
    "slow_median": (slow(max_p50_ms=499.9), "p50 is 500.0 ms, 499.9 ms allowed"),
    "slow_to_the_last": (
        slow(max_last_p99_ms=989.9),
        "p99 to the last subscriber is 990.0 ms, 989.9 ms allowed",
    ),
    "slow_and_few": (
        lambda run: write_config(run, max_p99_ms=6.9),
        "p99 is not known of so few samples, and the largest is 7.0 ms, 6.9 ms allowed",
    ),
    "slow_without_deliveries": (lose_everything, "p99 is not known: nothing was delivered, 1 ms allowed"),
}


@pytest.mark.parametrize(("spoil", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_limit_fails_the_run(spoil: Callable[[Run], None], reason: str, run: Run) -> None:
    """One thing is wrong: the verdict says which, and nothing else."""
    spoil(run)
    outcome = read_run(run.folder)
    assert [limit.line[0] for limit in outcome.limits].count("✗") == len(outcome.broken) == 1
    assert reason in outcome.broken[0]
    text = present(outcome, run.folder)
    assert f"FAILED: {outcome.broken[0]}" in text
    assert "PASSED" not in text


ALLOWED: dict[str, tuple[Callable[[Run], None], dict[str, Any]]] = {
    "dropped": (BROKEN["dropped"][0], {"max_dropped": 2}),
    "duplicates": (BROKEN["duplicates"][0], {"max_duplicates": 1}),
    "out_of_order": (BROKEN["out_of_order"][0], {"max_out_of_order": 1}),
    "disconnected": (BROKEN["disconnected"][0], {"max_disconnects": 3}),
    "slow_and_few": (lambda run: None, {"max_p99_ms": 7.0, "max_p50_ms": 7.0, "max_last_p99_ms": 7.0}),
    "no_limit": (lambda run: None, {"max_p99_ms": 0.0}),
}


@pytest.mark.parametrize(("spoil", "limits"), ALLOWED.values(), ids=ALLOWED.keys())
def test_a_limit_that_is_just_met_holds(spoil: Callable[[Run], None], limits: dict[str, Any], run: Run) -> None:
    """Exactly as many as allowed is allowed."""
    spoil(run)
    write_config(run, **limits)
    assert read_run(run.folder).broken == []


@pytest.mark.parametrize("configured", [3, 5])
def test_a_fleet_of_other_clients_than_its_settings_say(configured: int, run: Run, command: CommandLine) -> None:
    """What came to the others would stand for what was lost, with a word: no figures, and no verdict."""
    lose_two(run)
    overrides = {"fleet": {"clients": configured, "processes": 2}, "loadtest": {"events": 4}}
    run.config.write_text(dump(load(overrides=overrides).settings))
    ended = command("report", str(run.folder))
    assert (ended.code, ended.stdout) == (65, "")
    assert f"all fleet processes had 4 clients, and fleet.clients is {configured} in its" in ended.complaint


# The ledger


def test_the_ledger_is_printed_with_its_causes(run: Run) -> None:
    """Lost, but told: a line per cause; as many as allowed, so that the run has passed."""
    write_config(run, max_dropped=6, max_disconnects=1)
    change(run, 1, lambda rows: rows[2:])
    change(run, 2, lambda rows: [])
    away = LossRecord(3, "disconnected 4008", "", None, None, None, None, "", 0, None)
    announce(run, 1, gap(0, 1, 1), gap(1, 1, None))
    announce(run, 2, away)
    write_fleet(run, disconnects={"4008": 1})
    text = printed(run)
    assert (
        "Ledger: 16 expected = 10 delivered + 0 filtered + 6 lost, all named:\n"
        "  4  disconnected 4008 (too slow)\n"
        "  2  redis_restarted (gap announced by the hub)\n"
    ) in text
    assert "PASSED" in text
    rows = summary_rows(read_run(run.folder))
    assert [(row["lost_named"], row["lost_unexplained"]) for row in rows] == [(6, 0), (2, 0), (4, 0)]


def test_a_publish_that_failed_is_in_the_ledger(run: Run) -> None:
    """The event is not expected to come, but it is accounted for; to whom it came, it was delivered."""
    publish_with_errors(run)
    text = printed(run)
    assert table_of(text)["Expected deliveries"] == ["12", "9", "3"]
    assert (
        "Ledger: 16 expected = 13 delivered + 0 filtered + 3 lost, all named:\n"
        "  3  publish failed (Redis has not confirmed it, and it did not come)\n"
        "  1 of the delivered came though their publish seemed to have failed.\n"
    ) in text


def test_a_gap_told_to_a_client_of_another_process_explains_nothing(run: Run) -> None:
    """Each client's losses are its own."""
    lose_silently(run)
    announce(run, 2, gap(3, 1))
    rows = summary_rows(read_run(run.folder))
    assert [row["lost_unexplained"] for row in rows] == [2, 2, 0]


# The rows


def test_the_rows_of_the_summary(run: Run) -> None:
    """First the run, then each process; every column of the archive is filled, and none is unknown."""
    rows = summary_rows(read_run(run.folder))
    assert [row["scope"] for row in rows] == ["run", "fleet.1", "fleet.2"]
    for row in rows:
        assert set(row) == set(archive.COLUMNS)
        assert (row["run"], row["verdict"], row["cpu"]) == ("20260101-120000-1-2", "PASSED", "Test CPU")
    assert [row["received"] for row in rows] == [16, 12, 4]
    assert [row["fleet_lag_max_ms"] for row in rows] == [4.0, 2.0, 4.0]
    write_fleet(run, reconnects=2)
    assert [row["reconnects"] for row in summary_rows(read_run(run.folder))] == [2, 0, 2]
    BROKEN["dropped"][0](run)
    assert {row["verdict"] for row in summary_rows(read_run(run.folder))} == {"FAILED"}


# Whether the rig may be believed


DISTURBED: dict[str, tuple[Callable[[Run], object], str]] = {
    "fleet_stood_still": (
        lambda run: write_fleet(run, stalls=[[300 * MS, 287.0]]),
        "fleet.2 stood still for 287 ms: it was stopped, or was given no core (50 ms allowed",
    ),
    "publisher_stood_still": (
        lambda run: run.publisher.write_text(json.dumps(publisher_result(stalls=[[300 * MS, 51.0]]))),
        "publisher stood still for 51 ms",
    ),
    "fleet_stood_still_again_and_again": (
        lambda run: write_fleet(run, stalls=[[number * 100 * MS, 45.0] for number in range(1, 5)]),
        "fleet.2 stood still for 18 % of the time, 45 ms at most at once: it was stopped again and again",
    ),
    "late": (
        lambda run: run.publisher.write_text(json.dumps(publisher_result(late_max_ms=20.1))),
        "the publisher wrote an event 20 ms late, and was not waiting for Redis",
    ),
    "others": (
        lambda run: write_samples(run, lambda at_ms: {"user_ms": at_ms}),
        "other processes used 45 % of the machine's CPU time (33 % allowed)",
    ),
    "steal": (
        lambda run: write_samples(run, lambda at_ms: {"steal_ms": at_ms // 5}),
        "the machine itself was given no core for 10 % of the time (steal; 5 % allowed)",
    ),
    "wall_clock": (
        lambda run: write_samples(run, lambda at_ms: {"wall_ahead_us": 10**15 + (5001 if at_ms > 400 else 0)}),
        "the wall clock was set by 5 ms against CLOCK_MONOTONIC",
    ),
    "rows": (
        lambda run: records.write(run.deliveries(2), DeliveryRecord, []),
        "4 rows are missing in the logs of the fleet",
    ),
}


def write_samples(run: Run, changes: Callable[[int], dict[str, Any]]) -> None:
    rows = [sample(at_ms, **changes(at_ms)) for at_ms in range(0, 2000, 250)]
    records.write(run.rig, MachineSample, rows)


@pytest.mark.parametrize(("spoil", "reason"), DISTURBED.values(), ids=DISTURBED.keys())
def test_a_disturbed_rig_is_told(spoil: Callable[[Run], object], reason: str, run: Run) -> None:
    """One reason, above the table, whose figures are there all the same; the run has failed, unless it may."""
    write_config(run, max_dropped=4)
    announce(run, 2, gap(3, 1))
    spoil(run)
    outcome = read_run(run.folder)
    [found] = outcome.validity.reasons
    assert found.startswith(reason)
    assert (outcome.broken, outcome.is_failure, outcome.verdict) == ([], True, "FAILED")
    text = present(outcome, run.folder)
    assert text.startswith(f"Run {run.name}\nINVALID: {found}.\n┌")
    assert "FAILED: the run is INVALID; all limits of [report] hold." in text
    assert "\nVALID" not in text
    assert {(row["validity"], row["reasons"], row["verdict"]) for row in summary_rows(outcome)} == {
        ("INVALID", found, "FAILED")
    }
    write_config(run, max_dropped=4, allow_invalid=True)
    outcome = read_run(run.folder)
    assert (outcome.is_failure, outcome.validity.word) == (False, "INVALID")
    assert "PASSED" in present(outcome, run.folder)


CALM: dict[str, Callable[[Run], object]] = {
    "just_as_allowed": lambda run: run.publisher.write_text(
        json.dumps(publisher_result(late_max_ms=20.0, stalls=[[0, 50.0]]))
    ),
    "a_slow_loop": lambda run: write_fleet(run, stalls=[[300 * MS, 287.0]], lag_usual_ms=30.0),
    "some_short_stalls": lambda run: write_fleet(run, stalls=[[300 * MS, 50.0], [400 * MS, 50.0]]),
    "no_proc": lambda run: write_samples(run, lambda at_ms: {"user_ms": None, "steal_ms": None}),
    "a_hub_of_which_nothing_is_known": lambda run: write_samples(
        run, lambda at_ms: {"user_ms": at_ms, "hub_ms": None}
    ),
    "a_clock_that_runs_fast": lambda run: write_samples(run, lambda at_ms: {"wall_ahead_us": 10**15 + at_ms}),
    "no_samples": lambda run: records.write(run.rig, MachineSample, []),
}


@pytest.mark.parametrize("spoil", CALM.values(), ids=CALM.keys())
def test_what_is_no_disturbance(spoil: Callable[[Run], object], run: Run) -> None:
    """Within the bounds, a loop that is always slow, and what the system does not say: VALID."""
    spoil(run)
    outcome = read_run(run.folder)
    assert outcome.validity.word == "VALID"
    is_known = outcome.validity.rig.others_cpu_pct is not None
    assert ("How much CPU time others have used is not known" in present(outcome, run.folder)) == (not is_known)


def test_a_rig_at_its_limit_is_named(run: Run) -> None:
    """A fleet that is busy all the time is no fault of anybody, but has to be known."""
    write_fleet(run, busy_pct=93.0)
    outcome = read_run(run.folder)
    assert outcome.validity.word == "VALID"
    assert "fleet.2 was busy for 93 % of the time" in present(outcome, run.folder)


# `broadcaster report FOLDER`


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


def test_the_command_prints_a_run_again(run: Run, command: CommandLine) -> None:
    """It prints what the run printed, exit code 0, and changes nothing."""
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    for _ in range(2):
        ended = command("report", str(run.folder))
        hint = f"What the lines mean: broadcaster report {run.folder} --explain"
        assert (ended.code, ended.stdout, ended.stderr) == (0, f"{printed(run)}\n{hint}\n", "")
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before
    assert list(run.folder.parent.iterdir()) == [run.folder]


@pytest.mark.parametrize("name", ["dropped", "silently_lost"])
def test_the_command_fails_as_the_run_did(name: str, run: Run) -> None:
    """A broken limit, or a ledger that does not close, is exit code 1, with the reason."""
    spoil, reason = BROKEN[name]
    spoil(run)
    ended = finished("report", str(run.folder))
    assert (ended.code, ended.stderr) == (1, "")
    assert f"FAILED: {reason}" in ended.stdout


def test_a_run_of_an_earlier_version_is_told(run: Run, command: CommandLine) -> None:
    """It has no losses and no positions: one line that says so, exit code 65."""
    for process in (1, 2):
        run.losses(process).unlink()
    lines = [line.rpartition(",")[0].rpartition(",")[0] for line in run.published.read_text().splitlines()]
    run.published.write_text("\n".join(lines) + "\n")
    ended = command("report", str(run.folder))
    assert (ended.code, ended.stdout) == (65, "")
    assert "has no losses.1.csv: not a complete run, or of an earlier version" in ended.complaint


def test_the_limits_are_those_of_the_run(run: Run, command: CommandLine) -> None:
    """What holds here and now does not change the verdict of then."""
    ended = command("report", str(run.folder), BROADCASTER_REPORT__MAX_P99_MS="0.001")
    assert ended.code == 0


FILES = ["broadcaster.toml", "published.csv", "deliveries.1.csv", "deliveries.2.csv", "losses.1.csv",
         "losses.2.csv", "fleet.2.json", "hub.json", "machine.json", "publisher.json", "rig.csv"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_an_incomplete_run_is_told(name: str, run: Run, command: CommandLine) -> None:
    """A run without one of its files is one line that names it, exit code 65: no figures are made up."""
    (run.folder / name).unlink()
    with pytest.raises(RunDamaged, match=re.escape(name)):
        read_run(run.folder)
    ended = command("report", str(run.folder))
    assert (ended.code, ended.stdout) == (65, "")
    assert name in ended.complaint


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_run_is_told(name: str, run: Run, command: CommandLine) -> None:
    """A file that is something else is one line that names it, and no traceback."""
    (run.folder / name).write_text("{ damaged")
    ended = command("report", str(run.folder))
    assert (ended.code, ended.stdout) == (65, "")
    assert re.search(rf"{re.escape(name)}(, line 1)?: ", ended.complaint)


def text(said: str) -> Callable[[bytes], bytes]:
    return lambda before: said.encode()


def cut(before: bytes) -> bytes:
    return before[: len(before) * 2 // 3 - 5]


SPOILED: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "empty": ("published.csv", text(""), ", line 1: has other columns than"),
    "cut_csv": ("deliveries.1.csv", cut, r", line \d+: (is cut off|has \d)"),
    "cut_json": ("fleet.2.json", cut, ", line 1: "),
    "cut_toml": ("broadcaster.toml", text("[fleet\n"), ": Expected"),
    "another_json": ("machine.json", text("[]"), ": is another file"),
    "no_such_key": ("fleet.1.json", text('{"clients": 3}'), ": has no connected"),
    "a_wrong_value": ("hub.json", text(json.dumps(HUB | {"invalid": 3})), ": has a wrong invalid"),
    "deep_json": ("hub.json", text("[" * 100_000), ": "),
    "no_number": ("losses.1.csv", lambda old: old + b"x,,,,,,,,,\n", ", line 2: client is no whole number"),
    "too_wide": ("losses.1.csv", lambda old: old + b"1,,,,,,,,,,\n", ", line 2: has 11 columns"),
    "no_text": ("published.csv", lambda old: old + b"\xff,\n", r", line \d or later: is no UTF-8"),
    "no_text_json": ("hub.json", lambda old: b"{\n\xff}", ", line 2: is no UTF-8"),
    "nulls": ("deliveries.2.csv", lambda old: bytes(300_000), ", line 1: "),
    "a_later_version": ("broadcaster.toml", lambda old: old + b"more = 1\n", ": has settings of"),
}


@pytest.mark.parametrize(("name", "spoil", "said"), SPOILED.values(), ids=SPOILED.keys())
def test_damage_is_named_with_file_and_line(
    name: str, spoil: Callable[[bytes], bytes], said: str, run: Run, command: CommandLine
) -> None:
    """One line, exit code 65; no word of the language that this is written in."""
    path = run.folder / name
    path.write_bytes(spoil(path.read_bytes()))
    ended = command("report", str(run.folder))
    assert (ended.code, ended.stdout) == (65, "")
    assert re.fullmatch(rf"error: .*/{re.escape(name)}{said}.*\n", ended.stderr)
    assert not re.search(r"zip|argument|literal|Traceback|codec|Errno|KeyError", ended.stderr)


def test_what_is_no_run_is_told(run: Run, command: CommandLine) -> None:
    """An empty folder, a file, and nothing at all."""
    results = run.folder.parent
    empty, folder, hub = results / "empty", results / "folder", results / "hub.json"
    empty.mkdir()
    shutil.copytree(run.folder, folder)
    (folder / "losses.2.csv").unlink()
    (folder / "losses.2.csv").mkdir()
    hub.write_text("{}")
    for path, said in (
        (empty, "is not a complete run: there is no broadcaster.toml"),
        (hub, "is a file, not the folder of a run"),
        (results / "nowhere", "there is no "),
        (folder, "losses.2.csv cannot be read: is a directory"),
    ):
        ended = command("report", str(path))
        assert (ended.code, ended.stdout) == (65, "")
        assert said in ended.complaint


def test_without_a_folder_it_is_the_newest_run(run: Run, command: CommandLine) -> None:
    """The one that was begun last, whatever its name is."""
    older = run.folder.with_name("zzz")
    shutil.copytree(run.folder, older)
    os.utime(older / "broadcaster.toml", (1, 1))
    (run.folder.parent / "not_a_run").mkdir()
    ended = command("report", BROADCASTER_LOADTEST__RESULTS=str(run.folder.parent))
    assert (ended.code, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"Run {run.name}\n")
    assert "added" not in ended.stdout
    ended = command("report", BROADCASTER_LOADTEST__RESULTS=str(run.folder / "nowhere"))
    assert (ended.code, ended.stdout) == (65, "")
    assert "there is no run in" in ended.complaint


def test_the_files_of_an_earlier_run_are_no_result(run: Run, redis: RedisServer, tmp_path: Path) -> None:
    """A report that waits for its run does not take what lies in a folder of that name for it."""
    shutil.copytree(run.folder, tmp_path / "results" / "nightly")
    ended = finished(
        *("report", "--loadtest"),
        cwd=tmp_path,
        BROADCASTER_REDIS__URL=redis.url,
        BROADCASTER_HUB__PORT=str(free_port()),
        BROADCASTER_LOADTEST__RUN="nightly",
        BROADCASTER_LOADTEST__START_TIMEOUT_S="0.2",
        BROADCASTER_LOADTEST__EVENTS="4",
        BROADCASTER_LOADTEST__RATE_HZ="0",
        BROADCASTER_FLEET__DRAIN_S="0.2",
        BROADCASTER_FLEET__CLIENTS="4",
        BROADCASTER_FLEET__PROCESSES="2",
        BROADCASTER_REPORT__TIMEOUT_S="0.2",
    )
    assert ended.code in (69, 78), f"nobody has run anything, but:\n{ended.stdout}"
    assert "nightly" in ended.complaint
    assert not (tmp_path / "results" / "archive.csv").exists()


def spreadsheet(path: Path) -> None:
    path.write_text(";".join(archive.COLUMNS) + "\n")


SPOILED_LATER: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "archive_a_folder": ("../archive.csv", Path.mkdir, "is no file"),
    "archive_of_a_spreadsheet": ("../archive.csv", spreadsheet, "was saved by a spreadsheet"),
    "hub": ("hub.json", Path.mkdir, "Is a directory"),
    "summary": ("summary.csv", Path.mkdir, "Is a directory"),
}


@pytest.mark.parametrize(("name", "spoil", "said"), SPOILED_LATER.values(), ids=SPOILED_LATER.keys())
def test_what_cannot_be_kept_at_the_end_is_printed_all_the_same(
    name: str, spoil: Callable[[Path], None], said: str, run: Run, tmp_path: Path
) -> None:
    """Table and verdict, then one line that names the file; the row is in the run's folder, or in the archive."""
    folder = tmp_path / "results" / "nightly"
    variables = {
        "BROADCASTER_REDIS__URL": f"redis://127.0.0.1:{free_port()}/0",
        "BROADCASTER_HUB__PORT": str(free_port()),
        "BROADCASTER_LOADTEST__RUN": folder.name,
        "BROADCASTER_LOADTEST__EVENTS": "4",
        "BROADCASTER_FLEET__CLIENTS": "4",
        "BROADCASTER_FLEET__PROCESSES": "2",
    }
    with broadcaster("report", "--loadtest", cwd=tmp_path, **variables) as running:
        eventually((folder / "broadcaster.toml").exists, "the report has not begun", 20)
        spoil(folder / name)
        for path in run.folder.glob("[dflp]*"):
            shutil.copy(path, folder)
        assert running.wait(within=WHOLE_RUN_S) == 74, running.output
        assert "PASSED: all limits" in running.output
        assert table_of(running.output)["Received deliveries"] == ["16", "12", "4"]
        [complaint] = [line for line in running.output.splitlines() if line.startswith("error: ")]
    assert (folder / name).resolve().name in complaint
    assert said in complaint
    assert ("; the row of this run is in results/nightly/summary.csv" in complaint) == name.endswith("archive.csv")
    kept = "archive.csv" if name == "summary.csv" else "nightly/summary.csv"
    assert (tmp_path / "results" / kept).read_text().count("nightly,run,PASSED,") == 1


@pytest.mark.parametrize("spoil", [Path.mkdir, spreadsheet], ids=["a_folder", "a_spreadsheet"])
@pytest.mark.parametrize("command", [("loadtest",), ("report", "--loadtest")], ids=["loadtest", "report"])
def test_an_archive_that_takes_no_row_is_refused_before_the_run(
    command: tuple[str, ...], spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    """One line, exit code 78, and nothing was started."""
    (tmp_path / "results").mkdir()
    spoil(tmp_path / "results" / "archive.csv")
    ended = finished(*command, cwd=tmp_path)
    assert (ended.code, ended.stdout) == (78, "")
    assert "results/archive.csv: " in ended.complaint
