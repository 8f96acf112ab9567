"""Is the project's own load test part of what it measures? It beside the C load generator."""

from __future__ import annotations

import csv
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

from tests.bench.figures import Line, ratio_line
from tests.bench.hubs import hub_environment, running_hub
from tests.bench.plan import PAIRS, STEADY, Plan
from tests.bench.processes import ROOT, Process, TrialError
from tests.bench.trial import Bench, say

_START_S: Final = 30.0
_PROCFILE: Final = "Procfile.loadtest"


def own_loadtest(bench: Bench) -> list[Line]:
    """10 events/s to 50 subscribers, measured by the project's load test and by load.c in turn.

    Both ask the *same* hub process. The load test is its usual Procfile without the lines `redis`
    and `hub`: `honcho -f Procfile.loadtest start publisher fleet report`, with the address of
    that hub in the environment and its results in a temporary folder; p50 and p95 are then
    read from its summary.csv.
    """
    if not (ROOT / _PROCFILE).exists():
        return [Line("loadtest: p50 and p95 of the own load test", verdict="skipped: no Procfile.loadtest")]
    rounds = bench.rounds if bench.quick else max(bench.rounds, PAIRS)
    own: list[tuple[float, float]] = []
    c: list[tuple[float, float]] = []
    plan = replace(STEADY.shrunk() if bench.quick else STEADY, warmup=0)  # the load test has none
    with running_hub(bench.hub, bench.redis_port, bench.tools) as hub:
        for number_of_round in range(1, rounds + 1):
            own.append(_own_percentiles(hub.port, bench.redis_port, plan))
            outcome = bench.broadcast(hub.pid, hub.port, plan)
            outcome.check(bench.hub)
            c.append((outcome.result.p50_ms, outcome.result.p95_ms))
            say(
                f"loadtest {number_of_round}/{rounds}: own p50 {own[-1][0]:.2f} ms, p95 {own[-1][1]:.2f} ms; "
                f"load.c p50 {c[-1][0]:.2f} ms, p95 {c[-1][1]:.2f} ms"
            )
    return [
        ratio_line("loadtest: p50, ms", [p50 for p50, _ in own], "load.c", [p50 for p50, _ in c], 1.25),
        ratio_line("loadtest: p95, ms", [p95 for _, p95 in own], "load.c", [p95 for _, p95 in c], 1.5),
    ]


def _own_percentiles(port: int, redis_port: int, plan: Plan) -> tuple[float, float]:
    """One run of the project's load test; p50 and p95 in ms."""
    with tempfile.TemporaryDirectory() as results:
        env = {
            **hub_environment(port, redis_port),
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
            "BROADCASTER_FLEET__URL": f"ws://127.0.0.1:{port}/ws",
            "BROADCASTER_FLEET__CLIENTS": str(plan.conns),
            "BROADCASTER_LOADTEST__EVENTS": str(plan.events),
            "BROADCASTER_LOADTEST__RATE_HZ": str(1000 / plan.period_ms),
            "BROADCASTER_LOADTEST__RESULTS": results,
            "BROADCASTER_PUBLISHER__PAYLOAD_BYTES": str(plan.event_bytes),
            # The publisher beside load.c does not store its events either: the rigs are compared, not the work.
            "BROADCASTER_HISTORY__ENABLED": "false",
        }
        command = [sys.executable, "-m", "honcho", "-f", _PROCFILE, "start", "publisher", "fleet", "report"]
        with Process("own load test", command, env=env, cwd=ROOT) as run:
            run.finish(plan.length_s + _START_S)
        return _summary_percentiles(Path(results))


def _summary_percentiles(results: Path) -> tuple[float, float]:
    summaries = list(results.glob("*/summary.csv"))
    if len(summaries) != 1:
        raise TrialError(f"own load test: {len(summaries)} files summary.csv instead of one")
    with summaries[0].open(newline="") as file:
        whole_run = next(csv.DictReader(file))
    try:
        return float(whole_run["p50_ms"]), float(whole_run["p95_ms"])
    except KeyError as column:
        raise TrialError(f"own load test: summary.csv has no column {column}") from None
