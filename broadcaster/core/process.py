"""The lifecycle of a Procfile process: its event loop, its signals, its exit code.

honcho sends SIGTERM to all processes when the first one ends or Ctrl-C is pressed, and kills the remaining ones
five seconds later. So a role stops in time when told, and one that has done its work before *lingers*.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

import uvloop

T = TypeVar("T")
Main = Callable[[asyncio.Event], Awaitable[int]]

INTERRUPTED: Final = 128 + signal.SIGINT
TERMINATED: Final = 128 + signal.SIGTERM
"""Exit codes of what was stopped before it was done, and of everything that SIGINT has ended."""


def run(main: Main) -> int:
    """Run a role until it returns; SIGTERM and SIGINT set the event it is given.

    Returns:
        What `main` returned; 130 after SIGINT.
    """
    interrupted = False

    async def story() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            stop.set()

        loop.add_signal_handler(signal.SIGTERM, stop.set)
        loop.add_signal_handler(signal.SIGINT, interrupt)
        return await main(stop)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(story())
    return INTERRUPTED if interrupted else code


async def unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None if `stop` was set first; then `work` is cancelled."""
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        stopped.cancel()
        task.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


async def code_of(stop: asyncio.Event, work: Coroutine[Any, Any, int]) -> int:
    """The exit code of `work`, or `TERMINATED` if it was stopped before it was done."""
    code = await unless_stopped(stop, work)
    return TERMINATED if code is None else code
