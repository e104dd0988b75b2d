--- @include lib
-- Any router, on a timer: limits the data of finished calls, by time and by bytes. Entries of the index whose records
-- have expired are removed, with what those calls left on the router stream. While the others use more bytes than
-- allowed, the oldest are removed with their records.
-- It also measures how long calls stay, for the advice to refused producers (overload.lua).
--
-- ARGV     max_bytes (0 = no limit) limit (index entries per run, of up to 64 calls each)
-- Returns  {index entries removed, calls removed before their TTL}
local max_bytes, limit = tonumber(ARGV[4]), tonumber(ARGV[5])

-- The id may have been reused. The record belongs to this entry if the call ended before the entry was written.
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
  for left in string.gmatch(fields[6] or '', '%S+') do take_entry(left) end
  gone[#gone + 1] = entry[1]
  freed = freed + tonumber(fields[2])
end
in_chunks(gone, function(...) redis.call('XDEL', FINISHED, ...) end)
count(USAGE, 'retained_bytes', -freed)
if early > 0 then count_total('retired', early) end

-- How long calls take from submit to end, smoothed over some seconds; and how many were refused recently.
local SMOOTH_MS, RECENT_MS, EACH_MS = 3000, 1000, 200
local mark = redis.call('HMGET', USAGE, 'turnaround_ms', 'measured_ms', 'measured_calls', 'measured_total_ms',
  'refused')
local span = NOW - (tonumber(mark[2]) or 0)
if span >= EACH_MS or span < 0 then
  local total = redis.call('HMGET', STATS, 'started', 'waiting_ms', 'running_ms')
  local calls, spent = tonumber(total[1]) or 0, (tonumber(total[2]) or 0) + (tonumber(total[3]) or 0)
  local ended = calls - (tonumber(mark[3]) or calls)
  if ended > 0 then
    local each = (spent - tonumber(mark[4])) / ended
    local old = mark[1] and math.exp(-math.max(0, span) / SMOOTH_MS) or 0
    redis.call('HSET', USAGE, 'turnaround_ms', string.format('%.1f', old * (tonumber(mark[1]) or 0) + (1 - old) * each))
  end
  redis.call('HSET', USAGE, 'measured_ms', int(NOW), 'measured_calls', int(calls), 'measured_total_ms', int(spent))
  if mark[5] then
    redis.call('HSET', USAGE, 'refused', int(math.floor(math.exp(-math.max(0, span) / RECENT_MS) * tonumber(mark[5]))))
  end
end
write_all()
return {#gone, early}
