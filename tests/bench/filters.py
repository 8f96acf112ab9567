"""What do filters cost? 1,000 subscribers with 100 different ones, which let everything through, or little."""

from __future__ import annotations

from statistics import median

from tests.bench.figures import Line, number, ratio_line, ratios_of, spread
from tests.bench.hubs import PRODUCT
from tests.bench.plan import DENSE, FANOUT, FEW, PAIRS, SPARSE
from tests.bench.series import Side, cpu_us, interleaved
from tests.bench.trial import Bench


def filters(bench: Bench) -> list[Line]:
    """20 events/s that everybody wants; and 500 events/s, each of which 10 of 1,000 subscribers want."""
    if bench.hub != PRODUCT:
        return [Line("filters: 100 over 1,000 subscribers", verdict=f"skipped: {bench.hub} has no filters")]
    rounds = bench.rounds if bench.quick else max(bench.rounds, PAIRS)
    without, dense, few, sparse = interleaved(
        bench,
        "filters",
        rounds,
        Side("none", bench.hub, FANOUT),
        Side("100, all pass", bench.hub, DENSE),
        Side("none, 10 subscribers", bench.hub, FEW),
        Side("100, one passes", bench.hub, SPARSE),
    )
    what = "filters: 100 over 1,000 subscribers, hub CPU per delivery, µs"
    mine, other = cpu_us(sparse), cpu_us(few)
    return [
        ratio_line(what, cpu_us(dense), "none", cpu_us(without), 1.1),
        Line(
            "filters: the same, each event wanted by 10 subscribers, µs",
            number(median(mine)),
            f"10 subscribers, no filter {number(median(other))}",
            spread(ratios_of(mine, other)),
        ),
    ]
