"""One run on several hosts: its folders make the report that one folder would, and others make none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broadcaster.core.errors import RunDamaged
from broadcaster.loadtest import records
from broadcaster.loadtest.records import ClockRecord, DeliveryRecord, PublishedRecord
from broadcaster.loadtest.report.merge import read_merged
from broadcaster.loadtest.report.outcome import read_run
from broadcaster.loadtest.report.summary import summary
from broadcaster.loadtest.run import Run
from broadcaster.settings import dump, load
from tests.loadtest.test_report import MS, command, fleet_result, publisher_result, run, table_of
from tests.support import CommandLine, finished, free_port

__all__ = ["command", "run"]  # fixtures; the run has 4 events to 3 + 1 clients in two processes

AHEAD_NS = 1000 * 1000 * MS
"""How far CLOCK_MONOTONIC of the second host is ahead of the first one's."""


@pytest.fixture
def hosts(run: Run, tmp_path: Path) -> tuple[Path, Path]:
    """The same run on two hosts: the second one has a fleet process, and a clock of its own."""
    clocks = {"publisher": (0, 2 * MS, 1 * MS), "fleet.1": (0, 2 * MS, 1 * MS), "fleet.2": (1, -AHEAD_NS, 3 * MS)}
    for part, (wall_ahead_ns, hub_ahead_ns, error_ns) in clocks.items():
        row = ClockRecord("hub", "h", wall_ahead_ns * 10**12, hub_ahead_ns, error_ns, 0, "")
        records.write(run.clocks(part), ClockRecord, [row])
    rows = records.read(run.deliveries(2), DeliveryRecord)
    later = [
        DeliveryRecord(row.client, row.event_id, row.sequence, row.received_mono_ns + AHEAD_NS + 2 * MS, 0)
        for row in rows
    ]
    records.write(run.deliveries(2), DeliveryRecord, later)
    other = tmp_path / "other" / run.name
    other.mkdir(parents=True)
    for path in (run.deliveries(2), run.losses(2), run.fleet(2), run.clocks("fleet.2")):
        shutil.copy(path, other)
    return run.folder, other


def alone(hosts: tuple[Path, Path]) -> tuple[Path, Path]:
    """The first host without what is on the other one."""
    first, other = hosts
    for path in other.iterdir():
        (first / path.name).unlink(missing_ok=True)
    return hosts


def test_two_folders_make_the_report_of_one(hosts: tuple[Path, Path]) -> None:
    """Of all figures, in whichever order they are given; the other host's clock is corrected, its error told."""
    whole = summary(read_run(hosts[0]))
    first, other = alone(hosts)
    for folders in ([first, other], [other, first]):
        folder, outcome = read_merged(folders)
        assert folder == first
        assert summary(outcome) == whole
    scope = whole["scopes"]["fleet.2"]
    assert (scope["received"], scope["latency_ms"]["max"]) == (4, 7.0)
    assert whole["clocks"]["latency_error_ms"] == 4.0
    assert any(note.startswith("Clock of fleet.2: ") and "± 4.000 ms" in note for note in whole["clocks"]["notes"])
    assert "on the hosts of fleet.2" in " ".join(whole["validity"]["notes"])


def test_the_command_merges_them(hosts: tuple[Path, Path], command: CommandLine) -> None:
    """As text, for programs, and as a page; without the other host it is no complete run."""
    first, other = map(str, alone(hosts))
    text = command("report", first, other)
    assert table_of(text.stdout)["Received deliveries"] == ["16", "12", "4"]
    assert f"One run, merged from: {first} {other}" in text.stdout
    assert json.loads(command("report", first, other, "--json").stdout)["scopes"]["run"]["received"] == 16
    page = Path(first, "merged.html")
    command("report", first, other, "--html", str(page))
    assert "fleet.2" in page.read_text()
    ended = command("report", first, str(Path(other).parent))
    assert (ended.code, ended.stdout) == (65, "")
    assert "has fleet.2.json" in ended.complaint


def of_other_events(first: Run, other: Run) -> None:
    rows = records.read(other.deliveries(2), DeliveryRecord)
    foreign = [
        DeliveryRecord(row.client, f"x{row.event_id}", row.sequence, row.received_mono_ns, 0) for row in rows
    ]
    records.write(other.deliveries(2), DeliveryRecord, foreign)


def of_another_schedule(first: Run, other: Run) -> None:
    overrides = {"fleet": {"clients": 4, "processes": 2}, "loadtest": {"events": 5}}
    other.config.write_text(dump(load(overrides=overrides).settings))


def with_other_published(first: Run, other: Run) -> None:
    rows = [PublishedRecord(1, "x1", 0, 0, 0, 0, 1, "", "a", 1)]
    records.write(other.published, PublishedRecord, rows)


def with_too_many_clients(first: Run, other: Run) -> None:
    other.fleet(2).write_text(json.dumps(fleet_result(2, 2)))


def with_one_number_twice(first: Run, other: Run) -> None:
    other.fleet(1).write_text(json.dumps(fleet_result(1, 3, connected=2)))


def without_one(first: Run, other: Run) -> None:
    other.fleet(2).unlink()


def without_the_publisher(first: Run, other: Run) -> None:
    first.publisher.unlink()


REFUSED: dict[str, tuple[Callable[[Run, Run], None], str]] = {
    "other events": (of_other_events, "{other} is not of the same run: fleet.2 has received none of its events"),
    "other settings": (
        of_another_schedule,
        "{other} is of a run with other settings: loadtest.events is 5, and 4 in {first}",
    ),
    "other published": (
        with_other_published,
        "{other} is not of the run of {first}: its published.csv is another",
    ),
    "other clients": (
        with_too_many_clients,
        "{other} is of a run with other settings: all fleet processes had 5 clients, and fleet.clients is 4 in",
    ),
    "number twice": (with_one_number_twice, "{other} is not of the run of {first}: its fleet.1.json is another"),
    "one missing": (without_one, "none of {first}, {other} has fleet.2.json, and fleet.processes is 2"),
    "no publisher": (without_the_publisher, "none of {first}, {other} is of the publisher's host"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_of_one_run_is_refused(name: str, hosts: tuple[Path, Path]) -> None:
    """In one line that says which folder, and why."""
    first, other = alone(hosts)
    spoil, said = REFUSED[name]
    spoil(Run(first), Run(other))
    with pytest.raises(RunDamaged) as error:
        read_merged([first, other])
    assert str(error.value).startswith(said.format(first=first, other=other))
    assert "\n" not in str(error.value)


def test_what_was_copied_may_be_in_both(hosts: tuple[Path, Path]) -> None:
    """As where only the large logs have stayed on their hosts, or everything was copied."""
    whole = summary(read_run(hosts[0]))
    first, other = hosts
    shutil.copy(Run(first).published, other)
    shutil.copy(Run(first).config, other)
    Run(first).deliveries(2).unlink()
    assert summary(read_merged([first, other])[1]) == whole


def test_hosts_may_differ_in_addresses_and_limits(hosts: tuple[Path, Path]) -> None:
    """Those of the publisher's host hold."""
    first, other = alone(hosts)
    overrides: dict[str, dict[str, Any]] = {
        "fleet": {"clients": 4, "processes": 2, "url": "ws://10.0.0.1:8765/ws"},
        "loadtest": {"events": 4},
        "report": {"max_p50_ms": 0.001},
    }
    Run(other).config.write_text(dump(load(overrides=overrides).settings))
    Run(other).publisher.write_text(json.dumps(publisher_result()))
    assert read_merged([other, first])[1].broken == []


def test_a_host_that_lacks_the_others_keeps_what_it_has_measured(hosts: tuple[Path, Path], tmp_path: Path) -> None:
    """Its load test is not complete; machine, hub and rig are in its folder, which can be merged later."""
    first, other = alone(hosts)
    folder = tmp_path / "results" / "monday"
    ended = finished(
        *("report", "--loadtest"),
        cwd=tmp_path,
        BROADCASTER_REDIS__URL=f"redis://127.0.0.1:{free_port()}/0",
        BROADCASTER_HUB__PORT=str(free_port()),
        BROADCASTER_LOADTEST__RUN=folder.name,
        BROADCASTER_LOADTEST__START_TIMEOUT_S="0.2",
        BROADCASTER_LOADTEST__EVENTS="4",
        BROADCASTER_LOADTEST__RATE_HZ="0",
        BROADCASTER_FLEET__DRAIN_S="0.2",
        BROADCASTER_FLEET__CLIENTS="4",
        BROADCASTER_FLEET__PROCESSES="2",
        BROADCASTER_PUBLISHER__PUBLISH_DEADLINE_S="0.2",
        BROADCASTER_REPORT__TIMEOUT_S="0.2",
    )
    assert (ended.code, "fleet.2.json" in ended.complaint) == (69, True)
    for path in first.glob("[dflpc]*"):
        shutil.copy(path, folder)
    assert read_merged([folder, other])[1].whole.received == 16
