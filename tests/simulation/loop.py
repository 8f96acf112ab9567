"""The event loop of a simulation: its time is virtual, and stands still while nothing happens.

While `virtual(loop)` lasts, all clocks of the process are the loop's, and all chance is its `Random`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import heapq
import itertools
import os
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, MutableSequence
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any, Final

from broadcaster.core.runtime import Chance
from tests.simulation.process import PROCESS, Process

if TYPE_CHECKING:
    from tests.simulation.network import Network

EPOCH_S: Final = 1_700_000_000.0
"""The wall clock's seconds since 1970 at loop time 0."""

CALLBACK_S: Final = 2e-6
"""Seconds that a callback takes."""

CLOCK_S: Final = 1e-6
"""Seconds that reading a clock takes: what turns until a time has come must not turn for ever."""


class Stuck(Exception):
    """Nothing will ever happen again, or things happen without end and time does not go on."""


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop without sockets, threads and waiting.

    Attributes:
        now: Loop time in seconds; also CLOCK_MONOTONIC.
        network: Makes its connections.
        callbacks: How many callbacks have run.
        errors: What was given to the exception handler.
        over: Whether everything is being ended.
    """

    network: Network
    _ready: deque[asyncio.Handle]  # of BaseEventLoop

    def __init__(self) -> None:
        super().__init__()
        self._clock_resolution = 1e-9
        self.now = 1.0
        self.callbacks = 0
        self.errors: list[str] = []
        self._outside = copy_context()
        self._outside.run(PROCESS.set, None)
        self._tasks: list[tuple[asyncio.Task[Any], Process | None]] = []
        self.over = False
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []  # a heap; of one time the older goes first
        self._numbers = itertools.count()
        self._second_from = 0  # callbacks that had run when the present second began
        self._second = 0
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]
        self.set_exception_handler(self._note_error)

    def time(self) -> float:
        return self.now

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def read_clock(self) -> float:
        """CLOCK_MONOTONIC, in seconds."""
        self.now += CLOCK_S
        return self.now

    def call_outside(self, when: float, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        """Call something as the simulation, not as the process that is running."""
        return self.call_at(when, callback, *args, context=self._outside)

    def count_tasks(self) -> int:
        """How many are not done; those of dead processes never will be."""
        return sum(not task.done() and (process is None or process.alive) for task, process in self._tasks)

    def run_next(self, handles: list[asyncio.Handle]) -> None:
        """Let callbacks run that were held back."""
        self._ready.extend(handles)

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], context: Context | None = None
    ) -> asyncio.Task[Any]:
        """A task that is kept until the end: one of a dead process must not be collected, and so be closed."""
        task = asyncio.Task(coro, loop=self, context=context)
        self._tasks.append((task, PROCESS.get() if context is None else context.get(PROCESS)))
        if len(self._tasks) % 1024 == 0:
            self._tasks = [(each, process) for each, process in self._tasks if not each.done()]
        return task

    def _note_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not self.over:
            process = PROCESS.get()
            who = process.name if process else "simulation"
            error = context.get("exception")
            self.errors.append(f"{who}: {context.get('message')}: {error!r}")

    def _run_once(self) -> None:
        ready, timers = self._ready, self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not ready:
            if not timers:
                raise Stuck("nothing will ever happen again")
            self.now = max(self.now, timers[0][0])
        while timers and timers[0][0] <= self.now:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(PROCESS)  # type: ignore[attr-defined]
            if process is not None and not process.admits(handle):
                continue
            self.now += CALLBACK_S
            self.callbacks += 1
            handle._run()
            if process is not None:
                process.ran_at = self.now
                if process.pauses is not None:
                    process.pauses.after_callback(process)
        self._watch()

    def _watch(self) -> None:
        """Fail if too much happens in a second."""
        second = int(self.now)
        if second != self._second:
            self._second, self._second_from = second, self.callbacks
        elif self.callbacks - self._second_from > 150_000:
            raise Stuck("150,000 callbacks within a second")

    async def create_connection(  # type: ignore[override]
        self, protocol_factory: Callable[[], asyncio.BaseProtocol], host: str, port: int, **options: Any
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        return await self.network.connect(protocol_factory, host, port)

    async def create_server(  # type: ignore[override]
        self, protocol_factory: Callable[[], asyncio.BaseProtocol], host: str, port: int, **options: Any
    ) -> Any:
        return self.network.listen(protocol_factory, host, port)

    def call_soon_threadsafe(self, *args: Any, **options: Any) -> asyncio.Handle:  # type: ignore[override]
        return self.call_soon(*args, **options)

    def _process_events(self, event_list: object) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def finish(self) -> None:
        """End everything that still runs, now, so that none of it can end in another seed."""
        self.over = True
        asyncio._set_running_loop(self)
        try:
            for task, _ in self._tasks:
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    with contextlib.suppress(BaseException):
                        task.get_coro().close()
        finally:
            asyncio._set_running_loop(None)
        self._tasks.clear()
        self._ready.clear()
        self._timers.clear()
        self.close()


class DrawnChance(Chance):
    """The chance of one process."""

    def __init__(self, source: random.Random) -> None:
        self._source = source

    def uniform(self, low: float, high: float) -> float:
        return self._source.uniform(low, high)

    def shuffle(self, items: MutableSequence[Any]) -> None:
        self._source.shuffle(items)

    def hex(self, size: int) -> str:
        return self._source.randbytes(size).hex()

    def bytes(self, size: int) -> bytes:
        return self._source.randbytes(size)

    def uuid(self) -> str:
        return str(uuid.UUID(bytes=self._source.randbytes(16), version=4))


@contextlib.contextmanager
def virtual(loop: VirtualLoop, source: random.Random) -> Iterator[None]:
    """Replace all clocks and all chance, and keep the garbage collector from ending things by chance."""

    def wall_s() -> float:
        process = PROCESS.get()
        return EPOCH_S + loop.read_clock() + (process.wall_offset_s if process is not None else 0.0)

    real_seed, numbers = random.seed, itertools.count()
    patches: list[tuple[Any, str, Any]] = [
        (time, "monotonic", loop.read_clock),
        (time, "perf_counter", loop.read_clock),
        (time, "thread_time", loop.read_clock),
        (time, "process_time", loop.read_clock),
        (time, "monotonic_ns", lambda: int(loop.read_clock() * 1e9)),
        (time, "perf_counter_ns", lambda: int(loop.read_clock() * 1e9)),
        (time, "time", wall_s),
        (time, "time_ns", lambda: int(wall_s() * 1e9)),
        (os, "urandom", source.randbytes),
        (os, "getpid", lambda: 1),
        (random, "_urandom", source.randbytes),
        (random, "seed", lambda *args: real_seed(next(numbers))),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in patches]
    state, collects = random.getstate(), gc.isenabled()
    gc.disable()
    real_seed(source.getrandbits(64))
    for module, name, value in patches:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        random.setstate(state)
        if collects:
            gc.enable()
