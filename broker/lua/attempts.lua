-- Where a call waits: the router stream, or the queue of an engine. Needs lib, programs and terminal.

-- Puts a PENDING call back on the router stream, without its body. c: the call as read_call gave it.
local function to_router(id, c)
  redis.call('HSET', call_key(id), 'engine', '', 'state', 'PENDING', 'level', 0, 'inherited', 0)
  redis.call('XADD', CALLS, '*', 'id', id, 'gen', c.gen, 'session', c.session, 'model', c.model,
    'prompt_tokens', c.prompt_tokens)
end

local function to_queue(id, e, c)
  redis.call('HSET', call_key(id), 'state', 'PENDING')
  later('ZADD', queue_key(e), int(queue_score(tonumber(c.priority) or 0, tonumber(c.level) or 0, tonumber(c.submitted_ms))), id)
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
