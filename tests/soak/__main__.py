"""`python -m tests.soak --minutes 10`: soak a hub, say how it is every 10 s, and end with 1 if it is not sound."""

from __future__ import annotations

import argparse
import sys

from tests.soak.course import run
from tests.soak.verdict import growth, verdict


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long guests come and go (default: 10)")
    soak = run(60 * parser.parse_args().minutes, lambda line: print(line, flush=True))
    grown, allowed = growth(soak.samples)
    print(f"{soak.published} events to each of {len(soak.stayers)} who stayed")
    print(", ".join(f"{count} {kind}" for kind, count in soak.ended.items()))
    print(f"open files: {soak.files_before} before, {soak.files_after} after")
    print(f"memory: {grown / 2**20:+.2f} MiB after the warm-up; {allowed / 2**20:.2f} MiB may be")
    wrong = verdict(soak)
    print("\n".join(f"WRONG: {line}" for line in wrong) or "sound")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
