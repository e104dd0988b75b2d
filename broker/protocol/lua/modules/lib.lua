--- @needs nothing
-- Shared head of every script: names, the clock, reading a call, and writes that are gathered over a batch.
--
-- KEYS[1]  the namespace prefix, e.g. "{rsm}:"; all other keys are built from it, so they share its slot
-- ARGV[1]  result_ttl_ms    how long a finished call's record, log and inbox live
-- ARGV[2]  session_ttl_ms   how long an idle session's process-table entry lives
-- ARGV[3]  bounds           "inbox_max dead_bytes open_calls open_bytes session_calls session_bytes"; 0 = none
-- ARGV[4…] the script's own arguments
local P = KEYS[1]
local RESULT_TTL, SESSION_TTL = ARGV[1], ARGV[2]
local BOUND = {}
BOUND.inbox_max, BOUND.dead_bytes, BOUND.open_calls, BOUND.open_bytes, BOUND.session_calls, BOUND.session_bytes =
  string.match(ARGV[3], '(%d+) (%d+) (%d+) (%d+) (%d+) (%d+)')
for name, n in pairs(BOUND) do BOUND[name] = tonumber(n) end

-- Redis's clock is the only clock that is compared (architecture, rule 2). Milliseconds.
local clock = redis.call('TIME')
local NOW = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

-- Lua prints large numbers in exponent form; Redis wants plain integers.
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
local function bell_key(e) return P .. 'engine:' .. e .. ':bell' end
local function control_key(e) return P .. 'engine:' .. e .. ':control' end
local function session_key(s) return P .. 'session:' .. s end
local function session_calls_key(s) return P .. 'session:' .. s .. ':calls' end
local function session_recent_key(s) return P .. 'session:' .. s .. ':recent' end
local function children_key(s) return P .. 'session:' .. s .. ':children' end
local function affinity_key(s) return P .. 'affinity:' .. s end
local function residency_key(s) return P .. 'residency:' .. s end
local function parked_key(model) return P .. 'parked:' .. model end
local function held_key(model) return P .. 'held:' .. model end
local function held_starving_key(model) return P .. 'starving:' .. model end

-- What scripts read of a call's record; "" for a field that is not there, so state "" means: no such call.
-- Fields that are empty or zero are not stored.
local call_fields = {'state', 'gen', 'attempt', 'engine', 'session', 'model', 'priority', 'level', 'stream', 'inbox',
  'starves_ms', 'deadline_ms', 'submitted_ms', 'started_ms', 'prompt_tokens', 'reuse', 'context', 'events', 'cancel',
  'cancel_reason', 'cancel_before', 'format', 'bytes', 'log_bytes'}
-- fields: what the script needs, if that is less than all.
local function read_call(id, fields)
  fields = fields or call_fields
  local v = redis.call('HMGET', call_key(id), unpack(fields))
  local c = {}
  for i = 1, #fields do c[fields[i]] = v[i] or '' end
  return c
end

-- Puts a call on the router stream by its routing fields, without its body; returns the entry. Further pairs are added.
local function push_entry(c, ...)
  local fields = {'id', c.id, 'session', c.session, 'model', c.model, 'prompt_tokens', c.prompt_tokens, ...}
  if (tonumber(c.priority) or 0) ~= 0 then
    fields[#fields + 1] = 'priority'
    fields[#fields + 1] = c.priority
  end
  return redis.call('XADD', CALLS, '*', unpack(fields))
end

-- The weight of a call in its engine's load: its prompt's tokens as they were counted when it was assigned.
local function load_of(c) return tonumber(c.prompt_tokens) or 0 end
-- Tokens of its prompt that its engine is expected to compute; the rest it should find in its cache.
local function work_of(c) return math.max(0, load_of(c) - (tonumber(c.reuse) or 0)) end

-- HSET without the fields that are empty or, of these numbers, zero. Names are not among them, for an engine may be
-- called "0", nor is prompt_tokens: the engine's count replaces the estimate also if it is zero.
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

-- Writes that a batch has in common are gathered and made once, at its end, by write_all: a counter that a hundred
-- calls move is written once, and so is the expiry of a key that a hundred calls touch. A script must not read a key
-- that it has such a write outstanding for.
local increments, settings, expiries, taken, rung = {}, {}, {}, {}, {}
local fleeting = {[SESSION_BYTES] = true} -- hashes of counters of which those that are 0 go
local finished = {ids = {}, bytes = {}, entries = {}}
local before_writing = {} -- what is gathered last
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
-- How far a counter, or the size of a set, will have moved once write_all has run.
local function pending(key, field)
  return increments[key] and increments[key][field] or 0
end
local function pending_members(key) return #(members.SADD[key] or {}) - #(members.SREM[key] or {}) end
-- Takes an entry off the router stream. XACK alone would keep it for ever (docs/protocol.md).
local function take_entry(entry) taken[#taken + 1] = entry end
-- Wakes the worker that waits for work. One ring is enough however many calls wait.
local function ring(e) rung[e] = true end
-- A call left an engine that is kept for a suspect (poison.lua), and the way may be free now.
local function make_way(e)
  if redis.call('HEXISTS', engine_key(e), 'alone') == 1 then ring(e) end
end

-- Counts a call of so many that wait for an engine (sign 1), or one less (-1): its load, and its work by rank, which is
-- its place in the queue but for the arrival (programs.lua, queue_score). c: with prompt_tokens, reuse and priority.
local function count_waiting(e, c, level, sign)
  local class = math.max(-128, math.min(127, tonumber(c.priority) or 0)) + 128
  local rank, key = int(class * 16 + (tonumber(level) or 0)), work_key(e)
  fleeting[key] = true
  count(key, rank, sign)
  count(key, rank .. ':tokens', sign * work_of(c))
  count(engine_key(e), 'queued_tokens', sign * load_of(c))
end

-- Takes a waiting call out of an engine's queue. One in level 0 is not among those that may starve.
local function leave_queue(id, e, c)
  later('ZREM', queue_key(e), id)
  if c.level ~= '' then later('ZREM', starving_key(e), id) end
end

-- Lua cannot unpack lists of any length; the size is even, so that pairs stay together.
local function in_chunks(list, run)
  for at = 1, #list, 2000 do run(unpack(list, at, math.min(at + 1999, #list))) end
end

local function write_members(command)
  for key, list in pairs(members[command]) do
    in_chunks(list, function(...) redis.call(command, key, ...) end)
    if command == 'LPUSH' then redis.call('LTRIM', key, 0, 255) end
  end
end

-- The index of finished calls, in the order of their ends: what they take up, and whose records that are. A batch is
-- one entry (or a few), so that a call costs its name and little more. Of a call that ended before an engine had it, also
-- its entry on the router stream: left there for longer than the record, it would be admitted as a new call.
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
  for _, gather_rest in ipairs(before_writing) do gather_rest() end
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
      if now == 0 and fleeting[key] then redis.call('HDEL', key, field) end
    end
  end
  for _, command in ipairs({'ZADD', 'ZREM', 'SADD', 'SREM', 'LPUSH'}) do write_members(command) end
  for key, ttl in pairs(expiries) do redis.call('PEXPIRE', key, ttl) end
  write_finished()
  in_chunks(taken, function(...)
    redis.call('XACK', CALLS, 'router', ...)
    redis.call('XDEL', CALLS, ...)
  end)
  for e in pairs(rung) do
    if redis.call('LLEN', bell_key(e)) == 0 then
      redis.call('LPUSH', bell_key(e), '1')
      redis.call('PEXPIRE', bell_key(e), SESSION_TTL)
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

-- An order for one worker: a cancel flag, drain or stop.
local function order(e, ...)
  redis.call('XADD', control_key(e), 'MAXLEN', '~', 10000, '*', ...)
  redis.call('PEXPIRE', control_key(e), SESSION_TTL)
end
