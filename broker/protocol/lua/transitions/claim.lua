--- @include lib programs residents residence terminal poison
-- A worker takes the calls that its engine can start now. A claim has a number: after a lost reply, the same number
-- gives the same calls again instead of losing them.
--
-- A suspect of killing engines (poison.lua) runs alone. Once it is first in the queue, no call is handed out until all
-- running calls have left. Then only the suspect is handed out, and no other call until it has left.
--
-- Calls that have waited for too long are first moved ahead in the queue.
--
-- A full engine may preempt running calls for better ones. It claims up to `ahead` calls beyond `max` if they are
-- better than its preemption threshold: of a better class, or of the same class and a better level.
--
-- ARGV     engine incarnation claim_no max max_deaths ahead threshold_class threshold_level
-- Returns  {"fenced"} if another incarnation owns the engine, else {"ok", call, call, …}, per call
--          {id, gen, attempt, session, kind, stream, inbox, priority, level, events, traceparent, prompt_tokens,
--          format, body, cancel, on_engine_loss, begins, left: milliseconds until its deadline, "" = it has none,
--          program, inherited, waited_ms, ran_ms, reuse}
local e, incarnation, claim_no, max, max_deaths = ARGV[4], ARGV[5], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
local owner = redis.call('HMGET', engine_key(e), 'incarnation', 'claim_no', 'claimed', 'state', 'alone',
  'speed', 'prefill_until')
if owner[1] ~= incarnation or owner[4] == 'DEAD' then return {'fenced'} end

local out = {'ok'}
local job_fields = {'state', 'engine', 'gen', 'attempt', 'session', 'kind', 'stream', 'inbox', 'priority', 'level',
  'events', 'traceparent', 'prompt_tokens', 'deadline_ms', 'cancel', 'format', 'body', 'json',
  'deaths', 'on_engine_loss', 'begins', 'program', 'inherited', 'submitted_ms', 'started_ms', 'waited_ms', 'ran_ms',
  'paid_waited_ms', 'paid_ran_ms', 'promoted_ms', 'reuse'}
local function number(value) return tonumber(value) or 0 end

-- The program's unpaid wait, including this call's, and its unpaid run time. If this call was promoted, only its wait
-- since then counts.
local function waited_and_ran(c)
  local started = number(c.started_ms)
  if c.promoted_ms ~= '' then return started - number(c.promoted_ms), 0 end
  local waited = unpaid(number(c.waited_ms), number(c.paid_waited_ms))
  return waited + started - number(c.submitted_ms), unpaid(number(c.ran_ms), number(c.paid_ran_ms))
end

local function hand_over(id, c)
  local waited, ran = waited_and_ran(c)
  out[#out + 1] = {id, c.gen, c.attempt, c.session, c.kind, c.stream, c.inbox, c.priority, c.level, c.events,
    c.traceparent, c.prompt_tokens, c.format, c[c.format], c.cancel, c.on_engine_loss, c.begins,
    c.deadline_ms ~= '' and int(math.max(0, tonumber(c.deadline_ms) - NOW)) or '',
    c.program ~= '' and c.program or c.session, c.inherited, int(math.max(0, waited)), int(ran), c.reuse}
end

if owner[2] == claim_no then
  for id in string.gmatch(owner[3] or '', '%S+') do
    local c = read_call(id, job_fields)
    if c.state == 'RUNNING' and c.engine == e then hand_over(id, c) end
  end
  return out
end

-- Calls that starve now move to the best level of their class (programs.lua).
local function promote(id)
  redis.call('ZREM', starving_key(e), id)
  local c = read_call(id, {'state', 'engine', 'priority', 'level', 'submitted_ms', 'prompt_tokens', 'reuse'})
  if c.state ~= 'PENDING' or c.engine ~= e then return end
  redis.call('HDEL', call_key(id), 'level', 'starves_ms')
  redis.call('HSET', call_key(id), 'promoted_ms', NOW_TEXT)
  redis.call('ZADD', queue_key(e), 'XX', int(queue_score(number(c.priority), 0, number(c.submitted_ms))), id)
  count_waiting(e, c, c.level, -1)
  count_waiting(e, c, 0, 1)
  count_total('promoted')
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', starving_key(e), '-inf', NOW_TEXT, 'LIMIT', 0, PROMOTE_MANY)) do
  promote(id)
end

-- The first calls of the queue, as many as may be claimed.
local function first()
  local many, ahead = max, tonumber(ARGV[9])
  if ahead > many then
    local threshold = int(queue_score(tonumber(ARGV[10]), tonumber(ARGV[11]), 0))
    many = math.max(many, math.min(ahead, redis.call('ZCOUNT', queue_key(e), '-inf', '(' .. threshold)))
  end
  return many > 0 and redis.call('ZRANGE', queue_key(e), 0, many - 1) or {}
end

-- The calls that may be handed out now, in order.
local function candidates()
  local alone = owner[5]
  if not alone then return first() end
  local c = read_call(alone, job_fields)
  if c.engine == e and is_suspect(c.deaths, max_deaths) then
    if c.state == 'RUNNING' then return {} end
    if c.state == 'PENDING' then return {alone} end
  end
  -- It has ended or moved, or is no longer a suspect.
  redis.call('HDEL', engine_key(e), 'alone')
  return first()
end

local claimed, work = {}, 0
local function take(id, c)
  c.started_ms = NOW_TEXT
  redis.call('HSET', call_key(id), 'state', 'RUNNING', 'started_ms', c.started_ms)
  later('ZADD', running_key(e), NOW_TEXT, id)
  count(engine_key(e), 'running_tokens', load_of(c))
  work = work + work_of(c)
  claimed[#claimed + 1] = id
  hand_over(id, c)
end

for _, id in ipairs(candidates()) do
  local c = read_call(id, job_fields)
  -- If not: the call has ended or moved, and its id was left in the queue.
  local here = c.state == 'PENDING' and c.engine == e
  local late = here and c.deadline_ms ~= '' and tonumber(c.deadline_ms) <= NOW
  local suspect = here and not late and is_suspect(c.deaths, max_deaths)
  if suspect then redis.call('HSET', engine_key(e), 'alone', id) end
  if suspect and (#claimed > 0 or is_busy(e)) then break end
  leave_queue(id, e, c)
  if here then count_waiting(e, c, c.level, -1) end
  if late then
    end_call(id, read_call(id), 'FAILED', 'deadline_exceeded', 'The deadline passed while the call was waiting.', '')
    wake_if_reserved(e)
  elseif here then
    take(id, c)
  end
  if suspect then break end
end
-- When the engine will have computed the prompts of its claimed calls, by its own speed. The speed's second number is
-- seconds per token (workers/meters/speed.py).
local function prefill_until()
  local token_s = number(string.match(owner[6] or '', '^%S+ (%S+)'))
  return int(math.max(NOW, number(owner[7])) + work * token_s * 1000)
end
if #claimed > 0 then
  redis.call('HSET', engine_key(e), 'claim_no', claim_no, 'claimed', table.concat(claimed, ' '), 'prefill_until',
    prefill_until())
end
write_all()
return out
