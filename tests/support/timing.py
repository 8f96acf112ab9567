"""Waiting with a deadline; every deadline is a multiple of `UNIT_S`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

UNIT_S = float(os.environ.get("TEST_TIME_SCALE", "1"))
"""The time unit of all deadlines in seconds."""

WHOLE_RUN_S = 60.0
"""Time units within which a load test of five processes has come to its end, on the slowest of machines."""


def eventually(probe: Callable[[], T], message: str, within: float = 20.0) -> T:
    """Poll until `probe` returns something true; return it. `within` is in time units."""
    deadline = time.monotonic() + within * UNIT_S
    while not (result := probe()):
        assert time.monotonic() < deadline, f"after {within} units: {message}"
        time.sleep(0.01)
    return result


async def until(probe: Callable[[], T], message: str, within: float = 20.0) -> T:
    """`eventually` for a coroutine: the event loop turns between two looks."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within * UNIT_S
    while not (result := probe()):
        assert loop.time() < deadline, f"after {within} units: {message}"
        await asyncio.sleep(0.01)
    return result
