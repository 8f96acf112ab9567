"""How events are stored in Redis: keys, the one script, and what its replies mean. No connection, no clock.

Per channel, under one hash tag so that a cluster keeps them together:

    {ch}:meta           hash: epoch, offset of the last event, run_id of the Redis that began the epoch,
                        epochs: the last 16, each with its first offset ("a1:1 b2:451")
    {ch}:log            stream: the events, id <offset>-0, about the last `history.max_events` of them
    {ch}:id:<event_id>  the position an event was given, for `history.dedupe_s`: a retry is answered with it

Storing and publishing is one step of Redis: there is no event that was published and cannot be found again.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from broadcaster.errors import RedisUnavailable
from broadcaster.position import Position, is_epoch
from broadcaster.redis_link import RUN_ID, Command
from broadcaster.settings import HistoryTable

SCRIPT: Final = """\
-- KEYS: meta, log, id key of the event that must have been stored before, one id key per event.
-- ARGV: channel, a fresh epoch, max_events, idle_expire_s, dedupe_s, run_id of this Redis, whether KEYS[3] counts,
-- one payload per event.
-- (The caller has asked for the run_id on this very connection: INFO in here would cost up to 50 us each time.)
-- Without events it only looks, and begins the epoch if that is due.
-- Reply: epochs, last offset, then per event: position, how many subscriptions heard it (-1: it was there).
local meta, log, channel, fresh, run_id = KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[6]

local function digits(number)
  return string.format('%.0f', number)  -- from 10^14 on Lua would write 1e+14
end

for i = 8, #ARGV do
  if ARGV[i]:sub(1, 2) ~= '{"' then
    return redis.error_reply('BADEVENT the payload of an event begins with {"')
  end
end
if ARGV[7] == '1' and redis.call('EXISTS', KEYS[3]) == 0 then
  return redis.error_reply('ORDER what comes before it was not stored')
end

local known = redis.call('HMGET', meta, 'epoch', 'offset', 'run_id', 'epochs')
local epoch, offset, epochs = known[1], tonumber(known[2]), known[4]

local function begin_epoch()
  epoch = fresh
  epochs = epochs .. ' ' .. epoch .. ':' .. digits(offset + 1)
  local _, count = epochs:gsub('%S+', '')
  if count > 16 then
    epochs = epochs:gsub('^%s*%S+', '', 1)
  end
  epochs = epochs:gsub('^%s+', '')
  redis.call('HSET', meta, 'epoch', epoch, 'offset', digits(offset), 'run_id', run_id, 'epochs', epochs)
end

local function is_sound()
  return epoch and offset and epochs and epoch:match('^%w+$') and offset >= 0 and offset <= 9007199254740991
    and offset == math.floor(offset) and (' ' .. epochs):find(' ' .. epoch .. ':', 1, true)
end

if not is_sound() then
  -- Nothing is known of this channel. What the log may hold cannot be told from what will come.
  redis.call('DEL', log)
  offset, epochs = 0, ''
  begin_epoch()
elseif known[3] ~= run_id then
  -- Another Redis process: it may have come back with older data. Offsets count on, in a new epoch, or the
  -- same position would be given twice.
  begin_epoch()
end

local function failed(reply)
  return type(reply) == 'table' and reply.err
end

local function refuse(id_key, reply)  -- a missing right: as if this event had not been
  redis.call('HSET', meta, 'offset', digits(offset))
  redis.call('DEL', id_key)
  local is_right = reply.err:find('NOPERM') or reply.err:find("can't")
  return is_right and redis.error_reply('NOPERM ' .. reply.err) or reply
end

local reply = {}
for i = 4, #KEYS do
  local number = digits(offset + 1)
  local given = epoch .. '-' .. number
  if redis.call('SET', KEYS[i], given, 'NX', 'EX', ARGV[5]) then
    local function event()
      return '{"channel":"' .. channel .. '","epoch":"' .. epoch .. '","offset":' .. number .. ','
        .. ARGV[i + 4]:sub(2)
    end
    local counted = redis.pcall('HSET', meta, 'offset', number)
    if failed(counted) then
      redis.call('DEL', KEYS[i])
      return redis.error_reply('NOPERM ' .. counted.err)
    end
    local stored = event()
    local added = redis.pcall('XADD', log, 'MAXLEN', '~', ARGV[3], number .. '-0', 'e', stored)
    if failed(added) and not added.err:find('equal or smaller') then
      return refuse(KEYS[i], added)
    elseif failed(added) then
      -- The counter has fallen behind the log: somebody has changed it. No offset may be given twice.
      redis.call('DEL', log)
      if epoch ~= fresh then
        begin_epoch()
      end
      given, stored = epoch .. '-' .. number, event()
      redis.call('SET', KEYS[i], given, 'EX', ARGV[5])
      redis.call('HSET', meta, 'offset', number)
      redis.call('XADD', log, number .. '-0', 'e', stored)
    end
    local heard = redis.pcall('PUBLISH', channel, stored)
    if failed(heard) then
      redis.pcall('XDEL', log, number .. '-0')
      redis.pcall('XSETID', log, digits(offset) .. '-0')
      return refuse(KEYS[i], heard)
    end
    offset = offset + 1
    reply[#reply + 1] = given
    reply[#reply + 1] = heard
  else
    reply[#reply + 1] = redis.call('GET', KEYS[i])
    reply[#reply + 1] = -1
  end
end
if #KEYS > 3 then
  redis.pcall('EXPIRE', log, ARGV[4])
end
redis.pcall('EXPIRE', meta, 7 * ARGV[4])  -- the positions outlive the events
return {epochs, digits(offset), unpack(reply)}
"""

SHA: Final = hashlib.sha1(SCRIPT.encode()).hexdigest()
LOAD: Final[Command] = ("SCRIPT", "LOAD", SCRIPT)
"""Must have been sent on a connection before `look` or `store`."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What Redis says of one published event.

    Attributes:
        position: Where it is stored; None if events are not stored.
        heard: How many Redis subscriptions heard it; None for one that had been stored before.
    """

    position: Position | None
    heard: int | None


@dataclass(frozen=True, slots=True)
class Head:
    """Where a channel stands in Redis: its epochs with their first offsets, oldest first, and the last offset."""

    epochs: tuple[Position, ...]
    offset: int

    @property
    def position(self) -> Position:
        return Position(self.epochs[-1].epoch, self.offset)


def store(
    channel: str, events: Sequence[tuple[str, bytes]], table: HistoryTable, *, after: str | None = None
) -> Command:
    """Store and publish events in order; the reply is for `read_stored`.

    Args:
        channel: The channel.
        events: Id and payload of each.
        table: How long they are kept.
        after: Id of an event that must have been stored before; else this is an error (`ORDER`).
    """
    prefix = f"{{{channel}}}:id:"
    ids = [prefix + event_id for event_id, _ in events]
    payloads = [payload for _, payload in events]
    # A fresh epoch each time, also when the same events are sent again: Redis may have lived twice meanwhile.
    return (
        *("EVALSHA", SHA, 3 + len(ids), *_keys(channel), prefix + (after or ""), *ids),
        *(channel, secrets.token_hex(6), table.max_events, table.idle_expire_s, table.dedupe_s, RUN_ID),
        *(int(after is not None), *payloads),
    )


def look(channel: str, table: HistoryTable) -> Command:
    """Ask where a channel stands, and begin its epoch if that is due; the reply is for `read_head`."""
    return store(channel, (), table)


def glance(channel: str) -> Command:
    """Ask where a channel stands, cheaply and without consequence; the reply is for `read_glance`."""
    return ("HMGET", _keys(channel)[0], "epoch", "offset", "run_id")


def keep(channel: str, table: HistoryTable) -> Command:
    """Have Redis remember a silent channel's position for as long as somebody listens."""
    return ("EXPIRE", _keys(channel)[0], 7 * table.idle_expire_s)


def page(channel: str, first: int, count: int) -> Command:
    """Ask for the first `count` stored events from an offset on; the reply is for `read_page`."""
    return ("XRANGE", _keys(channel)[1], f"{first}-0", "+", "COUNT", count)


def read_stored(reply: Any) -> list[Stored]:
    """Per event, in order.

    Raises:
        RedisUnavailable: This is no reply of the script.
    """
    try:
        if type(reply) is not list or len(reply) < 2:
            raise ValueError
        pairs = zip(reply[2::2], reply[3::2], strict=True)
        return [Stored(Position.parse(where.decode()), heard if heard >= 0 else None) for where, heard in pairs]
    except (TypeError, ValueError, AttributeError):
        raise RedisUnavailable(f"Redis gave an unexpected answer: {reply!r:.100}") from None


def read_head(reply: Any) -> Head:
    """Where the channel stands.

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


def read_glance(reply: Any, run_id: str) -> Position | None:
    """Where the channel stands; None if nobody knows, or the epoch is of another Redis process.

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


def read_page(reply: Any) -> list[tuple[int, bytes]]:
    """Offset and payload of each event, in order.

    Raises:
        RedisUnavailable: This is no such reply.
    """
    try:
        return [(int(id_.partition(b"-")[0]), fields[1]) for id_, fields in reply]
    except (TypeError, ValueError, AttributeError, IndexError):
        raise RedisUnavailable(f"Redis gave an unexpected answer: {reply!r:.100}") from None


def _keys(channel: str) -> tuple[str, str]:
    return f"{{{channel}}}:meta", f"{{{channel}}}:log"
