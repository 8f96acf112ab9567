"""The rig measures itself: how late it is, how long it stood still, and what the machine has used."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from broadcaster.core.runtime import CLOCK
from broadcaster.loadtest import records, rig
from broadcaster.loadtest.rig import LagMeter, MachineMeter, MachineSample, Stall
from broadcaster.redis.server import RedisServer
from tests.loadtest.test_whole_run import CLIENTS, parts
from tests.support import WHOLE_RUN_S, HubProcess, eventually

MS = 1_000_000


def test_lag_is_that_of_the_run() -> None:
    """Timers within the run and the second before it count; a stall also before that, and not after it."""
    meter = LagMeter()
    for at_ms, late_ms, busy_ms in (
        (100, 400, 0),  # before the second before
        (1500, 60, 0),  # before the run
        (2100, 200, 0),  # begins before the run, and reaches into it
        (2500, 80, 75),  # late because it was busy
        (2600, 2, 1),
        (3050, 100, 0),  # ends after the run
        (3500, 300, 0),  # begins after it
    ):
        meter.note((at_ms - late_ms) * MS, at_ms * MS, busy_ms * MS)
    lag = meter.between(2000 * MS, 3000 * MS)
    assert lag.stalls == [
        Stall(100 * MS, 400.0),
        Stall(1500 * MS, 60.0),
        Stall(2100 * MS, 200.0),
        Stall(3050 * MS, 100.0),
    ]
    assert (lag.lag_p50_ms, lag.lag_usual_ms, lag.lag_max_ms) == (80.0, 2.0, 200.0)
    assert lag.busy_pct == pytest.approx(100 * 76 / (60 + 200 + 80 + 2 + 100 + 5 * 20), abs=0.1)


@pytest.mark.parametrize(("timers", "stops"), [(95, 2), (250, 4)])
def test_being_stopped_often_is_no_usual_lag(timers: int, stops: int) -> None:
    """Each of the stops stays far above it."""
    meter = LagMeter()
    for number in range(timers):
        late_ms = 300 if number % (timers // stops) == 5 else 1
        meter.note(number * 400 * MS, (number * 400 + late_ms) * MS, 0)
    lag = meter.between(0, timers * 400 * MS)
    assert lag.lag_usual_ms == 1.0
    assert [stall.still_ms for stall in lag.stalls] == [300.0] * stops


def test_what_a_loop_has_worked_is_its_usual_lag() -> None:
    """It works 200 ms in each round, and has to wait for a core for 100 ms meanwhile."""
    meter = LagMeter()
    for number in range(50):
        meter.note(number * 400 * MS, (number * 400 + 300) * MS, 200 * MS)
    assert meter.between(0, 50 * 400 * MS).lag_usual_ms == 200.0


def test_a_timer_that_is_early_is_not_late() -> None:
    """A loop rounds to a millisecond."""
    meter = LagMeter()
    meter.note(20 * MS, 19 * MS, 0)
    assert meter.between(0, 100 * MS).lag_max_ms == 0.0


def test_a_loop_that_is_blocked_and_busy_is_no_stall() -> None:
    """What the process has used itself is saturation; what it has slept in the midst of its loop is a stall."""

    async def story() -> LagMeter:
        meter = LagMeter()
        measuring = asyncio.create_task(meter.keep_measuring())
        await asyncio.sleep(0.03)
        CLOCK.block(0.2)
        await asyncio.sleep(0.05)
        until_s = CLOCK.thread_cpu_s() + 0.15
        while CLOCK.thread_cpu_s() < until_s:
            pass
        await asyncio.sleep(0.05)
        measuring.cancel()
        return meter

    meter = asyncio.run(story())
    lag = meter.between(0, CLOCK.monotonic_ns())
    assert lag.lag_max_ms >= 100
    assert max(stall.still_ms for stall in lag.stalls) >= 150


def test_what_the_parts_have_used_is_known(tmp_path: Path) -> None:
    """Each part says which process it is; one that has ended, or said nonsense, is not known."""
    rig.announce(tmp_path, "fleet", os.getpid())
    rig.announce(tmp_path, "fleet", os.getppid(), 2)
    rig.announce(tmp_path, "hub", 2**22 + 1)
    (tmp_path / ".redis.1.pid").write_text("")
    taken = MachineMeter(tmp_path).sample()
    assert taken.fleet_ms is not None
    assert taken.fleet_ms >= CLOCK.thread_cpu_s() * 1000 - 100
    assert (taken.redis_ms, taken.hub_ms, taken.publisher_ms) == (None, None, None)
    assert taken.user_ms is not None
    assert taken.user_ms >= taken.fleet_ms
    assert abs(taken.wall_ahead_us * 1000 - (CLOCK.wall_ns() - CLOCK.monotonic_ns())) < 10**9


def test_a_system_without_proc_says_nothing(tmp_path: Path) -> None:
    """macOS has none: the clocks are known, and the rest is empty in the file."""
    rig.announce(tmp_path, "fleet", os.getpid())
    taken = MachineMeter(tmp_path, proc=tmp_path).sample()
    assert (taken.user_ms, taken.steal_ms, taken.fleet_ms) == (None, None, None)
    records.write(tmp_path / "rig.csv", MachineSample, [taken])
    assert records.read(tmp_path / "rig.csv", MachineSample) == [taken]


def test_a_busy_machine(redis: RedisServer, tmp_path: Path) -> None:
    """A process on each core that has nothing to do with the run: it says so, whatever its figures are."""
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(HubProcess(redis.url)).until_ready()
        for _ in range(os.cpu_count() or 1):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(busy.kill)
        running = stack.enter_context(parts(redis, hub, tmp_path, BROADCASTER_LOADTEST__EVENTS="20"))
        assert running["report.1"].wait(within=WHOLE_RUN_S) == 0, running["report.1"].output
        text = running["report.1"].output
    found = re.search(r"INVALID: other processes used (\d+) % of the machine's CPU time", text)
    assert found, text
    assert int(found[1]) > 33


@pytest.mark.parametrize("name", ["fleet.1", "publisher.1", "hub"])
def test_what_is_stopped_in_the_middle(name: str, redis: RedisServer, tmp_path: Path) -> None:
    """A part of the rig that stands still makes a run INVALID; a hub that does is what is measured."""
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(HubProcess(redis.url)).until_ready()
        running = stack.enter_context(parts(redis, hub, tmp_path))
        eventually(lambda: hub.stats().get("deliveries", 0) >= 5 * CLIENTS, "nothing is delivered", 20)
        stopped = hub if name == "hub" else running[name]
        stopped.signal(signal.SIGSTOP)
        CLOCK.block(0.3 if name == "hub" else 1.0)  # far beyond any lag of a shared core
        stopped.signal(signal.SIGCONT)
        assert running["report.1"].wait(within=WHOLE_RUN_S) == 0, running["report.1"].output
        text = running["report.1"].output
    stalls = re.findall(r"INVALID: (\S+) stood still for (?:[2-9]\d\d|\d{4}) ms", text)
    assert stalls == {"hub": [], "fleet.1": ["fleet.1"], "publisher.1": ["publisher"]}[name], text
