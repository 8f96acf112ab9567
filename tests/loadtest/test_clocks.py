"""Clocks of several hosts: compared, corrected, and told with the error below which nothing is claimed."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from broadcaster.core.errors import RunDamaged
from broadcaster.loadtest import records
from broadcaster.loadtest.records import ClockRecord, DeliveryRecord, TraceRecord
from broadcaster.loadtest.report.clocks import SAME, SAME_NS, UNKNOWN, Clocks, Offset, compare
from broadcaster.loadtest.report.outcome import read_run
from broadcaster.loadtest.report.page.series import marks_of
from broadcaster.loadtest.report.text import present
from broadcaster.loadtest.run import Run
from broadcaster.redis.commands import server_clock
from broadcaster.redis.server import RedisServer
from broadcaster.settings import RedisTable
from broadcaster.subscribe.hub_status import midpoint
from tests.loadtest.test_report import MS, command, run, table_of, write_config
from tests.support import CommandLine

__all__ = ["command", "run"]

S = 1000 * MS
WALL = 1_790_000_000 * S
"""How far the wall clocks are ahead of CLOCK_MONOTONIC on the publisher's host."""


def hub(
    ahead_ns: int = 0, error_ns: int = 40_000, *, wall_ns: int = WALL, its_wall_ns: int = WALL, instance: str = "a"
) -> ClockRecord:
    return ClockRecord("hub", instance, wall_ns, ahead_ns, error_ns, its_wall_ns, "")


def second_hub(ahead_ns: int, *, wall_ns: int = WALL) -> ClockRecord:
    """Of another host, which was started 90 s later."""
    return hub(ahead_ns, wall_ns=wall_ns, its_wall_ns=WALL + 90 * S, instance="b")


def silent(of: str = "hub", *, wall_ns: int = WALL) -> ClockRecord:
    return ClockRecord(of, "", wall_ns, None, None, None, "no answer (HTTP 404 Not Found)")


def redis(ahead_ns: int = WALL, error_ns: int = 30_000, *, wall_ns: int = WALL) -> ClockRecord:
    return ClockRecord("redis", "", wall_ns, ahead_ns, error_ns, None, "")


def compared(publisher: list[ClockRecord], fleet: list[ClockRecord], *, redis_is_here: bool = True) -> Clocks:
    return compare(publisher, {1: fleet}, redis_is_here=redis_is_here)


def test_on_one_host_nothing_is_corrected_and_nothing_is_wrong() -> None:
    """However long a round trip takes: CLOCK_MONOTONIC is one for all processes."""
    found = compared([hub(30_000), redis(WALL + 20_000)], [hub(-25_000)])
    assert (found.fleets[1], found.hubs[1]) == (SAME, SAME)
    assert found.redis == Offset(WALL, 1000)
    assert found.notes == ()
    assert found.hop_errors_ns == {
        "schedule": 0, "to_redis": 1000, "to_hub": 1000, "in_hub": 0, "fanout": 0, "latency": 0,
    }  # fmt: skip


def test_a_fleet_on_another_host_is_corrected_by_way_of_the_hub() -> None:
    """Its CLOCK_MONOTONIC began 1,000 s earlier; both have asked the hub, each with an error of its own."""
    fleet = [hub(-1000 * S + 10_000, 60_000, wall_ns=WALL - 1000 * S)]
    found = compared([hub(0, 40_000), redis()], fleet)
    assert found.fleets[1] == Offset(1000 * S - 10_000, 100_000)
    assert found.error_ns == 100_000
    [note, *_] = found.notes
    assert note.startswith(
        "Clock of fleet.1: +999,999.990 ms from the publisher's (wall minus monotonic differs by 1,000.000 s)"
    )
    assert "± 0.100 ms" in note


def test_a_wall_clock_that_is_set_otherwise_is_told_and_leaves_the_figures_as_they_are() -> None:
    """CLOCK_MONOTONIC is the same, within what exchanges can say; only that much less is claimed."""
    found = compared([hub(5_000), redis()], [hub(-5_000, wall_ns=WALL + 3 * S // 2)])
    assert found.fleets[1] == Offset(10_000, 80_000)
    assert "differs by 1.500 s" in found.notes[0]


def test_two_hosts_whose_wall_clocks_are_ahead_by_the_same_are_found_by_the_exchanges() -> None:
    """A chance of one in millions, or a fault of a virtual machine."""
    found = compared([hub(0)], [hub(5 * MS, wall_ns=WALL + SAME_NS // 2)])
    assert found.fleets[1] == Offset(-5 * MS, 80_000)


def test_hubs_on_two_hosts_compare_nothing() -> None:
    """Behind a balancer the publisher has asked one, and the fleet another one."""
    found = compared([hub(), redis()], [second_hub(-90 * S)])
    assert found.fleets[1] == SAME, "they are on one host"
    found = compared([hub(), redis()], [second_hub(-1090 * S, wall_ns=WALL - 1000 * S)])
    assert (found.fleets[1], found.error_ns) == (UNKNOWN, None)
    assert "no hub to compare them by that both have asked: unknown." in found.notes[0]


def test_hubs_on_one_host_are_one_clock() -> None:
    """Several processes of a hub, or one that was restarted: any of them compares."""
    theirs = hub(-1000 * S, wall_ns=WALL - 1000 * S, instance="b")
    assert compared([hub(), redis()], [theirs]).fleets[1] == Offset(1000 * S, 80_000)


def test_what_both_have_asked_compares_them() -> None:
    """Before the run one hub answered both of them, and at its end another one on another host."""
    fleet = [hub(-1000 * S, wall_ns=WALL - 1000 * S), second_hub(-1090 * S, wall_ns=WALL - 1000 * S)]
    assert compared([hub(), second_hub(-90 * S), redis()], fleet).fleets[1] == Offset(1000 * S, 80_000)


@pytest.mark.parametrize("publisher", [[], [silent()], [hub()]], ids=["nothing", "no hub", "hub"])
def test_clocks_that_nothing_compares_are_unknown(publisher: list[ClockRecord]) -> None:
    """Another hub than ours tells no time: then the latencies of a fleet on another host are not known."""
    found = compared(publisher, [silent(wall_ns=WALL - 1000 * S)])
    assert found.fleets[1] == UNKNOWN
    assert found.error_ns is None
    assert found.hop_errors_ns["fanout"] is None


def test_another_hub_on_one_host_leaves_latencies_exact() -> None:
    """Publisher and fleet are on one clock; only the hub's, and so its hops, are not known."""
    found = compared([silent(), redis()], [silent()])
    assert (found.error_ns, found.hubs[1]) == (0, UNKNOWN)
    assert found.hop_errors_ns["in_hub"] == 0
    assert found.hop_errors_ns["to_hub"] is None
    assert "no answer (HTTP 404 Not Found)" in found.notes[0]


def test_a_hub_on_another_host() -> None:
    found = compared([hub(7 * S, its_wall_ns=WALL - 7 * S)], [hub(7 * S + 1000, 9_000, its_wall_ns=WALL - 7 * S)])
    assert found.fleets[1] == SAME
    assert found.hubs[1] == Offset(7 * S + 1000, 9_000)


def test_clocks_that_drift_apart_are_known_less_well() -> None:
    """At the beginning and at the end they were apart by different amounts; in between by something in between."""
    apart = [hub(S, 10_000, its_wall_ns=0), hub(S + 100_000, 10_000, its_wall_ns=0)]
    assert compared(apart, apart).hubs[1] == Offset(S + 50_000, 60_000)
    agreeing = [hub(S, 40_000, its_wall_ns=0), hub(S + 20_000, 10_000, its_wall_ns=0)]
    assert compared(agreeing, agreeing).hubs[1] == Offset(S + 20_000, 10_000)


def test_redis_elsewhere_is_known_by_its_round_trips_only() -> None:
    """Also where the address is of this machine, and a tunnel leads to another one."""
    assert compared([redis(WALL + 500, 70_000)], [], redis_is_here=False).redis == Offset(WALL + 500, 70_000)
    assert compared([redis(WALL + 9 * MS, 70_000)], []).redis == Offset(WALL + 9 * MS, 70_000)
    assert compared([silent("redis")], []).redis == UNKNOWN


def test_the_middle_of_a_round_trip() -> None:
    assert midpoint(100, 201, 1000) == (849, 51)
    assert midpoint(100, 100, 90) == (-10, 0)


def test_the_clock_of_redis_is_that_of_this_machine(redis: RedisServer) -> None:
    """A real Redis: within the error, and 1 microsecond."""
    ahead_ns, error_ns = asyncio.run(server_clock(RedisTable(url=redis.url)))
    assert abs(ahead_ns - (time.time_ns() - time.monotonic_ns())) < error_ns + MS


# In a report


def with_clocks(run: Run, ahead_ns: int, error_ns: int, *, compared: bool = True) -> None:
    """Let fleet.2 be on a clock that is so far ahead."""
    path = run.deliveries(2)
    rows = records.read(path, DeliveryRecord)
    records.write(
        path, DeliveryRecord, [replace(row, received_mono_ns=row.received_mono_ns + ahead_ns) for row in rows]
    )
    theirs = hub(-ahead_ns, error_ns, wall_ns=WALL - ahead_ns) if compared else silent(wall_ns=WALL - ahead_ns)
    records.write(
        run.clocks("publisher"), ClockRecord, [hub(0, 0), ClockRecord("redis", "", WALL, WALL, 0, None, "")]
    )
    records.write(run.clocks("fleet.1"), ClockRecord, [hub()])
    records.write(run.clocks("fleet.2"), ClockRecord, [theirs])


def test_the_report_corrects_a_fleet_on_another_clock(run: Run) -> None:
    """The same latencies as on one clock, each with its error; below that nothing is claimed."""
    before = table_of(present(read_run(run.folder), run.folder))
    with_clocks(run, 1000 * S, 3 * MS)
    outcome = read_run(run.folder)
    after = table_of(present(outcome, run.folder))
    assert before["max latency (ms)"][0] == "7.00"
    assert after["max latency (ms)"][0] == "7.00 ± 3.00"
    assert outcome.whole.negative == 0
    assert outcome.verdict == "PASSED"


@pytest.mark.parametrize(("ahead_s", "compared"), [(1000, True), (-1000, True), (0, True), (1000, False)])
def test_a_fleet_is_judged_on_its_own_clock(ahead_s: int, compared: bool, run: Run) -> None:
    """It stood still before the first publish, and in the run, where that is marked if the clocks are known."""
    with_clocks(run, ahead_s * S, MS // 2, compared=compared)
    result = json.loads(run.fleet(2).read_text())
    stalls = [[ahead_s * S + at_ms * MS, still_ms] for at_ms, still_ms in ((90, 500.0), (300, 287.0))]
    run.fleet(2).write_text(json.dumps(result | {"stalls": stalls}))
    outcome = read_run(run.folder)
    assert outcome.validity.rig.stalls_ms == {"publisher": 0.0, "fleet.1": 0.0, "fleet.2": 287.0}
    assert outcome.validity.word == "INVALID"
    [(kind, begin_s, end_s, what)] = marks_of(outcome)
    assert (kind, what) == ("rig stood still", "fleet.2, 287 ms")
    assert not compared or (begin_s, end_s) == pytest.approx((-0.087, 0.2))


@pytest.mark.parametrize("error_ms", [7, 8])
def test_less_than_the_error_is_not_claimed(run: Run, error_ms: int) -> None:
    """The slowest delivery took 7 ms."""
    with_clocks(run, 1000 * S, error_ms * MS)
    told = table_of(present(read_run(run.folder), run.folder))["max latency (ms)"][0]
    assert told == ("7.00 ± 7.00" if error_ms == 7 else "< 8.00")


@pytest.mark.parametrize(("off_ms", "early"), [(7, 0), (8, 1)])
def test_what_came_before_it_was_due_is_invalid(off_ms: int, early: int, run: Run) -> None:
    """The fastest delivery of fleet.2 took 4 ms, and its clock is known to 3 ms: no more can have been wrong."""
    with_clocks(run, 1000 * S, 3 * MS)
    rows = records.read(run.deliveries(2), DeliveryRecord)
    earlier = [replace(row, received_mono_ns=row.received_mono_ns - off_ms * MS) for row in rows]
    records.write(run.deliveries(2), DeliveryRecord, earlier)
    outcome = read_run(run.folder)
    assert outcome.validity.rig.too_early == early
    assert outcome.is_failure == bool(early)
    assert not early or "1 deliveries came before their event was due, by more than" in outcome.validity.reasons[0]


@pytest.mark.parametrize("part", ["publisher", "fleet.1", "fleet.2"])
def test_clocks_of_some_parts_only_are_no_complete_run(part: str, run: Run) -> None:
    """They may be on another host: that they are on one clock must not be taken for granted."""
    with_clocks(run, 1000 * S, MS)
    run.clocks(part).unlink()
    with pytest.raises(RunDamaged, match=f"there is no clocks.{part}.csv"):
        read_run(run.folder)


def test_what_cannot_be_compared_is_no_latency(run: Run) -> None:
    """A hub without `/time`, and a fleet on another host: no figure, a reason, and FAILED."""
    with_clocks(run, 1000 * S, 0, compared=False)
    outcome = read_run(run.folder)
    text = present(outcome, run.folder)
    assert table_of(text)["max latency (ms)"] == ["-"] * 3
    assert outcome.verdict == "FAILED"
    assert "FAILED: latencies are not known: publisher and fleet are on clocks that nothing compares" in text


def test_no_figure_stands_anywhere_that_does_not_exist(run: Run, command: CommandLine, tmp_path: Path) -> None:
    """No histogram, no hops and no limit of a latency, as text, for programs and on the page; exit code 1."""
    write_config(run, max_p50_ms=1.0)
    records.write(run.trace(1), TraceRecord, [])
    with_clocks(run, 1000 * S, 0, compared=False)
    text = command("report", str(run.folder), "--html", str(tmp_path / "page.html"))
    assert (text.code, text.stderr) == (1, "")
    assert "FAILED: p50 is not known: the clocks cannot be compared, 1 ms allowed" in text.stdout
    assert table_of(text.stdout)["Received deliveries"] == ["16", "12", "4"]
    assert "█" not in text.stdout
    assert "Beyond p99" not in text.stdout
    assert re.findall(r"<h2[^>]*>([^<]+)", (tmp_path / "page.html").read_text())[:2] == ["Ledger", "Limits"]
    told = json.loads(command("report", str(run.folder), "--json").stdout)
    assert (told["hops"], told["histogram"]) == (None, [])
    assert "Total count    =            0]" in command("report", str(run.folder), "--hgrm").stdout
