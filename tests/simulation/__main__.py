"""`python -m tests.simulation 1000` runs seeds 0 to 999 on all cores, `5000-5999` these, `--replay 7` one of them.

Each seed that fails is printed. Of each broken rule the first is run again, which must go exactly the same way,
and is shrunk to a short script. Exit code 1: a seed has failed; or in 1,000 seeds something was never reached.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from tests.simulation.run import Outcome, run_seed
from tests.simulation.shrink import script, shrink
from tests.simulation.worlds import KINDS, draw

ENOUGH_SEEDS: Final = 1000
"""So many must reach everything but what is rare."""

RARE: Final = ("events at one position",)
"""Ten times as many must reach this, too."""

MUST_BE_REACHED: Final = (
    *("events", "events not stored", "deliveries", "beats", "stale", "fresh"),
    *("epochs over 16", "epochs over 64", "since over 16 epochs ago", "since over 64 epochs ago"),
    *("trimmed", "output limit", "resumed from the ring", "resumed from the log"),
    *(
        "hubs resumed",
        "hubs resumed_whole",
        "hubs pages_read",
        "hubs recovered",
        "hubs twins",
        "hubs shed",
        "hubs redis_moves",
    ),
    *("gap expired", "gap redis_restarted", "gap position_unknown", "gap refused", "gap shed"),
    *("gap no_history", "gap redis_link_lost"),
    *(
        f"since {since} {kind}"
        for since in ("old", "older", "foreign", "huge", "time")
        for kind in ("v1", "plain", "Subscriber")
    ),
    *("close 1006", "close 1011", "close 1012", "close 4008", "close 4009", "close 4010"),
    *("clients by ws", "clients by deflate", "clients by sse"),
    *("welcome, recovered true", "welcome, recovered false", "welcome, recovered none"),
    *(f"fault {kind}" for kind in KINDS),
)


def main(arguments: Sequence[str]) -> int:
    """Run what the command line says; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seeds", nargs="?", default="200", help="how many, or first-last")
    parser.add_argument("--replay", type=int, help="run one seed, and print all that happens")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--shrinks", type=int, default=8, help="how many failing seeds are shrunk at most")
    parser.add_argument("--until-failure", action="store_true", help="stop at the first seed that fails")
    options = parser.parse_args(arguments)
    if options.replay is not None:
        return _replay(options.replay)
    first, _, last = options.seeds.rpartition("-")
    seeds = range(int(first), int(last) + 1) if first else range(int(last))
    counts, failing = _run_all(seeds, options.workers, options.until_failure)
    if options.until_failure:
        return 1 if failing else 0
    for outcome in _one_of_each(failing, options.shrinks):
        _explain(outcome)
    expected = MUST_BE_REACHED if len(seeds) >= ENOUGH_SEEDS else ()
    expected += RARE if len(seeds) >= 10 * ENOUGH_SEEDS else ()
    missed = [name for name in expected if not counts[name]]
    if missed:
        print("never reached:", ", ".join(missed))
    print(_last_line(counts, len(failing)))
    return 1 if failing or missed else 0


def _replay(seed: int) -> int:
    outcome = run_seed(seed, keep_lines=True)
    print(script(draw(seed)))
    print("\n".join(outcome.lines))
    for failure in outcome.failures:
        print(failure)
    print(f"seed {seed}: {len(outcome.failures)} failures, digest {outcome.digest}")
    return 1 if outcome.failures else 0


def _run_all(seeds: range, workers: int, until_failure: bool) -> tuple[Counter[str], list[Outcome]]:
    counts: Counter[str] = Counter()
    failing = []
    for outcome in _outcomes(seeds, workers):
        counts.update(outcome.counts)
        if outcome.failures:
            failing.append(outcome)
            more = f" (and {len(outcome.failures) - 1} more)" if len(outcome.failures) > 1 else ""
            print(f"seed {outcome.seed} ({outcome.profile}): {outcome.failures[0]}{more}"[:400], flush=True)
            if until_failure:
                break
    return counts, sorted(failing, key=lambda outcome: outcome.seed)


def _outcomes(seeds: Iterable[int], workers: int) -> Iterator[Outcome]:
    if workers == 1:
        yield from map(run_seed, seeds)
        return
    # A process does not live long: what libraries keep of each seed must not add up.
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=20) as pool:
        yield from pool.imap_unordered(run_seed, seeds, chunksize=10)


def _one_of_each(failing: list[Outcome], most: int) -> list[Outcome]:
    """The first failing seed of each rule."""
    firsts: dict[str, Outcome] = {}
    for outcome in failing:
        firsts.setdefault(outcome.failures[0].rule, outcome)
    return list(firsts.values())[:most]


def _explain(outcome: Outcome) -> None:
    """Run a failing seed again, and print the least that fails in the same way."""
    again = run_seed(outcome.seed)
    if again.digest != outcome.digest:
        print(f"seed {outcome.seed} is not deterministic: {outcome.digest}, then {again.digest}")
        return
    rule = outcome.failures[0].rule
    small = shrink(draw(outcome.seed), rule)
    print(f"\n{rule}: the least of seed {outcome.seed} that still breaks it\n{script(small)}\n", flush=True)


def _last_line(counts: Counter[str], failing: int) -> str:
    first = ("seeds", "events", "deliveries", "hubs resumed", "hubs resumed_whole", "hubs pages_read", "epochs")
    rest = sorted(name for name in counts if name not in first)
    return ", ".join(f"{name} {counts[name]}" for name in (*first, *rest)) + f", failures {failing}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
