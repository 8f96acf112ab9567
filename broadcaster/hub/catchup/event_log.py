"""The stored events of all channels, as the hub reads them."""

from __future__ import annotations

from dataclasses import dataclass

from broadcaster.core.errors import InvalidEvent, RedisErrorReply, RedisRefused
from broadcaster.core.position import Head, Position
from broadcaster.core.runtime import LIMITS, Limits
from broadcaster.hub.broker.broker import Broker
from broadcaster.hub.fanout.message import Message, read_message


@dataclass(frozen=True, slots=True)
class Page:
    """Stored events that follow each other in the log.

    Attributes:
        head: Where the channel stood when it was read.
        messages: The valid events.
        refused: Positions of those that are not valid, which must be announced as missing.
        last: Position of the last one, valid or not; None if there is none.
        complete: Whether there was nothing after it.
    """

    head: Head
    messages: tuple[Message, ...]
    refused: tuple[Position, ...]
    last: Position | None
    complete: bool


class EventLog:
    """Reads the log of any channel; events larger than `max_bytes` are refused.

    Attributes:
        page_events: Events that are read at a time.
    """

    def __init__(self, broker: Broker, max_bytes: int, limits: Limits = LIMITS) -> None:
        self._broker = broker
        self._max_bytes = max_bytes
        self.page_events = limits.page_events

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
        """The stored events from an offset on, at most `page_events`.

        Args:
            channel: Of which channel.
            first: The lowest offset.
            floor: The newest position of the channel that this hub has seen.

        Raises:
            RedisUnavailable, RedisRefused: See `Broker`.
        """
        head, items = await self._broker.page(channel, first, self.page_events, floor)
        messages, refused = list[Message](), list[Position]()
        for offset, payload in items:
            try:
                message = read_message(payload, self._max_bytes)
            except InvalidEvent:
                refused.append(_position_of(offset, head))
                continue
            if message.position is None or message.position.offset != offset:
                refused.append(_position_of(offset, head))
                continue
            messages.append(message)
        last = _position_of(items[-1][0], head) if items else None
        return Page(head, tuple(messages), tuple(refused), last, len(items) < self.page_events)


def _position_of(offset: int, head: Head) -> Position:
    """Of what is stored at an offset, whatever it says itself: the log and its table are of one memory."""
    begun = (epoch for epoch, first in reversed(head.epochs) if first <= offset)
    return Position(next(begun, head.epochs[0].epoch), offset)


def is_of_channel(error: Exception) -> bool:
    """Whether Redis answers, and refuses this channel: a wrong type of key, a missing right."""
    return isinstance(error, RedisRefused) or (isinstance(error, RedisErrorReply) and not error.is_of_server)
