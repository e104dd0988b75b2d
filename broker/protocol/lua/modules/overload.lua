--- @needs lib
-- headroom: whether the limits of ARGV[3] allow a new call. Usage is counted where calls are created and ended
-- (create_call, end_call), inside the scripts, so any number of producers together never exceed a limit.
--
-- The limits are called "open_calls", "open_bytes", "session_calls" and "session_bytes". The bytes are those of bodies.

-- Once a call of a batch is refused, later ones of the same scope are refused too. That keeps their order, and small
-- calls cannot overtake a large one for ever. A scope is a session, or everything ('').
local refused = {}

local usage
local function used(name)
  if not usage then
    local v = redis.call('HMGET', USAGE, 'open_calls', 'open_bytes', 'refused', 'turnaround_ms')
    usage = {open_calls = tonumber(v[1]) or 0, open_bytes = tonumber(v[2]) or 0, refused = tonumber(v[3]) or 0,
      turnaround_ms = tonumber(v[4]) or 0}
  end
  return usage[name] + pending(USAGE, name)
end

local session_usage = {}
local function used_by(s, name)
  local known = session_usage[s]
  if not known then
    known = {session_calls = redis.call('SCARD', session_calls_key(s)),
      session_bytes = tonumber(redis.call('HGET', SESSION_BYTES, s)) or 0}
    session_usage[s] = known
  end
  if name == 'session_calls' then return known.session_calls + pending_members(session_calls_key(s)) end
  return known.session_bytes + pending(SESSION_BYTES, s)
end

local function exceeds(name, used_now, more) return LIMITS[name] > 0 and used_now + more > LIMITS[name] end

-- The limit that a new call of this session, with a body of this many bytes, would exceed; nil = none.
local function headroom(s, bytes)
  local limit = refused[''] or refused[s]
  if limit then return limit end
  if exceeds('open_calls', used('open_calls'), 1) then
    refused[''] = 'open_calls'
  elseif exceeds('open_bytes', used('open_bytes'), bytes) then
    refused[''] = 'open_bytes'
  elseif LIMITS.session_calls > 0 and exceeds('session_calls', used_by(s, 'session_calls'), 1) then
    refused[s] = 'session_calls'
  elseif LIMITS.session_bytes > 0 and exceeds('session_bytes', used_by(s, 'session_bytes'), bytes) then
    refused[s] = 'session_bytes'
  end
  return refused[''] or refused[s]
end

-- When to try again, in ms; 0 = never, because the deadline has passed. If n calls stay for a time T each, n / T of
-- them end per second (Little's law; retain.lua measures T). A count of ends would not work: it falls while refused
-- producers stay away, and would keep them away even longer. Other producers that were refused recently wait for the
-- same headroom, so the n-th of them waits for n ends.
local RETRY_MIN, RETRY_MAX, RETRY_UNKNOWN = 50, 30000, 1000
local function retry_after(c, limit, bytes)
  local ends = 1 + used('refused')
  count(USAGE, 'refused', 1)
  local calls, open_bytes, limit_bytes = used('open_calls'), used('open_bytes'), LIMITS.open_bytes
  if string.find(limit, 'session', 1, true) then
    calls, open_bytes = used_by(c.session, 'session_calls'), used_by(c.session, 'session_bytes')
    limit_bytes = LIMITS.session_bytes
  end
  calls = math.max(1, calls)
  if string.find(limit, 'bytes', 1, true) then
    ends = ends + (open_bytes + bytes - limit_bytes) / math.max(1, open_bytes / calls)
  end
  local wait = RETRY_UNKNOWN
  if used('turnaround_ms') > 0 then
    wait = math.max(RETRY_MIN, math.min(RETRY_MAX, ends * used('turnaround_ms') / calls))
  end
  if c.deadline_ms ~= '' then wait = math.min(wait, math.max(0, tonumber(c.deadline_ms) - NOW) / 2) end
  return int(math.ceil(wait))
end
