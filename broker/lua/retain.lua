--- @include lib
-- Any router, on a timer: what finished calls leave behind is bounded by time and by bytes. Entries of the index whose
-- records are gone by their TTL go; while those left take more bytes than allowed, the oldest go with their records.
-- It also measures how many calls end in a second, for those who are refused (lua/overload.lua).
--
-- ARGV     max_bytes (0 = no bound) limit (index entries per run, of up to 64 calls each)
-- Returns  {index entries removed, calls removed before their TTL}
local max_bytes, limit = tonumber(ARGV[4]), tonumber(ARGV[5])

-- An id may have been used again since; the record is of this entry if it ended before the entry was written.
local function remove(id, ended_ms)
  local r = redis.call('HMGET', call_key(id), 'state', 'finished_ms')
  if r[2] and r[1] ~= 'PENDING' and r[1] ~= 'RUNNING' and tonumber(r[2]) <= ended_ms then
    redis.call('UNLINK', call_key(id), log_key(id))
    return 1
  end
  return 0
end

local retained = tonumber(redis.call('HGET', USAGE, 'retained_bytes')) or 0
local gone, early, freed = {}, 0, 0
for _, entry in ipairs(redis.call('XRANGE', FINISHED, '-', '+', 'COUNT', limit)) do
  local ended_ms, fields = tonumber(string.match(entry[1], '^%d+')), entry[2]
  local expired = ended_ms + tonumber(RESULT_TTL) <= NOW
  if not expired and (max_bytes == 0 or retained - freed <= max_bytes) then break end
  if not expired then
    for id in string.gmatch(fields[4], '%S+') do early = early + remove(id, ended_ms) end
  end
  gone[#gone + 1] = entry[1]
  freed = freed + tonumber(fields[2])
end
in_chunks(gone, function(...) redis.call('XDEL', FINISHED, ...) end)
count(USAGE, 'retained_bytes', -freed)
if early > 0 then count_total('retired', early) end

-- Ends per second, smoothed over some seconds; and those refused of late, who come back within about the same time.
local SMOOTH_MS, EACH_MS = 3000, 200
local mark = redis.call('HMGET', USAGE, 'rate', 'rate_ms', 'rate_ended', 'refused')
local span = NOW - (tonumber(mark[2]) or 0)
if span >= EACH_MS or span < 0 then
  local ended = 0
  for _, n in ipairs(redis.call('HMGET', STATS, 'completed', 'cancelled', 'failed')) do
    ended = ended + (tonumber(n) or 0)
  end
  local old = math.exp(-span / SMOOTH_MS)
  if mark[3] and span > 0 then
    local measured = math.max(0, ended - tonumber(mark[3])) / span * 1000
    local rate = old * (tonumber(mark[1]) or 0) + (1 - old) * measured
    redis.call('HSET', USAGE, 'rate', string.format('%.3f', rate))
  end
  redis.call('HSET', USAGE, 'rate_ms', int(NOW), 'rate_ended', int(ended))
  if mark[4] then redis.call('HSET', USAGE, 'refused', int(math.floor(old * tonumber(mark[4])))) end
end
write_all()
return {#gone, early}
