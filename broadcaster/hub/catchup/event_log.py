"""The stored events of all channels, as the hub reads them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import NamedTuple

from broadcaster.core.errors import InvalidEvent, RedisErrorReply, RedisRefused, RedisUnavailable
from broadcaster.core.position import Head, Position, read_place, read_stamp
from broadcaster.core.runtime import RUNTIME, Limits, Runtime
from broadcaster.hub.broker.broker import Broker, StoredEvents
from broadcaster.hub.fanout.message import Message, read_message


@dataclass(frozen=True, slots=True)
class Page:
    """Stored events that follow each other in the log.

    Attributes:
        head: Where the channel stood when it was read.
        first: The lowest offset that was asked for.
        messages: The valid events.
        refused: Positions of those that are not valid, which must be announced as missing.
        last: Position of the last one, valid or not; None if there is none.
        complete: Whether there was nothing after it.
    """

    head: Head
    first: int
    messages: tuple[Message, ...]
    refused: tuple[Position, ...]
    last: Position | None
    complete: bool


Unreadable = RedisUnavailable | RedisRefused
"""Why a log cannot be read."""


class StampedPage(NamedTuple):
    """When stored events were stored.

    Attributes:
        head: Where the channel stood when they were read.
        events: Per event its position, and its `stored_at_us`, if it says that.
        complete: Whether nothing came after them.
    """

    head: Head
    events: list[tuple[Position, int | None]]
    complete: bool


class EventLog:
    """Reads the log of any channel; events larger than `max_bytes` are refused."""

    def __init__(self, broker: Broker, max_bytes: int, runtime: Runtime = RUNTIME) -> None:
        self._broker = broker
        self._max_bytes = max_bytes
        self._clock = runtime.clock
        self._limits = runtime.limits

    async def head(self, channel: str, floor: Position | None = None) -> Head:
        """Where a channel stands; its epoch is begun if that is due.

        Args:
            channel: Which one.
            floor: The newest position of it that this hub has seen.

        Raises:
            RedisUnavailable, RedisRefused: See `Broker`.
        """
        return await self._broker.ensure_epoch(channel, floor)

    async def page(self, channel: str, first: int, floor: Position | None = None) -> Page:
        """The stored events from an offset on, as many as `limits.page_events` and `limits.page_bytes` allow.

        Args:
            channel: Of which channel.
            first: The lowest offset.
            floor: The newest position of the channel that this hub has seen.

        Raises:
            RedisUnavailable, RedisRefused: See `Broker`.
        """
        count, max_bytes = self._limits.page_events, self._limits.page_bytes
        stored = await self._broker.page(channel, first, count=count, max_bytes=max_bytes, floor=floor)
        return await self._decode(stored, first)

    async def peek(self, channel: str, first: int, count: int) -> Page | None:
        """The same, of at most so many events; nothing begins in Redis. None if it knows nothing of the channel.

        Raises:
            RedisUnavailable, RedisRefused: See `Broker`.
        """
        count = min(count, self._limits.page_events)
        stored = await self._broker.peek(channel, first, count=count, max_bytes=self._limits.page_bytes)
        return None if stored is None else await self._decode(stored, first)

    async def stamped(self, channel: str, first: int, count: int) -> StampedPage | None:
        """The places and stamps of stored events from an offset on; the rest of them is not looked at.

        Raises:
            RedisUnavailable, RedisRefused: See `Broker`.
        """
        stored = await self._broker.peek(channel, first, count=count, max_bytes=self._limits.page_bytes)
        if stored is None:
            return None
        events = list[tuple[Position, int | None]]()
        for offset, payload in stored.items:
            place = read_place(payload)
            known = place is not None and place[1].offset == offset
            position = place[1] if place is not None and known else _position_of(offset, stored.head, None)
            events.append((position, read_stamp(payload)))
        return StampedPage(stored.head, events, stored.complete)

    async def stamps(self, channel: str) -> tuple[int | None, int | None]:
        """See `Broker.stamps`."""
        return await self._broker.stamps(channel)

    async def _decode(self, stored: StoredEvents, first: int) -> Page:
        """Check the events of a page, in slices: a page of large ones must not delay what is live meanwhile."""
        head, items, complete = stored
        messages, refused = list[Message](), list[Position]()
        last: Position | None = None
        clock, limits = self._clock, self._limits
        end = clock.monotonic_s() + limits.slice_after(0.0)
        for offset, payload in items:
            if clock.monotonic_s() >= end:
                left_at = clock.thread_cpu_s()
                await asyncio.sleep(0)
                end = clock.monotonic_s() + limits.slice_after(clock.thread_cpu_s() - left_at)
            message = self._read(payload, offset)
            if message is not None:
                messages.append(message)
                last = message.position
            else:
                last = _position_of(offset, head, after=last)
                refused.append(last)
        return Page(head, first, tuple(messages), tuple(refused), last, complete)

    def _read(self, payload: bytes, offset: int) -> Message | None:
        """The event that is stored at an offset; None if it is no valid one, or is of another place."""
        try:
            message = read_message(payload, self._max_bytes)
        except InvalidEvent:
            return None
        return message if message.position is not None and message.position.offset == offset else None


def _position_of(offset: int, head: Head, after: Position | None) -> Position:
    """Of what is stored at an offset, by the table of epochs: the log and its table are of one memory.

    If an epoch has begun between the two answers, only the event before it may tell.
    """
    known = {epoch for epoch, _ in head.epochs}
    if after is not None and after.epoch not in known:
        return Position(after.epoch, offset)
    begun = (epoch for epoch, first in reversed(head.epochs) if first <= offset)
    return Position(next(begun, head.epochs[0].epoch), offset)


def is_of_channel(error: Exception) -> bool:
    """Whether Redis answers, and refuses this channel: a wrong type of key, a missing right."""
    return isinstance(error, RedisRefused) or (isinstance(error, RedisErrorReply) and not error.is_of_server)


def is_given_up(error: Unreadable, waited_s: float, limits: Limits) -> bool:
    """Whether who has waited for so long for a log is told that it cannot be read: nobody waits for ever.

    What is of the channel will not pass so soon; all else is tried again for a while.
    """
    return is_of_channel(error) or waited_s > limits.page_give_up_s
