"""EventLog: pages of the log are checked in slices, between which everything else goes on."""

from __future__ import annotations

import asyncio
import math

from broadcaster.core.runtime import Limits, Runtime
from broadcaster.hub.catchup.event_log import EventLog
from broadcaster.settings import Settings
from tests.hub.house import CHANNEL, INVALID, Memory, payload
from tests.support import Clock, in_loop

SLICE_S = 0.5


class Slow(Clock):
    """A clock on which each event takes a quarter of a slice; the rest of a turn takes `rest_s`."""

    def __init__(self, rest_s: float = 0.0) -> None:
        super().__init__(0.0)
        self.rest_s = rest_s
        self.used_s = 0.0

    def monotonic_s(self) -> float:
        self.move(SLICE_S / 4)
        return super().monotonic_s()

    def thread_cpu_s(self) -> float:
        self.used_s += self.rest_s
        return self.used_s


async def turns_while_reading(clock: Clock, events: int, slice_s: float = SLICE_S) -> int:
    """Turns of the loop that others have while a page of so many events is read."""
    redis = Memory()
    for number in range(events):
        redis.store(payload(number) if number % 7 else INVALID)
    log = EventLog(redis.broker(Settings()), 131_072, Runtime(clock, limits=Limits(slice_s=slice_s)))
    reading = asyncio.create_task(log.page(CHANNEL, 1))
    turned = 0
    while not reading.done():
        await asyncio.sleep(0)
        turned += 1
    page = reading.result()
    offsets = [message.position.offset for message in page.messages if message.position]
    assert sorted([*offsets, *(position.offset for position in page.refused)]) == [*range(1, events + 1)]
    assert page.last is not None
    assert page.last.offset == events
    return turned


@in_loop
async def test_a_page_is_checked_in_slices() -> None:
    """However many large events a page has, what is live waits for one slice of it."""
    at_once = await turns_while_reading(Slow(), 100, slice_s=math.inf)
    assert await turns_while_reading(Slow(), 100) >= at_once + 20


@in_loop
async def test_a_page_is_checked_faster_where_the_rest_of_the_loop_is_busy() -> None:
    """It is given a share of the time: those that resume must come in also while much is sent."""
    idle, busy = [await turns_while_reading(Slow(rest_s), 200) for rest_s in (0.0, 40 * SLICE_S)]
    assert busy < idle / 3
