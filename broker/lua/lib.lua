-- Shared head of every script: names, the clock, and counters that are written once a script.
--
-- KEYS[1]  the namespace prefix, e.g. "{rsm}:"; all other keys are built from it, so they share its slot
-- ARGV[1]  result_ttl_ms    how long a finished call's record, log and inbox live
-- ARGV[2]  session_ttl_ms   how long an idle session's process-table entry lives
-- ARGV[3]  inbox_max        approximate length an inbox is trimmed to
-- ARGV[4…] the script's own arguments
local P = KEYS[1]
local RESULT_TTL, SESSION_TTL, INBOX_MAX = ARGV[1], ARGV[2], ARGV[3]

-- Redis's clock is the only clock that is compared (architecture, rule 2). Milliseconds.
local clock = redis.call('TIME')
local NOW = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

-- Lua prints large numbers in exponent form; Redis wants plain integers.
local function int(n) return string.format('%.0f', n) end

local CALLS = P .. 'calls'
local ENGINES = P .. 'engines'
local DEAD = P .. 'dead'
local DEADLINES = P .. 'deadlines'
local function call_key(id) return P .. 'call:' .. id end
local function log_key(id) return P .. 'call:' .. id .. ':events' end
local function inbox_key(client) return P .. 'inbox:' .. client end
local function engine_key(e) return P .. 'engine:' .. e end
local function queue_key(e) return P .. 'engine:' .. e .. ':queue' end
local function running_key(e) return P .. 'engine:' .. e .. ':running' end
local function bell_key(e) return P .. 'engine:' .. e .. ':bell' end
local function control_key(e) return P .. 'engine:' .. e .. ':control' end
local function session_key(s) return P .. 'session:' .. s end
local function session_calls_key(s) return P .. 'session:' .. s .. ':calls' end
local function session_recent_key(s) return P .. 'session:' .. s .. ':recent' end
local function affinity_key(s) return P .. 'affinity:' .. s end
local function parked_key(model) return P .. 'parked:' .. model end

-- Counters gathered while a batch runs and written once at its end: {key = {field = increment}}.
local pending = {}
local function count(key, field, n)
  local fields = pending[key]
  if not fields then fields = {}; pending[key] = fields end
  fields[field] = (fields[field] or 0) + n
end
local function count_total(field, n) count(P .. 'stats', field, n or 1) end
local function write_counters()
  for key, fields in pairs(pending) do
    for field, n in pairs(fields) do
      if n ~= 0 then redis.call('HINCRBY', key, field, int(n)) end
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

-- Takes an entry off the router stream. XACK alone would keep it for ever (docs/protocol.md).
local function take_entry(entry)
  if entry ~= '' then
    redis.call('XACK', CALLS, 'router', entry)
    redis.call('XDEL', CALLS, entry)
  end
end

-- Wakes the worker that waits for work. One ring is enough however many calls wait.
local function ring(e)
  local bell = bell_key(e)
  if redis.call('LLEN', bell) == 0 then
    redis.call('LPUSH', bell, '1')
    redis.call('PEXPIRE', bell, SESSION_TTL)
  end
end

-- An order for one worker: a cancel flag, drain or stop.
local function order(e, ...)
  redis.call('XADD', control_key(e), 'MAXLEN', '~', 10000, '*', ...)
  redis.call('PEXPIRE', control_key(e), SESSION_TTL)
end
