"""Coroutines as tests: a call of the product that blocks the event loop is an error."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, ParamSpec, TypeVar

import uvloop
from blockbuster import BlockBuster

from tests.support.timing import UNIT_S

T = TypeVar("T")
P = ParamSpec("P")


class _Watch:
    """What blocks is replaced in the whole process, once; it is an error in the threads that are watched.

    A thread is watched for as long as one of its blocks lasts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: Counter[int] = Counter()
        self._blockbuster = BlockBuster("broadcaster")
        del self._blockbuster.functions["os.stat"]  # asyncio's debug mode does it for each callback
        for function in self._blockbuster.functions.values():
            # Before it serves: settings are files, and Sanic reads the source of its routes.
            function.can_block_in("tests/support/hub.py", "settings_of")
            function.can_block_in("broadcaster/hub/deployment/listening.py", "begin")
            function.can_block_predicate = self._unless_watched(function.can_block_predicate)

    def _unless_watched(self, may_block: Callable[..., bool]) -> Callable[..., bool]:
        return lambda *args, **kwargs: not self._threads[threading.get_ident()] or may_block(*args, **kwargs)

    @contextlib.contextmanager
    def thread(self) -> Iterator[None]:
        with self._lock:
            if not self._threads:
                self._blockbuster.activate()
            self._threads[me := threading.get_ident()] += 1
        try:
            yield
        finally:
            with self._lock:
                self._threads -= Counter([me])  # drops what is zero
                if not self._threads:
                    self._blockbuster.deactivate()


_WATCH = _Watch()


def unblocked() -> contextlib.AbstractContextManager[None]:
    """Meanwhile a call of the product that blocks the event loop of this thread is an error."""
    return _WATCH.thread()


def run_async(story: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine; a call in the product that blocks the loop is an error."""
    with unblocked():
        return asyncio.run(story)


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test as the hub runs, on uvloop; a blocked loop or an error in a callback fails it."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        unhandled: list[str] = []

        async def story() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda loop, what: unhandled.append(str(what)))
            async with asyncio.timeout(30 * UNIT_S):
                await test(*args, **kwargs)

        with (
            unblocked(),
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            runner.run(story())
        assert not unhandled, unhandled

    return run
