-- Reads a page of a channel's log: its events from an offset on, bounded in number and in bytes.
--
-- KEYS[1]  log: stream of the events
-- KEYS[2]  meta: hash with epoch and offset of the channel
-- ARGV[1]  the lowest offset
-- ARGV[2]  the most events
-- ARGV[3]  the most bytes, one larger event excepted
-- Reply: 1 if nothing comes after them, else 0; epoch and offset of meta; then per event: id, payload
local log, first, most, bytes = KEYS[1], ARGV[1] .. '-0', tonumber(ARGV[2]), tonumber(ARGV[3])
local reply, count, size, step = {0, redis.call('HMGET', KEYS[2], 'epoch', 'offset')}, 0, 0, 4
while count < most do
  local asked = math.min(step, most - count)
  local found = redis.call('XRANGE', log, first, '+', 'COUNT', asked)
  for i = 1, #found do
    local payload = found[i][2][2]
    size = size + #payload
    if size > bytes and count > 0 then
      return reply
    end
    count = count + 1
    reply[2 * count + 1], reply[2 * count + 2] = found[i][1], payload
  end
  if #found < asked then
    reply[1] = 1
    return reply
  end
  first = '(' .. found[#found][1]
  -- As many as are likely to fit. Whatever does not was looked at in vain, and Redis was blocked meanwhile.
  step = math.max(1, math.min(64, math.floor((bytes - size) / (size / count))))
end
return reply
