"""The pictures of docs/scale.md: `python -m tests.scale draw`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from tests.scale.costs import Costs
from tests.scale.scenarios import bottlenecks, storm

FOLDER: Final = Path(__file__).parents[2] / "docs" / "pictures"
_HUBS: Final = (4, 10, 20, 40, 100, 200, 400, 1000)
_STORMS: Final = ((1000, 1.0, False), (1000, 1.0, True), (400, 5.0, True), (100, 5.0, False))


def draw(costs: Costs, folder: Path = FOLDER) -> list[Path]:
    """Draw both; where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"scale-redis.svg": _redis(costs), "scale-storm.svg": _storm(costs)}
    # The same picture is the same file: no date, and names that do not depend on chance.
    with mpl.rc_context({"svg.hashsalt": "scale", "svg.fonttype": "none"}):
        for name, figure in pictures.items():
            figure.savefig(folder / name, metadata={"Date": None})
    return [folder / name for name in pictures]


def _redis(costs: Costs) -> Figure:
    figure, axes = _figure(
        "Events per second that one Redis gives to a channel's hubs", "hubs", "events/s at most"
    )
    for replicas in (0, 4, 16, 32):
        hubs = [count for count in _HUBS if count >= replicas * 2]
        limits = [min(bottlenecks(costs, count, replicas).values()) for count in hubs]
        axes.plot(hubs, limits, marker="o", label=f"{replicas} replicas" if replicas else "no replica")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend()
    return figure


def _storm(costs: Costs) -> Figure:
    title = "5 million reconnect, each with 10 events to catch up on"
    figure, axes = _figure(title, "seconds", "share that is live again")
    for hubs, spread_s, busy in _STORMS:
        served = sorted(storm(costs, 5_000_000 // hubs, spread_s, busy=busy))
        shares = [(place + 1) / len(served) for place in range(len(served))]
        axes.plot(served, shares, label=f"{hubs:,} {'busy' if busy else 'idle'} hubs, spread over {spread_s:g} s")
    axes.legend()
    return figure


def _figure(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    axes.grid(visible=True, which="both", alpha=0.3)
    return figure, axes
