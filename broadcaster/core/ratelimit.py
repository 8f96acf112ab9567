"""Rate limiting by token bucket: so many per second, and a second's worth at once."""

from __future__ import annotations

from broadcaster.core.runtime import CLOCK, Clock


def leaked(level: float, elapsed_s: float, per_s: float) -> float:
    """What is left in a bucket that held `level` and loses `per_s` every second, `elapsed_s` later."""
    return max(0.0, level - elapsed_s * per_s)


class TokenBucket:
    """A rate limit. The bucket is empty at first; each use fills it by one, and it never holds more than `per_s`."""

    def __init__(self, per_s: float, *, clock: Clock = CLOCK) -> None:
        self._per_s = per_s
        self._clock = clock
        self._level = 0.0
        self._used_at = clock.monotonic_s()

    def allows_one(self) -> bool:
        """Whether one more may pass now; if so, it counts."""
        now = self._clock.monotonic_s()
        self._level = leaked(self._level, now - self._used_at, self._per_s)
        self._used_at = now
        if self._level + 1 > self._per_s:
            return False
        self._level += 1
        return True
