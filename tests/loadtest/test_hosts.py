"""Whole load tests: hops of real events, and a fleet whose clocks are those of another host."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from broadcaster.loadtest.hops import HOPS
from broadcaster.loadtest.report.outcome import Outcome, read_run
from broadcaster.redis.server import RedisServer
from tests.support import WHOLE_RUN_S, HubProcess, Running, broadcaster

Clocks = Callable[[], tuple[list[str], dict[str, str]]]
"""What a process is started with, so that its clocks are other ones: words in front of it, and variables."""

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


def other_monotonic_clock() -> tuple[list[str], dict[str, str]]:
    """A process in a time namespace of its own: its CLOCK_MONOTONIC is 1,000 s ahead."""
    wrapper = ["unshare", "-T", "--monotonic", "1000", "--fork", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*wrapper, "true"], check=False).returncode:
        pytest.skip("no time namespace may be made here")
    return wrapper, {}


def other_wall_clock() -> tuple[list[str], dict[str, str]]:
    """A process whose wall clock is 1.5 s ahead."""
    if not FAKETIME.exists():
        pytest.skip("there is no libfaketime")
    return ["env"], {"LD_PRELOAD": str(FAKETIME), "FAKETIME": "+1.5s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


def run_of(
    folder: Path, redis: RedisServer, hub: HubProcess, wrapper: list[str], changes: dict[str, str], **more: str
) -> tuple[Outcome, str]:
    """A load test of three processes; the fleet is started by `wrapper` and with `changes`."""
    variables = {
        "BROADCASTER_REDIS__URL": redis.url,
        "BROADCASTER_HUB__PORT": str(hub.port),
        "BROADCASTER_LOADTEST__RUN": "test",
        "BROADCASTER_LOADTEST__EVENTS": "40",
        "BROADCASTER_LOADTEST__RATE_HZ": "100",
        "BROADCASTER_LOADTEST__WARMUP_EVENTS": "3",
        "BROADCASTER_FLEET__CLIENTS": "4",
        "BROADCASTER_REPORT__ALLOW_INVALID": "true",  # the tests share their cores
        **more,
    }
    product = (sys.executable, "-m", "broadcaster")
    with contextlib.ExitStack() as stack:
        report = stack.enter_context(broadcaster("report", "--loadtest", cwd=folder, **variables))
        stack.enter_context(Running(*wrapper, *product, "fleet", "--loadtest", cwd=folder, **variables, **changes))
        stack.enter_context(broadcaster("publisher", "--loadtest", cwd=folder, **variables))
        assert report.wait(within=WHOLE_RUN_S) == 0, report.output
        return read_run(folder / "results" / "test"), report.output


def test_every_hop_of_a_burst_is_known_and_adds_up(redis: RedisServer, tmp_path: Path) -> None:
    """2,000 events at once, in many pieces, to subscribers with two filters: exact to the nanosecond."""
    burst = {"BROADCASTER_LOADTEST__EVENTS": "2000", "BROADCASTER_LOADTEST__RATE_HZ": "0"}
    with (
        HubProcess(redis.url).until_ready() as hub,
        broadcaster("subscribe", "--severity", "info", cwd=tmp_path, BROADCASTER_HUB__PORT=str(hub.port)),
    ):
        hub.until_connected(1)
        outcome, text = run_of(tmp_path, redis, hub, [], {}, **burst)
    budget = outcome.budget
    assert budget is not None
    assert "Hops known for 2,000 of 2,000 events." in text
    assert budget.negative == 0
    assert budget.known.sum() == 8000
    hops = np.array([budget.hops[name] for name in HOPS])
    assert (hops.sum(axis=0) == outcome.latencies.latency_ns).all()
    assert budget.others == []


def test_with_history_off_it_is_said_what_cannot_be_known(redis: RedisServer, tmp_path: Path) -> None:
    """Events have no position then: neither Redis nor the trace says anything of them."""
    history = {"BROADCASTER_HISTORY__ENABLED": "false"}
    with HubProcess(redis.url, None, **history).until_ready() as hub:
        outcome, text = run_of(tmp_path, redis, hub, [], {}, **history)
    assert outcome.whole.received == 160
    assert "Hops known for 0 of 40 events." in text
    assert "Of 40 events it is not known when Redis stored them: history is off" in text
    assert "Of 40 events it is not known when the hub read them: " in text


@pytest.mark.parametrize("other", [other_monotonic_clock, other_wall_clock], ids=["monotonic", "wall"])
def test_a_fleet_on_another_clock(other: Clocks, redis: RedisServer, tmp_path: Path) -> None:
    """Its latencies are those of this machine, with an error, and not wrong by what the clocks differ."""
    wrapper, changes = other()
    if preload := changes.get("LD_PRELOAD"):
        changes["LD_PRELOAD"] = " ".join(filter(None, [os.environ.get("LD_PRELOAD", ""), preload]))
    with HubProcess(redis.url).until_ready() as hub:
        outcome, text = run_of(tmp_path, redis, hub, wrapper, changes)
    error_ns = outcome.clocks.error_ns
    assert error_ns
    assert outcome.whole.received == 160
    assert outcome.latencies.latency_ns.min() > -error_ns
    assert outcome.whole.max_ms is not None
    assert outcome.whole.max_ms < 10_000
    assert "Clock of fleet.1: " in text
    assert "below which nothing is claimed" in text
    assert ("differs by 1,000.000 s" in text) or ("differs by 1.500 s" in text)
    assert "±" in text
