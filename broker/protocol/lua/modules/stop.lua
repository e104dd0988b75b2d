--- @needs lib terminal
-- stop_call: ends a waiting call at once; flags a running one and wakes its worker.
--
-- flag: "user" (the call becomes CANCELLED) | "deadline" (it becomes FAILED)
-- Returns "ended" | "flagged" | "before" (it already had this flag) | "other" (it already has the other flag)
--         | the terminal state | "" (no such call)
local function stop_call(id, flag, reason)
  local c = read_call(id)
  if c.state == 'RUNNING' then
    if c.cancel ~= '' then return c.cancel == flag and 'before' or 'other' end
    redis.call('HSET', call_key(id), 'cancel', flag, 'cancel_reason', reason)
    send_command(c.engine, 'op', 'cancel', 'id', id, 'gen', c.gen, 'attempt', c.attempt)
    return 'flagged'
  end
  if c.state ~= 'PENDING' then return c.state end
  if c.engine ~= '' then
    -- A call that its creator runs itself (transition.lua) is in no queue.
    if redis.call('ZSCORE', queue_key(c.engine), id) then
      leave_queue(id, c.engine, c)
      count_waiting(c.engine, c, c.level, -1)
    end
    wake_if_reserved(c.engine)
  end
  if flag == 'deadline' then
    end_call(id, c, 'FAILED', 'deadline_exceeded', reason, '')
  else
    end_call(id, c, 'CANCELLED', '', reason, '')
  end
  return 'ended'
end
