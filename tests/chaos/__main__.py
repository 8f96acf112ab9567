"""`python -m tests.chaos --minutes 10` runs seeds for so long; `--seed 7` runs one, and prints all that happens.

Each seed that fails is printed with its script of faults and the command that runs it again. Exit code 1: one has
failed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence

from tests.chaos.run import Outcome, run_seed


def main(arguments: Sequence[str]) -> int:
    """Run what the command line says; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long seeds are begun (default: 10)")
    parser.add_argument("--seed", type=int, help="run this one, and print all that happens")
    parser.add_argument("--first", type=int, help="the first seed (default: drawn from the clock)")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        outcome = asyncio.run(run_seed(options.seed, keep_lines=True))
        print("\n".join(outcome.lines))
        print(explanation(outcome) if outcome.failures else outcome.world)
        print(last_line(outcome.counts, bool(outcome.failures)))
        return 1 if outcome.failures else 0
    end = time.monotonic() + 60 * options.minutes
    seed = options.first if options.first is not None else int(time.time()) % 10**6 * 1000
    counts: Counter[str] = Counter()
    failing = 0
    while time.monotonic() < end:
        try:
            outcome = asyncio.run(run_seed(seed))
        except Exception:
            print(f"seed {seed} cannot be run: make chaos SEED={seed}", flush=True)
            raise
        counts.update(outcome.counts)
        if outcome.failures:
            failing += 1
            print(explanation(outcome), flush=True)
        seed += 1
    print(last_line(counts, failing))
    return 1 if failing else 0


def explanation(outcome: Outcome) -> str:
    """What has failed, what was done, and how to do it again."""
    failures = [f"  {failure}"[:2500] for failure in outcome.failures[:10]]
    more = [f"  and {len(outcome.failures) - 10} more"] if len(outcome.failures) > 10 else []
    return "\n".join(["", str(outcome.world), *failures, *more, f"make chaos SEED={outcome.world.seed}"])


def last_line(counts: Counter[str], failing: int) -> str:
    """What was reached."""
    first = ("seeds", "events", "deliveries")
    rest = sorted(name for name in counts if name not in first)
    return ", ".join(f"{name} {counts[name]}" for name in (*first, *rest)) + f", failures {int(failing)}"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)  # everything has been ended
