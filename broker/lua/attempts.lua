-- What happens to a running call whose attempt is over without a result.

-- The score orders an engine's queue: the user's priority class, then the scheduling level, then
-- arrival. 8 + 4 + 41 bits: the exact integers of a double.
local function queue_score(priority, level, submitted_ms)
  local class = math.max(-128, math.min(127, tonumber(priority) or 0)) + 128
  return int((class * 16 + (tonumber(level) or 0)) * 2199023255552 + tonumber(submitted_ms))
end

-- Puts a PENDING call back on the router stream, without its body. c: the call as read_call gave it.
local function to_router(id, c)
  redis.call('HSET', call_key(id), 'engine', '', 'state', 'PENDING', 'level', 0, 'inherited', 0)
  redis.call('XADD', CALLS, '*', 'id', id, 'gen', c.gen, 'session', c.session, 'model', c.model,
    'prompt_tokens', c.prompt_tokens)
end

local function to_queue(id, e, c)
  redis.call('HSET', call_key(id), 'state', 'PENDING')
  later('ZADD', queue_key(e), queue_score(c.priority, c.level, c.submitted_ms), id)
  count(engine_key(e), 'queued_tokens', load_of(c))
  ring(e)
end

local function end_flagged(id, c)
  if c.cancel == 'deadline' then
    end_call(id, c, 'FAILED', 'deadline_exceeded', 'The deadline passed while the call was running.', '')
  else
    end_call(id, c, 'CANCELLED', '', c.cancel_reason, '')
  end
end

-- A call lost its attempt on engine e. fault: whether it counts against max_attempts (a death or an error
-- does, a graceful give-back does not). home: the engine whose queue takes it, "" = the router decides.
-- code, message: what the record will say if this was the last attempt allowed.
local function end_attempt(id, e, fault, max_attempts, home, code, message)
  local key = call_key(id)
  local c = read_call(id)
  later('ZREM', running_key(e), id)
  -- A running set may hold the id of a call that ended or moved: its record says so, and is the law.
  if c.state ~= 'RUNNING' or c.engine ~= e then return end
  count(engine_key(e), 'running_tokens', -load_of(c))
  if c.cancel ~= '' then return end_flagged(id, c) end
  local failures = (tonumber(redis.call('HGET', key, 'failures')) or 0) + (fault and 1 or 0)
  if failures >= max_attempts then
    local more = redis.call('HMGET', key, 'kind', c.format)
    bury(id, code, message, 'session', c.session, 'kind', more[1] or '', 'model', c.model, 'attempts', c.attempt,
      c.format, more[2] or '')
    return end_call(id, c, 'FAILED', code, message, '', 'failures', failures)
  end
  -- attempt is half of the fence: from here on the old attempt can change nothing.
  redis.call('HSET', key, 'attempt', int((tonumber(c.attempt) or 1) + 1), 'failures', failures, 'lost', message)
  count_total('requeued')
  if home == '' then to_router(id, c) else to_queue(id, home, c) end
end

-- Gives an engine's waiting calls back to the router, at most limit of them. Returns how many.
local function give_back_queue(e, limit)
  local ids = redis.call('ZRANGE', queue_key(e), 0, limit - 1)
  for _, id in ipairs(ids) do
    later('ZREM', queue_key(e), id)
    local c = read_call(id)
    if c.state == 'PENDING' and c.engine == e then
      count(engine_key(e), 'queued_tokens', -load_of(c))
      to_router(id, c)
    end
  end
  return #ids
end
