"""What the load test measures of itself: did its processes stand still, and who else used the machine?

Recorded while it runs; `report/validity.py` judges it later.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Final, NamedTuple

from broadcaster.core.runtime import CLOCK, Clock
from broadcaster.loadtest.records import Record

ROLES: Final = ("redis", "hub", "publisher", "fleet", "report")
"""The parts of a run whose CPU time is its own; that of all others is of others."""

SAMPLE_EVERY_S: Final = 0.25
"""Time between two samples of the machine."""

_TIMER_S: Final = 0.02
_STILL_NS: Final = 20_000_000
"""Shorter times of standing still are in the lag, and no stall of their own."""
_KEPT_LAGS: Final = 200_000
"""Of a run of more than an hour, the lag is that of the last one."""
_KEPT_STALLS: Final = 100_000
"""Likewise, of a process that is stopped again and again."""
_BEFORE_NS: Final = 1_000_000_000
"""The lag is that of the run and of the second before it: a burst is over before a timer has run."""


_STEPS: Final = 20
"""Steps of a rough latency for each doubling: 3.5 % each."""


def step_of(latency_us: int) -> int:
    """A latency, roughly, for the line of progress: these of several processes can be added."""
    return round(_STEPS * log2(max(latency_us, 1)))


def latency_of(step: int) -> float:
    """Milliseconds of such a step."""
    return float(2 ** (step / _STEPS) / 1000)


class Stall(NamedTuple):
    """A time in which a process did not run although it was due: it was stopped, or other processes had the cores.

    Attributes:
        ended_mono_ns: When it ran again; CLOCK_MONOTONIC, nanoseconds.
        still_ms: How long it stood still, without the CPU time that it used meanwhile itself.
    """

    ended_mono_ns: int
    still_ms: float


@dataclass(frozen=True, slots=True)
class Lag:
    """How late the event loop of a process ran a timer, from first publish (fleet: delivery) to last delivery.

    Attributes:
        lag_p50_ms, lag_p99_ms, lag_max_ms: By CLOCK_MONOTONIC, read in the process itself: the error bar of its
            stamps.
        lag_usual_ms: The 99th percentile of all timers but the latest one, which is not its own measure, each less
            the time of its stall: being stopped often is no usual lag.
        busy_pct: CPU time of its loop's thread, in percent of one core.
        stalls: When and how long it stood still, for more than 20 ms, in order; also before that: when the first
            event was published is known by the publisher's clock, onto which the report brings them.
    """

    lag_p50_ms: float
    lag_p99_ms: float
    lag_max_ms: float
    lag_usual_ms: float
    busy_pct: float
    stalls: list[Stall]


class _Timer(NamedTuple):
    at_ns: int
    late_ns: int
    busy_ns: int

    @property
    def stall_ns(self) -> int:
        """How long it stood still; 0 if that is no stall of its own."""
        still_ns = self.late_ns - self.busy_ns
        return still_ns if still_ns > _STILL_NS else 0


class LagMeter:
    """Measures the lag of the process that it is in."""

    def __init__(self, clock: Clock = CLOCK) -> None:
        self._clock = clock
        self._timers: deque[_Timer] = deque(maxlen=_KEPT_LAGS)
        self._stalls: deque[tuple[int, int]] = deque(maxlen=_KEPT_STALLS)

    async def keep_measuring(self) -> None:
        """Record how late a timer is run, and how busy the thread was meanwhile; runs until cancelled."""
        # Not by the clock of the loop: uvloop's is 1 ms coarse.
        while True:
            due_ns = self._clock.monotonic_ns() + round(_TIMER_S * 1e9)
            busy_s = self._clock.thread_cpu_s()
            await asyncio.sleep(_TIMER_S)
            self.note(due_ns, self._clock.monotonic_ns(), round((self._clock.thread_cpu_s() - busy_s) * 1e9))

    def note(self, due_ns: int, now_ns: int, busy_ns: int) -> None:
        """Record one timer: when it was due, when it ran, and CPU time used since it was set."""
        late_ns = max(0, now_ns - due_ns)
        timer = _Timer(now_ns, late_ns, busy_ns)
        self._timers.append(timer)
        if timer.stall_ns:
            self._stalls.append((now_ns, timer.stall_ns))

    def between(self, first_ns: int, last_ns: int) -> Lag:
        """The lag from the first publish, or the first delivery, to the last delivery; all stalls until then."""
        until = [each for each in self._timers if each.at_ns - each.late_ns <= last_ns]
        timers = [each for each in until if each.at_ns >= first_ns - _BEFORE_NS]
        lags_ms = sorted(each.late_ns / 1e6 for each in timers) or [0.0]
        own_ms = sorted((each.late_ns - each.stall_ns) / 1e6 for each in timers)[:-1] or [0.0]
        lasted_ns = sum(each.late_ns + round(_TIMER_S * 1e9) for each in timers)
        return Lag(
            lag_p50_ms=round(lags_ms[len(lags_ms) // 2], 3),
            lag_p99_ms=round(lags_ms[int(len(lags_ms) * 0.99)], 3),
            lag_max_ms=round(lags_ms[-1], 3),
            lag_usual_ms=round(own_ms[int(len(own_ms) * 0.99)], 3),
            busy_pct=round(100 * sum(each.busy_ns for each in timers) / max(lasted_ns, 1), 1),
            stalls=[
                Stall(at_ns, round(still_ns / 1e6, 3))
                for at_ns, still_ns in self._stalls
                if at_ns - still_ns <= last_ns
            ],
        )


@dataclass(frozen=True, slots=True)
class MachineSample(Record):
    """What the machine and the parts of the run had used at one instant. CPU times are sums since some start.

    Attributes:
        at_mono_ns: When; CLOCK_MONOTONIC, nanoseconds.
        wall_ahead_us: The wall clock minus that one, in microseconds: it only changes when one of them is set.
        cores: Of the machine.
        user_ms: CPU time of all processes, in milliseconds over all cores; empty where the system does not say.
        steal_ms: Time in which the machine was not given a core by the host it is a guest of; likewise.
        redis_ms, hub_ms, publisher_ms, fleet_ms, report_ms: CPU time of the parts; empty: not on this machine, or
            not known yet.
    """

    at_mono_ns: int
    wall_ahead_us: int
    cores: int
    user_ms: int | None
    steal_ms: int | None
    redis_ms: int | None
    hub_ms: int | None
    publisher_ms: int | None
    fleet_ms: int | None
    report_ms: int | None


class MachineMeter:
    """Reads what the machine has used, some 0.1 ms each time. On systems without /proc only the clocks."""

    def __init__(self, folder: Path, clock: Clock = CLOCK, proc: Path = Path("/proc")) -> None:
        """Prepare.

        Args:
            folder: Of the run, in which each part says its process id (`announce`).
            clock: What to read.
            proc: Where Linux says what it has used.
        """
        self._folder = folder
        self._clock = clock
        self._proc = proc

    def sample(self) -> MachineSample:
        wall_ahead_ns = self._clock.wall_ahead_ns()
        total = self._machine()
        parts = {f"{role}_ms": self._of_role(role) for role in ROLES}
        return MachineSample(
            at_mono_ns=self._clock.monotonic_ns(),
            wall_ahead_us=wall_ahead_ns // 1000,
            cores=total.cores if total else os.cpu_count() or 1,
            user_ms=total.user_ms if total else None,
            steal_ms=total.steal_ms if total else None,
            **parts,
        )

    def _machine(self) -> _Total | None:
        try:
            lines = (self._proc / "stat").read_text().splitlines()
            user, nice, system, _, _, _, _, steal, *_ = map(int, lines[0].split()[1:])
        except (OSError, ValueError, IndexError):
            return None
        cores = sum(line.startswith("cpu") for line in lines) - 1
        # Without interrupts: no process is charged for them, and most are those of the run's own packets.
        return _Total(cores, (user + nice + system) * _TICK_MS, steal * _TICK_MS)

    def _of_role(self, role: str) -> int | None:
        times = [self._of_process(pid) for pid in announced(self._folder, role)]
        known = [time for time in times if time is not None]
        return sum(known) if known else None

    def _of_process(self, pid: int) -> int | None:
        try:
            # Counted after the command's name, which may hold spaces: fields 14 and 15.
            fields = (self._proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) * _TICK_MS
        except (OSError, ValueError, IndexError):
            return None


class _Total(NamedTuple):
    cores: int
    user_ms: int
    steal_ms: int


_TICK_MS: Final = 1000 // os.sysconf("SC_CLK_TCK")


def announce(folder: Path, role: str, pid: int, number: int = 1) -> None:
    """Say in the folder of a run which process a part is, so that its CPU time is not that of others."""
    (folder / f".{role}.{number}.pid").write_text(f"{pid}\n")


def is_program(pid: int, *names: str) -> bool:
    """Whether a process of this machine is one of these programs: a pid may have come from another machine."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return any(name in command for name in names)


def announced(folder: Path, role: str) -> Iterable[int]:
    """The process ids of a part, as far as they are said."""
    for path in folder.glob(f".{role}.*.pid"):
        if (text := path.read_text().strip()).isdigit():
            yield int(text)
