--- @needs lib residence
-- end_call: the only place where a call ends. Every path to COMPLETED, CANCELLED or FAILED goes through it, so each
-- waiter gets exactly one end, and no key is left without an expiry (rule 4).
--
-- It is worse to lose a call than to run it twice, so the callers have already checked state and fence.
--
-- Emits: the end of the call to the client's inbox and to the call's log. An event with a `state` is an end.

-- A larger result is kept only in the record, and the inbox event says big=1. An inbox that no client empties gets only
-- small results, so that 10,000 events for a client that is gone are not 10,000 results.
local INBOX_RESULT_MAX, UNREAD_RESULT_MAX, UNREAD_MANY = 65536, 1024, 512

local unread = {}
local function result_max(inbox)
  unread[inbox] = (unread[inbox] or redis.call('XLEN', inbox)) + 1
  return unread[inbox] > UNREAD_MANY and UNREAD_RESULT_MAX or INBOX_RESULT_MAX
end

local function report_end(client, id, state, code, message, result, ...)
  if client == '' then return end
  local inbox = inbox_key(client)
  if #result > result_max(inbox) then return report_end(client, id, state, code, message, '', 'big', 1, ...) end
  local event = {'call', id, 'state', state, 'finished_ms', NOW_TEXT, ...}
  if code ~= '' then event[#event + 1] = 'error_code'; event[#event + 1] = code end
  if message ~= '' then event[#event + 1] = 'error'; event[#event + 1] = message end
  if result ~= '' then event[#event + 1] = 'result'; event[#event + 1] = result end
  redis.call('XADD', inbox, 'MAXLEN', '~', LIMITS.inbox_max, '*', unpack(event))
  touch(inbox, RESULT_TTL)
end

-- The bytes of a finished call's record in Redis besides its body, result and log, including its share of the index and
-- of the process table. Measured by tests/protocol/test_retention.py.
local RECORD_BYTES = 768

-- Whether it is on the router stream, parked or throttled.
local function waits_for_router(c) return c.state == 'PENDING' and c.engine == '' end

-- Subtracts what was counted when the call was created, and counts what remains until its TTL.
local function settle_usage(id, c, state, result)
  if c.bytes == '' then return end -- a record from a version that did not count
  local body = tonumber(c.bytes)
  count(USAGE, 'open_calls', -1)
  count(USAGE, 'open_bytes', -body)
  count(SESSION_BYTES, c.session, -body)
  local kept = RECORD_BYTES + #result + (tonumber(c.log_bytes) or 0) + (state == 'FAILED' and body or 0)
  count(USAGE, 'retained_bytes', kept)
  local n = #finished.ids + 1
  finished.ids[n], finished.bytes[n] = id, kept
  if waits_for_router(c) then finished.entries[n] = c.gen end
end

-- c: the call, from read_call. Further field-value pairs go into the record and into the inbox event.
local function end_call(id, c, state, code, message, result, ...)
  local key = call_key(id)
  if waits_for_router(c) then
    later('ZREM', parked_key(c.model), id)
    if c.context ~= '' then -- it is throttled (throttled.lua)
      redis.call('ZREM', throttled_key(c.model), id)
      redis.call('ZREM', throttled_starving_key(c.model), id)
    end
  end
  depart(id, c)
  -- The body of a failed call is kept, because people look at it and may replay the call.
  set_fields(key, {'state', state, 'finished_ms', NOW_TEXT, 'error_code', code, 'error', message,
    'result', result, ...})
  if state ~= 'FAILED' then redis.call('HDEL', key, c.format) end
  redis.call('PEXPIRE', key, RESULT_TTL)
  if c.stream == '1' then
    redis.call('XADD', log_key(id), '*', 'n', c.events == '' and '0' or c.events, 'state', state, 'error_code', code,
      'error', message)
    redis.call('PEXPIRE', log_key(id), RESULT_TTL)
  end
  if c.deadline_ms ~= '' then redis.call('ZREM', DEADLINES, id) end
  later('SREM', session_calls_key(c.session), id)
  settle_usage(id, c, state, result)
  local session = session_key(c.session)
  set_later(session, 'last_completion_ms', NOW_TEXT)
  count(session, string.lower(state), 1)
  touch(session, SESSION_TTL)
  if c.session ~= id then
    later('LPUSH', session_recent_key(c.session), id)
    touch(session_recent_key(c.session), RESULT_TTL)
  end
  -- Everything that the waiter needs to build its result, so that it need not read the record.
  report_end(c.inbox, id, state, code, message, result, 'n', c.events, 'session', c.session, 'gen', c.gen, 'engine',
    c.engine, 'attempt', c.attempt, 'submitted_ms', c.submitted_ms, 'started_ms', c.started_ms, ...)
  count_total(string.lower(state))
end

-- A dead letter keeps what is needed to understand and to replay the call. Letters have bodies of up to megabytes, so
-- the stream is also limited in bytes. Each letter says how many bytes of letters came before it (`before`). So the
-- oldest and the newest letter tell how many bytes are between them, even if some were replayed or deleted by hand.

-- The fields that a letter takes from the call. The body is in a field named after its format.
local letter_fields = {'session', 'kind', 'model', 'priority', 'stream', 'prompt_tokens', 'traceparent',
  'on_engine_loss', 'parent_session'}
-- The routing fields and the body of a letter, from a table that has them.
local function letter_of(c, format, body)
  local out = {}
  for _, name in ipairs(letter_fields) do
    if (c[name] or '') ~= '' then
      out[#out + 1] = name
      out[#out + 1] = c[name]
    end
  end
  if body ~= '' then
    out[#out + 1] = format
    out[#out + 1] = body
  end
  return out
end
local function add_dead_letter(id, code, message, ...)
  local size = RECORD_BYTES
  for i = 1, select('#', ...) do size = size + #tostring((select(i, ...))) end
  local written = redis.call('HINCRBY', USAGE, 'buried_bytes', size)
  redis.call('XADD', DEAD, 'MAXLEN', '~', 10000, '*', 'id', id, 'error_code', code, 'error', message,
    'before', int(written - size), 'gen', redis.call('HGET', call_key(id), 'gen') or '', ...)
  count_total('dead_letters')
  if LIMITS.dead_bytes == 0 then return end
  for _ = 1, 100 do
    local oldest = redis.call('XRANGE', DEAD, '-', '+', 'COUNT', 1)[1]
    local fields, before = oldest[2], 0
    for i = 1, #fields, 2 do
      if fields[i] == 'before' then before = tonumber(fields[i + 1]) end
    end
    if written - before <= LIMITS.dead_bytes then return end
    redis.call('XDEL', DEAD, oldest[1])
  end
end
