"""The percentile distribution as HdrHistogram writes it (`.hgrm`), for its plotter and whatever else reads it.

From the raw latencies: no class of a histogram has rounded them.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import ceil, floor
from typing import Final

import numpy as np

from broadcaster.loadtest.deliveries import Integers

_STEPS_PER_HALF: Final = 5
"""So many lines for each half of what remains above: HdrHistogram's own default."""


def hgrm(ordered_ns: Integers) -> str:
    """The whole file; values are milliseconds.

    Args:
        ordered_ns: Latencies in nanoseconds, ascending.
    """
    count = len(ordered_ns)
    lines = [f"{'Value':>12} {'Percentile':>14} {'TotalCount':>10} {'1/(1-Percentile)':>14}", ""]
    for share in shares(count):
        value_ns = ordered_ns[max(1, ceil(share * count)) - 1]
        total = int(np.searchsorted(ordered_ns, value_ns, side="right"))
        beyond = f" {float(1 / (1 - share)):14.2f}" if share < 1 else ""
        lines.append(f"{value_ns / 1e6:12.3f} {float(share):2.12f} {total:10d}{beyond}")
    mean_ms, deviation_ms, max_ms = (
        (ordered_ns.mean() / 1e6, ordered_ns.std() / 1e6, ordered_ns[-1] / 1e6) if count else (0.0, 0.0, 0.0)
    )
    lines += [
        f"#[Mean    = {mean_ms:12.3f}, StdDeviation   = {deviation_ms:12.3f}]",
        f"#[Max     = {max_ms:12.3f}, Total count    = {count:12d}]",
        f"#[Buckets = {0:12d}, SubBuckets     = {0:12d}]",
    ]
    return "\n".join(lines) + "\n"


def shares(count: int) -> Iterator[Fraction]:
    """From 0 on, each half of what remains above in as many steps, up to the last sample, and 1."""
    if not count:
        return
    share = Fraction(0)
    while (1 - share) * count >= 1:
        yield share
        halves = floor(1 / (1 - share)).bit_length()
        share += Fraction(1, _STEPS_PER_HALF * 2**halves)
    yield Fraction(1)
