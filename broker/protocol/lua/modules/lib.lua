--- @needs nothing
-- The head of every script: key names, the clock, reading a call, and writes that are collected over a batch.
--
-- KEYS[1]  the namespace prefix, such as "{rsm}:". All other keys begin with it, so they share its slot.
-- ARGV[1]  result_ttl_ms    how long a finished call's record, log and inbox live
-- ARGV[2]  session_ttl_ms   how long an idle session's process-table entry lives
-- ARGV[3]  limits           "inbox_max dead_bytes open_calls open_bytes session_calls session_bytes"; 0 = no limit
-- ARGV[4…] the script's own arguments
local P = KEYS[1]
local RESULT_TTL, SESSION_TTL = ARGV[1], ARGV[2]
local LIMITS = {}
LIMITS.inbox_max, LIMITS.dead_bytes, LIMITS.open_calls, LIMITS.open_bytes, LIMITS.session_calls, LIMITS.session_bytes =
  string.match(ARGV[3], '(%d+) (%d+) (%d+) (%d+) (%d+) (%d+)')
for name, n in pairs(LIMITS) do LIMITS[name] = tonumber(n) end

-- All times are compared on Redis's clock (architecture, rule 2). Milliseconds.
local clock = redis.call('TIME')
local NOW = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

-- Lua prints large numbers with an exponent; Redis wants plain integers.
local function int(n) return string.format('%.0f', n) end
local NOW_TEXT = int(NOW)

local CALLS = P .. 'calls'
local ENGINES = P .. 'engines'
local DEAD = P .. 'dead'
local DEADLINES = P .. 'deadlines'
local STATS = P .. 'stats'
local USAGE = P .. 'usage'
local SESSION_BYTES = P .. 'usage:sessions'
local FINISHED = P .. 'finished'
local function call_key(id) return P .. 'call:' .. id end
local function log_key(id) return P .. 'call:' .. id .. ':events' end
local function inbox_key(client) return P .. 'inbox:' .. client end
local function engine_key(e) return P .. 'engine:' .. e end
local function queue_key(e) return P .. 'engine:' .. e .. ':queue' end
local function starving_key(e) return P .. 'engine:' .. e .. ':starving' end
local function work_key(e) return P .. 'engine:' .. e .. ':work' end
local function residents_key(e) return P .. 'engine:' .. e .. ':residents' end
local function running_key(e) return P .. 'engine:' .. e .. ':running' end
local function wake_key(e) return P .. 'engine:' .. e .. ':bell' end
local function control_key(e) return P .. 'engine:' .. e .. ':control' end
local function session_key(s) return P .. 'session:' .. s end
local function session_calls_key(s) return P .. 'session:' .. s .. ':calls' end
local function session_recent_key(s) return P .. 'session:' .. s .. ':recent' end
local function children_key(s) return P .. 'session:' .. s .. ':children' end
local function affinity_key(s) return P .. 'affinity:' .. s end
local function residency_key(s) return P .. 'residency:' .. s end
local function parked_key(model) return P .. 'parked:' .. model end
local function throttled_key(model) return P .. 'held:' .. model end
local function throttled_starving_key(model) return P .. 'starving:' .. model end

-- The fields of a call's record that scripts read. A missing field reads as "", so a state of "" means that there is no
-- such call. Fields that are empty or zero are not stored.
local call_fields = {'state', 'gen', 'attempt', 'engine', 'session', 'model', 'priority', 'level', 'stream', 'inbox',
  'starves_ms', 'deadline_ms', 'submitted_ms', 'started_ms', 'prompt_tokens', 'reuse', 'context', 'events', 'cancel',
  'cancel_reason', 'cancel_before', 'format', 'bytes', 'log_bytes'}
-- fields: what the script needs, if it does not need all of them.
local function read_call(id, fields)
  fields = fields or call_fields
  local v = redis.call('HMGET', call_key(id), unpack(fields))
  local c = {}
  for i = 1, #fields do c[fields[i]] = v[i] or '' end
  return c
end

-- Puts a call's routing fields, without its body, on the router stream and returns the entry's id. Further pairs are
-- added to the entry.
local function push_entry(c, ...)
  local fields = {'id', c.id, 'session', c.session, 'model', c.model, 'prompt_tokens', c.prompt_tokens, ...}
  if (tonumber(c.priority) or 0) ~= 0 then
    fields[#fields + 1] = 'priority'
    fields[#fields + 1] = c.priority
  end
  return redis.call('XADD', CALLS, '*', unpack(fields))
end

-- What a call adds to its engine's load: the tokens of its prompt, as counted when it was assigned.
local function load_of(c) return tonumber(c.prompt_tokens) or 0 end
-- The prompt tokens that its engine is expected to compute; it should find the others in its cache.
local function work_of(c) return math.max(0, load_of(c) - (tonumber(c.reuse) or 0)) end

-- HSET without fields that are empty or, for the numbers listed here, zero. Names are not listed, because an engine may
-- be called "0". Nor is prompt_tokens: the engine's count replaces the estimate even if it is zero.
local numbers = {priority = true, stream = true, completion_tokens = true, cached_tokens = true, failures = true}
local function set_fields(key, pairs_)
  local list = {}
  for i = 1, #pairs_, 2 do
    local value = pairs_[i + 1]
    if value ~= '' and not (numbers[pairs_[i]] and tonumber(value) == 0) then
      list[#list + 1] = pairs_[i]
      list[#list + 1] = value
    end
  end
  redis.call('HSET', key, unpack(list))
end

-- Writes that the calls of a batch have in common are collected, and write_all makes them at the end: a counter that a
-- hundred calls change is written once, and so is the expiry of a key that a hundred calls touch. A script must not
-- read a key for which such a write is pending.
local increments, settings, expiries, taken, to_wake = {}, {}, {}, {}, {}
local drops_zeros = {[SESSION_BYTES] = true} -- hashes of counters that lose a field once it is 0
local finished = {ids = {}, bytes = {}, entries = {}}
local before_writing = {} -- functions that write_all calls first
local members = {ZADD = {}, ZREM = {}, SADD = {}, SREM = {}, LPUSH = {}}

local function gather(map, key)
  local t = map[key]
  if not t then t = {}; map[key] = t end
  return t
end
local function count(key, field, n)
  local fields = gather(increments, key)
  fields[field] = (fields[field] or 0) + n
end
local function count_total(field, n) count(STATS, field, n or 1) end
local function set_later(key, field, value) gather(settings, key)[field] = value end
local function touch(key, ttl) expiries[key] = ttl end
local function later(command, key, ...)
  local list = gather(members[command], key)
  for i = 1, select('#', ...) do list[#list + 1] = (select(i, ...)) end
end
-- By how much write_all will change a counter, or the size of a set.
local function pending(key, field)
  return increments[key] and increments[key][field] or 0
end
local function pending_members(key) return #(members.SADD[key] or {}) - #(members.SREM[key] or {}) end
-- Takes an entry off the router stream. XACK alone would keep it for ever (docs/protocol.md).
local function take_entry(entry) taken[#taken + 1] = entry end
-- Wakes the worker that waits for work. Once is enough, however many calls wait.
local function wake(e) to_wake[e] = true end
-- A call has left an engine. If the engine is reserved for a suspect (poison.lua), the suspect may start now.
local function wake_if_reserved(e)
  if redis.call('HEXISTS', engine_key(e), 'alone') == 1 then wake(e) end
end

-- Counts a call among those that wait for an engine (sign 1), or takes it out of the count (-1): its load, and its work
-- by rank. The rank is its place in the queue without the arrival (programs.lua, queue_score). c has prompt_tokens,
-- reuse and priority.
local function count_waiting(e, c, level, sign)
  local class = math.max(-128, math.min(127, tonumber(c.priority) or 0)) + 128
  local rank, key = int(class * 16 + (tonumber(level) or 0)), work_key(e)
  drops_zeros[key] = true
  count(key, rank, sign)
  count(key, rank .. ':tokens', sign * work_of(c))
  count(engine_key(e), 'queued_tokens', sign * load_of(c))
end

-- Takes a waiting call out of an engine's queue. A call of level 0 cannot starve, so it is in one set only.
local function leave_queue(id, e, c)
  later('ZREM', queue_key(e), id)
  if c.level ~= '' then later('ZREM', starving_key(e), id) end
end

-- Lua cannot unpack a list of any length. The size is even, so that pairs stay together.
local function in_chunks(list, run)
  for at = 1, #list, 2000 do run(unpack(list, at, math.min(at + 1999, #list))) end
end

local function write_members(command)
  for key, list in pairs(members[command]) do
    in_chunks(list, function(...) redis.call(command, key, ...) end)
    if command == 'LPUSH' then redis.call('LTRIM', key, 0, 255) end
  end
end

-- The index of finished calls, in the order of their ends: the bytes that they take up, and their ids. A batch is one
-- entry, or a few, so a call costs little more than its id. If a call ended before an engine had it, its entry on the
-- router stream is listed too: an entry that outlived the record would be accepted as a new call.
local function write_finished()
  for at = 1, #finished.ids, 64 do
    local to, bytes, entries = math.min(at + 63, #finished.ids), 0, {}
    for i = at, to do
      bytes = bytes + finished.bytes[i]
      entries[#entries + 1] = finished.entries[i]
    end
    local fields = {'bytes', int(bytes), 'ids', table.concat(finished.ids, ' ', at, to)}
    if #entries > 0 then fields[5], fields[6] = 'entries', table.concat(entries, ' ') end
    redis.call('XADD', FINISHED, '*', unpack(fields))
  end
end

local function write_all()
  for _, prepare in ipairs(before_writing) do prepare() end
  for key, fields in pairs(settings) do
    local list = {}
    for field, value in pairs(fields) do
      list[#list + 1] = field
      list[#list + 1] = value
    end
    in_chunks(list, function(...) redis.call('HSET', key, ...) end)
  end
  for key, fields in pairs(increments) do
    for field, n in pairs(fields) do
      local now = n ~= 0 and redis.call('HINCRBY', key, field, int(n))
      if now == 0 and drops_zeros[key] then redis.call('HDEL', key, field) end
    end
  end
  for _, command in ipairs({'ZADD', 'ZREM', 'SADD', 'SREM', 'LPUSH'}) do write_members(command) end
  for key, ttl in pairs(expiries) do redis.call('PEXPIRE', key, ttl) end
  write_finished()
  in_chunks(taken, function(...)
    redis.call('XACK', CALLS, 'router', ...)
    redis.call('XDEL', CALLS, ...)
  end)
  for e in pairs(to_wake) do
    if redis.call('LLEN', wake_key(e)) == 0 then
      redis.call('LPUSH', wake_key(e), '1')
      redis.call('PEXPIRE', wake_key(e), SESSION_TTL)
    end
  end
end

-- Stream ids ("ms-seq") compare as numbers, not as text.
local function id_at_most(a, b)
  local am, as = string.match(a, '^(%d+)%-(%d+)$')
  local bm, bs = string.match(b, '^(%d+)%-(%d+)$')
  if not am or not bm then return false end
  am, as, bm, bs = tonumber(am), tonumber(as), tonumber(bm), tonumber(bs)
  return am < bm or (am == bm and as <= bs)
end

-- Sends a command to one worker: cancel, drain or stop.
local function send_command(e, ...)
  redis.call('XADD', control_key(e), 'MAXLEN', '~', 10000, '*', ...)
  redis.call('PEXPIRE', control_key(e), SESSION_TTL)
end
