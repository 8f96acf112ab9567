"""The simulation itself: it can be repeated exactly, and it finds what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.simulation.books import Beaten, Book, Connected, Entry, Given, Place, Told, Welcomed
from tests.simulation.journal import Journal
from tests.simulation.oracle import Oracle
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


ONE = "from tests.simulation.run import run_seed; print(run_seed({seed}).digest)"
AFTER_OTHERS = (
    "from tests.simulation.run import run_seed; print([run_seed(n) for n in range({seed} + 1)][-1].digest)"
)


@pytest.mark.slow
def test_a_seed_is_the_same_wherever_and_whenever_it_is_run() -> None:
    one = ONE.format(seed=BUSY)
    digests = {elsewhere(one, "1"), elsewhere(one, "4711"), elsewhere(AFTER_OTHERS.format(seed=BUSY))}
    assert len(digests) == 1


@pytest.mark.slow
def test_another_seed_is_another_history() -> None:
    assert elsewhere(ONE.format(seed=3)) != elsewhere(ONE.format(seed=4))


@pytest.mark.slow
def test_a_calm_seed_breaks_nothing() -> None:
    calm = next(seed for seed in range(1000) if draw(seed).profile == "calm")
    code = f"from tests.simulation.run import run_seed; print(*run_seed({calm}).failures)"
    assert elsewhere(code) == ""


# What the oracle finds in made-up books

CHANNEL = "c"


def event(epoch: str, offset: int) -> bytes:
    return (
        f'{{"channel":"{CHANNEL}","epoch":"{epoch}","offset":{offset},"event_id":"{epoch}{offset}",'
        f'"event_type":"t","source":"s","severity":"info"}}'
    ).encode()


def rules(entries: list[Entry], stored: tuple[str, ...] = (), removed: tuple[int, ...] = ()) -> list[str]:
    """The rules that a client's book breaks, in a channel with the events a-1 to a-5 and then b-6 to b-9."""
    journal = Journal()
    for now, (epoch, offset) in enumerate([*(("a", n) for n in range(1, 6)), *(("b", n) for n in range(6, 10))]):
        journal.on_stored(event(epoch, offset), "run", float(now))
    for offset in removed:
        journal.on_removed([((offset, 0), [b"e", event("a", offset)])], 10.0)
    oracle = Oracle(
        journal,
        is_stored=lambda accepted: accepted.event_id in stored,
        in_charge=lambda: "run",
        troubled=lambda who, within_s: False,
        told_s=5.0,
        max_bytes=1000,
    )
    book = Book("client", "v1", {CHANNEL: None})
    for entry in [Connected("hub", {CHANNEL: Place("a", 1)}), *entries]:
        oracle.on_entry(book, 11.0, entry)
    return [failure.rule for failure in oracle.failures]


def given(*places: str) -> list[Entry]:
    return [Given(CHANNEL, Place(place[0], int(place[1:])), place) for place in places]


def gap(cause: str, epoch: str, first: int, last: int | None, position: str) -> Entry:
    return Told(CHANNEL, cause, epoch, first, last, Place(position[0], int(position[1:])))


TWICE = "two gaps without end in one epoch"
TO_B = gap("redis_restarted", "a", 6, None, "b5")


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([*given("a2", "a3", "a4", "a5"), TO_B, *given("b6")], []),
        ([Welcomed(CHANNEL, Place("a", 1), True), *given("a2"), Beaten(CHANNEL, Place("a", 2))], []),
        (given("a2", "a4"), ["lost, untold"]),
        (given("a2", "a2"), ["given twice"]),
        (given("a2", "a3", "a4", "a3"), ["given twice"]),
        ([*given("a2"), *given("b6")], ["another epoch, untold"]),
        (given("a2", "a3", "a4", "a5", "a6"), ["never accepted"]),
        ([gap("expired", "a", 2, 3, "a3"), *given("a4")], ["expired, but never left the log"]),
        ([*given("a2"), gap("redis_restarted", "a", 3, None, "a4")], ["no epoch has begun between"]),
        ([*given("a2", "a3", "a4", "a5"), TO_B, TO_B], ["another epoch, untold", TWICE]),
        ([*given("a2"), gap("expired", "a", 2, 2, "a2")], ["told from before its place", "told although given"]),
        ([Beaten(CHANNEL, Place("a", 3))], ["lost, untold"]),
        ([Welcomed(CHANNEL, Place("a", 1), False), *given("a2")], ["recovered false, and no gap first"]),
        ([Welcomed(CHANNEL, Place("a", 1), None)], ["since without recovered"]),
    ],
)  # fmt: skip
def test_the_oracle_knows_a_broken_promise(entries: list[Entry], expected: list[str]) -> None:
    assert [rule for rule in rules(entries) if rule != "a heartbeat although blind"] == expected


def test_what_has_left_the_log_may_be_told_as_expired() -> None:
    assert rules([gap("expired", "a", 2, 3, "a3"), *given("a4")], removed=(2, 3)) == []


def test_what_is_stored_must_be_given_and_not_told() -> None:
    found = rules([*given("a2"), gap("redis_restarted", "a", 3, None, "b5")], stored=("a3", "a4", "a5"))
    assert found == ["told, but it could be given"]


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
