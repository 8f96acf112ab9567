"""Work that may wait: in turn, once, and no more than a slice of it per turn of the loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from broadcaster.core.runtime import LIMITS, RUNTIME, Clock, Runtime
from broadcaster.hub.fanout.scheduler import Scheduler
from tests.support import in_loop


class StillClock(Clock):
    """A clock that only the test moves; the rest of a turn costs nothing."""

    now = 0.0

    def monotonic_s(self) -> float:
        return self.now

    def thread_cpu_s(self) -> float:
        return 0.0


class Bench:
    """A pacer and pieces of work that write down when they were done."""

    def __init__(self, runtime: Runtime = RUNTIME) -> None:
        self.pacer = Scheduler(runtime)
        self.done: list[str] = []

    def work(self, name: str, pieces: int, takes_s: float = 0.0) -> Callable[[], bool]:
        left = [pieces]

        def piece() -> bool:
            self.done.append(name)
            left[0] -= 1
            end = time.monotonic() + takes_s
            while time.monotonic() < end:
                pass
            return left[0] > 0

        return piece


@in_loop
async def test_work_waits_for_the_next_turn() -> None:
    """Nothing is done while it is added: whoever adds it is in the middle of something."""
    bench = Bench()
    bench.pacer.add(bench.work("a", 1))
    assert bench.done == []
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert bench.done == ["a"]


@in_loop
async def test_everybody_gets_a_piece_in_turn() -> None:
    """Who has much to do goes behind the others after each piece."""
    bench = Bench()
    for name, pieces in (("a", 4), ("b", 1), ("c", 2)):
        bench.pacer.add(bench.work(name, pieces))
    for _ in range(20):
        await asyncio.sleep(0)
    assert "".join(bench.done) == "abcacaa"


@in_loop
async def test_a_turn_ends_when_its_slice_is_over() -> None:
    """However much waits, the loop turns after one slice and the piece that was begun in it."""
    clock = StillClock()
    bench = Bench(Runtime(clock=clock))

    def piece() -> bool:
        clock.now += LIMITS.slice_s
        bench.done.append("")
        return False

    for _ in range(10):
        bench.pacer.add(partial(piece))
    per_turn = []
    before = 0
    while before < 10:
        await asyncio.sleep(0)
        per_turn.append(len(bench.done) - before)
        before = len(bench.done)
        assert len(per_turn) < 50
    assert max(per_turn) == 1


@in_loop
async def test_small_pieces_share_a_turn() -> None:
    """A slice holds many of them: the loop need not turn for each."""
    bench = Bench()
    for number in range(20):
        bench.pacer.add(bench.work(str(number), 1))
    turns = 0
    while len(bench.done) < 20:
        await asyncio.sleep(0)
        turns += 1
    assert turns < 20


@in_loop
async def test_the_same_work_stands_in_the_queue_once() -> None:
    """Added again before its turn it is done once, at its first place; afterwards it can be added again."""
    bench = Bench()
    again, other = bench.work("a", 1), bench.work("b", 1)
    for work in (again, other, again, again):
        bench.pacer.add(work)
    for _ in range(5):
        await asyncio.sleep(0)
    assert bench.done == ["a", "b"]
    bench.pacer.add(bench.work("a", 1))
    for _ in range(5):
        await asyncio.sleep(0)
    assert bench.done == ["a", "b", "a"]


class Owner:
    def __init__(self) -> None:
        self.count = 0

    def work(self) -> bool:
        self.count += 1
        return False


@in_loop
async def test_a_method_of_one_object_is_the_same_work() -> None:
    """Each access makes a new bound method; they are equal, and those of another object are not."""
    pacer, one, two = Scheduler(), Owner(), Owner()
    for owner in (one, two, one, two):
        pacer.add(owner.work)
    for _ in range(5):
        await asyncio.sleep(0)
    assert (one.count, two.count) == (1, 1)


@in_loop
async def test_work_may_add_work() -> None:
    """Also itself, from within its piece."""
    bench = Bench()
    inner = bench.work("inner", 1)

    def outer() -> bool:
        bench.done.append("outer")
        bench.pacer.add(inner)
        return False

    bench.pacer.add(outer)
    for _ in range(5):
        await asyncio.sleep(0)
    assert bench.done == ["outer", "inner"]


def test_work_that_fails_does_not_stop_the_rest() -> None:
    """The error is the loop's to report; what waits behind it is done."""
    reported: list[Any] = []

    async def story() -> list[str]:
        asyncio.get_running_loop().set_exception_handler(lambda loop, what: reported.append(what["exception"]))
        bench = Bench()

        def broken() -> bool:
            raise RuntimeError("broken")

        bench.pacer.add(broken)
        bench.pacer.add(bench.work("after", 2))
        for _ in range(10):
            await asyncio.sleep(0)
        return bench.done

    assert asyncio.run(story()) == ["after", "after"]
    with pytest.raises(RuntimeError, match="broken"):
        raise reported[0]
