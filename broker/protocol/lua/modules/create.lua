--- @needs lib family
-- create_call: the only place where a call's record is created.
--
-- push      returns the id of the call's entry on the router stream, which is also the call's generation. So a cancel
--           or a publish that was meant for an earlier call can never hit a later one of the same id (rule 3).
-- format    "json" (text) or "body" (msgpack): the name of the record's field, and how the result will be encoded
-- headroom  checks the limits for a new call (overload.lua); nil = do not check
--
-- Returns   "new", "duplicate" (same id, same content: the retry of a push) or "conflict", and the call's state
--           or "overloaded" and the limit that was reached; or "invalid" and an error message that says why its session
--           cannot be a child of c.parent_session. In these two cases nothing has changed.
local function create_call(c, push, format, body, headroom)
  local key = call_key(c.id)
  -- "+N": N ms from now.
  if string.sub(c.deadline_ms, 1, 1) == '+' then c.deadline_ms = int(NOW + tonumber(c.deadline_ms)) end
  local seen = redis.call('HMGET', key, 'state', 'digest', 'cancel_before', 'error_code')
  -- A push that was refused as overloaded may be repeated under its id. It is then a new call.
  local refused = seen[4] == 'overloaded' and seen[2] == c.digest
  if seen[1] and not refused then
    if seen[2] ~= c.digest then return 'conflict', seen[1] end
    -- The producer may be a new process, which reads another inbox.
    if c.inbox ~= '' then redis.call('HSET', key, 'inbox', c.inbox) end
    return 'duplicate', seen[1]
  end
  local limit = headroom and headroom(c.session, #body)
  if limit then return 'overloaded', limit end
  local refusal = (c.parent_session or '') ~= '' and adopt(c.session, c.parent_session)
  if refusal then return 'invalid', refusal end
  if refused then redis.call('DEL', key, log_key(c.id)) end
  set_fields(key, {'state', 'PENDING', 'session', c.session, 'kind', c.kind, 'model', c.model,
    'priority', c.priority, 'prompt_tokens', c.prompt_tokens, 'deadline_ms', c.deadline_ms,
    'stream', c.stream, 'inbox', c.inbox, 'traceparent', c.traceparent,
    'on_engine_loss', c.on_engine_loss or '', 'digest', c.digest,
    'gen', push(), 'attempt', 1, 'submitted_ms', NOW_TEXT, 'bytes', #body, 'format', format, format, body})
  if seen[3] then redis.call('PERSIST', key) end
  if c.deadline_ms ~= '' then redis.call('ZADD', DEADLINES, c.deadline_ms, c.id) end
  local session = session_key(c.session)
  set_later(session, 'last_arrival_ms', NOW_TEXT)
  count(session, 'arrivals', 1)
  touch(session, SESSION_TTL)
  later('SADD', session_calls_key(c.session), c.id)
  count_total('submitted')
  count(USAGE, 'open_calls', 1)
  count(USAGE, 'open_bytes', #body)
  count(SESSION_BYTES, c.session, #body)
  return 'new', 'PENDING'
end
