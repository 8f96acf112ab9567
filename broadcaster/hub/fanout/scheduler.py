"""A cooperative scheduler: work that may wait, such as feeding slow consumers, a little per turn of the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from broadcaster.core.runtime import RUNTIME, Runtime

Work = Callable[[], bool]
"""Does one small piece; returns whether there is more."""


class Scheduler:
    """A queue of work, served round-robin. The same work stands in it only once."""

    def __init__(self, runtime: Runtime = RUNTIME) -> None:
        self._loop = asyncio.get_running_loop()
        self._limits = runtime.limits
        self._clock = runtime.clock
        self._queue: dict[Work, None] = {}
        self._scheduled = False
        self._left_at = 0.0  # this thread's CPU time when the last turn's work ended, or was added

    def add(self, work: Work) -> None:
        self._queue[work] = None
        if not self._scheduled:
            self._scheduled = True
            self._left_at = self._clock.thread_cpu_s()
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        clock = self._clock
        rest_s = clock.thread_cpu_s() - self._left_at
        # Not by loop time, which stands still within a turn.
        end = clock.monotonic_s() + self._limits.slice_after(rest_s)
        try:
            while self._queue:
                work = next(iter(self._queue))
                del self._queue[work]
                if work():
                    self._queue[work] = None
                if clock.monotonic_s() >= end:
                    break
        finally:
            self._scheduled = bool(self._queue)
            self._left_at = clock.thread_cpu_s()
            if self._queue:
                self._loop.call_soon(self._turn)
