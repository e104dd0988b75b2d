--- @needs lib programs residence
-- Where a call waits: on the router stream, or in the queue of an engine.

-- The fields that a call gets when it is assigned to an engine, and loses when it leaves that engine.
local assigned = {'level', 'program', 'inherited', 'waited_ms', 'ran_ms', 'paid_waited_ms', 'paid_ran_ms',
  'promoted_ms', 'starves_ms', 'reuse', 'costs', 'context', 'let_in'}

local function enqueue(id, e, c, level, starves)
  local score = queue_score(tonumber(c.priority) or 0, level, tonumber(c.submitted_ms))
  later('ZADD', queue_key(e), int(score), id)
  if starves ~= '' then later('ZADD', starving_key(e), starves, id) end
  count_waiting(e, c, level, 1)
  wake(e)
end

-- Puts a PENDING call back on the router stream, without its body. c: the call, from read_call. Further pairs are added
-- to its entry.
local function to_router(id, c, ...)
  depart(id, c)
  redis.call('HSET', call_key(id), 'engine', '', 'state', 'PENDING')
  redis.call('HDEL', call_key(id), unpack(assigned))
  c.id = id
  push_entry(c, 'gen', c.gen, ...)
end

local function to_queue(id, e, c)
  redis.call('HSET', call_key(id), 'state', 'PENDING')
  enqueue(id, e, c, tonumber(c.level) or 0, c.starves_ms)
end

-- Gives an engine's waiting calls back to the router, up to `limit` of them. Returns how many.
local function give_back_queue(e, limit)
  local ids = redis.call('ZRANGE', queue_key(e), 0, limit - 1)
  for _, id in ipairs(ids) do
    local c = read_call(id)
    leave_queue(id, e, c)
    if c.state == 'PENDING' and c.engine == e then
      count_waiting(e, c, c.level, -1)
      to_router(id, c)
    end
  end
  return #ids
end
