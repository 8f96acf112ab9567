"""Work that may wait, such as feeding those who are behind: a little of it per turn of the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

SLICE_S: Final = 0.0003
"""Such work per turn of the loop, in seconds: by so much it may delay an event that has just arrived ..."""

SHARE: Final = 0.25
"""... or this share of what the rest of the turn took: who has too much to send must still let people in."""

Work = Callable[[], bool]
"""Does one small piece; whether there is more."""


class Pacer:
    """A queue of work, served in turn. The same work stands in it only once."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: dict[Work, None] = {}
        self._scheduled = False
        self._left_at = 0.0  # this thread's CPU time when the last turn's work ended, or was added

    def add(self, work: Work) -> None:
        self._queue[work] = None
        if not self._scheduled:
            self._scheduled = True
            self._left_at = time.thread_time()
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        rest_s = time.thread_time() - self._left_at
        end = time.monotonic() + max(SLICE_S, SHARE * rest_s)  # the loop's own clock stands still within a turn
        try:
            while self._queue:
                work = next(iter(self._queue))
                del self._queue[work]
                if work():
                    self._queue[work] = None
                if time.monotonic() >= end:
                    break
        finally:
            self._scheduled = bool(self._queue)
            self._left_at = time.thread_time()
            if self._queue:
                self._loop.call_soon(self._turn)
