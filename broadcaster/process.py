"""One process of a Procfile: its signals, its output, its exit code.

honcho sends everybody SIGTERM when the first process ends or Ctrl-C is pressed, and kills what is left five
seconds later. So a role stops when told, in time, and whoever has done its work before *lingers*.
"""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TextIO, TypeVar

import uvloop

_CONTROL: Final = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")

T = TypeVar("T")
Main = Callable[[asyncio.Event], Awaitable[int]]


class _Printable(logging.Formatter):
    """What a peer has said may be in a message: its control characters must not reach a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return _CONTROL.sub(lambda found: repr(found[0])[1:-1], super().format(record))


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
    return 130 if interrupted else code


def talk_in_lines(logs: TextIO | None = None) -> None:
    """Flush every line: under honcho stdout is a pipe. Log to stdout (or `logs`), the message and nothing else."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    handler = logging.StreamHandler(logs or sys.stdout)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("sanic", "websockets", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


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
