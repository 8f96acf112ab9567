"""How far a run is: one line a second, from what the fleet processes say in its folder."""

from __future__ import annotations

import json
from collections import Counter

from broadcaster.loadtest.latency import SAMPLES_BEYOND
from broadcaster.loadtest.rig import latency_of
from broadcaster.loadtest.run import Run
from broadcaster.settings import Settings


def so_far(run: Run, settings: Settings) -> str:
    """Such as `12 of 50 events, 600 of 2,500 deliveries, p99 so far 1.1 ms, 4 s left`; empty before the first.

    The latency is that from when an event was written, not from when it was due: only the publisher knows that.
    """
    events = received = 0
    latencies: Counter[int] = Counter()
    for number in range(1, settings.fleet.processes + 1):
        try:
            said = json.loads(run.progress(number).read_text())
        except (OSError, ValueError):  # it has said nothing yet
            continue
        events = max(events, said["events"])
        received += said["received"]
        latencies.update({int(step): count for step, count in said["latencies"].items()})
    if not events:
        return ""
    total, rate_hz = settings.loadtest.events, settings.loadtest.rate_hz
    expected = total * settings.fleet.clients
    events, received = min(events, total), min(received, expected)  # by bytes, they may be a few too many
    parts = [f"{events:,} of {total:,} events", f"{received:,} of {expected:,} deliveries"]
    if (p99_ms := _p99_ms(latencies)) is not None:
        parts.append(f"p99 so far {p99_ms:.1f} ms")
    if rate_hz and events < total:
        parts.append(f"{(total - events) / rate_hz:.0f} s left")
    return ", ".join(parts)


def _p99_ms(latencies: Counter[int]) -> float | None:
    beyond = latencies.total() // 100
    if beyond < SAMPLES_BEYOND:
        return None
    for step in sorted(latencies, reverse=True):
        beyond -= latencies[step]
        if beyond < 0:
            return latency_of(step)
    raise AssertionError(latencies)
