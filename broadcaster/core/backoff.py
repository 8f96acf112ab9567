"""Exponential backoff with full jitter: of reconnecting clients, and of the retry loop built on it."""

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

LONGEST_HINT_S: Final = 60.0
"""However long a hub asks a client to stay away."""
TRY_LATER_S: Final = 2.0
"""What close 1013 (try again later) asks for, which has no number of its own."""
_RECONNECT_S: Final = 0.2
_IN_VAIN_S: Final = 1.0
_IN_VAIN_MAX_S: Final = 30.0
_LASTED_S: Final = 5.0


def backoff_s(shortest_s: float, longest_s: float, chance: Chance = CHANCE) -> Iterator[float]:
    """Seconds between attempts: full jitter under a bound that doubles (AWS, Exponential Backoff And Jitter).

    Args:
        shortest_s: The first bound.
        longest_s: The largest bound.
        chance: Draws each wait between 0 and the bound.
    """
    bound_s = shortest_s
    while True:
        yield chance.uniform(0, min(bound_s, longest_s))
        bound_s = min(bound_s * 2, longest_s)


class ReconnectBackoff:
    """How long a client waits before it connects to its hub again.

    A connection was good once it has lasted, or has brought an event. One that was not is as a failed attempt: the
    bound goes on rising, or a server that accepts and closes at once would be connected to without end.
    """

    def __init__(self, longest_s: float, chance: Chance = CHANCE) -> None:
        """Prepare.

        Args:
            longest_s: The largest bound while there is no connection at all; of connections in vain it is 30 s.
            chance: Draws each wait.
        """
        self._longest_s = longest_s
        self._chance = chance
        self._in_vain = 0

    def on_lost(self, lasted_s: float, *, brought_event: bool) -> None:
        """A connection has ended."""
        self._in_vain = 0 if brought_event or lasted_s >= _LASTED_S else self._in_vain + 1

    def waits_s(self) -> Iterator[float]:
        """Seconds before each attempt, until there is a connection."""
        shortest_s = _RECONNECT_S
        if self._in_vain:
            shortest_s = min(_IN_VAIN_S * 2 ** min(self._in_vain - 1, 10), _IN_VAIN_MAX_S)
        return backoff_s(shortest_s, max(shortest_s, self._longest_s), self._chance)


async def keep_trying(
    work: Callable[[], Awaitable[T]],
    complain: Callable[[str], object],
    chance: Chance = CHANCE,
    on_error: Callable[[RedisUnavailable | RedisRefused], None] = lambda error: None,
) -> T:
    """Retry `work` until it succeeds; return its result.

    Args:
        work: What to do; may raise RedisUnavailable or RedisRefused.
        complain: Called with the text of each new error.
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
                complain(said)
            await asyncio.sleep(next(waits_s))
