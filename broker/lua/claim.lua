--- @include lib terminal
-- A worker takes the calls its engine can start now. A claim carries a number: the same number again, after a
-- reply was lost, gives the same calls again instead of losing them.
--
-- ARGV     engine incarnation claim_no max
-- Returns  {"fenced"} if another incarnation owns the engine, else {"ok", call, call, …}, per call
--          {id, gen, attempt, session, kind, stream, inbox, priority, level, events, traceparent, prompt_tokens,
--          body_field, body, cancel}
local e, incarnation, claim_no, max = ARGV[4], ARGV[5], ARGV[6], tonumber(ARGV[7])
local owner = redis.call('HMGET', engine_key(e), 'incarnation', 'claim_no', 'claimed', 'state')
if owner[1] ~= incarnation or owner[4] == 'DEAD' then return {'fenced'} end

local out = {'ok'}
local function hand_over(id)
  local r = redis.call('HMGET', call_key(id), 'gen', 'attempt', 'session', 'kind', 'stream', 'inbox', 'priority',
    'level', 'events', 'traceparent', 'prompt_tokens', 'body', 'json', 'cancel')
  local body_field = r[12] and 'body' or 'json'
  out[#out + 1] = {id, r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8] or '0', r[9], r[10], r[11], body_field,
    r[12] or r[13] or '', r[14] or ''}
end

if owner[2] == claim_no then
  for id in string.gmatch(owner[3] or '', '%S+') do
    local r = redis.call('HMGET', call_key(id), 'state', 'engine')
    if r[1] == 'RUNNING' and r[2] == e then hand_over(id) end
  end
  return out
end

local claimed = {}
for _, id in ipairs(redis.call('ZRANGE', queue_key(e), 0, max - 1)) do
  redis.call('ZREM', queue_key(e), id)
  local key = call_key(id)
  local r = redis.call('HMGET', key, 'state', 'engine', 'load', 'deadline_ms', 'session', 'assigned_ms')
  -- Anything else here is the trace of a call that ended or moved meanwhile.
  if r[1] == 'PENDING' and r[2] == e then
    local load = tonumber(r[3]) or 0
    count(engine_key(e), 'queued_tokens', -load)
    if r[4] ~= '' and tonumber(r[4]) <= NOW then
      end_call(id, 'FAILED', 'deadline_exceeded', 'The deadline passed while the call was waiting.', '')
    else
      redis.call('HSET', key, 'state', 'RUNNING', 'started_ms', int(NOW))
      redis.call('ZADD', running_key(e), int(NOW), id)
      count(engine_key(e), 'running_tokens', load)
      claimed[#claimed + 1] = id
      hand_over(id)
    end
  end
end
if #claimed > 0 then
  redis.call('HSET', engine_key(e), 'claim_no', claim_no, 'claimed', table.concat(claimed, ' '))
end
write_counters()
return out
