"""What do access control, filters and limits cost? The same work with all of them on, and with none."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from tests.bench.figures import Line, absolute_line, ratio_line
from tests.bench.guard import NO_GUARD, Guard, guard
from tests.bench.hubs import PRODUCT
from tests.bench.plan import BURST, CONNECT_RAMP_PER_S, FANOUT, GUARDED_PATH, IDLE_CONNS, PAIRS, PING_ROUNDS
from tests.bench.series import Side, cpu_us, interleaved, p50
from tests.bench.trial import Bench, say

_LIMITS: Final = {
    "BROADCASTER_HUB__MAX_CONNECTIONS": "6000",
    "BROADCASTER_HUB__MAX_PER_ADDRESS": "6000",
    "BROADCASTER_HUB__HANDSHAKES_PER_S": "20000",
    "BROADCASTER_HUB__ALLOWED_ORIGINS": '["https://wall.example"]',
    "BROADCASTER_CHANNELS__DROP_OLDEST": '["events.*"]',
    "BROADCASTER_CHANNELS__MAX_PER_CONNECTION": "4",
}


def guarded(bench: Bench) -> list[Line]:
    """The rows `burst`, `fanout` and `memory` with tokens, a filter and limits, against the same without."""
    if bench.hub != PRODUCT:
        return [Line("guarded", verdict=f"skipped: {bench.hub} lets everybody in")]
    rounds = bench.rounds if bench.quick else max(bench.rounds, PAIRS)
    with guard() as tokens:
        on = replace(tokens, env={**tokens.env, **_LIMITS})
        burst = [Side(name, bench.hub, replace(BURST, path=path), guard=side) for name, path, side in _sides(on)]
        fanout = [Side(name, bench.hub, replace(FANOUT, path=path), guard=side) for name, path, side in _sides(on)]
        burst_on, burst_off = interleaved(bench, "guarded burst", rounds, *burst)
        fanout_on, fanout_off = interleaved(bench, "guarded fanout", rounds, *fanout)
        memory_on, memory_off = _memory(bench, on)
    return [
        ratio_line("guarded: burst p50, ms", p50(burst_on), "open", p50(burst_off), 1.1),
        ratio_line("guarded: hub CPU per delivery, µs", cpu_us(fanout_on), "open", cpu_us(fanout_off), 1.1),
        absolute_line("guarded: per idle connection, KB", memory_on, 2.5),
        ratio_line("guarded: per idle connection, KB", memory_on, "open", memory_off, 1.1),
    ]


def token(bench: Bench) -> list[Line]:
    """5,000 connects offered at 4,000/s, each with a token of its own, new and then known; and without."""
    if bench.hub != PRODUCT:
        return [Line("token", verdict=f"skipped: {bench.hub} lets everybody in")]
    conns = IDLE_CONNS // 5 if bench.quick else IDLE_CONNS
    rounds = bench.rounds if bench.quick else max(bench.rounds, PAIRS)
    first: list[float] = []
    again: list[float] = []
    without: list[float] = []
    with guard() as tokens:
        for number_of_round in range(1, rounds + 1):
            new, known = bench.connect_cpu_us(bench.hub, conns, CONNECT_RAMP_PER_S, tokens, times=2)
            [free] = bench.connect_cpu_us(bench.hub, conns, CONNECT_RAMP_PER_S)
            first.append(new)
            again.append(known)
            without.append(free)
            say(
                f"token {number_of_round}/{rounds}: new {new:.0f}, known {known:.0f}, without {free:.0f} µs of CPU"
            )
    return [
        ratio_line("token: hub CPU per connect, new tokens, µs", first, "without", without, 1.3),
        ratio_line("token: hub CPU per connect, known tokens, µs", again, "without", without, 1.3),
    ]


def _sides(on: Guard) -> list[tuple[str, str, Guard]]:
    return [("guarded", GUARDED_PATH, on), ("open", "/ws", NO_GUARD)]


def _memory(bench: Bench, on: Guard) -> tuple[list[float], list[float]]:
    conns = IDLE_CONNS // 5 if bench.quick else IDLE_CONNS
    used_kb: dict[str, list[float]] = {"guarded": [], "open": []}
    for number_of_round in range(1, bench.rounds + 1):
        for name, side in (("guarded", on), ("open", NO_GUARD)):
            used_kb[name].append(bench.idle_bytes(bench.hub, conns, PING_ROUNDS, side) / 1000)
            say(f"guarded memory {number_of_round}/{bench.rounds} {name}: {used_kb[name][-1]:.2f} KB")
    return used_kb["guarded"], used_kb["open"]
