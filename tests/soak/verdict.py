"""What a soak has measured, and whether a hub that lives for months may be like that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

WARM_UP: Final = 0.2
"""Share of the time until caches, rings and the allocator's arenas have their size."""

END: Final = 0.2
"""Share of the time at the end whose median is compared with that of the samples right after the warm-up."""

SLACK_BYTES: Final = 3 * 2**20
"""What the memory of a hub that leaks nothing may differ by: pages of the log of other sizes, and fragments."""

BYTES_PER_CONNECT: Final = 60
"""What it may grow by for each connection that has come and gone.

The smallest leak that matters is one object of a connection for each who comes, and what it holds: its transport
at least. That is 930 bytes, as measured with a roster that kept a list of everybody. In 10 minutes some 20,000
connections come between the two ends of the comparison, 17,000 of them are let in: that leak is 15 MiB, and the
bound is 4.1 MiB. (In a few seconds it would not be seen: test_forgotten.py looks for it there in another way.)
"""

SPARE_FILES: Final = 3
"""Open files that may be more at the end than at the start: a link to Redis that is just being replaced."""

_BAD_WORDS: Final = ("Traceback", "Error", "error:", "exception", "Exception")


@dataclass(frozen=True, slots=True)
class Sample:
    """The hub at one moment.

    Attributes:
        at_s: Seconds since the churn began.
        memory: Bytes in RAM (VmRSS).
        files: Open files.
        connected, events, deliveries: As `/stats` says.
        connects: Connections that the churn has made so far, let in or not.
    """

    at_s: float
    memory: int
    files: int
    connected: int
    events: int
    deliveries: int
    connects: int

    def __str__(self) -> str:
        return (
            f"{self.at_s:6.0f} s  {self.memory / 2**20:7.2f} MiB  {self.files:4d} files  "
            f"{self.connected:4d} connected  {self.events:7d} events  {self.deliveries:9d} deliveries  "
            f"{self.connects:7d} connects"
        )


@dataclass(slots=True)
class Soak:
    """A whole soak.

    Attributes:
        ready: Whether the hub was ready at the end.
        published: Events that were published while it ran.
        stayers: Per client that stayed: how many of them it was given.
        complaints: What anybody has seen that the contract does not allow.
        samples: At regular times.
        files_before, files_after: Open files before anybody came, and after everybody had left.
        left: How many were still connected when everybody had left.
        ended: How often each thing happened that has to happen, or the soak has tested nothing.
        output: What the hub said.
        exit_code: Of the hub after SIGTERM.
    """

    ready: bool = False
    published: int = 0
    stayers: dict[str, int] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    files_before: int = 0
    files_after: int = 0
    left: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    output: Sequence[str] = ()
    exit_code: int | None = None


def growth(samples: Sequence[Sample]) -> tuple[int, int]:
    """By how many bytes the memory has grown after the warm-up, and by how many it may have."""
    whole_s = samples[-1].at_s
    warm = [sample for sample in samples if sample.at_s >= WARM_UP * whole_s]
    first = [sample for sample in warm if sample.at_s <= (WARM_UP + END / 2) * whole_s] or warm[:1]
    last = [sample for sample in warm if sample.at_s >= (1 - END) * whole_s]
    grown = median(sample.memory for sample in last) - median(sample.memory for sample in first)
    return round(grown), SLACK_BYTES + BYTES_PER_CONNECT * (last[-1].connects - first[0].connects)


def verdict(soak: Soak) -> list[str]:
    """What is wrong; empty if nothing is."""
    wrong = list(soak.complaints[:20])
    if not soak.ready:
        wrong.append("the hub is not ready at the end")
    if soak.exit_code != 0:
        wrong.append(f"the hub has ended with {soak.exit_code}")
    if not soak.published or not soak.stayers:
        wrong.append("nothing was published, or nobody stayed")
    wrong += [
        f"{name} stayed, and was given {given} of {soak.published} events"
        for name, given in soak.stayers.items()
        if given != soak.published
    ]
    wrong += [f"nobody was {name}: this has tested nothing" for name, count in soak.ended.items() if not count]
    if soak.left:
        wrong.append(f"{soak.left} are still connected after everybody has left")
    if soak.files_after > soak.files_before + SPARE_FILES:
        wrong.append(f"{soak.files_after} files are open, and {soak.files_before} were at the start")
    if len(soak.samples) < 5:
        wrong.append(f"only {len(soak.samples)} samples")
    else:
        grown, allowed = growth(soak.samples)
        if grown > allowed:
            wrong.append(f"the memory has grown by {grown:,} bytes; {allowed:,} may be")
    wrong += [f"the hub said: {line}" for line in soak.output if any(word in line for word in _BAD_WORDS)]
    return wrong
