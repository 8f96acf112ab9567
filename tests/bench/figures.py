"""From the figures of all rounds to a line of the table: medians, ratios, goals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from tabulate import tabulate

HEADERS: Final = ("what", "hub", "compared with", "ratio (lowest to highest)", "goal", "verdict")
REACHED: Final = "reached"
MISSED: Final = "missed"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table, ready to print."""

    what: str
    hub: str = ""
    compared: str = ""
    ratio: str = ""
    goal: str = ""
    verdict: str = ""


def ratio_line(what: str, hub: Sequence[float], other_name: str, other: Sequence[float], at_most: float) -> Line:
    """The hub against something measured in the same rounds.

    The ratio is the median over the rounds of (hub / other in that round), so that a slow minute of
    the machine, which both met, does not count.
    """
    ratios = ratios_of(hub, other)
    return Line(
        what,
        number(median(hub)),
        f"{other_name} {number(median(other))}",
        spread(ratios),
        f"≤ {at_most:g} ×",
        verdict(median(ratios) <= at_most),
    )


def absolute_line(what: str, hub: Sequence[float], at_most: float, compared: str = "") -> Line:
    """The median over the rounds against a fixed goal; `compared` is only shown beside it."""
    middle = median(hub)
    goal = f"≤ {number(at_most)}"
    return Line(what, number(middle), compared, goal=goal, verdict=verdict(middle <= at_most))


def ratios_of(hub: Sequence[float], other: Sequence[float]) -> list[float]:
    """Round by round; a zero on the other side counts as infinitely worse."""
    return [mine / theirs if theirs else float("inf") for mine, theirs in zip(hub, other, strict=True)]


def spread(ratios: Sequence[float]) -> str:
    return f"{median(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})"


def number(value: float) -> str:
    """Three significant digits, thousands separated."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def verdict(reached: bool) -> str:
    return REACHED if reached else MISSED


def table(lines: Sequence[Line]) -> str:
    rows = [(line.what, line.hub, line.compared, line.ratio, line.goal, line.verdict) for line in lines]
    return tabulate(rows, headers=HEADERS, tablefmt="simple", disable_numparse=True)
