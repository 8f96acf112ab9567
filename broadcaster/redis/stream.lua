-- Stores events and publishes them, in one step; without events it returns the head of the channel, and begins an
-- epoch if that is due.
--
-- KEYS[1]  meta: hash with epoch, offset, run_id, epochs of the channel
-- KEYS[2]  log: stream of its events
-- KEYS[3]  id key of the event that must have been stored before; counts only if ARGV[9] is 1
-- KEYS[4]  and so on: one id key per event
-- ARGV[1]  channel
-- ARGV[2]  6 hexadecimal digits by chance, for the name of the epoch that begins if one has to
-- ARGV[3]  milliseconds since 1970 on the caller's clock, for where Redis will not tell its own
-- ARGV[4]  the floor: the newest position of this channel that the caller has seen, or nothing
-- ARGV[5]  history.max_events
-- ARGV[6]  history.idle_expire_s
-- ARGV[7]  history.dedupe_s
-- ARGV[8]  run_id of this Redis; the caller has asked for it on this very connection, since INFO in here would cost
--          up to 50 us each time
-- ARGV[9]  1 if KEYS[3] must exist, else 0
-- ARGV[10] and so on: one payload per event
-- Reply: epochs (nothing if there are events), last offset, then per event: position, number of receivers (-1: it
-- had been stored before)
local meta, log, channel, floor, run_id = KEYS[1], KEYS[2], ARGV[1], ARGV[4], ARGV[8]
local FIRST = 10  -- of the payloads in ARGV

local function digits(number)
  return string.format('%.0f', number)  -- from 10^14 on Lua would write 1e+14
end

for i = FIRST, #ARGV do
  if ARGV[i]:sub(1, 2) ~= '{"' then
    return redis.error_reply('BADEVENT the payload of an event begins with {"')
  end
end
if ARGV[9] == '1' and redis.call('EXISTS', KEYS[3]) == 0 then
  return redis.error_reply('ORDER what comes before it was not stored')
end

local known = redis.call('HMGET', meta, 'epoch', 'offset', 'run_id', 'epochs')
local epoch, offset, epochs = known[1], tonumber(known[2]), known[4]

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
  local now = redis.pcall('TIME')
  local ms = now.err and tonumber(ARGV[3]) or now[1] * 1000 + math.floor(now[2] / 1000)
  ms = math.max(ms, (began_at(epoch) or 0) + 1, (began_at(floor_epoch) or 0) + 1)
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
elseif known[3] ~= run_id or is_before_the_floor() then
  -- Another Redis process, which may have come back with older data, or this one has. Offsets count on, in a new
  -- epoch, or the same position would be given twice.
  begin_epoch()
end
local begun = epoch ~= known[1]

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
  if redis.call('SET', KEYS[i], given, 'NX', 'EX', ARGV[7]) then
    local function event()
      return '{"channel":"' .. channel .. '","epoch":"' .. epoch .. '","offset":' .. number .. ','
        .. ARGV[i + FIRST - 4]:sub(2)
    end
    local counted = redis.pcall('HSET', meta, 'offset', number)
    if failed(counted) then
      redis.call('DEL', KEYS[i])
      return redis.error_reply('NOPERM ' .. counted.err)
    end
    local stored = event()
    local added = redis.pcall('XADD', log, 'MAXLEN', '~', ARGV[5], number .. '-0', 'e', stored)
    if failed(added) and not added.err:find('equal or smaller') then
      return refuse(KEYS[i], added)
    elseif failed(added) then
      -- The counter has fallen behind the log: it was changed from outside. No offset may be given twice.
      redis.call('DEL', log)
      if not begun then
        begin_epoch()
      end
      given, stored = epoch .. '-' .. number, event()
      redis.call('SET', KEYS[i], given, 'EX', ARGV[7])
      redis.call('HSET', meta, 'offset', number)
      redis.call('XADD', log, number .. '-0', 'e', stored)
    end
    local receivers = redis.pcall('PUBLISH', channel, stored)
    if failed(receivers) then
      redis.pcall('XDEL', log, number .. '-0')
      redis.pcall('XSETID', log, digits(offset) .. '-0')
      return refuse(KEYS[i], receivers)
    end
    offset = offset + 1
    reply[#reply + 1] = given
    reply[#reply + 1] = receivers
  else
    reply[#reply + 1] = redis.call('GET', KEYS[i])
    reply[#reply + 1] = -1
  end
end
if #KEYS > 3 then
  epochs = ''
  redis.pcall('EXPIRE', log, ARGV[6])
end
redis.pcall('EXPIRE', meta, 7 * ARGV[6])  -- the positions outlive the events
return {epochs, digits(offset), unpack(reply)}
