--- @include lib terminal
-- A worker ends calls: record, process table, affinity and the waiter's event in one step.
--
-- ARGV     engine, then per call: id gen attempt state error_code error result prompt_tokens completion_tokens
--          cached_tokens resident_tokens (tokens of the session now believed cached on this engine)
-- Returns  list, per call: "done" | "again" (this very finish had arrived before) | "stale"
-- Source of the service rule: Autellix, Algorithm 1, line 4: service = max(service, inherited + own).
-- The unit is uncached prompt tokens + 2 x completion tokens (the weights of VTC and llm-d).
local e = ARGV[4]

local function charge_session(session, submitted_ms, started_ms, inherited, prompt, completion, cached)
  local own = math.max(0, prompt - cached) + 2 * completion
  local key = session_key(session)
  local service = tonumber(redis.call('HGET', key, 'service')) or 0
  if inherited + own > service then redis.call('HSET', key, 'service', int(inherited + own)) end
  local waiting = math.max(0, started_ms - submitted_ms)
  redis.call('HINCRBY', key, 'waiting_ms', int(waiting))
  count_total('started')
  count_total('waiting_ms', waiting)
  count_total('running_ms', math.max(0, NOW - started_ms))
  count_total('prompt_tokens', prompt)
  count_total('completion_tokens', completion)
  count_total('cached_tokens', cached)
end

local function finish(id, gen, attempt, state, code, message, result, prompt, completion, cached, resident)
  local key = call_key(id)
  local r = redis.call('HMGET', key, 'state', 'gen', 'attempt', 'engine', 'session', 'cancel', 'cancel_reason',
    'submitted_ms', 'started_ms', 'inherited', 'load')
  if r[2] ~= gen or r[3] ~= attempt or r[4] ~= e then return 'stale' end
  if r[1] ~= 'RUNNING' then return r[1] == 'PENDING' and 'stale' or 'again' end
  -- A cancel that was acknowledged before this finish has taken effect, whatever the engine managed to do.
  if r[6] == 'deadline' then
    state, code, message = 'FAILED', 'deadline_exceeded', 'The deadline passed while the call was running.'
  elseif r[6] then
    state, code, message = 'CANCELLED', '', r[7] or ''
  end
  redis.call('ZREM', running_key(e), id)
  count(engine_key(e), 'running_tokens', -(tonumber(r[11]) or 0))
  redis.call('HSET', key, 'prompt_tokens', prompt, 'completion_tokens', completion, 'cached_tokens', cached)
  charge_session(r[5], tonumber(r[8]), tonumber(r[9]), tonumber(r[10]) or 0, tonumber(prompt), tonumber(completion),
    tonumber(cached))
  if tonumber(resident) > 0 and r[5] ~= id then
    redis.call('HSET', affinity_key(r[5]), e, resident .. ':' .. int(NOW))
    redis.call('PEXPIRE', affinity_key(r[5]), SESSION_TTL)
  end
  end_call(id, state, code, message, result)
  return 'done'
end

local out = {}
for at = 5, #ARGV, 11 do
  out[#out + 1] = finish(ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4], ARGV[at + 5], ARGV[at + 6],
    ARGV[at + 7], ARGV[at + 8], ARGV[at + 9], ARGV[at + 10])
end
write_counters()
return out
