"""May the figures of a run be believed? Judged from what its rig has measured of itself.

The bounds were measured: in 26 undisturbed runs others used at most 0.5 % of the CPU, steal was 0.1 %, and
publishes 4 ms late at most; a busy process on each core was 82 % and more, and a fleet that was stopped for 300 ms
stood still for 287. A hub or a Redis that freezes is no fault of the rig: that is what it measures.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Final, NamedTuple

from broadcaster.loadtest.rig import ROLES, Lag, MachineSample

OTHERS_CPU_PCT: Final = 33.0
STEAL_PCT: Final = 5.0
STALL_MS: Final = 50.0
STALL_LAGS: Final = 10.0
"""A stall counts that is also so many times the usual lag of its process."""
STILL_PCT: Final = 10.0
"""Stalls that count, of whatever length, are together less of the time: none that is short excuses many."""
LATE_MS: Final = 20.0
WALL_STEP_MS: Final = 5.0
BUSY_PCT: Final = 80.0
"""A part that uses so much of a core is at its limit: that is named, and no fault."""

_SHORTEST_S: Final = 1.0
"""CPU times have steps of 10 ms: what is shorter is judged with what was just before it."""


@dataclass(frozen=True, slots=True)
class Rig:
    """What the rig has measured between first publish and last delivery; None: this system does not say.

    Attributes:
        others_cpu_pct: CPU time of all processes but those of the run, in percent of the whole machine.
        steal_pct: Time in which the machine was not given its cores, likewise.
        cpu_pct: CPU time of each part, in percent of one core; None: not known, or on another machine.
        stalls_ms: By process: the longest time it stood still.
        still_pct: By process: all times that it stood still (`still_pct`), in percent of the time.
        lags_ms: By process: its usual lag.
        late_ms: How late the publisher wrote an event through its own fault.
        wall_step_ms: The largest step of the wall clock against CLOCK_MONOTONIC.
        too_early: Deliveries that came before their event was due, by more than the error of the clocks.
        lost_rows: Rows that the fleet has written and that are not in its logs; negative: there are more.
    """

    others_cpu_pct: float | None
    steal_pct: float | None
    cpu_pct: Mapping[str, float | None]
    stalls_ms: dict[str, float]
    still_pct: dict[str, float]
    lags_ms: dict[str, float]
    late_ms: float
    wall_step_ms: float
    lost_rows: int
    too_early: int


@dataclass(frozen=True, slots=True)
class Validity:
    """Whether the figures of a run may be believed.

    Attributes:
        rig: What it was judged by.
        reasons: One sentence for each reason why not; none: VALID.
        notes: What is no fault, and has to be known.
    """

    rig: Rig
    reasons: list[str]
    notes: list[str]

    @property
    def word(self) -> str:
        return "INVALID" if self.reasons else "VALID"


class Used(NamedTuple):
    """See `Rig`."""

    others_cpu_pct: float | None
    steal_pct: float | None
    cpu_pct: Mapping[str, float | None]


_NOT_KNOWN: Final = Used(None, None, MappingProxyType(dict.fromkeys(ROLES)))


def used(samples: Sequence[MachineSample], first_ns: int, last_ns: int, local: Collection[str]) -> Used:
    """Percent of the machine that others used, percent of steal, and percent of a core that each part used.

    Args:
        samples: Of the machine, in order.
        first_ns: When the first event was published; CLOCK_MONOTONIC.
        last_ns: When the last delivery was received.
        local: The parts that run on this machine. Where the CPU time of one is not known, that of others is not.
    """
    if not samples:
        return _NOT_KNOWN
    before = [each for each in samples if each.at_mono_ns <= min(first_ns, last_ns - _SHORTEST_S * 1e9)]
    after = [each for each in samples if each.at_mono_ns >= last_ns]
    start = before[-1] if before else samples[0]
    end = after[0] if after else samples[-1]
    lasted_ms = (end.at_mono_ns - start.at_mono_ns) / 1e6
    user_ms, steal_ms = _difference(start.user_ms, end.user_ms), _difference(start.steal_ms, end.steal_ms)
    if lasted_ms <= 0 or user_ms is None or steal_ms is None:
        return _NOT_KNOWN
    parts = {role: _difference(getattr(start, f"{role}_ms"), getattr(end, f"{role}_ms")) for role in ROLES}
    ours_ms = sum(part for part in parts.values() if part is not None)
    whole_ms = lasted_ms * end.cores
    is_known = all(parts[role] is not None for role in local)
    return Used(
        round(100 * (user_ms - ours_ms) / whole_ms, 1) if is_known else None,
        round(100 * steal_ms / whole_ms, 1),
        {role: None if part is None else round(100 * part / lasted_ms, 1) for role, part in parts.items()},
    )


def _difference(start: int | None, end: int | None) -> int | None:
    return None if start is None or end is None else end - start


def wall_step_ms(samples: Sequence[MachineSample]) -> float:
    """The largest step between two samples; a clock that is only slowed down or sped up does not step."""
    aheads_us = [each.wall_ahead_us for each in samples]
    return max((abs(after - before) / 1000 for before, after in pairwise(aheads_us)), default=0.0)


def still_pct(lag: Lag, lasted_ms: float) -> float:
    """All stalls of more than ten times the usual lag, in percent of the time (of a second at least)."""
    stalls_ms = [each.still_ms for each in lag.stalls if each.still_ms > STALL_LAGS * lag.lag_usual_ms]
    return round(100 * sum(stalls_ms) / max(lasted_ms, _SHORTEST_S * 1000), 1)


def _stalls(rig: Rig) -> list[str]:
    """A sentence for each process that stood still for too long, or too often."""
    reasons = []
    for name, stall_ms in rig.stalls_ms.items():
        lag_ms = rig.lags_ms[name]
        if stall_ms > STALL_MS and stall_ms > STALL_LAGS * lag_ms:
            reasons.append(
                f"{name} stood still for {stall_ms:.0f} ms: it was stopped, or was given no core "
                f"({STALL_MS:.0f} ms allowed; its lag is usually {lag_ms:.1f} ms)"
            )
        elif rig.still_pct[name] > STILL_PCT:
            reasons.append(
                f"{name} stood still for {rig.still_pct[name]:.0f} % of the time, {stall_ms:.0f} ms at most at "
                f"once: it was stopped again and again, or was given too little of a core "
                f"({STILL_PCT:.0f} % allowed)"
            )
    return reasons


def judge(rig: Rig, lags: Mapping[str, Lag]) -> Validity:
    """Say what speaks against the figures, and what has to be known.

    Args:
        rig: What was measured.
        lags: Of each process that measures.
    """
    reasons = _stalls(rig)
    if rig.late_ms > LATE_MS:
        reasons.append(
            f"the publisher wrote an event {rig.late_ms:.0f} ms late, and was not waiting for Redis "
            f"({LATE_MS:.0f} ms allowed)"
        )
    if rig.others_cpu_pct is not None and rig.others_cpu_pct > OTHERS_CPU_PCT:
        reasons.append(
            f"other processes used {rig.others_cpu_pct:.0f} % of the machine's CPU time "
            f"({OTHERS_CPU_PCT:.0f} % allowed)"
        )
    if rig.steal_pct is not None and rig.steal_pct > STEAL_PCT:
        reasons.append(
            f"the machine itself was given no core for {rig.steal_pct:.0f} % of the time (steal; "
            f"{STEAL_PCT:.0f} % allowed)"
        )
    if rig.wall_step_ms > WALL_STEP_MS:
        reasons.append(
            f"the wall clock was set by {rig.wall_step_ms:.0f} ms against CLOCK_MONOTONIC while the run lasted "
            f"({WALL_STEP_MS:.0f} ms allowed)"
        )
    if rig.too_early:
        reasons.append(
            f"{rig.too_early:,} deliveries came before their event was due, by more than the error of the clocks: "
            "what was compared is not how far they are apart"
        )
    if rig.lost_rows:
        which = "missing in" if rig.lost_rows > 0 else "too many in"
        reasons.append(f"{abs(rig.lost_rows):,} rows are {which} the logs of the fleet")
    notes = [
        f"{name} was busy for {lag.busy_pct:.0f} % of the time: it is at its limit, and so may the figures be."
        for name, lag in lags.items()
        if lag.busy_pct > BUSY_PCT
    ]
    if rig.others_cpu_pct is None:
        notes.append("How much CPU time others have used is not known, and was not judged.")
    return Validity(rig, reasons, notes)
