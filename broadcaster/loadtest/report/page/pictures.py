"""The pictures of a report: which there are, and what each of them shows."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from broadcaster.core.text import printable_or_repr
from broadcaster.loadtest.hops import HOPS, Budget
from broadcaster.loadtest.report import budget as hops
from broadcaster.loadtest.report.outcome import Outcome
from broadcaster.loadtest.report.page.drawing import (
    BLUE,
    GREEN,
    GRID,
    HUES,
    MUTED,
    NARROW,
    ORANGE,
    RED,
    ROWS_SHOWN,
    WIDE,
    Drawing,
    Picture,
    in_ms,
    picture,
)
from broadcaster.loadtest.report.page.series import OverTime, curve, heat_map, marks_of, over_time, rates

_STEPS: Final = (1, 2, 2.5, 5, 10)
_PERCENTILES: Final = (0.5, 0.9, 0.95, 0.99, 0.999)


def pictures(outcome: Outcome) -> list[Picture]:
    """All pictures of a run whose deliveries are on one clock; of another one there is only the ledger to show."""
    if not len(outcome.latencies.latency_ns):
        return [_ledger(outcome)]
    timed = over_time(outcome)
    return [
        _percentiles(outcome),
        _latency_over_time(outcome, timed),
        _heat(outcome),
        *([] if outcome.budget is None or not outcome.budget.rows else [_hops(outcome.budget)]),
        _rates(outcome),
        _ledger(outcome),
    ]


def _percentiles(outcome: Outcome) -> Picture:
    shares, latency_ms = curve(outcome.latencies.ordered_ns)
    beyond = 1 / (1 - shares)
    known = {
        f"p{100 * share:g}": (share, value)
        for share, value in zip(
            _PERCENTILES,
            (getattr(outcome.whole, f"p{name}_ms") for name in ("50", "90", "95", "99", "999")),
            strict=True,
        )
        if value is not None
    }

    def draw(axes: Axes, is_narrow: bool) -> None:
        axes.set_xscale("log")
        axes.set_xlim(1, beyond[-1] * 1.15)
        axes.set_ylim(0, latency_ms[-1] * 1.08)
        few = outcome.whole.received / 10
        if few < beyond[-1]:
            axes.axvspan(max(1.0, few), beyond[-1] * 1.15, color=GRID, alpha=0.45, linewidth=0)
        axes.plot(beyond, latency_ms, color=BLUE, linewidth=2, gid="curve")
        for name, (share, value) in known.items():
            axes.plot([1 / (1 - share)], [value], "o", color=BLUE, markersize=7, gid=f"mark-{name}")
        ticks = [10.0**power for power in range(int(np.log10(beyond[-1])) + 1)]
        ticks = [1.0, 2.0, *ticks[1:]] if not is_narrow else ticks
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda each, _: f"{100 - 100 / each:.6g} %"))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
        axes.set_xlabel("of the deliveries are as fast, or faster")
        axes.set_ylabel("ms")

    points = [
        (x, f"{100 * share:.6g} % within {in_ms(value)} ms")
        for x, share, value in zip(beyond, shares, latency_ms, strict=True)
    ]
    rows = [(name, f"{value:.3f}") for name, (_, value) in known.items()]
    return picture(
        "percentiles",
        "Latency by percentile",
        "How fast the slow ones are: each step to the right is ten times rarer. In the grey part fewer than ten "
        "deliveries lie beyond: there the curve is chance. The dots are the percentiles of the table.",
        Drawing(300, draw, points),
        ("percentile", "latency (ms)"),
        [*rows, ("max", f"{outcome.whole.max_ms:.3f}")],
    )


def _latency_over_time(outcome: Outcome, timed: OverTime) -> Picture:
    marks = marks_of(outcome) if timed.is_time else []

    def draw(axes: Axes, is_narrow: bool) -> None:
        axes.fill_between(timed.at, timed.least_ms, timed.most_ms, color=BLUE, alpha=0.2, linewidth=0)
        axes.plot(timed.at, timed.most_ms, color=ORANGE, linewidth=1.5, label="slowest", gid="slowest")
        if not np.isnan(timed.p99_ms).all():
            axes.plot(timed.at, timed.p99_ms, color=MUTED, linewidth=1.5, label="p99", gid="p99")
        axes.plot(timed.at, timed.p50_ms, color=BLUE, linewidth=2, label="p50", gid="p50")
        for kind, colour in _MARKS.items():
            spans = [(begin, end) for mark, begin, end, _ in marks if mark == kind]
            for index, (begin, end) in enumerate(spans[:ROWS_SHOWN]):
                axes.axvspan(begin, max(end, begin), color=colour, alpha=0.35, linewidth=2,
                             label=None if index else kind)  # fmt: skip
        axes.margins(x=0)
        axes.set_ylim(bottom=min(0.0, float(timed.least_ms.min())))
        axes.xaxis.set_major_locator(MaxNLocator(4 if is_narrow else 10))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
        axes.set_xlabel("seconds since the first event was due" if timed.is_time else "event")
        axes.set_ylabel("ms")
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02 if is_narrow else 0, 1.0),
            frameon=False,
            ncols=2 if is_narrow else 7,
            handlelength=1.2,
            columnspacing=1.2,
            borderaxespad=0.2,
        )

    unit = " s" if timed.is_time else ""
    rows = [
        (f"{at:.3f}", in_ms(least), in_ms(p50), in_ms(p99), in_ms(most), f"{count:,}")
        for at, least, p50, p99, most, count in zip(
            timed.at, timed.least_ms, timed.p50_ms, timed.p99_ms, timed.most_ms, timed.deliveries, strict=True
        )
    ]
    points = [
        (float(at), f"{row[0]}{unit}: p50 {row[2]}, p99 {row[3]}, {row[1]} to {row[4]} ms, {row[5]} deliveries")
        for at, row in zip(timed.at, rows, strict=True)
    ]
    each = "one event" if len(outcome.published) == len(timed.at) else "some events"
    found = "; ".join(f"{kind} at {begin:.2f} s ({what})" for kind, begin, _, what in marks[:8])
    return picture(
        "time",
        "Latency over time",
        f"Each point is {each}, at the time it was due: half of its deliveries were faster than the blue "
        "line, the slowest is the orange one (the last subscriber); the shade begins at the fastest. "
        f"Marked: {found or 'nothing'}.",
        Drawing(330, draw, points, top=(38, 70)),
        (
            "due (s)" if timed.is_time else "event",
            "fastest (ms)",
            "p50 (ms)",
            "p99 (ms)",
            "slowest (ms)",
            "deliveries",
        ),
        rows,
    )


_MARKS: Final = {"gap": RED, "no connection": ORANGE, "publish failed": RED, "rig stood still": MUTED}


_HEAT_HEIGHT: Final = 340


def _heat(outcome: Outcome) -> Picture:
    heat = heat_map(outcome)
    is_time = _has_schedule(outcome)
    least, most = np.nanmin(heat.slowest_ms), np.nanmax(heat.slowest_ms)
    norm = LogNorm(max(least, 1e-3), max(most, least * 1.01, 2e-3))
    begin = 0.0 if is_time else 1.0
    end = float(heat.until[-1]) if heat.until[-1] > begin else begin + 1

    def draw(axes: Axes, is_narrow: bool) -> None:
        image = axes.imshow(
            np.clip(heat.slowest_ms, 1e-3, None),
            aspect="auto",
            origin="lower",
            interpolation="none",
            norm=norm,
            cmap="viridis",
            extent=(begin, end, 0, outcome.whole.clients),
        )
        axes.grid(visible=False)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(4 if is_narrow else 10))
        axes.set_ylabel("subscriber")
        figure, width = axes.figure, NARROW if is_narrow else WIDE
        bar = figure.add_axes((52 / width, 34 / _HEAT_HEIGHT, (width - 76) / width, 10 / _HEAT_HEIGHT))
        ticks = np.geomspace(norm.vmin or 1e-3, norm.vmax or 1.0, 3 if is_narrow else 6)
        figure.colorbar(image, cax=bar, orientation="horizontal")
        bar.xaxis.set_major_locator(FixedLocator([*ticks]))
        bar.xaxis.set_minor_locator(NullLocator())
        bar.xaxis.set_major_formatter(FuncFormatter(lambda each, _: f"{each:.3g} ms"))
        bar.xaxis.set_tick_params(length=0, pad=5)
        first, *_, last = bar.get_xticklabels()
        first.set_horizontalalignment("left")
        last.set_horizontalalignment("right")
        bar.spines[:].set_visible(False)

    rows = [
        (
            str(last),
            in_ms(float(np.nanmedian(line))),
            in_ms(float(np.nanmax(line))),
            f"{int(np.isnan(line).sum())}",
        )
        for last, line in zip(heat.last_client, heat.slowest_ms, strict=True)
        if not np.isnan(line).all()
    ]
    return picture(
        "heat",
        "Subscriber × time",
        "The slowest delivery to some subscribers in some time: a bright column is a time that was slow for all, "
        "a bright line a subscriber that was slow all the time. Where nothing is drawn, nothing came.",
        Drawing(_HEAT_HEIGHT, draw, foot=80),
        ("subscribers up to", "median of the slowest (ms)", "slowest (ms)", "times without a delivery"),
        rows,
    )


def _has_schedule(outcome: Outcome) -> bool:
    due = [row.intended_mono_ns for row in outcome.published]
    return max(due) > min(due)


def _hops(budget: Budget) -> Picture:
    means = hops.groups(budget)

    def draw(axes: Axes, is_narrow: bool) -> None:
        begin = np.zeros(len(means))
        for index, name in enumerate(HOPS):
            lengths = np.array([group[index] for group in means.values()])
            axes.barh(range(len(means)), lengths, 0.5, left=begin, color=HUES[index], linewidth=0, label=name)
            begin += lengths
        axes.set_yticks([])
        axes.set_ylim(len(means) - 0.5, -0.8)
        axes.grid(visible=False, axis="y")
        for index, name in enumerate(means):
            axes.text(0, index - 0.3, name, va="bottom", ha="left")
        axes.xaxis.set_major_locator(MaxNLocator(4 if is_narrow else 8, steps=_STEPS))
        axes.set_xlabel("ms, mean of these deliveries")
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            frameon=False,
            ncols=2 if is_narrow else 5,
            handlelength=1.0,
            columnspacing=1.2,
            borderaxespad=0.2,
        )

    return picture(
        "hops",
        "Where the time goes",
        "The hops that a latency is made of, on average: of all deliveries, and of the slowest ones. schedule: "
        "from due to written by the publisher; to_redis: to stored; to_hub: to read; in_hub: to the first write; "
        f"fanout: to the return of this client's read. {hops.note(budget)}",
        Drawing(90 + 60 * len(means), draw, top=(38, 70)),
        hops.HEADS,
        hops.table(budget),
    )


def _rates(outcome: Outcome) -> Picture:
    edges, per_s = rates(outcome)

    def draw(axes: Axes, is_narrow: bool) -> None:
        axes.bar(edges[:-1], per_s, np.diff(edges) * 0.9, align="edge", color=BLUE, linewidth=0)
        axes.set_xlim(0, edges[-1])
        axes.xaxis.set_major_locator(MaxNLocator(4 if is_narrow else 10))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(_short))
        axes.set_xlabel("seconds since the first event was due")
        axes.set_ylabel("a second")

    rows = [
        (f"{begin:.5g}", f"{end:.5g}", f"{rate:,.0f}")
        for begin, end, rate in zip(edges, edges[1:], per_s, strict=False)
    ]
    points = [((begin + end) / 2, f"{row[0]} to {row[1]} s: {row[2]} deliveries a second")
              for begin, end, row in zip(edges, edges[1:], rows, strict=False)]  # fmt: skip
    return picture(
        "rates",
        "Deliveries per second",
        f"How many deliveries came in each {edges[1] - edges[0]:.5g} s, as a rate.",
        Drawing(220, draw, points),
        ("from (s)", "to (s)", "deliveries a second"),
        rows,
    )


def _short(value: float, _: Any = None) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _ledger(outcome: Outcome) -> Picture:
    ledger = outcome.ledger
    parts = {"delivered": ledger.delivered, "filtered": ledger.filtered}
    parts |= {printable_or_repr(cause): count for cause, count in ledger.lost.items()}
    parts["unexplained"] = len(ledger.unexplained)
    shown = {name: count for name, count in parts.items() if count or name in ("delivered", "unexplained")}

    def draw(axes: Axes, is_narrow: bool) -> None:
        names = [*shown]
        shares = [100 * count / max(ledger.expected, 1) for count in shown.values()]
        colours = [GREEN if name == "delivered" else RED if name == "unexplained" else ORANGE for name in names]
        axes.barh(range(len(names)), shares, 0.55, color=colours, linewidth=0)
        axes.set_yticks([])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_ylim(len(names) - 0.4, -0.9)
        for index, (name, count) in enumerate(shown.items()):
            short = name if not is_narrow or len(name) < 30 else f"{name[:29]}…"
            axes.text(0, index - 0.36, f"{short}: {count:,}", va="bottom", ha="left")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda each, _: f"{each:g} %"))
        axes.xaxis.set_major_locator(MaxNLocator(4))

    rows = [
        (name, f"{count:,}", f"{100 * count / max(ledger.expected, 1):.3f} %") for name, count in parts.items()
    ]
    return picture(
        "ledger",
        "Ledger",
        f"What became of the {ledger.expected:,} deliveries that should have been: every event that was to be "
        "published, for every client. What is lost has a cause; nothing may be unexplained.",
        Drawing(50 + 46 * len(shown), draw, foot=34),
        ("what became of it", "deliveries", "share"),
        rows,
    )
