"""The storage of events in Redis: keys, the script, and its replies. No connection, no clock.

Per channel, under one hash tag so that a cluster keeps them together:

    {ch}:meta    hash: epoch, offset of the last event, run_id of the Redis that began the epoch,
                 epochs: those of which there are events, each with its first offset ("a1:1 b2:451"),
                 rising: since which offset events are in the order of their stamps
    {ch}:log     stream: the events, id <offset>-0, about the last `history.max_events` of them
    {ch}:id:odd  hash: per event_id the position an event was given: a retry is answered with it. Two hashes take
    {ch}:id:even turns of `history.dedupe_s`, and each is dropped whole after the turn of the other

The names are always the same ones, and in one slot: a cluster serves the script also while it moves that. Earlier
versions had a key `{ch}:id:<event_id>` for each event: the script heeds those for `history.dedupe_s` after it has
seen that one of them was at work. They do not know these hashes.

Storing and publishing is one step of Redis: there is no event that was published and cannot be found again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broadcaster.core.errors import RedisUnavailable
from broadcaster.core.position import Head, Position, is_epoch
from broadcaster.core.runtime import RUNTIME, Runtime
from broadcaster.redis.connection import RUN_ID, Command
from broadcaster.settings import HistoryTable

SCRIPT: Final = Path(__file__).with_name("stream.lua").read_text(encoding="utf-8")
"""Stores and publishes; its head names every KEY and ARGV."""

SHA: Final = hashlib.sha1(SCRIPT.encode()).hexdigest()
LOAD: Final[Command] = ("SCRIPT", "LOAD", SCRIPT)
"""Has to be sent on a connection before `ensure_epoch` or `store`."""

PAGE_SCRIPT: Final = Path(__file__).with_name("page.lua").read_text(encoding="utf-8")
"""Reads a page. Commands bound it by a number of events only, and one event may be as large as 1,000 others."""

PAGE_SHA: Final = hashlib.sha1(PAGE_SCRIPT.encode()).hexdigest()
LOAD_PAGE: Final[Command] = ("SCRIPT", "LOAD", PAGE_SCRIPT)
"""Has to be sent on a connection before `page`."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The result of publishing one event.

    Attributes:
        position: Its position; None if events are not stored.
        receivers: How many Redis subscriptions received it; None for one that had been stored before.
    """

    position: Position | None
    receivers: int | None


def store(
    channel: str,
    events: Sequence[tuple[str, bytes]],
    table: HistoryTable,
    *,
    after: str | None = None,
    floor: Position | None = None,
    runtime: Runtime = RUNTIME,
) -> Command:
    """Build the command that stores and publishes events in order; the reply is for `read_stored`.

    Args:
        channel: The channel.
        events: Id and payload of each.
        table: How many of them are kept, and how long.
        after: Id of an event that must have been stored before; else this is an error (`ORDER`).
        floor: The newest position of this channel that the caller has seen. A Redis that stands before it has come
            back to an older memory, and begins an epoch. Never what a client says.
        runtime: Clock and chance, for the name of the epoch that may begin.
    """
    ids = [event_id for event_id, _ in events]
    payloads = [payload for _, payload in events]
    # Fresh digits each time, also when the same events are sent again: Redis may have been restarted meanwhile.
    return (
        *("EVALSHA", SHA, 4, *_keys(channel)),
        *(channel, runtime.chance.hex(3), runtime.clock.wall_ns() // 1_000_000, str(floor or "")),
        *(table.max_events, table.idle_expire_s, table.position_expire_s, table.dedupe_s, RUN_ID),
        *(*ids, after or "", *payloads),
    )


def ensure_epoch(
    channel: str, table: HistoryTable, *, floor: Position | None = None, runtime: Runtime = RUNTIME
) -> Command:
    """Build the command that reads a channel's head and begins an epoch if due; the reply is for `read_head`.

    It keeps a silent channel's position in Redis, and drops ids that are no longer needed. See `store` for floor.
    """
    return store(channel, (), table, floor=floor, runtime=runtime)


def peek_head(channel: str) -> Command:
    """Build the command that only reads a channel's head, at low cost; the reply is for `read_peeked_head`."""
    return ("HMGET", _keys(channel)[0], "epoch", "offset", "run_id")


def peek_epochs(channel: str) -> Command:
    """Build the command that only reads a channel's head with its epochs; the reply is for `read_head`.

    Both of its values are None where nothing is known of the channel.
    """
    return ("HMGET", _keys(channel)[0], "epochs", "offset")


def peek_rising(channel: str) -> Command:
    """Build the command that only reads since where a channel's stamps rise; the reply is for `read_rising`."""
    return ("HMGET", _keys(channel)[0], "rising", "offset")


def page(channel: str, first: int, count: int, max_bytes: int) -> Command:
    """Build the command for the stored events from an offset on; the reply is for `read_page`.

    Args:
        channel: The channel.
        first: The lowest offset.
        count: The most events.
        max_bytes: The most bytes of their payloads, one larger event excepted.
    """
    meta, log, *_ = _keys(channel)
    return ("EVALSHA", PAGE_SHA, 2, log, meta, first, count, max_bytes)


def read_stored(reply: Any) -> list[Stored]:
    """The results of `store` per event, in order.

    Raises:
        RedisUnavailable: This is no reply of the script.
    """
    try:
        if type(reply) is not list or len(reply) < 2:
            raise ValueError
        pairs = zip(reply[2::2], reply[3::2], strict=True)
        return [Stored(Position.parse(where.decode()), count if count >= 0 else None) for where, count in pairs]
    except (TypeError, ValueError, AttributeError):
        raise RedisUnavailable(f"Redis gave an unexpected answer: {reply!r:.100}") from None


def is_unstamped(reply: Any) -> bool:
    """Whether a reply to `store` says that the events do not say when they were stored: Redis refuses `TIME`."""
    return type(reply) is list and bool(reply) and reply[0] == b"unstamped"


def read_head(reply: Any) -> Head:
    """The head of the channel.

    Raises:
        RedisUnavailable: This is no reply of the script.
    """
    try:
        pairs = [text.partition(":") for text in reply[0].decode().split()]
        if not all(is_epoch(epoch) and first.isdecimal() for epoch, _, first in pairs):
            raise ValueError
        head = Head(tuple(Position(epoch, int(first)) for epoch, _, first in pairs), int(reply[1]))
        head.position  # noqa: B018 - there is at least one epoch
        return head
    except (TypeError, ValueError, AttributeError, IndexError):
        raise RedisUnavailable(f"Redis gave an unexpected answer: {reply!r:.100}") from None


def read_peeked_head(reply: Any, run_id: str) -> Position | None:
    """The position of the channel's head; None if it is unknown, or the epoch is of another Redis process.

    Raises:
        RedisUnavailable: This is no such reply.
    """
    if type(reply) is not list or [type(value) in (bytes, type(None)) for value in reply] != [True] * 3:
        raise RedisUnavailable(f"Redis gave an unexpected answer: {reply!r:.100}")
    epoch, offset, began_by = [(value or b"").decode("ascii", "replace") for value in reply]
    try:
        position = Position.parse(f"{epoch}-{offset}")
    except ValueError:
        return None
    return position if run_id and began_by == run_id else None


def read_rising(reply: Any) -> int | None:
    """The first offset from which on no event says an earlier `stored_at_us` than the one before it.

    None if that is not known: the last event was stored by an earlier version, or does not say.

    Raises:
        RedisUnavailable: This is no such reply.
    """
    try:
        rising, offset = reply
        match = _RISING(rising or b"")
        return int(match[1]) if match and offset == match[2] else None
    except (TypeError, ValueError):
        raise RedisUnavailable(f"Redis gave an unexpected answer: {reply!r:.100}") from None


def read_time(reply: Any) -> int | None:
    """Redis' clock, in microseconds since 1970; None if it does not tell (an error: `TIME` is refused)."""
    try:
        seconds, microseconds = reply
        return int(seconds) * 1_000_000 + int(microseconds)
    except (TypeError, ValueError):
        return None


def read_page(reply: Any) -> tuple[list[tuple[int, bytes]], bool]:
    """Offset and payload of each event, in order, and whether nothing comes after them.

    Raises:
        RedisUnavailable: This is no such reply.
    """
    try:
        complete, place, *rest = reply
        if type(complete) is not int or any(type(each) is not bytes for each in rest):
            raise ValueError
        if type(place) is not list or [type(each) in (bytes, type(None)) for each in place] != [True] * 2:
            raise ValueError
        pairs = zip(rest[::2], rest[1::2], strict=True)
        return [(int(id_.partition(b"-")[0]), payload) for id_, payload in pairs], complete == 1
    except (TypeError, ValueError, AttributeError, IndexError):
        raise RedisUnavailable(f"Redis gave an unexpected answer: {reply!r:.100}") from None


def is_of_head(page: Any, head: Head) -> bool:
    """Whether a page that `read_page` has taken is of the memory that told a head: it stands there, or further on.

    Between two commands on one connection a process may be given another memory: that of a master it follows.
    """
    epoch, offset = page[1]
    stands = epoch is not None and offset is not None and offset.isdigit()
    return stands and epoch == head.position.epoch.encode() and int(offset) >= head.offset


def _keys(channel: str) -> tuple[str, str, str, str]:
    return f"{{{channel}}}:meta", f"{{{channel}}}:log", f"{{{channel}}}:id:odd", f"{{{channel}}}:id:even"


_RISING: Final = re.compile(rb"([1-9][0-9]{0,15}):([0-9]{1,16}):[0-9]+").fullmatch
