"""The product's publisher as a child: `loadtest.events` events at `loadtest.rate_hz`, or until SIGTERM.

Like publish.c it says at the end how late it was; latencies count from the instant that the product stamps
on an event as it writes it. Everything comes from the environment, as it does for the hub.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any, Final

from broadcaster.core import process
from broadcaster.publish.publisher import Publisher
from broadcaster.publish.schedule import on_schedule, padding
from broadcaster.settings import Settings, load

_ASIDE_S: Final = 0.01
_SETTLE_S: Final = 0.02


async def publish(settings: Settings, stop: asyncio.Event) -> int:
    """Publish, and print BEGUN before the first event and PUBLISHED after the last."""
    table, data = settings.loadtest, padding(settings)
    # As in the load test, this process is out of the way once an event is written: it sleeps, loop and all.
    aside_s = min(_ASIDE_S, 0.25 / table.rate_hz) if table.rate_hz else _ASIDE_S
    late_us: list[float] = []
    heard = errors = 0
    async with Publisher(settings) as publisher:
        kind, source = settings.publisher.event_type, settings.publisher.source
        drafts = [publisher.draft(kind, source, data=data) for _ in range(table.events)]
        await asyncio.sleep(_SETTLE_S)
        _tell("BEGUN", {})
        async for intended in on_schedule(table.events, table.rate_hz):
            due, drafts = drafts[: len(intended)], drafts[len(intended) :]
            written_ns = time.monotonic_ns()
            sent = publisher.send(due)
            time.sleep(aside_s)  # noqa: ASYNC251 - see above
            late_us += [(written_ns - due_ns) / 1000 for due_ns in intended]
            for result in await publisher.settle(sent):
                heard += result.heard or 0
                errors += result.error is not None
            if stop.is_set():
                break
    late_us.sort()
    late = {"p50": _percentile(late_us, 0.5), "p99": _percentile(late_us, 0.99), "max": _percentile(late_us, 1)}
    _tell("PUBLISHED", {"published": len(late_us), "heard": heard, "errors": errors, "late_us": late})
    return 0


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def _tell(word: str, record: dict[str, Any]) -> None:
    print(word, json.dumps(record), flush=True)


if __name__ == "__main__":
    sys.exit(process.run(lambda stop: publish(load().settings, stop)))
