"""What do compression and event streams cost, and what do they save? The same events, given in another form."""

from __future__ import annotations

import json
import random
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Final

from tests.bench.figures import Line, number, ratio_line, ratios_of, spread, verdict
from tests.bench.guard import Guard
from tests.bench.hubs import PRODUCT
from tests.bench.plan import FANOUT, IDLE_CONNS, PAIRS, STEADY, Plan
from tests.bench.series import Side, cpu_us, interleaved, p50
from tests.bench.trial import Bench, Outcome, say

AS_IT_IS: Final = Guard()
DEFLATE: Final = Guard({"BROADCASTER_HUB__COMPRESS_MIN_BYTES": "64"}, {"form": "deflate"})
"""Also the smallest corpus is compressed, to see what comes of it."""
SSE: Final = Guard(options={"form": "sse"})

_CORPUS: Final = Plan(conns=10, events=50, period_ms=10, warmup=5)
_MOST_MS: Final = 0.1


def compression(bench: Bench) -> list[Line]:
    """Three corpora, none of it padding: bytes, CPU, p50 and memory with compression and without."""
    if bench.hub != PRODUCT:
        return [Line("compression", verdict=f"skipped: {bench.hub} has none")]
    rounds = bench.rounds if bench.quick else max(bench.rounds, PAIRS)
    with corpora() as files:
        hosts = files["host list"]
        many = replace(FANOUT, data=hosts)
        few = replace(STEADY, data=hosts)
        without, agreed, quiet, quiet_agreed = interleaved(
            bench,
            "compression",
            rounds,
            Side("1,000 without", bench.hub, many, guard=AS_IT_IS),
            Side("1,000 with", bench.hub, many, guard=DEFLATE),
            Side("50 without", bench.hub, few, guard=AS_IT_IS),
            Side("50 with", bench.hub, few, guard=DEFLATE),
        )
        other = [line for name in ("UUID list", "250 bytes") for line in _bytes_of(bench, name, files[name])]
    more_ms = [one - two for one, two in zip(p50(quiet_agreed), p50(quiet), strict=True)]
    return [
        ratio_line("compression: bytes per delivery, host list", sent(agreed), "without", sent(without), 0.35),
        *other,
        ratio_line("compression: hub CPU per delivery, µs", cpu_us(agreed), "without", cpu_us(without), 1.05),
        Line(
            "compression: p50 of 50 subscribers, ms",
            number(median(p50(quiet_agreed))),
            f"without {number(median(p50(quiet)))}",
            f"+ {spread(more_ms)} ms",
            f"≤ + {_MOST_MS:g} ms",
            verdict(median(more_ms) <= _MOST_MS),
        ),
        _memory(bench, "compression", DEFLATE, 1.05),
    ]


def streams(bench: Bench) -> list[Line]:
    """20 events/s to 1,000 subscribers, as Server-Sent Events and over WebSockets; and idle ones."""
    if bench.hub != PRODUCT:
        return [Line("streams", verdict=f"skipped: {bench.hub} has none")]
    rounds = bench.rounds if bench.quick else max(bench.rounds, PAIRS)
    sockets, streamed = interleaved(
        bench,
        "streams",
        rounds,
        Side("WebSockets", bench.hub, FANOUT),
        Side("streams", bench.hub, replace(FANOUT, path="/sse"), guard=SSE),
    )
    return [
        ratio_line("streams: hub CPU per delivery, µs", cpu_us(streamed), "WebSockets", cpu_us(sockets), 1.1),
        _memory(bench, "streams", SSE, 1.1, "/sse"),
    ]


def sent(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.bytes_per_delivery for outcome in outcomes]


def _bytes_of(bench: Bench, name: str, file: str) -> Iterator[Line]:
    """What a corpus comes to; without a goal."""
    plan = replace(_CORPUS, data=file)
    without, agreed = (
        interleaved(bench, f"compression, {name}", 1, Side(name, bench.hub, plan, guard=each))[0]
        for each in (AS_IT_IS, DEFLATE)
    )
    yield Line(
        f"compression: bytes per delivery, {name}",
        number(median(sent(agreed))),
        f"without {number(median(sent(without)))}",
        spread(ratios_of(sent(agreed), sent(without))),
    )


def _memory(bench: Bench, row: str, form: Guard, at_most: float, path: str = "/ws") -> Line:
    """Of an idle connection, after so long a time that each has been pinged (or has had a comment)."""
    conns = IDLE_CONNS // 5 if bench.quick else IDLE_CONNS
    used: tuple[list[float], list[float]] = [], []
    for number_of_round in range(1, bench.rounds + 1):
        for place, guard, where in ((0, form, path), (1, AS_IT_IS, "/ws")):
            options = {**guard.options, "path": where}
            used[place].append(bench.idle_bytes(bench.hub, conns, 0, Guard(guard.env, options)) / 1000)
            say(f"{row} {number_of_round}/{bench.rounds} idle at {where}: {used[place][-1]:.2f} KB")
    return ratio_line(f"{row}: per idle connection, KB", used[0], "without", used[1], at_most)


@contextmanager
def corpora() -> Iterator[dict[str, str]]:
    """Files with the `data` of events, by name."""
    chance = random.Random(7)
    contents: dict[str, dict[str, Any]] = {
        "host list": {"hosts": _up_to(3900, lambda: _host(chance))},
        "UUID list": {"ids": _up_to(3900, lambda: str(uuid.UUID(int=chance.getrandbits(128), version=4)))},
        "250 bytes": {"rack": 7, "reason": "no answer for 3 s"},
    }
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, data in contents.items():
            file = Path(folder, name.replace(" ", "-"))
            file.write_text(json.dumps(data, separators=(",", ":")))
            files[name] = str(file)
        yield files


def _up_to(size: int, make: Callable[[], Any]) -> list[Any]:
    made: list[Any] = []
    while len(json.dumps(made, separators=(",", ":"))) < size:
        made.append(make())
    return made


def _host(chance: random.Random) -> dict[str, Any]:
    return {
        "name": f"srv-{chance.randrange(1000):03d}.dc{chance.randrange(4)}.example.com",
        "address": f"10.{chance.randrange(4)}.{chance.randrange(256)}.{chance.randrange(256)}",
        "state": chance.choice(("down", "up", "degraded")),
        "since_s": chance.randrange(100_000),
    }
