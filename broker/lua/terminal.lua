-- end_call: the one place where a call ends. Every path to COMPLETED, CANCELLED or FAILED runs through
-- it, so a waiter is told exactly once and no key is left without an expiry (rule 4).
--
-- It is worse to lose a call than to run it twice: callers have checked state and fence before.
--
-- Emits: the record's end to the client's inbox and to the call's log. An event with a `state` is an end.

-- Results larger than this stay in the record alone; the inbox event then says big=1.
local INBOX_RESULT_MAX = 65536

local touched = {}
local function touch(key, ttl)
  if not touched[key] then
    redis.call('PEXPIRE', key, ttl)
    touched[key] = true
  end
end

-- What the record and the end event share, so that a waiter needs no second look.
local told_fields = {'session', 'gen', 'engine', 'attempt', 'submitted_ms', 'started_ms', 'prompt_tokens',
  'completion_tokens', 'cached_tokens', 'stream', 'inbox', 'deadline_ms', 'events'}

local function tell_inbox(client, id, state, code, message, result, n, more)
  if client == '' then return end
  local inbox = inbox_key(client)
  local big = #result > INBOX_RESULT_MAX and '1' or ''
  redis.call('XADD', inbox, 'MAXLEN', '~', INBOX_MAX, '*', 'call', id, 'n', n, 'state', state, 'error_code', code,
    'error', message, 'result', big == '' and result or '', 'big', big, 'finished_ms', int(NOW), unpack(more))
  touch(inbox, RESULT_TTL)
end

local function end_call(id, state, code, message, result)
  local key = call_key(id)
  local v = redis.call('HMGET', key, unpack(told_fields))
  local c, told = {}, {}
  for i, name in ipairs(told_fields) do
    c[name] = v[i] or ''
    if i <= 9 and v[i] then
      told[#told + 1] = name
      told[#told + 1] = v[i]
    end
  end
  redis.call('HSET', key, 'state', state, 'finished_ms', int(NOW), 'error_code', code, 'error', message,
    'result', result)
  if state ~= 'FAILED' then redis.call('HDEL', key, 'body', 'json') end
  redis.call('PEXPIRE', key, RESULT_TTL)
  if c.stream == '1' then
    redis.call('XADD', log_key(id), '*', 'n', c.events, 'state', state, 'error_code', code, 'error', message)
    redis.call('PEXPIRE', log_key(id), RESULT_TTL)
  end
  if c.deadline_ms ~= '' then redis.call('ZREM', DEADLINES, id) end
  redis.call('SREM', session_calls_key(c.session), id)
  local session = session_key(c.session)
  redis.call('HSET', session, 'last_completion_ms', int(NOW))
  redis.call('HINCRBY', session, string.lower(state), 1)
  redis.call('PEXPIRE', session, SESSION_TTL)
  if c.session ~= id then
    local recent = session_recent_key(c.session)
    redis.call('LPUSH', recent, id)
    redis.call('LTRIM', recent, 0, 255)
    redis.call('PEXPIRE', recent, RESULT_TTL)
  end
  tell_inbox(c.inbox, id, state, code, message, result, c.events, told)
  count_total(string.lower(state))
end

-- A dead letter keeps what is needed to understand and to replay the call.
local function bury(id, code, message, ...)
  redis.call('XADD', DEAD, 'MAXLEN', '~', 10000, '*', 'id', id, 'error_code', code, 'error', message, ...)
  count_total('dead_letters')
end
