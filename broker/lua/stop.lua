-- stop_call: ends a waiting call at once, flags a running one and wakes its worker. Needs lib and terminal.
--
-- flag: "user" (the call becomes CANCELLED) | "deadline" (it becomes FAILED)
-- Returns "ended" | "flagged" | "before" (flagged earlier) | the terminal state | "" (no such call)
local function stop_call(id, flag, reason)
  local key = call_key(id)
  local r = redis.call('HMGET', key, 'state', 'engine', 'gen', 'attempt', 'load', 'cancel', 'model')
  if r[1] == 'RUNNING' then
    if r[6] then return 'before' end
    redis.call('HSET', key, 'cancel', flag, 'cancel_reason', reason)
    order(r[2], 'op', 'cancel', 'id', id, 'gen', r[3], 'attempt', r[4])
    return 'flagged'
  end
  if r[1] ~= 'PENDING' then return r[1] or '' end
  if r[2] ~= '' then
    redis.call('ZREM', queue_key(r[2]), id)
    count(engine_key(r[2]), 'queued_tokens', -(tonumber(r[5]) or 0))
  else
    redis.call('ZREM', parked_key(r[7] or ''), id)
  end
  if flag == 'deadline' then
    end_call(id, 'FAILED', 'deadline_exceeded', reason, '')
  else
    end_call(id, 'CANCELLED', '', reason, '')
  end
  return 'ended'
end
