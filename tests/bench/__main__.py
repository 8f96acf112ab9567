"""`python -m tests.bench [row ...]`: measure, then print the table. README.md explains the rows."""

from __future__ import annotations

import argparse
import signal
import sys
from types import FrameType
from typing import Final

import redis

from broadcaster.core.errors import Unavailable
from broadcaster.redis.presence import answers
from broadcaster.redis.server import RedisServer
from tests.bench.figures import Line, table
from tests.bench.hubs import HUBS, PRODUCT
from tests.bench.processes import TrialError, raise_file_limit
from tests.bench.rows import ROWS
from tests.bench.tools import NoCompilerError, Tools, build_tools
from tests.bench.trial import Bench, say

UNAVAILABLE: Final = 69
BROKEN: Final = "broken"


def main() -> int:
    """Exit code 0 whatever the figures are, 1 when something broke, 69 without gcc or Redis."""
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, _leave)  # every process ends in the `finally` of its block
    raise_file_limit()
    try:
        tools = build_tools()
        lines, broken = _measure(arguments, tools)
    except (NoCompilerError, Unavailable) as error:
        say(f"error: {error}")
        return UNAVAILABLE
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    print(table(lines))
    print(_footer(arguments))
    for problem in broken:
        say(f"error: {problem}")
    return 1 if broken else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="row", type=_row, help=f"of {', '.join(ROWS)}; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repetitions (default: 3)")
    parser.add_argument("--quick", action="store_true", help="one small round: does everything work?")
    parser.add_argument("--hub", choices=HUBS, default=PRODUCT, help="the hub under test")
    return parser


def _row(name: str) -> str:
    if name not in ROWS:
        raise argparse.ArgumentTypeError(f"there is no row {name!r}, only {', '.join(ROWS)}")
    return name


def _measure(arguments: argparse.Namespace, tools: Tools) -> tuple[list[Line], list[str]]:
    """The lines of all rows asked for, and what broke; one broken row does not hide the others."""
    lines: list[Line] = []
    broken: list[str] = []
    with RedisServer.start(port=None) as server:
        _accept_slow_readers(server.url)
        rounds = 1 if arguments.quick else arguments.rounds
        bench = Bench(tools, server.port, arguments.hub, rounds, arguments.quick)
        for name in arguments.rows or ROWS:
            if not answers(server.url):
                return lines, [
                    *broken,
                    f"Redis does not answer any more; {name} and what follows was not measured",
                ]
            try:
                lines += ROWS[name](bench)
            except TrialError as error:
                lines.append(Line(name, verdict=BROKEN))
                broken.append(f"{name}: {error}")
    return lines, broken


def _accept_slow_readers(url: str) -> None:
    """Redis must not cut a hub that lags: the hub is judged, not Redis' buffer limit."""
    with redis.Redis.from_url(url) as client:
        client.config_set("client-output-buffer-limit", "pubsub 0 0 0")


def _footer(arguments: argparse.Namespace) -> str:
    if arguments.quick:
        return "\n--quick: one small round; these figures show that it works and prove nothing."
    return (
        f"\nMedians of {arguments.rounds} interleaved rounds or more on this machine; a ratio is the median "
        "over the rounds\nof the ratio within a round. Latency: from the time an event was due until a "
        "subscriber's recv() returned."
    )


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
