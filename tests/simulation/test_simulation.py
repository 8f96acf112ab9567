"""The simulation itself: it can be repeated exactly, and it finds what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from tests.simulation.shrink import fewest, script
from tests.simulation.worlds import draw
from tests.support import ROOT

BUSY = 2
"""A seed with many kinds of fault."""


def elsewhere(code: str, hash_seed: str = "0") -> str:
    """What code prints in a process of its own: a simulation leaves a process fit for nothing else."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment, cwd=ROOT
    )
    return done.stdout.strip()


DIGESTS = "from tests.simulation.run import run_seed; print(*(run_seed(seed).digest for seed in {seeds}))"


def digests(seeds: list[int], hash_seed: str = "0") -> dict[int, str]:
    """The digests of all that happens in seeds that are run in this order, in a process of their own."""
    return dict(zip(seeds, elsewhere(DIGESTS.format(seeds=seeds), hash_seed).split(), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_seed_is_the_same_wherever_and_whenever_it_is_run() -> None:
    """Alone, after others, in another process, and however Python hashes."""
    seeds = [*range(1000, 1004), BUSY]
    found = digests(seeds, "1")
    assert len(set(found.values())) == len(seeds)
    assert digests(seeds[::-1], "4711") == found
    assert digests([BUSY], "2")[BUSY] == found[BUSY]


@pytest.mark.slow
def test_a_calm_seed_breaks_nothing() -> None:
    calm = next(seed for seed in range(1000) if draw(seed).profile == "calm")
    code = f"from tests.simulation.run import run_seed; print(*run_seed({calm}).failures)"
    assert elsewhere(code) == ""


# Many seeds

TOGETHER = 32
"""Seeds of one test: those of several run at the same time, each in a process of its own."""


def assert_clean(first: int) -> None:
    """Seeds from `first` on break no promise; else which do, and how each is run again, is what is said."""
    seeds = f"{first}-{first + TOGETHER - 1}"
    print(f"make simulate SEEDS={seeds}")
    command = [sys.executable, "-m", "tests.simulation", seeds, "--workers", "1", "--shrinks", "0"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"make simulate SEEDS={seeds}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("first", range(0, 4 * TOGETHER, TOGETHER))
def test_seeds_that_are_always_the_same_break_no_promise(first: int) -> None:
    assert_clean(first)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("group", range(4))
def test_seeds_that_are_others_each_time_break_no_promise(group: int) -> None:
    """They are drawn from the clock."""
    assert_clean(1_000_000 + int(time.time()) % 10_000_000 * 4 * TOGETHER + group * TOGETHER)


# Shrinking


@pytest.mark.parametrize("needed", [(), (3,), (0, 7), (2, 3, 9)])
def test_what_is_not_needed_is_left_out(needed: tuple[int, ...]) -> None:
    assert fewest(range(10), lambda some: set(needed) <= set(some)) == needed


def test_a_script_says_what_is_left() -> None:
    world = draw(BUSY)
    lines = script(replace(world, faults=world.faults[:1], clients=())).splitlines()
    assert lines[0].startswith(f"seed {BUSY} (")
    assert lines[-1].split()[2] == world.faults[0].kind
    assert len(lines) == 2 + len(world.producers)
