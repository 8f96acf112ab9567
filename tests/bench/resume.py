"""Do those who are there notice when many come back at once? Live latency during a storm of resumptions."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from broadcaster.core.position import Position
from tests.bench.figures import Line, number, ratio_line, ratios_of, spread, verdict
from tests.bench.guard import NO_GUARD, Guard, guard
from tests.bench.hubs import PRODUCT, Hub, running_hub, statistics
from tests.bench.plan import PAIRS, RECONNECT, STORM, StormPlan
from tests.bench.processes import Process, TrialError
from tests.bench.stored import CHANNEL, head, publisher, store
from tests.bench.trial import Bench, Result, await_result, say
from tests.bench.windows import between, pass_window, read_samples

_STREAM_S: Final = 60
_WARMUP_S: Final = 0.5
_STORM_S: Final = 20
_SHORTEST_US: Final = 100_000
"""No window is shorter: it must have some live events."""
_LEAVE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Windows:
    """Latencies of the live subscribers, in ms, in three windows of the same length, one after another."""

    served_s: float
    """From the first connect until the last one was served; the windows are as long, if that is long enough."""
    served: int
    storm: list[float]
    crowd: list[float]
    """The storm is over, and all of it is live, too."""
    quiet: list[float]
    """The storm is gone."""


def resume(bench: Bench) -> list[Line]:
    """200 live subscribers at 50 events/s; 1,000 others connect at once with the position 100 events ago.

    A storm: a fresh hub, so that most of what they want is in the log and not in the ring. The figure of a
    round is made of several storms, each with its quiet window of the same length in the same processes.
    """
    return _storms(bench, "resume", STORM, NO_GUARD, at_most=1.5, within_s=_STORM_S)


def storm(bench: Bench) -> list[Line]:
    """The same with 5,000 who come back, each with a token of his own, to get 10 events each."""
    with guard() as tokens:
        return _storms(bench, "storm", RECONNECT, tokens, at_most=3.0, within_s=3.0)


def _storms(
    bench: Bench, row: str, plan: StormPlan, side: Guard, *, at_most: float, within_s: float
) -> list[Line]:
    if bench.hub != PRODUCT:
        return [Line(f"{row}: a storm", verdict=f"skipped: {bench.hub} stores nothing")]
    plan = plan.shrunk() if bench.quick else plan
    rounds = bench.rounds if bench.quick else max(bench.rounds, PAIRS)
    storm: list[float] = []
    crowd: list[float] = []
    quiet: list[float] = []
    all_windows: list[Windows] = []
    for number_of_round in range(1, rounds + 1):
        windows = [_storm(bench, plan, side) for _ in range(plan.repeat)]
        all_windows += windows
        storm.append(median(ms for each in windows for ms in each.storm))
        crowd.append(median(ms for each in windows for ms in each.crowd))
        quiet.append(median(ms for each in windows for ms in each.quiet))
        say(
            f"{row} {number_of_round}/{rounds}: live p50 in storms of "
            f"{', '.join(f'{each.served_s:.2f}' for each in windows)} s {storm[-1]:.2f} ms, "
            f"with all of them live {crowd[-1]:.2f} ms, without them {quiet[-1]:.2f} ms"
        )
    served = min(each.served for each in all_windows)
    served_s = [each.served_s for each in all_windows]
    everybody = f"{served:,} of {plan.conns:,}"
    in_time = f"in {number(median(served_s))} s (at most {number(max(served_s))})"
    all_served = served == plan.conns and max(served_s) <= within_s
    beside = f"{plan.live + plan.conns:,} live {number(median(crowd))}"
    return [
        Line(f"{row}: served", everybody, in_time, "", f"all in {within_s:g} s", verdict(all_served)),
        ratio_line(f"{row}: live p50 meanwhile, ms", storm, f"{plan.live:,} live, quiet", quiet, at_most),
        Line(f"{row}: live p50 meanwhile, ms", number(median(storm)), beside, spread(ratios_of(storm, crowd))),
    ]


def _storm(bench: Bench, plan: StormPlan, side: Guard) -> Windows:
    """One hub, one storm, and what comes after it."""
    store(bench.redis_port, plan.stored, plan.event_bytes)
    first, count = plan.stored + 1, round(plan.rate_hz * _STREAM_S)
    options = {"first": first, "last": plan.stored + count, "by_offset": 1, "max_s": _STREAM_S * 2}
    with (
        tempfile.TemporaryDirectory() as folder,
        running_hub(bench.hub, bench.redis_port, bench.tools, side.env) as hub,
    ):
        samples = Path(folder, "samples")
        with (
            bench.load(hub.port, plan.live, samples=str(samples), **options, **side.options) as live,
            publisher(bench.redis_port, count, plan.rate_hz, plan.event_bytes) as stream,
        ):
            stream.record("BEGUN", 15)
            time.sleep(_WARMUP_S)
            with _come_back(bench, hub, plan, side, head(bench.redis_port)) as storm:
                result = await_result(storm, _STORM_S)
                served_us = result.ended_at_us - result.began_at_us
                length_us = max(served_us, _SHORTEST_US)
                crowd_us = pass_window(length_us)
            _check_storm(plan, result, statistics(hub.port))
            _await_departure(hub, plan.live)
            quiet_us = pass_window(length_us)
            _finish(live, stream, plan)
        sampled = read_samples(samples)
    storm_ms, crowd_ms, quiet_ms = (
        between(sampled, from_us, length_us) for from_us in (result.began_at_us, crowd_us, quiet_us)
    )
    return Windows(served_us / 1e6, result.whole, storm_ms, crowd_ms, quiet_ms)


def _come_back(bench: Bench, hub: Hub, plan: StormPlan, side: Guard, at: Position) -> Process:
    """The storm: everybody connects as fast as the hub lets them in, and stays."""
    since = at.offset - plan.events
    if plan.from_log and not 0 <= since < plan.stored:
        raise TrialError(f"the position {since} does not lead into the log of {plan.stored} events")
    return bench.load(
        hub.port,
        plan.conns,
        path=f"/ws?since={at.epoch}-{since}",
        first=since + 1,
        last=at.offset,
        by_offset=1,
        ramp=1_000_000,
        in_flight=plan.conns,
        max_s=_STORM_S,
        stay=1,
        **side.options,
    )


def _check_storm(plan: StormPlan, result: Result, said: dict[str, Any]) -> None:
    """Who was served has each event once and in order, and the hub has read the log for it if it should."""
    result.check_order("storm")
    mine = said["channels"][CHANNEL]
    if not result.deliveries or mine["gaps"] or (plan.from_log and not said["pages_read"]):
        raise TrialError(
            f"the storm: {result.deliveries} deliveries, {said['pages_read']} pages of the log read, "
            f"gaps: {mine['gaps']}"
        )


def _await_departure(hub: Hub, live: int) -> None:
    """Until the hub has forgotten the storm."""
    deadline = time.monotonic() + _LEAVE_S
    while (connected := statistics(hub.port)["connected"]) != live:
        if connected < live or time.monotonic() > deadline:
            raise TrialError(
                f"{connected} subscribers are connected after the storm, not {live}: {statistics(hub.port)}"
            )
        time.sleep(0.05)


def _finish(live: Process, stream: Process, plan: StormPlan) -> None:
    """End the stream; all of it must have reached everybody, once and in order."""
    time.sleep(0.2)
    stream.terminate()
    record = stream.record("PUBLISHED", 15)
    time.sleep(0.5)
    live.terminate()
    result = Result.from_record(live.record("RESULT", 10))
    result.check_order("live ones")
    if record["errors"] or result.closed or result.deliveries != record["published"] * plan.live:
        raise TrialError(
            f"live ones: {result.deliveries} deliveries of {record['published']} events to {plan.live}, "
            f"{record['errors']} not published, {result.closed} closed ({result.close_code})"
        )
