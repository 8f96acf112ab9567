"""The sequencer of a channel whose events are not stored: nothing can be brought into order, or read again."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from broadcaster.core.position import Cause, Gap, Position
from broadcaster.hub.catchup.epochs import EpochOrder
from broadcaster.hub.fanout.fanout import Fanout
from broadcaster.hub.fanout.message import Message


class LiveSequencer:
    """Everything passes at once, an interruption is a gap.

    The same attributes as `Sequencer`, so far as they have a meaning.
    """

    position: Position | None = None
    order = EpochOrder("", ())
    duplicates = unknown_position = recovered = 0
    unknown_at = -math.inf
    problem = None
    sync_round = 0
    synced_round = 1

    def __init__(self, fanout: Fanout, on_caught_up: Callable[[], None]) -> None:
        self._fanout = fanout
        self._on_caught_up = on_caught_up
        self._ever_confirmed = False
        self.caught_up = False

    def take(self, messages: Sequence[Message]) -> None:
        self._fanout.broadcast([message._replace(position=None) for message in messages])

    def confirm(self) -> None:
        if self._ever_confirmed:
            self._fanout.announce(Gap(self._fanout.channel, Cause.REDIS_LINK_LOST))
        self._ever_confirmed = self.caught_up = True
        self._on_caught_up()

    def interrupt(self) -> None:
        self.caught_up = False

    def check(self, head: Position | None, before: Position | None = None) -> bool:
        return True

    def knows(self, position: Position) -> bool:
        return True

    async def run(self) -> None:
        """Nothing is ever read from a log."""
        await asyncio.Event().wait()
