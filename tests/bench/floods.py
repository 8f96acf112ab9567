"""Do those who are there notice peers that mean no good? Live latency during a flood of them."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Final

from tests.bench.figures import Line, ratio_line
from tests.bench.hubs import PRODUCT, Hub, running_hub, statistics
from tests.bench.plan import FLOODS, PAIRS, FloodPlan
from tests.bench.processes import Process
from tests.bench.stored import clear, publisher
from tests.bench.trial import Bench, Result, command, say
from tests.bench.windows import between, pass_window, read_samples

_STREAM_S: Final = 60
_WARMUP_S: Final = 0.5


def floods(bench: Bench) -> list[Line]:
    """50 live subscribers at 50 events/s, with a flood and without it, one window after the other."""
    if bench.hub != PRODUCT:
        return [Line("floods", verdict=f"skipped: {bench.hub} stores nothing")]
    rounds = bench.rounds if bench.quick else max(bench.rounds, PAIRS)
    lines: list[Line] = []
    for name, plan in FLOODS.items():
        flooded: list[float] = []
        quiet: list[float] = []
        for number_of_round in range(1, rounds + 1):
            during, without, said = _flood(bench, plan)
            flooded.append(median(during))
            quiet.append(median(without))
            say(
                f"floods {number_of_round}/{rounds} {name}: live p50 {flooded[-1]:.2f} ms, without "
                f"{quiet[-1]:.2f} ms; {said}"
            )
        lines.append(ratio_line(f"floods: {name}: live p50, ms", flooded, "quiet", quiet, 1.5))
    return lines


def _flood(bench: Bench, plan: FloodPlan) -> tuple[list[float], list[float], dict[str, Any]]:
    """One hub: latencies in ms during the flood, and before it; and what the flood has done."""
    clear(bench.redis_port)
    count, length_us = round(plan.rate_hz * _STREAM_S), round(plan.window_s * 1e6)
    options = {"first": 1, "last": count, "by_offset": 1, "max_s": _STREAM_S * 2}
    with tempfile.TemporaryDirectory() as folder, running_hub(bench.hub, bench.redis_port, bench.tools) as hub:
        samples = Path(folder, "samples")
        with (
            bench.load(hub.port, plan.live, samples=str(samples), **options) as live,
            publisher(bench.redis_port, count, plan.rate_hz, plan.event_bytes) as stream,
        ):
            stream.record("BEGUN", 15)
            time.sleep(_WARMUP_S)
            quiet_us = pass_window(length_us)
            with _peers(bench, hub, plan) as peers:
                peers.record("FLOODING", 30)
                flooded_us = pass_window(length_us)
                peers.terminate()
                said = peers.record("FLOODED", 10)
            said["refused"] = {cause: n for cause, n in statistics(hub.port)["refused"].items() if n}
            stream.terminate()
            record = stream.record("PUBLISHED", 15)
            time.sleep(0.5)
            live.terminate()
            result = Result.from_record(live.record("RESULT", 10))
            result.check_order("live ones")
            result.check_all("live ones", record["published"] * plan.live)
        sampled = read_samples(samples)
    return between(sampled, flooded_us, length_us), between(sampled, quiet_us, length_us), said


def _peers(bench: Bench, hub: Hub, plan: FloodPlan) -> Process:
    conns = plan.conns // 5 if bench.quick else plan.conns
    line = command(bench.tools.flood, port=hub.port, conns=conns, rate=plan.per_s, talk=plan.talk_hz, say=plan.say)
    return Process("flood", line, talks=True)
