--- @include lib programs family residents residence terminal attempts throttled
-- A worker ends calls: record, process table, affinity and the waiter's event in one step. Throttled calls for which
-- there is KV headroom now go back to the router.
--
-- ARGV     engine rule (of service: "path" | "total", programs.lua), then per call: id gen attempt state error_code
--          error result prompt_tokens completion_tokens cached_tokens
--          resident_tokens (tokens of the session that are probably cached on this engine now)
--          events (how many the worker has published for it, including earlier attempts; "" = not given)
--          service (the call's service, in the deployment's unit: a whole number)
-- Returns  list, per call: "done" | "again" (this finish has arrived before) | "stale"
--          | "gap" (Redis has lost some of its events; nothing has changed: give the attempt up)
local e, rule = ARGV[4], ARGV[5]

-- Wait and run time are charged by the longest path, service by `rule`. When a promoted call ends, its promotion is
-- paid: its program's wait until the promotion, and its run time before it, do not count for the next promotion.
local function charge_program(c, service, waited, ran)
  local p, waited_before, ran_before = program_of(c.session), tonumber(c.waited_ms) or 0, tonumber(c.ran_ms) or 0
  charge_total(p, 'service', tonumber(c.inherited) or 0, service, rule)
  charge_total(p, 'waited_ms', waited_before, waited)
  charge_total(p, 'ran_ms', ran_before, ran)
  if c.promoted_ms ~= '' then
    charge_total(p, 'paid_waited_ms', waited_before, tonumber(c.promoted_ms) - tonumber(c.submitted_ms))
    charge_total(p, 'paid_ran_ms', ran_before, 0)
  end
end

local function charge(c, prompt, completion, cached, service)
  local waited = math.max(0, tonumber(c.started_ms) - tonumber(c.submitted_ms))
  local ran = math.max(0, NOW - tonumber(c.started_ms))
  charge_program(c, service, waited, ran)
  count_total('started')
  count_total('waiting_ms', waited)
  count_total('running_ms', ran)
  count_total('prompt_tokens', prompt)
  count_total('completion_tokens', completion)
  count_total('cached_tokens', cached)
end

-- Tokens whose KV the engine had computed in its whole life before this batch.
local known
local function computed_before()
  known = known or tonumber(redis.call('HGET', engine_key(e), 'computed')) or 0
  return known
end

local made_headroom = false -- in the engine's KV cache, for throttled calls
local end_fields = {'state', 'gen', 'attempt', 'engine', 'session', 'stream', 'inbox', 'deadline_ms', 'submitted_ms',
  'started_ms', 'prompt_tokens', 'context', 'inherited', 'waited_ms', 'ran_ms', 'promoted_ms', 'events', 'cancel',
  'cancel_reason', 'format', 'bytes', 'log_bytes'}
local function finish(id, gen, attempt, state, code, message, result, prompt, completion, cached, resident, events,
                      service)
  local c = read_call(id, end_fields)
  if c.gen ~= gen or c.attempt ~= attempt or c.engine ~= e then return 'stale' end
  if c.state ~= 'RUNNING' then return c.state == 'PENDING' and 'stale' or 'again' end
  -- A cancel that was acknowledged before this finish takes effect, even if the engine has completed the call.
  if c.cancel == 'deadline' then
    state, code, message = 'FAILED', 'deadline_exceeded', 'The deadline passed while the call was running.'
  elseif c.cancel ~= '' then
    state, code, message = 'CANCELLED', '', c.cancel_reason
  end
  -- Only a completed call promises a complete log.
  if state == 'COMPLETED' and events ~= '' and tonumber(events) > (tonumber(c.events) or 0) then return 'gap' end
  later('ZREM', running_key(e), id)
  count(engine_key(e), 'running_tokens', -load_of(c))
  count(engine_key(e), 'computed', math.max(0, tonumber(prompt) - tonumber(cached)) + tonumber(completion))
  if state == 'COMPLETED' then count(session_key(c.session), 'completion_tokens', completion) end
  charge(c, tonumber(prompt), tonumber(completion), tonumber(cached), tonumber(service))
  if tonumber(resident) > 0 and c.session ~= id then
    local computed = computed_before() + pending(engine_key(e), 'computed')
    set_later(affinity_key(c.session), e, resident .. ':' .. NOW_TEXT .. ':' .. int(computed))
    touch(affinity_key(c.session), SESSION_TTL)
  end
  if c.context ~= '' then
    made_headroom = true
    if tonumber(resident) > 0 then c.more = tonumber(resident) - tonumber(c.context) end
  end
  end_call(id, c, state, code, message, result, 'prompt_tokens', prompt, 'completion_tokens', completion,
    'cached_tokens', cached)
  return 'done'
end

local out = {}
for at = 6, #ARGV, 13 do out[#out + 1] = finish(unpack(ARGV, at, at + 12)) end
wake_if_reserved(e)
-- Calls have ended on this engine, so it may have headroom. The routers check the other engines on their timers.
local function admit_others()
  local v, account = redis.call('HMGET', engine_key(e), 'state', 'model', 'kv_tokens'), account_of(e)
  if v[1] ~= 'READY' or not account then return end
  local cache = cache_of(e, (tonumber(v[3]) or 0) * account.factor, account.half)
  admit_waiting(v[2] or '', {cache}, account.half, #out)
end
if made_headroom and any_throttled() then admit_others() end
write_all()
return out
