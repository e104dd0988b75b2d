-- What happens to a running call whose attempt is over without a result.

-- The score orders an engine's queue: the user's priority class, then the scheduling level, then
-- arrival. 8 + 4 + 41 bits: the exact integers of a double.
local function queue_score(priority, level, submitted_ms)
  local class = math.max(-128, math.min(127, tonumber(priority) or 0)) + 128
  return int((class * 16 + (tonumber(level) or 0)) * 2199023255552 + tonumber(submitted_ms))
end

-- Puts a PENDING call back on the router stream, without its body.
local function to_router(id, gen, session, model)
  redis.call('HSET', call_key(id), 'engine', '', 'state', 'PENDING')
  redis.call('XADD', CALLS, '*', 'id', id, 'gen', gen, 'session', session, 'model', model)
end

local function to_queue(id, e, r)
  redis.call('HSET', call_key(id), 'state', 'PENDING')
  redis.call('ZADD', queue_key(e), queue_score(r.priority, r.level, r.submitted_ms), id)
  count(engine_key(e), 'queued_tokens', tonumber(r.load) or 0)
  ring(e)
end

local function end_flagged(id, flag, reason)
  if flag == 'deadline' then
    end_call(id, 'FAILED', 'deadline_exceeded', 'The deadline passed while the call was running.', '')
  else
    end_call(id, 'CANCELLED', '', reason, '')
  end
end

local attempt_fields = {'gen', 'session', 'model', 'attempt', 'failures', 'cancel', 'cancel_reason', 'priority',
  'level', 'submitted_ms', 'load', 'kind'}

-- A call lost its attempt on engine e. fault: whether it counts against max_attempts (a death or an error
-- does, a graceful give-back does not). home: the engine whose queue takes it, "" = the router decides.
-- code, message: what the record will say if this was the last attempt allowed.
local function end_attempt(id, e, fault, max_attempts, home, code, message)
  local key = call_key(id)
  local v = redis.call('HMGET', key, unpack(attempt_fields))
  local r = {}
  for i, name in ipairs(attempt_fields) do r[name] = v[i] or '' end
  redis.call('ZREM', running_key(e), id)
  count(engine_key(e), 'running_tokens', -(tonumber(r.load) or 0))
  if r.cancel ~= '' then return end_flagged(id, r.cancel, r.cancel_reason) end
  local failures = (tonumber(r.failures) or 0) + (fault and 1 or 0)
  if failures >= max_attempts then
    local body = redis.call('HMGET', key, 'body', 'json')
    local field = body[1] and 'body' or 'json'
    bury(id, code, message, 'session', r.session, 'kind', r.kind, 'model', r.model, 'attempts', r.attempt,
      field, body[1] or body[2] or '')
    redis.call('HSET', key, 'failures', failures)
    return end_call(id, 'FAILED', code, message, '')
  end
  -- attempt is half of the fence: from here on the old attempt can change nothing.
  redis.call('HSET', key, 'attempt', int((tonumber(r.attempt) or 1) + 1), 'failures', failures, 'lost', message)
  count_total('requeued')
  if home == '' then to_router(id, r.gen, r.session, r.model) else to_queue(id, home, r) end
end

-- Gives an engine's waiting calls back to the router, at most limit of them. Returns how many.
local function give_back_queue(e, limit)
  local ids = redis.call('ZRANGE', queue_key(e), 0, limit - 1)
  for _, id in ipairs(ids) do
    local r = redis.call('HMGET', call_key(id), 'state', 'engine', 'gen', 'session', 'model', 'load')
    redis.call('ZREM', queue_key(e), id)
    if r[1] == 'PENDING' and r[2] == e then
      count(engine_key(e), 'queued_tokens', -(tonumber(r[6]) or 0))
      to_router(id, r[3], r[4], r[5])
    end
  end
  return #ids
end
