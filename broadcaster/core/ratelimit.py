"""Rate limiting by token bucket: a number per second, in bursts of up to one second's worth."""

from __future__ import annotations

from broadcaster.core.bounded import BoundedDict
from broadcaster.core.runtime import CLOCK, Clock


def leaked(level: float, elapsed_s: float, per_s: float) -> float:
    """The level of a bucket that held `level` and leaks `per_s` per second, `elapsed_s` later."""
    return max(0.0, level - elapsed_s * per_s)


class TokenBucket:
    """A rate limiter. Its bucket starts empty, each use adds one to it, and it never holds more than `per_s`."""

    def __init__(self, per_s: float, *, clock: Clock = CLOCK) -> None:
        self._per_s = per_s
        self._clock = clock
        self._level = 0.0
        self._used_at = clock.monotonic_s()

    def allows_one(self) -> bool:
        """Whether one more use is allowed now; if so, it is counted."""
        now = self._clock.monotonic_s()
        self._level = leaked(self._level, now - self._used_at, self._per_s)
        self._used_at = now
        if self._level + 1 > self._per_s:
            return False
        self._level += 1
        return True


class TokenBuckets:
    """A token bucket per key, such as an address; of too many keys the one that came first is forgotten."""

    def __init__(self, per_s: float, most: int, *, clock: Clock = CLOCK) -> None:
        self._per_s = per_s
        self._clock = clock
        self._buckets = BoundedDict[str, TokenBucket](most)

    def allows_one(self, key: str) -> bool:
        """Whether one more use by this key is allowed now; if so, it is counted."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = TokenBucket(self._per_s, clock=self._clock)
        return bucket.allows_one()
