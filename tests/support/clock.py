"""A clock that a test sets."""

from __future__ import annotations

import math
from typing import Self

from broadcaster.core.runtime import Clock as SystemClock


class Clock(SystemClock):
    """A clock whose loop time and monotonic time stand still as soon as a test sets `now`.

    Attributes:
        now: Both in seconds; None: those of the system.
    """

    def __init__(self, now: float | None = None) -> None:
        self.now = now

    def loop_s(self) -> float:
        return super().loop_s() if self.now is None else self.now

    def monotonic_s(self) -> float:
        return super().monotonic_s() if self.now is None else self.now

    def stop(self) -> Self:
        """Stand still from now on, at a whole number of seconds, so that sums are exact."""
        self.now = float(math.ceil(self.loop_s()))
        return self

    def move(self, seconds: float) -> None:
        """Move a clock that stands still."""
        assert self.now is not None
        self.now += seconds
