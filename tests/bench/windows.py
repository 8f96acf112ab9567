"""Latencies of live subscribers by the time at which an event was due: in this window, and in that."""

from __future__ import annotations

import time
from array import array
from pathlib import Path
from typing import Final

from tests.bench.processes import TrialError

_SETTLE_S: Final = 0.3
"""Between what has just ended and the next window."""


def pass_window(length_us: int) -> int:
    """Let a window pass, a little from now; when it began, on the wall clock, in µs."""
    time.sleep(_SETTLE_S)
    began_us = time.time_ns() // 1000
    time.sleep(length_us / 1e6)
    return began_us


def read_samples(file: Path) -> array[int]:
    """What the load tool wrote: due time in µs, latency in ns, and so on."""
    sampled = array("q")
    sampled.frombytes(file.read_bytes())
    return sampled


def between(sampled: array[int], from_us: int, length_us: int) -> list[float]:
    """Latencies in ms of the deliveries that were due in a window."""
    pairs = zip(sampled[::2], sampled[1::2], strict=True)
    found = [late_ns / 1e6 for due_us, late_ns in pairs if from_us <= due_us < from_us + length_us]
    if not found:
        raise TrialError(f"no live event was due in the {length_us / 1000:.0f} ms of a window")
    return found
