-- Stores events and publishes them, in one step; without events it returns the head of the channel, and begins an
-- epoch if that is due.
--
-- KEYS[1]  meta: hash with epoch, offset, run_id, epochs of the channel; ids, ids_until, ids_offset, taken_back and
--          rising: see below
-- KEYS[2]  log: stream of its events
-- KEYS[3]  and 4: two hashes that take turns: of each event its id, and the position that it was given
-- ARGV[1]  channel
-- ARGV[2]  6 hexadecimal digits by chance, for the name of the epoch that begins if one has to
-- ARGV[3]  milliseconds since 1970 on the caller's clock, for where Redis will not tell its own
-- ARGV[4]  the floor: the newest position of this channel that the caller has seen, or nothing
-- ARGV[5]  history.max_events
-- ARGV[6]  history.idle_expire_s
-- ARGV[7]  seconds after which meta expires; at most an hour as long as there has been no event: anybody may ask for
--          a name, and be given a position
-- ARGV[8]  history.dedupe_s
-- ARGV[9]  run_id of this Redis, for which the caller has asked on this very connection not long ago; or nothing. INFO
--          in here costs up to 50 us, so it is asked only where the caller does not know, or may be wrong: a proxy
--          can keep a connection open while what is behind it becomes another process.
-- ARGV[10] and so on: the id of each event; that of the one that must have been stored before, or nothing; the
--          payload of each event
-- Reply: epochs (if there are events: nothing, or `unstamped` where Redis refuses TIME to the caller), last offset,
-- then per event: position, number of receivers (-1: it had been stored before)
local meta, log, channel, floor, run_id = KEYS[1], KEYS[2], ARGV[1], ARGV[4], ARGV[9]
local FIRST = 10  -- of the ids in ARGV
local count = (#ARGV - FIRST) / 2  -- of the events
local after = FIRST + count

local function digits(number)
  return string.format('%.0f', number)  -- from 10^14 on Lua would write 1e+14
end

local function failed(reply)
  return type(reply) == 'table' and reply.err
end

for i = after + 1, #ARGV do
  if ARGV[i]:sub(1, 2) ~= '{"' then
    return redis.error_reply('BADEVENT the payload of an event begins with {"')
  end
end

local known = redis.call('HMGET', meta, 'epoch', 'offset', 'run_id', 'epochs', 'ids', 'ids_until', 'ids_offset',
  'taken_back', 'rising')
local epoch, offset, epochs = known[1], tonumber(known[2]), known[4]

if run_id == '' or run_id ~= known[3] then
  local info = redis.pcall('INFO', 'server')
  run_id = type(info) == 'string' and info:match('run_id:(%x+)') or run_id
end

-- Events say when they were stored, by Redis' clock, which is read once per call. Without the right to read it (`+time`,
-- which earlier versions did not need) they say nothing.
local clock = count > 0 and redis.pcall('TIME')
local us = clock and not clock.err and digits(clock[1] * 1000000 + clock[2])
local stamp = us and '"stored_at_us":' .. us .. ',' or ''

local function now_ms()
  local now = clock or redis.pcall('TIME')
  return now.err and tonumber(ARGV[3]) or now[1] * 1000 + math.floor(now[2] / 1000)
end

-- The ids of a turn (history.dedupe_s) are in one hash, those of the turn before in the other one. Which takes them
-- now is the first letter of `ids`; what follows is the epoch in which its turn began: of the positions in it only the
-- offset is kept. The turn ends at `ids_until`, by Redis' clock, which is read only where the caller's is beyond.
local ids, ids_before = KEYS[3], KEYS[4]
if known[5] and known[5]:sub(1, 1) == '2' then
  ids, ids_before = ids_before, ids
end
local turn_ms = ARGV[8] * 1000
local turn_ends = known[5] and tonumber(known[6])
local left_ms = (turn_ends or 0) - ARGV[3]
local now = (count > 0 or turn_ends) and not (left_ms > 0 and left_ms <= turn_ms) and now_ms()

-- The positions that were given before: per event, then that of the one that must have been stored.
local given = {}
-- A publisher of an earlier version makes a key for each id, and leaves `ids_offset` as it was. Such keys count for
-- one turn after that was seen; the end of that time stands behind `ids_offset` until then.
local old_until = ''
if count > 0 then
  local last = ARGV[after] == '' and after - 1 or after
  given = redis.call('HMGET', ids, unpack(ARGV, FIRST, last))
  local given_before = redis.call('HMGET', ids_before, unpack(ARGV, FIRST, last))
  if known[7] ~= known[2] then
    now = now or now_ms()
    local at, ms = (known[7] or ''):match('^(%d*):?(%d*)$')
    ms = at == known[2] and tonumber(ms) or now + turn_ms
    old_until = ms > now and ':' .. digits(ms) or ''
  end
  for i = 1, last - FIRST + 1 do
    local at, hash = given[i], ids
    if not at then
      at, hash = given_before[i], ids_before
    end
    if at and not at:find('-', 1, true) then
      at = (redis.call('HMGET', hash, 'epoch')[1] or epoch) .. '-' .. at
    elseif not at and old_until ~= '' then
      at = redis.call('GET', '{' .. channel .. '}:id:' .. ARGV[FIRST + i - 1])
    end
    given[i] = at
  end
  if last == after and not given[count + 1] then
    return redis.error_reply('ORDER what comes before it was not stored')
  end
end

local function is_listed(name)
  return (' ' .. epochs):find(' ' .. name .. ':', 1, true)
end

-- The name of an epoch is the time at which it began, and orders it for ever: T, milliseconds since 1970 as 9 digits
-- to the base of 32, and 6 digits by chance. Whoever has another name is of an earlier version, and older.
local DIGITS = '0123456789abcdefghijklmnopqrstuv'

local function began_at(name)
  if not name or #name ~= 16 or not name:match('^T[0-9a-v]+$') or not name:match('^[0-9a-f]+$', 11) then
    return nil
  end
  local ms = 0
  for i = 2, 10 do
    ms = ms * 32 + DIGITS:find(name:sub(i, i), 1, true) - 1
  end
  return ms
end

local floor_epoch = floor ~= '' and floor:sub(1, floor:find('-', 1, true) - 1) or nil

local function begin_epoch()
  local ms = math.max(now or now_ms(), (began_at(epoch) or 0) + 1, (began_at(floor_epoch) or 0) + 1)
  ms = math.min(ms, 32 ^ 9 - 1)
  epoch = ARGV[2]
  for _ = 1, 9 do
    local digit = ms % 32
    epoch = DIGITS:sub(digit + 1, digit + 1) .. epoch
    ms = (ms - digit) / 32
  end
  epoch = 'T' .. epoch
  -- Listed are those of which there are events, the oldest first. A publisher may have no right to look.
  local found = redis.pcall('XRANGE', log, '-', '+', 'COUNT', 1)
  local first = found.err and 0 or found[1] and tonumber(found[1][1]:match('^%d+')) or offset + 1
  local untimed, timed = {}, {}  -- the first have no order but this list
  for name, at in epochs:gmatch('(%S+):(%d+)') do
    if began_at(name) and tonumber(at) <= first then
      timed = {}  -- what came before it has left the log
    end
    table.insert(began_at(name) and timed or untimed, name .. ':' .. at)
  end
  table.insert(timed, epoch .. ':' .. digits(offset + 1))
  while #timed > 512 do
    table.remove(timed, 1)
  end
  epochs = table.concat(untimed, ' ') .. (#untimed > 0 and ' ' or '') .. table.concat(timed, ' ')
  redis.call('HSET', meta, 'epoch', epoch, 'offset', digits(offset), 'run_id', run_id, 'epochs', epochs)
end

local function is_before_the_floor()  -- then this memory is older than what the caller has seen
  if not floor_epoch or floor_epoch == epoch then
    return floor_epoch and tonumber(floor:sub(#epoch + 2)) > offset
  end
  local seen, ours = began_at(floor_epoch), began_at(epoch)
  if seen and seen == ours then  -- bytes are not compared by <, which follows the locale
    return tonumber(floor_epoch:sub(11), 16) > tonumber(epoch:sub(11), 16)
  end
  return seen and (not ours or seen > ours) or (not seen and not ours and not is_listed(floor_epoch))
end

if not (epoch and offset and epochs and epoch:match('^%w+$') and offset >= 0 and offset <= 9007199254740991
    and offset == math.floor(offset) and is_listed(epoch)) then
  -- Nothing is known of this channel. What the log may hold cannot be told from what will come.
  redis.call('DEL', log)
  offset, epochs = 0, ''
  begin_epoch()
  redis.call('HSET', meta, 'ids_offset', '0')
elseif (run_id ~= '' and run_id ~= known[3]) or is_before_the_floor() then
  -- Another Redis process, which may have come back with older data, or this one has. Offsets count on, in a new
  -- epoch, or the same position would be given twice.
  begin_epoch()
end
local begun = epoch ~= known[1]

left_ms = now and turn_ends and turn_ends - now or 0
-- A cluster that moves the slot serves no key that is missing: what is dropped could not be made again. So this turn
-- goes on until the slot has moved; whether it moves is seen by a key that there never is.
local turn_is_over = now and not (left_ms > 0 and left_ms <= turn_ms)
if turn_is_over and failed(redis.pcall('HMGET', '{' .. channel .. '}:id:', 'epoch')) then
  redis.pcall('EXPIRE', ids, 3 * ARGV[8])
  redis.pcall('EXPIRE', ids_before, 3 * ARGV[8])
  known[5] = known[5] or '1' .. epoch  -- of a channel that is new
elseif turn_is_over then
  if turn_ends and left_ms <= 0 then  -- else nothing is known of the turn, or a clock was set back: all of it stays
    ids, ids_before = ids_before, ids
    if failed(redis.pcall('UNLINK', ids)) then
      redis.pcall('DEL', ids)  -- a right that an earlier version did not need
    end
  end
  -- For the same reason both are there as long as the channel is in use.
  for _, hash in ipairs({ids_before, ids}) do
    known[5] = redis.call('HMGET', hash, 'epoch')[1]
    if not known[5] then
      known[5] = epoch
      redis.call('HSET', hash, 'epoch', epoch)
    end
    redis.pcall('EXPIRE', hash, 3 * ARGV[8])
  end
  known[5] = (ids == KEYS[3] and '1' or '2') .. known[5]
  redis.call('HSET', meta, 'ids', known[5], 'ids_until', digits(now + turn_ms))
end

local new = {}  -- id and position of the events that are stored in this call, for the hash

local function event(number, payload)
  return '{"channel":"' .. channel .. '","epoch":"' .. epoch .. '","offset":' .. number .. ',' .. stamp
    .. payload:sub(2)
end

-- Where an event stands in the log. The place of one that was taken back is not given again by Valkey and newer Redis,
-- so the next event with its number stands behind it.
local function place_of(number)
  local taken = known[8] and known[8]:match('^' .. number .. '%-(%d+)$')
  return number .. '-' .. (taken and digits(taken + 1) or '0')
end

-- `rising`: since which offset, up to which one, and up to what stamp no event has an earlier stamp than the one before
-- it. That far a reader can bisect by time. It begins anew where the clock was set back, where there is no stamp, and
-- after an event that an earlier version has stored.
local rising_from, to, last_us = (known[9] or ''):match('^(%d+):(%d+):(%d+)$')
if not (us and to and to == known[2] and tonumber(us) >= tonumber(last_us)) then
  rising_from = digits(offset + 1)
end

local function rising(number)
  return us and rising_from .. ':' .. number .. ':' .. us or ''
end

local reply = {}
local number, refused
for i = 1, count do
  local id = ARGV[FIRST + i - 1]
  local position, receivers = given[i] or given[id], -1
  if not position then
    number = digits(offset + 1)
    local counted = redis.pcall('HSET', meta, 'offset', number, 'ids_offset', number .. old_until, 'rising',
      rising(number))
    if failed(counted) then
      refused = counted
      break
    end
    local stored = event(number, ARGV[after + i])
    local place = place_of(number)
    local added = redis.pcall('XADD', log, 'MAXLEN', '~', ARGV[5], place, 'e', stored)
    if failed(added) and not added.err:find('equal or smaller') then
      refused = added
      break
    elseif failed(added) then
      -- The counter has fallen behind the log: it was changed from outside. No offset may be given twice.
      redis.call('DEL', log)
      if not begun then
        begin_epoch()
      end
      stored = event(number, ARGV[after + i])
      redis.call('HSET', meta, 'offset', number)
      place = number .. '-0'
      redis.call('XADD', log, place, 'e', stored)
    end
    receivers = redis.pcall('PUBLISH', channel, stored)
    if failed(receivers) then
      local gone = redis.pcall('XDEL', log, place)
      if failed(redis.pcall('XSETID', log, digits(offset) .. '-0')) and gone == 1 then
        redis.pcall('HSET', meta, 'taken_back', place)
      end
      refused = receivers
      break
    end
    offset = offset + 1
    position = epoch .. '-' .. number
    given[id] = position
    new[#new + 1] = id
    new[#new + 1] = known[5]:sub(2) == epoch and number or position
  end
  reply[#reply + 1] = position
  reply[#reply + 1] = receivers
end
if #new > 0 then
  if not redis.call('HMGET', ids, 'epoch')[1] then  -- a Redis that is short of memory has evicted the hash
    redis.call('HSET', ids, 'epoch', known[5]:sub(2))
  end
  redis.call('HSET', ids, unpack(new))
end
if refused then  -- as if this event had not been
  local last = digits(offset)
  redis.pcall('HSET', meta, 'offset', last, 'ids_offset', last .. old_until, 'rising',
    #new > 0 and rising(last) or known[9] or '')
  local is_right = refused.err:find('NOPERM') or refused.err:find("script can't", 1, true)
  return is_right and redis.error_reply('NOPERM ' .. refused.err) or refused
end
if count > 0 then
  epochs = stamp == '' and 'unstamped' or ''
  redis.pcall('EXPIRE', log, ARGV[6])
end
redis.pcall('EXPIRE', meta, offset > 0 and ARGV[7] or math.min(ARGV[7], 3600))  -- positions outlive the events
return {epochs, number or digits(offset), unpack(reply)}
