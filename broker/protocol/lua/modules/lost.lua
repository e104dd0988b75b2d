--- @needs lib terminal attempts events poison
-- end_attempt: an attempt of a running call has ended without a result.

local attempt_fields = {'failures', 'deaths', 'on_engine_loss', 'begins', 'kind', unpack(call_fields)}

local function end_flagged(id, c)
  if c.cancel == 'deadline' then
    end_call(id, c, 'FAILED', 'deadline_exceeded', 'The deadline passed while the call was running.', '')
  else
    end_call(id, c, 'CANCELLED', '', c.cancel_reason, '')
  end
end

local function end_as_dead_letter(id, c, code, message, ...)
  c.traceparent = redis.call('HGET', call_key(id), 'traceparent') or ''
  local body = redis.call('HGET', call_key(id), c.format) or ''
  add_dead_letter(id, code, message, 'attempts', c.attempt, unpack(letter_of(c, c.format, body)))
  end_call(id, c, 'FAILED', code, message, '', ...)
end

-- The engine's process died while the call ran. Returns whether the call may continue.
local function survives_death(id, c, e, lost)
  if c.on_engine_loss == 'fail' then
    end_call(id, c, 'FAILED', 'engine_lost', lost.message, '')
    return false
  end
  local deaths = unsolved(c.deaths, lost.incident)
  deaths[#deaths + 1] = lost.incident
  if #deaths >= lost.max_deaths and redis.call('HGET', engine_key(e), 'alone') == id then
    solve(deaths)
    end_as_dead_letter(id, c, 'attempts_exhausted',
      #deaths .. ' engine processes died while they ran the call, the last one while it ran alone.',
      'deaths', table.concat(deaths, ' '))
    return false
  end
  redis.call('HSET', call_key(id), 'deaths', table.concat(deaths, ' '))
  return true
end

-- The engine reported an error for the call, and still runs. Returns whether the call may continue.
local function survives_error(id, c, lost)
  local failures = (tonumber(c.failures) or 0) + 1
  if failures < lost.max_attempts then
    redis.call('HSET', call_key(id), 'failures', failures)
    return true
  end
  end_as_dead_letter(id, c, lost.code, lost.message, 'failures', failures)
  return false
end

-- If a stream must start over, adds an event that says so: its text starts again after this event.
local function restart_stream(id, c)
  local n = tonumber(c.events) or 0
  if c.on_engine_loss ~= 'restart' or n <= (tonumber(c.begins) or 0) then return end
  add_event(id, c, int(n), {'restart', '1'}, '')
  redis.call('HSET', call_key(id), 'begins', int(n + 1))
end

-- A call has lost its attempt on engine e. lost:
--   fault         "death" (the engine's process died) | "error" (it failed on this call) | "" (the worker gave it back)
--   incident      the incarnation of the engine
--   max_attempts  errors after which a call is a dead letter; max_deaths: engine deaths after which it is one
--   requeue_on    the engine whose queue takes the call; "" = the router decides
--   code, message the error of the record if no more attempts are allowed
local function end_attempt(id, e, lost)
  local c = read_call(id, attempt_fields)
  later('ZREM', running_key(e), id)
  -- A running set may hold the id of a call that has ended or moved. Its record says so, and the record decides.
  if c.state ~= 'RUNNING' or c.engine ~= e then return end
  count(engine_key(e), 'running_tokens', -load_of(c))
  wake_if_reserved(e)
  if c.cancel ~= '' then return end_flagged(id, c) end
  if lost.fault == 'death' and not survives_death(id, c, e, lost) then return end
  if lost.fault == 'error' and not survives_error(id, c, lost) then return end
  restart_stream(id, c)
  -- The attempt is half of the fence: from here on the old attempt can change nothing.
  redis.call('HSET', call_key(id), 'attempt', int((tonumber(c.attempt) or 1) + 1), 'lost', lost.message)
  count_total('requeued')
  if lost.requeue_on == '' then to_router(id, c) else to_queue(id, lost.requeue_on, c) end
end
