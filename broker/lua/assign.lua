--- @include lib terminal programs attempts
-- The router gives each call to the queue of one engine, or parks it until an engine of its model is ready.
--
-- ARGV     bounds: the upper ends of the scheduling levels, in service units, separated by spaces
--          per call: entry id gen ("" = the entry itself) engine ("" = park) bind ("1" = bind the session to
--          this engine) seen (the session's engine as the router saw it) hit ("1" hit, "0" miss, "" not asked)
--          why (for `rsm call`)
-- Returns  flat list, per call: code, engine
--          "assigned" | "parked" | "cancelled" | "expired" | "stale" (nothing to do) | and, with the entry left on
--          the stream: "unplaced" (the engine takes no calls any more: choose again) | "missing" (no record)
-- Emits    a ring to each engine's bell
local bounds = {}
for b in string.gmatch(ARGV[4], '%S+') do bounds[#bounds + 1] = tonumber(b) end

local ready = {}
local function takes_calls(e)
  if ready[e] == nil then ready[e] = redis.call('HGET', engine_key(e), 'state') == 'READY' end
  return ready[e]
end

-- A session as this batch sees it: read once, its binding kept up to date.
local sessions = {}
local function session_of(s)
  local known = sessions[s]
  if not known then
    local v = redis.call('HMGET', session_key(s), 'cancel_before', 'cancel_reason', 'service', 'engine')
    known = {cancel_before = v[1], cancel_reason = v[2] or '', service = tonumber(v[3]) or 0, engine = v[4] or ''}
    sessions[s] = known
  end
  return known
end

-- Two routers may choose for one session at once; the first binding wins while its engine takes calls.
local function bound_engine(name, session, chosen, seen)
  if session.engine ~= '' and session.engine ~= seen and takes_calls(session.engine) then return session.engine end
  session.engine = chosen
  set_later(session_key(name), 'engine', chosen)
  return chosen
end

local place_fields = {'state', 'gen', 'engine', 'session', 'model', 'priority', 'submitted_ms', 'deadline_ms',
  'prompt_tokens', 'cancel_before', 'cancel_reason'}
local function assign(entry, id, gen, e, bind, seen, hit, why)
  local c = read_call(id, place_fields)
  if c.state == '' then return 'missing', '' end
  take_entry(entry)
  if c.state ~= 'PENDING' or c.gen ~= gen or c.engine ~= '' then return 'stale', c.engine end
  local session = session_of(c.session)
  -- A cancel that was sent while the entry was still on the stream: of its session, or of its id alone.
  local cancel_before = c.cancel_before ~= '' and c.cancel_before
  local by_session = session.cancel_before and id_at_most(gen, session.cancel_before)
  if by_session or (cancel_before and id_at_most(gen, cancel_before)) then
    end_call(id, read_call(id), 'CANCELLED', '', by_session and session.cancel_reason or c.cancel_reason, '')
    return 'cancelled', ''
  end
  if c.deadline_ms ~= '' and tonumber(c.deadline_ms) <= NOW then
    end_call(id, read_call(id), 'FAILED', 'deadline_exceeded', 'The deadline passed before an engine took the call.', '')
    return 'expired', ''
  end
  if e == '' then
    redis.call('HSET', call_key(id), 'why', why)
    later('ZADD', parked_key(c.model), c.submitted_ms, id)
    return 'parked', ''
  end
  if not takes_calls(e) then
    taken[#taken] = nil -- it stays on the stream
    return 'unplaced', e
  end
  if bind == '1' then
    local bound = bound_engine(c.session, session, e, seen)
    if bound ~= e then
      e, why = bound, 'bound by another router at the same moment'
    end
  end
  local level = level_of(session.service, bounds)
  set_fields(call_key(id), {'engine', e, 'assigned_ms', int(NOW), 'level', level, 'inherited', int(session.service),
    'why', why})
  later('ZREM', parked_key(c.model), id) -- another router that had this entry in hand may have parked it
  later('ZADD', queue_key(e), int(queue_score(tonumber(c.priority) or 0, level, tonumber(c.submitted_ms))), id)
  count(engine_key(e), 'queued_tokens', load_of(c))
  count(engine_key(e), 'served', 1)
  if hit == '1' then count_total('affinity_hits') elseif hit == '0' then count_total('affinity_misses') end
  ring(e)
  return 'assigned', e
end

local out = {}
for at = 5, #ARGV, 8 do
  local gen = ARGV[at + 2]
  if gen == '' then gen = ARGV[at] end
  local code, e = assign(ARGV[at], ARGV[at + 1], gen, ARGV[at + 3], ARGV[at + 4], ARGV[at + 5], ARGV[at + 6],
    ARGV[at + 7])
  out[#out + 1] = code
  out[#out + 1] = e
end
write_all()
return out
