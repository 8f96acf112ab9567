"""The clocks of a run: how far each is from that of the publisher, onto which all instants are brought.

Two processes are on one clock if their wall clocks are equally far ahead of their CLOCK_MONOTONIC: those of two
hosts, which were started at different times, are not. Else the difference is what exchanges with the hub say, if
both have asked the same one, or two on one clock: behind a balancer each may have reached another host. It may be
wrong by half of a round trip, and that much less is claimed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final, NamedTuple

from broadcaster.loadtest.records import ClockRecord

SAME_NS: Final = 1_000_000
"""Wall clocks that are ahead by the same within so much are one clock: it is set, or slewed, while a run lasts."""

_RESOLUTION_NS: Final = 1000
"""Redis tells microseconds."""


class Offset(NamedTuple):
    """How far a clock is ahead of the publisher's CLOCK_MONOTONIC, and how wrong that may be (None: not known)."""

    ahead_ns: int
    error_ns: int | None

    @property
    def is_known(self) -> bool:
        return self.error_ns is not None


SAME: Final = Offset(0, 0)
UNKNOWN: Final = Offset(0, None)


@dataclass(frozen=True, slots=True)
class Clocks:
    """The clocks of a run.

    Attributes:
        fleets: Of each fleet process.
        hubs: Of the hub of each fleet process.
        redis: The wall clock of Redis.
        notes: One sentence for each that is not the publisher's.
    """

    fleets: Mapping[int, Offset]
    hubs: Mapping[int, Offset]
    redis: Offset
    notes: tuple[str, ...] = ()

    @property
    def error_ns(self) -> int | None:
        """How wrong a latency may be; None: not known, and so are the latencies."""
        return _largest(offset.error_ns for offset in self.fleets.values())

    @property
    def hop_errors_ns(self) -> dict[str, int | None]:
        """How wrong each hop may be, by name, and the latency; None: not known."""
        to_hub = _largest([*(hub.error_ns for hub in self.hubs.values()), self.redis.error_ns])
        fanout = _largest(
            0 if self.hubs[number] == fleet == SAME else _sum(self.hubs[number].error_ns, fleet.error_ns)
            for number, fleet in self.fleets.items()
        )
        return {
            "schedule": 0,
            "to_redis": self.redis.error_ns,
            "to_hub": to_hub,
            "in_hub": 0,
            "fanout": fanout,
            "latency": self.error_ns,
        }


class _Every(dict[int, Offset]):
    def __missing__(self, number: int) -> Offset:
        return SAME


ONE_CLOCK: Final = Clocks(_Every(), _Every(), SAME)
"""Where nothing was compared: all parts are taken to be on one clock."""


def compare(
    publisher: Sequence[ClockRecord], fleets: Mapping[int, Sequence[ClockRecord]], *, redis_is_here: bool
) -> Clocks:
    """Compare the clocks of a run.

    Args:
        publisher: What the publisher has measured.
        fleets: What each fleet process has.
        redis_is_here: Whether Redis is on the publisher's machine, by its address.
    """
    redis = _redis(publisher, redis_is_here=redis_is_here)
    found: dict[int, Offset] = {}
    hubs: dict[int, Offset] = {}
    notes: list[str] = []
    for number, rows in fleets.items():
        found[number] = fleet = _fleet(publisher, rows)
        hubs[number] = _hub(rows, fleet, _measured(rows, "hub"))
        if fleet != SAME:
            notes.append(_told(f"fleet.{number}", fleet, publisher, rows))
        why = next((row.why for row in rows if row.of == "hub" and row.why), "")
        if why:
            notes.append(f"Clock of the hub of fleet.{number}: not compared ({why}), so its hops are not known.")
        elif hubs[number] != SAME and hubs[number] != fleet:
            notes.append(_told(f"the hub of fleet.{number}", hubs[number]))
    if not redis.is_known:
        why = next((row.why for row in publisher if row.of == "redis"), "it was not asked")
        notes.append(f"Clock of Redis: not compared ({why}), so its hops are not known.")
    return Clocks(found, hubs, redis, tuple(notes))


def _told(part: str, offset: Offset, *rows: Sequence[ClockRecord]) -> str:
    differ = ""
    if rows and all(rows):
        apart_s = abs(rows[0][0].wall_ahead_ns - rows[1][0].wall_ahead_ns) / 1e9
        differ = f" (wall minus monotonic differs by {apart_s:,.3f} s)"
    if offset.error_ns is None:
        return (
            f"Clock of {part}: another one than the publisher's{differ}, and no hub to compare them by that both "
            "have asked: unknown."
        )
    return (
        f"Clock of {part}: {offset.ahead_ns / 1e6:+,.3f} ms from the publisher's{differ}, corrected; "
        f"known to ± {offset.error_ns / 1e6:,.3f} ms, below which nothing is claimed."
    )


def _measured(rows: Sequence[ClockRecord], of: str) -> Offset:
    read = [(row.ahead_ns, row.error_ns) for row in rows if row.of == of]
    return _middle([(ahead, error) for ahead, error in read if ahead is not None and error is not None])


def _middle(known: Sequence[tuple[int, int]]) -> Offset:
    """The middle of what was measured, and how far the truth may be from it: clocks of two hosts drift apart."""
    if not known:
        return UNKNOWN
    low, high = max(ahead - error for ahead, error in known), min(ahead + error for ahead, error in known)
    if low > high:
        low, high = min(ahead - error for ahead, error in known), max(ahead + error for ahead, error in known)
    return Offset((low + high) // 2, (high - low + 1) // 2)


def _fleet(publisher: Sequence[ClockRecord], rows: Sequence[ClockRecord]) -> Offset:
    measured = _middle([apart for ours, theirs in product(publisher, rows) if (apart := _apart(ours, theirs))])
    same = bool(publisher and rows) and abs(publisher[0].wall_ahead_ns - rows[0].wall_ahead_ns) < SAME_NS
    is_contradicted = measured.error_ns is not None and abs(measured.ahead_ns) > measured.error_ns
    return SAME if same and not is_contradicted else measured


def _apart(ours: ClockRecord, theirs: ClockRecord) -> tuple[int, int] | None:
    """How far the clock of a fleet is ahead, and the error; None if the two have not asked one clock."""
    if ours.ahead_ns is None or ours.error_ns is None or theirs.ahead_ns is None or theirs.error_ns is None:
        return None
    its_differ_ns = abs((ours.its_wall_ahead_ns or 0) - (theirs.its_wall_ahead_ns or 0))
    if ours.of != theirs.of or (ours.instance != theirs.instance and its_differ_ns >= SAME_NS):
        return None
    return ours.ahead_ns - theirs.ahead_ns, ours.error_ns + theirs.error_ns


def _hub(rows: Sequence[ClockRecord], fleet: Offset, theirs: Offset) -> Offset:
    """The hub from the publisher: by way of the fleet process that has asked it."""
    if theirs.error_ns is None or fleet.error_ns is None:
        return UNKNOWN
    read = [row for row in rows if row.its_wall_ahead_ns is not None]
    same = all(abs(row.wall_ahead_ns - (row.its_wall_ahead_ns or 0)) < SAME_NS for row in read)
    if same and abs(theirs.ahead_ns) <= theirs.error_ns:
        return fleet
    return Offset(fleet.ahead_ns + theirs.ahead_ns, fleet.error_ns + theirs.error_ns)


def _redis(publisher: Sequence[ClockRecord], *, redis_is_here: bool) -> Offset:
    measured = _measured(publisher, "redis")
    own = [row.wall_ahead_ns for row in publisher]
    if measured.error_ns is None or not redis_is_here:
        return measured
    here = Offset((min(own) + max(own)) // 2, (max(own) - min(own) + 1) // 2 + _RESOLUTION_NS)
    assert here.error_ns is not None
    is_contradicted = abs(here.ahead_ns - measured.ahead_ns) > here.error_ns + measured.error_ns
    return measured if is_contradicted else here


def _largest(errors_ns: Iterable[int | None]) -> int | None:
    largest = 0
    for error_ns in errors_ns:
        if error_ns is None:
            return None
        largest = max(largest, error_ns)
    return largest


def _sum(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second
