--- @include lib terminal attempts
-- The router gives each call to the queue of one engine, or parks it until an engine of its model is ready.
--
-- ARGV     bounds: the upper ends of the scheduling levels, in service units, separated by spaces
--          per call: entry id gen ("" = the entry itself) engine ("" = park) bind ("1" = bind the session to
--          this engine) seen (the session's engine as the router saw it) hit ("1" hit, "0" miss, "" not asked)
--          prompt_tokens (estimate) why (for `rsm call`)
-- Returns  flat list, per call: code, engine
--          "assigned" | "parked" | "cancelled" | "expired" | "stale" (nothing to do) | and, with the entry left on
--          the stream: "unplaced" (the engine takes no calls any more: choose again) | "missing" (no record)
-- Emits    a ring to each engine's bell
local bounds = {}
for b in string.gmatch(ARGV[4], '%S+') do bounds[#bounds + 1] = tonumber(b) end

-- MLFQ bin of attained service (Autellix, section 4.2: a call enters the queue of its program's service).
local function level_of(service)
  for i, b in ipairs(bounds) do
    if service < b then return i - 1 end
  end
  return #bounds
end

local ready = {}
local function takes_calls(e)
  if ready[e] == nil then ready[e] = redis.call('HGET', engine_key(e), 'state') == 'READY' end
  return ready[e]
end

-- Two routers may choose for one session at once; the first binding wins while its engine takes calls.
local function bound_engine(session, chosen, seen)
  local now_bound = redis.call('HGET', session_key(session), 'engine') or ''
  if now_bound ~= '' and now_bound ~= seen and takes_calls(now_bound) then return now_bound end
  redis.call('HSET', session_key(session), 'engine', chosen)
  return chosen
end

local function assign(entry, id, gen, e, bind, seen, hit, prompt_tokens, why)
  local key = call_key(id)
  local r = redis.call('HMGET', key, 'state', 'gen', 'engine', 'session', 'priority', 'submitted_ms', 'deadline_ms',
    'model', 'cancel_before')
  if not r[1] then return 'missing', '' end
  if r[1] ~= 'PENDING' or r[2] ~= gen or r[3] ~= '' then
    take_entry(entry)
    return 'stale', r[3] or ''
  end
  local session = r[4]
  local s = redis.call('HMGET', session_key(session), 'cancel_before', 'cancel_reason', 'service')
  -- A cancel that was sent while the entry was still on the stream: of its session, or of its id alone.
  if (s[1] and id_at_most(gen, s[1])) or (r[9] and id_at_most(gen, r[9])) then
    take_entry(entry)
    end_call(id, 'CANCELLED', '', s[2] or '', '')
    return 'cancelled', ''
  end
  if r[7] ~= '' and tonumber(r[7]) <= NOW then
    take_entry(entry)
    end_call(id, 'FAILED', 'deadline_exceeded', 'The deadline passed before an engine took the call.', '')
    return 'expired', ''
  end
  if e == '' then
    take_entry(entry)
    redis.call('HSET', key, 'why', why)
    redis.call('ZADD', parked_key(r[8]), r[6], id)
    return 'parked', ''
  end
  if not takes_calls(e) then return 'unplaced', e end
  if bind == '1' then
    local bound = bound_engine(session, e, seen)
    if bound ~= e then
      e, why = bound, 'bound by another router at the same moment'
    end
  end
  local service = tonumber(s[3]) or 0
  local level = level_of(service)
  redis.call('HSET', key, 'engine', e, 'assigned_ms', int(NOW), 'level', level, 'inherited', int(service),
    'load', prompt_tokens, 'why', why)
  redis.call('ZADD', queue_key(e), queue_score(r[5], level, r[6]), id)
  count(engine_key(e), 'queued_tokens', tonumber(prompt_tokens) or 0)
  count(engine_key(e), 'served', 1)
  if hit == '1' then count_total('affinity_hits') elseif hit == '0' then count_total('affinity_misses') end
  ring(e)
  take_entry(entry)
  return 'assigned', e
end

local out = {}
for at = 5, #ARGV, 9 do
  local gen = ARGV[at + 2]
  if gen == '' then gen = ARGV[at] end
  local code, e = assign(ARGV[at], ARGV[at + 1], gen, ARGV[at + 3], ARGV[at + 4], ARGV[at + 5], ARGV[at + 6],
    ARGV[at + 7], ARGV[at + 8])
  out[#out + 1] = code
  out[#out + 1] = e
end
write_counters()
return out
