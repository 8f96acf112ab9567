"""Processes of a simulation: all in one thread, each known by the context in which its callbacks run."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tests.simulation.loop import VirtualLoop

PROCESS: Final[ContextVar[Process | None]] = ContextVar("process", default=None)
"""The process that is running; None: the simulation itself."""


class Process:
    """A process: its callbacks run unless it is dead, and later if it is stopped.

    Attributes:
        name: Of the process, for the network too: links are between names.
        alive: False once it was killed: nothing of it ever runs again, not even a `finally`.
        wall_offset_s: Seconds by which its wall clock is wrong.
        pauses: Draws how long a callback keeps the CPU; None: callbacks cost nothing.
        ran_at: Loop time at which it last did something.
        on_kill: Called when it is killed, by the simulation: its kernel closes what it had open.
    """

    def __init__(self, name: str, loop: VirtualLoop) -> None:
        self.name = name
        self.alive = True
        self.wall_offset_s = 0.0
        self.pauses: Pauses | None = None
        self.on_kill: list[Callable[[], None]] = []
        self.ran_at = loop.now
        self._loop = loop
        self._stops = 0
        self._held: list[asyncio.Handle] = []
        self._context = copy_context()
        self._context.run(PROCESS.set, self)

    @property
    def context(self) -> Context:
        """A context in which callbacks are this process'."""
        return self._context.copy()

    @property
    def stopped(self) -> bool:
        return self._stops > 0

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run a coroutine as this process."""
        return self._loop.create_task(work, name=f"{self.name}: {name}", context=self.context)

    def admits(self, handle: asyncio.Handle) -> bool:
        """For the loop: whether a callback may run now; one of a stopped process runs when that goes on."""
        if self._stops and self.alive:
            self._held.append(handle)
        return self.alive and not self._stops

    def kill(self) -> None:
        """SIGKILL."""
        if self.alive:
            self.alive = False
            self._held.clear()
            for close in self.on_kill:
                close()

    def stop(self) -> None:
        """SIGSTOP; stops add up, each ends with a `resume` of its own."""
        self._stops += 1

    def resume(self) -> None:
        """SIGCONT: what was due meanwhile runs now, in its order."""
        self._stops -= 1
        if not self._stops and self.alive:
            held, self._held = self._held, []
            self._loop.run_next(held)

    def pause(self, seconds: float) -> None:
        """It does nothing for some time: the CPU is another's, or a callback needs so long."""
        self.stop()
        self._loop.call_outside(self._loop.now + seconds, self.resume)


class Pauses:
    """How much CPU time the callbacks of a process take: a long one every now and then.

    Args:
        chance: Draws them.
        every: The mean number of callbacks between two pauses.
        longest_s: The longest pause.
    """

    def __init__(self, chance: random.Random, every: int, longest_s: float) -> None:
        self._chance = chance
        self._every = every
        self._longest_s = longest_s
        self._left = 1 + int(chance.expovariate(1 / every))

    def after_callback(self, process: Process) -> None:
        self._left -= 1
        if self._left <= 0:
            self._left = 1 + int(self._chance.expovariate(1 / self._every))
            process.pause(self._chance.uniform(0, self._longest_s))
