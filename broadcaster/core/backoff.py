"""Exponential backoff with full jitter, and the retry loop built on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, TypeVar

from broadcaster.core.errors import RedisRefused, RedisUnavailable
from broadcaster.core.runtime import CHANCE, Chance

log = logging.getLogger("broadcaster.redis")

T = TypeVar("T")

SHORTEST_WAIT_S: Final = 0.05
LONGEST_WAIT_S: Final = 1.0


def backoff_s(
    shortest_s: float, longest_s: float, chance: Chance = CHANCE, *, least: float = 0.0
) -> Iterator[float]:
    """Seconds between attempts: full jitter under a bound that doubles (AWS, Exponential Backoff And Jitter).

    Args:
        shortest_s: The first bound.
        longest_s: The largest bound.
        chance: Draws each wait between 0 and the bound.
        least: The shortest wait, as a share of the bound.
    """
    bound_s = shortest_s
    while True:
        most_s = min(bound_s, longest_s)
        yield chance.uniform(least * most_s, most_s)
        bound_s = min(bound_s * 2, longest_s)


async def keep_trying(
    work: Callable[[], Awaitable[T]],
    complaint: str,
    chance: Chance = CHANCE,
    on_error: Callable[[RedisUnavailable | RedisRefused], None] = lambda error: None,
) -> T:
    """Retry `work` until it succeeds; return its result. Each new error is logged once.

    Args:
        work: What to do; may raise RedisUnavailable or RedisRefused.
        complaint: How the log lines begin.
        chance: For the backoff.
        on_error: Called with each error; what it raises ends the retrying.
    """
    waits_s = backoff_s(SHORTEST_WAIT_S, LONGEST_WAIT_S, chance)
    said = ""
    while True:
        try:
            return await work()
        except (RedisUnavailable, RedisRefused) as error:
            on_error(error)
            if str(error) != said:
                said = str(error)
                log.warning("%s: %s; trying again", complaint, said)
            await asyncio.sleep(next(waits_s))
