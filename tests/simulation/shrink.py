"""Makes a failing world small: leaves out faults, clients and publishers as long as it breaks the same rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from tests.simulation.run import run_world
from tests.simulation.worlds import World

T = TypeVar("T")


def shrink(world: World, rule: str, most_runs: int = 80) -> World:
    """A smaller world that breaks the same rule; the same world if there is none.

    Args:
        world: Which fails.
        rule: The rule that must still be broken.
        most_runs: After so many runs what has been found is returned.
    """
    runs = 0

    def fails(smaller: World) -> bool:
        nonlocal runs
        runs += 1
        return runs <= most_runs and any(failure.rule == rule for failure in run_world(smaller).failures)

    faults = fewest(world.faults, lambda some: fails(replace(world, faults=some)))
    world = replace(world, faults=faults)
    clients = fewest(world.clients, lambda some: fails(replace(world, clients=some)))
    world = replace(world, clients=clients)
    if len(world.producers) > 1:
        producers = fewest(world.producers, lambda some: bool(some) and fails(replace(world, producers=some)))
        world = replace(world, producers=producers)
    return world


def fewest(items: Sequence[T], fails: Callable[[tuple[T, ...]], bool]) -> tuple[T, ...]:
    """As few of the items as possible with which it still fails: halves first, then ever smaller pieces."""
    kept, size = tuple(items), max(1, len(items) // 2)
    while kept:
        at, found = 0, False
        while at < len(kept):
            fewer = kept[:at] + kept[at + size :]
            if fails(fewer):
                kept, found = fewer, True
            else:
                at += size
        if size == 1 and not found:
            break
        size = max(1, size // 2)
    return kept


def script(world: World) -> str:
    """What is left of a world, in lines."""
    lines = [
        f"seed {world.seed} ({world.profile}), {world.lasts_s:.1f} s, channels {', '.join(world.channels)}, hubs"
        f" {', '.join(map(str, world.hubs))}",
        *(f"  {producer}" for producer in world.producers),
        *(f"  {client}" for client in world.clients),
        *(f"  {fault}" for fault in world.faults),
    ]
    return "\n".join(lines)
