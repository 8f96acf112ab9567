"""What does it cost that events are stored? The same hub and publisher with history on and off."""

from __future__ import annotations

from tests.bench.figures import Line, ratio_line
from tests.bench.hubs import PRODUCT
from tests.bench.plan import FANOUT, PAIRS, STEADY
from tests.bench.series import Side, cpu_us, interleaved, p50
from tests.bench.trial import Bench


def history(bench: Bench) -> list[Line]:
    """10 events/s to 50 subscribers for the latency, 20 events/s to 1,000 for the CPU time."""
    if bench.hub != PRODUCT:
        return [Line("history: on against off", verdict=f"skipped: {bench.hub} stores nothing")]
    rounds = bench.rounds if bench.quick else max(bench.rounds, PAIRS)
    steady_on, steady_off, fanout_on, fanout_off = interleaved(
        bench,
        "history",
        rounds,
        *(
            Side(f"{name}, history {'on' if on else 'off'}", bench.hub, plan, on)
            for name, plan in (("steady", STEADY), ("fanout", FANOUT))
            for on in (True, False)
        ),
    )
    return [
        ratio_line("history: on, publish → delivered, p50, ms", p50(steady_on), "off", p50(steady_off), 1.25),
        ratio_line("history: on, hub CPU per delivery, µs", cpu_us(fanout_on), "off", cpu_us(fanout_off), 1.05),
    ]
