"""Coroutines as tests: a call of the product that blocks the event loop is an error."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import uvloop
from blockbuster import blockbuster_ctx

from tests.support.timing import UNIT_S

T = TypeVar("T")
P = ParamSpec("P")


def run_async(story: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine with asyncio's debug mode on; a call in the product that blocks the loop is an error."""
    with blockbuster_ctx("broadcaster"):
        return asyncio.run(story, debug=True)


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
            blockbuster_ctx("broadcaster"),
            asyncio.Runner(debug=True, loop_factory=uvloop.new_event_loop) as runner,
        ):
            runner.run(story())
        assert not unhandled, unhandled

    return run
