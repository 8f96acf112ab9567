-- Stores events and publishes them, in one step; without events it returns the head of the channel, and begins an
-- epoch if that is due.
--
-- KEYS[1]  meta: hash with epoch, offset, run_id, epochs of the channel
-- KEYS[2]  log: stream of its events
-- KEYS[3]  id key of the event that must have been stored before; counts only if ARGV[7] is 1
-- KEYS[4]  and so on: one id key per event
-- ARGV[1]  channel
-- ARGV[2]  name of the epoch that begins if one has to, never used before
-- ARGV[3]  history.max_events
-- ARGV[4]  history.idle_expire_s
-- ARGV[5]  history.dedupe_s
-- ARGV[6]  run_id of this Redis; the caller has asked for it on this very connection, since INFO in here would cost
--          up to 50 us each time
-- ARGV[7]  1 if KEYS[3] must exist, else 0
-- ARGV[8]  and so on: one payload per event
-- Reply: epochs, last offset, then per event: position, number of receivers (-1: it had been stored before)
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
      -- The counter has fallen behind the log: it was changed from outside. No offset may be given twice.
      redis.call('DEL', log)
      if epoch ~= fresh then
        begin_epoch()
      end
      given, stored = epoch .. '-' .. number, event()
      redis.call('SET', KEYS[i], given, 'EX', ARGV[5])
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
  redis.pcall('EXPIRE', log, ARGV[4])
end
redis.pcall('EXPIRE', meta, 7 * ARGV[4])  -- the positions outlive the events
return {epochs, digits(offset), unpack(reply)}
