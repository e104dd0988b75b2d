--- @include lib terminal
-- A worker takes the calls its engine can start now. A claim carries a number: the same number again, after a
-- reply was lost, gives the same calls again instead of losing them.
--
-- ARGV     engine incarnation claim_no max
-- Returns  {"fenced"} if another incarnation owns the engine, else {"ok", call, call, …}, per call
--          {id, gen, attempt, session, kind, stream, inbox, priority, level, events, traceparent, prompt_tokens,
--          format, body, cancel}
local e, incarnation, claim_no, max = ARGV[4], ARGV[5], ARGV[6], tonumber(ARGV[7])
local owner = redis.call('HMGET', engine_key(e), 'incarnation', 'claim_no', 'claimed', 'state')
if owner[1] ~= incarnation or owner[4] == 'DEAD' then return {'fenced'} end

local out = {'ok'}
local job_fields = {'state', 'engine', 'gen', 'attempt', 'session', 'kind', 'stream', 'inbox', 'priority', 'level',
  'events', 'traceparent', 'prompt_tokens', 'deadline_ms', 'cancel', 'format', 'body', 'json'}
local function hand_over(id, c)
  out[#out + 1] = {id, c.gen, c.attempt, c.session, c.kind, c.stream, c.inbox, c.priority, c.level, c.events,
    c.traceparent, c.prompt_tokens, c.format, c[c.format], c.cancel}
end

if owner[2] == claim_no then
  for id in string.gmatch(owner[3] or '', '%S+') do
    local c = read_call(id, job_fields)
    if c.state == 'RUNNING' and c.engine == e then hand_over(id, c) end
  end
  return out
end

local claimed = {}
for _, id in ipairs(redis.call('ZRANGE', queue_key(e), 0, max - 1)) do
  later('ZREM', queue_key(e), id)
  local c = read_call(id, job_fields)
  -- Anything else here is the trace of a call that ended or moved meanwhile.
  if c.state == 'PENDING' and c.engine == e then
    local load = load_of(c)
    count(engine_key(e), 'queued_tokens', -load)
    if c.deadline_ms ~= '' and tonumber(c.deadline_ms) <= NOW then
      end_call(id, read_call(id), 'FAILED', 'deadline_exceeded', 'The deadline passed while the call was waiting.', '')
    else
      redis.call('HSET', call_key(id), 'state', 'RUNNING', 'started_ms', int(NOW))
      later('ZADD', running_key(e), int(NOW), id)
      count(engine_key(e), 'running_tokens', load)
      claimed[#claimed + 1] = id
      hand_over(id, c)
    end
  end
end
if #claimed > 0 then
  redis.call('HSET', engine_key(e), 'claim_no', claim_no, 'claimed', table.concat(claimed, ' '))
end
write_all()
return out
