--- @include lib programs family residents residence terminal attempts throttled
-- The router gives each call to the queue of one engine, parks it until an engine of its model is ready, or throttles
-- it until an engine has KV headroom for its context (throttled.lua). This script decides whether one has, because
-- several routers may place calls at once.
--
-- ARGV     level_bounds: the upper ends of the scheduling levels, in service units, separated by spaces
--          beta: wait / run of a program at which its calls starve (programs.lua), 0 = never
--          half factor: of admission, as in admit_throttled.lua
--          per call: entry id gen ("" = the entry itself) engine ("" = park) bind ("1" = bind the session to
--          this engine) seen (the session's engine as the router saw it) hit ("1" hit, "0" miss, "" not asked)
--          why reuse (tokens of the prompt that the engine should find in its cache)
--          costs (of each engine, as the router estimated them; "" = it did not), both for `rsm call`
--          throttle ("1" = the router found no engine with headroom for it)
--          context (tokens that it will hold) new (those that no other call of its session holds on that engine)
-- Returns  flat list, per call: code, engine
--          "assigned" | "parked" | "held" (throttled) | "cancelled" | "expired" | "stale" (nothing to do)
--          and, with the entry left on the stream: "unplaced" (the engine takes no calls any more: choose again) |
--          "missing" (no record)
-- Emits    a wake-up to each engine that got a call
local level_bounds = {}
for b in string.gmatch(ARGV[4], '%S+') do level_bounds[#level_bounds + 1] = tonumber(b) end
local beta, half, factor = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])

local ready = {}
local function takes_calls(e)
  if ready[e] == nil then ready[e] = redis.call('HGET', engine_key(e), 'state') == 'READY' end
  return ready[e]
end

local function add(fields, name, value)
  fields[#fields + 1] = name
  fields[#fields + 1] = value
end

-- A session as this batch sees it: read once, its binding kept up to date. `program`: its root's totals. `had`: its own
-- totals, as fields of a record.
local sessions = {}
local session_fields = {'parent', 'engine', 'cancel_before', 'cancel_reason', 'cancel_tree_before', unpack(totals)}
local NONE = {}
local function cancels_of(before, reason, more)
  if not before then return more end
  return {{before = before, reason = reason or ''}, unpack(more)}
end
local function session_of(s)
  local known = sessions[s]
  if known then return known end
  local v = redis.call('HMGET', session_key(s), unpack(session_fields))
  known = {id = s, engine = v[2] or '', had = {}}
  for i, name in ipairs(totals) do
    known[name] = tonumber(v[5 + i]) or 0
    if known[name] > 0 then add(known.had, name == 'service' and 'inherited' or name, v[5 + i]) end
  end
  known.program = known
  known.tree_cancels = NONE
  sessions[s] = known
  if v[1] then
    local parent = session_of(v[1])
    known.program, known.tree_cancels = parent.program, parent.tree_cancels
    keep_alive(s, v[1])
    set_later(session_key(known.program.id), 'last_arrival_ms', NOW_TEXT)
  end
  known.cancels = cancels_of(v[3], v[4], known.tree_cancels)
  known.tree_cancels = cancels_of(v[5], v[4], known.tree_cancels)
  return known
end

-- A cancel that was sent while the call's entry was still on the stream: of its session, of an ancestor with all its
-- descendants, or of the call itself.
local function cancelled_by(session, c, gen)
  for _, cancel in ipairs(session.cancels) do
    if id_at_most(gen, cancel.before) then return cancel end
  end
  if c.cancel_before ~= '' and id_at_most(gen, c.cancel_before) then return {reason = c.cancel_reason} end
end

-- Two routers may choose for one session at the same time. The first binding wins while its engine takes calls.
local function bound_engine(session, chosen, seen)
  if session.engine ~= '' and session.engine ~= seen and takes_calls(session.engine) then return session.engine end
  return chosen
end
local function bind_to(name, session, e)
  if session.engine == e then return end
  session.engine = e
  set_later(session_key(name), 'engine', e)
end

-- Why a call cannot go to an engine now; nil = it can. A call that was admitted does not wait after others.
local FULL = '%s no longer has KV headroom for its context of %d tokens'
local NOT_FIRST = 'throttled calls ahead of it wait for KV headroom'
local function why_throttled(id, c, e, level, score, context)
  if c.let_in == '' and any_throttled() and must_wait(id, c.session, c.model, score, half) then return NOT_FIRST end
  local cache = cache_of(e, (tonumber(redis.call('HGET', engine_key(e), 'kv_tokens')) or 0) * factor, half)
  local tier = tier_of(tonumber(c.priority) or 0, level)
  local share = share_on(c.session, e, half)
  if fits(cache.spoken, tier, share, context, cache.capacity, cache.calls) then return nil end
  return string.format(FULL, e, context)
end

local place_fields = {'state', 'gen', 'engine', 'session', 'model', 'priority', 'submitted_ms', 'deadline_ms',
  'prompt_tokens', 'cancel_before', 'cancel_reason', half and 'let_in'}
local function assign(entry, id, gen, e, bind, seen, hit, why, reuse, costs, throttled, context, new)
  local c = read_call(id, place_fields)
  if c.state == '' then return 'missing', '' end
  take_entry(entry)
  if c.state ~= 'PENDING' or c.gen ~= gen or c.engine ~= '' then return 'stale', c.engine end
  local session = session_of(c.session)
  local cancel = cancelled_by(session, c, gen)
  if cancel then
    end_call(id, read_call(id), 'CANCELLED', '', cancel.reason, '')
    return 'cancelled', ''
  end
  if c.deadline_ms ~= '' and tonumber(c.deadline_ms) <= NOW then
    end_call(id, read_call(id), 'FAILED', 'deadline_exceeded', 'The deadline passed before an engine took the call.',
      '')
    return 'expired', ''
  end
  throttled = half and throttled == '1'
  if e == '' and not throttled then
    redis.call('HSET', call_key(id), 'why', why)
    later('ZADD', parked_key(c.model), c.submitted_ms, id)
    return 'parked', ''
  end
  if not throttled and not takes_calls(e) then
    taken[#taken] = nil -- it stays on the stream
    return 'unplaced', e
  end
  if bind == '1' then
    local bound = bound_engine(session, e, seen)
    if bound ~= e then
      e, why, reuse, new = bound, 'another router bound its session to it at the same time', '0', context
    end
  end
  local p = session.program
  local waited, ran = unpaid(p.waited_ms, p.paid_waited_ms), unpaid(p.ran_ms, p.paid_ran_ms)
  local level, moment, promoted = place(p.service, waited, ran, tonumber(c.submitted_ms), NOW, level_bounds, beta)
  local starves = moment < NEVER and int(moment) or ''
  if half then
    local score = int(queue_score(tonumber(c.priority) or 0, level, tonumber(c.submitted_ms)))
    local reason = throttled and why or why_throttled(id, c, e, level, score, tonumber(context))
    if reason then
      local since = starves_at(tonumber(c.submitted_ms), waited, ran, beta)
      throttle(id, c, score, level, since < NEVER and int(since) or '', context, reason)
      return 'held', ''
    end
    unthrottle(id, c.model)
    arrive(c.session, e, tier_of(tonumber(c.priority) or 0, level), tonumber(context), tonumber(new), half, factor)
  end
  if bind == '1' then bind_to(c.session, session, e) end
  local fields = {'engine', e, 'assigned_ms', NOW_TEXT, unpack(p.had)}
  if level > 0 then add(fields, 'level', level) end
  if starves ~= '' then add(fields, 'starves_ms', starves) end
  if promoted then
    add(fields, 'promoted_ms', NOW_TEXT)
    count_total('promoted')
  end
  if p ~= session then add(fields, 'program', p.id) end
  if why ~= '' then add(fields, 'why', why) end
  if reuse ~= '0' then add(fields, 'reuse', reuse) end
  if costs ~= '' then add(fields, 'costs', costs) end
  if half then add(fields, 'context', context) end
  c.reuse = reuse
  redis.call('HSET', call_key(id), unpack(fields))
  later('ZREM', parked_key(c.model), id) -- another router that had read this entry may have parked it
  enqueue(id, e, c, level, starves)
  count(engine_key(e), 'served', 1)
  if hit == '1' then count_total('affinity_hits') elseif hit == '0' then count_total('affinity_misses') end
  return 'assigned', e
end

local out = {}
for at = 8, #ARGV, 13 do
  local gen = ARGV[at + 2]
  if gen == '' then gen = ARGV[at] end
  local code, e = assign(ARGV[at], ARGV[at + 1], gen, unpack(ARGV, at + 3, at + 12))
  out[#out + 1] = code
  out[#out + 1] = e
end
write_all()
return out
