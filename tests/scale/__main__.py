"""`python -m tests.scale [run | draw | measure | check]`: docs/scale.md says what for."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from tabulate import tabulate

from broadcaster.core.errors import Unavailable
from broadcaster.redis.server import RedisServer
from tests.bench.processes import TrialError, raise_file_limit
from tests.bench.tools import NoCompilerError, build_tools
from tests.scale.agreement import HUBS, SUBSCRIBERS, WITHIN, compare
from tests.scale.costs import FILE, Costs
from tests.scale.document import DOCUMENT, with_tables
from tests.scale.measure import Measured, Rig, calibrate
from tests.scale.scenarios import tables

UNAVAILABLE: Final = 69
AGREEMENT: Final = FILE.with_name("agreement.md")
"""What check has printed last."""


def main(arguments: Sequence[str]) -> int:
    """Exit code 0; 1: the model does not agree with the machine, or something broke; 69: no gcc or no Redis."""
    parser = argparse.ArgumentParser(prog="python -m tests.scale", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("run", "draw", "measure", "check"), default="run")
    parser.add_argument("--rounds", type=int, default=3, help="how often check measures each deployment")
    options = parser.parse_args(arguments)
    if options.what == "run":
        print(*tables(Costs.load()).values(), sep="\n\n")
        return 0
    try:
        if options.what == "draw":
            return _draw()
        return _on_this_machine(options.what, options.rounds)
    except (NoCompilerError, Unavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return UNAVAILABLE
    except TrialError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _draw() -> int:
    """Write tables and pictures; those that need this machine stay as they are."""
    from tests.scale.pictures import draw  # the only part that needs matplotlib

    costs = Costs.load()
    found = {**tables(costs), "costs": tabulate(costs.table(), headers=("cost", "measured"), tablefmt="github")}
    agreement = AGREEMENT.read_text().rstrip() if AGREEMENT.exists() else "Not measured yet."
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(), {**found, "agreement": agreement}))
    print(DOCUMENT, *draw(costs), sep="\n")
    return 0


def _on_this_machine(what: str, rounds: int) -> int:
    raise_file_limit()
    tools = build_tools()
    with RedisServer.start(port=None) as server:
        rig = Rig(tools, server)
        if what == "measure":
            calibrate(rig, f"{platform.machine()}, {datetime.now(UTC):%Y-%m-%d}").save()
            print(FILE.read_text())
            return 0
        return _check(rig, rounds)


def _check(rig: Rig, rounds: int) -> int:
    """Each deployment in turn, several times; of each figure the median counts."""
    costs = Costs.load()
    measured: dict[int, list[tuple[Measured, Measured]]] = {hubs: [] for hubs in HUBS}
    for _ in range(rounds):
        for hubs in HUBS:
            measured[hubs].append((rig.broadcast(hubs, SUBSCRIBERS), rig.often(hubs)))
    rows, agree = [], True
    for hubs in HUBS:
        for lines in zip(*(compare(*each, costs) for each in measured[hubs]), strict=True):
            middle = sorted(lines, key=lambda line: line.measured)[len(lines) // 2]
            agree &= middle.agrees
            rows.append((hubs, middle.what, middle.measured, middle.modelled, f"{middle.error:+.0%}"))
    headers = ("hubs", "what", "measured", "model", "off by")
    text = tabulate(rows, headers=headers, floatfmt=",.3g", tablefmt="github")
    print(text)
    print(f"{'All' if agree else 'Not all'} within {WITHIN:.0%}; medians of {rounds} rounds.")
    AGREEMENT.write_text(text + "\n")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
