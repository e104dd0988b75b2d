-- end_call: the one place where a call ends. Every path to COMPLETED, CANCELLED or FAILED runs through
-- it, so a waiter is told exactly once and no key is left without an expiry (rule 4).
--
-- It is worse to lose a call than to run it twice: callers have checked state and fence before.
--
-- Emits: the record's end to the client's inbox and to the call's log. An event with a `state` is an end.

-- Results larger than this stay in the record alone; the inbox event then says big=1.
local INBOX_RESULT_MAX = 65536

local function tell_inbox(client, id, state, code, message, result, ...)
  if client == '' then return end
  if #result > INBOX_RESULT_MAX then return tell_inbox(client, id, state, code, message, '', 'big', 1, ...) end
  local inbox = inbox_key(client)
  local event = {'call', id, 'state', state, 'finished_ms', int(NOW), ...}
  if code ~= '' then event[#event + 1] = 'error_code'; event[#event + 1] = code end
  if message ~= '' then event[#event + 1] = 'error'; event[#event + 1] = message end
  if result ~= '' then event[#event + 1] = 'result'; event[#event + 1] = result end
  redis.call('XADD', inbox, 'MAXLEN', '~', INBOX_MAX, '*', unpack(event))
  touch(inbox, RESULT_TTL)
end

-- c: the call as read_call gave it. Further field-value pairs go into the record, and are told.
local function end_call(id, c, state, code, message, result, ...)
  local key = call_key(id)
  -- A finished call's body is not needed any more; a failed one's is, to look at it and to replay it.
  set_fields(key, {'state', state, 'finished_ms', int(NOW), 'error_code', code, 'error', message, 'result', result, ...})
  if state ~= 'FAILED' then redis.call('HDEL', key, c.format) end
  redis.call('PEXPIRE', key, RESULT_TTL)
  if c.stream == '1' then
    redis.call('XADD', log_key(id), '*', 'n', c.events == '' and '0' or c.events, 'state', state, 'error_code', code, 'error', message)
    redis.call('PEXPIRE', log_key(id), RESULT_TTL)
  end
  if c.deadline_ms ~= '' then redis.call('ZREM', DEADLINES, id) end
  later('SREM', session_calls_key(c.session), id)
  local session = session_key(c.session)
  set_later(session, 'last_completion_ms', int(NOW))
  count(session, string.lower(state), 1)
  touch(session, SESSION_TTL)
  if c.session ~= id then
    later('LPUSH', session_recent_key(c.session), id)
    touch(session_recent_key(c.session), RESULT_TTL)
  end
  -- What the waiter needs to make the result of, so that it need not look at the record.
  tell_inbox(c.inbox, id, state, code, message, result, 'n', c.events, 'session', c.session, 'gen', c.gen, 'engine',
    c.engine, 'attempt', c.attempt, 'submitted_ms', c.submitted_ms, 'started_ms', c.started_ms, ...)
  count_total(string.lower(state))
end

-- A dead letter keeps what is needed to understand and to replay the call.
local function bury(id, code, message, ...)
  redis.call('XADD', DEAD, 'MAXLEN', '~', 10000, '*', 'id', id, 'error_code', code, 'error', message, ...)
  count_total('dead_letters')
end
