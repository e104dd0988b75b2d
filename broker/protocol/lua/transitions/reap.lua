--- @include lib residents residence terminal programs attempts events poison lost
-- Any router, on a timer: engines whose lease has expired are dead, and their calls go to other engines.
--
-- ARGV     lease_ms max_deaths limit (calls moved per run, so that no run blocks Redis for long)
--          engine ("" = all whose lease has expired; else only this one, whose death its supervisor reports)
--          incarnation of that engine
-- Returns  {calls moved, engine, …}: the engines found dead in this run
local lease, max_deaths, limit = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local only, incarnation = ARGV[7], ARGV[8]
local message = 'The worker died while the call was running.'
local candidates
if only == '' then
  candidates = redis.call('ZRANGEBYSCORE', ENGINES, '-inf', int(NOW - lease))
elseif redis.call('HGET', engine_key(only), 'incarnation') == incarnation then
  candidates = {only}
else
  candidates = {}
end
local moved, dead = 0, {}
for _, e in ipairs(candidates) do
  local key = engine_key(e)
  local state = redis.call('HGET', key, 'state') -- nil: the hash of a stopped or dead engine has expired
  if state and state ~= 'DEAD' and state ~= 'STOPPED' then
    redis.call('HSET', key, 'state', 'DEAD', 'died_ms', int(NOW))
    redis.call('PEXPIRE', key, SESSION_TTL)
    dead[#dead + 1] = e
  end
  if moved < limit then
    local running = redis.call('ZRANGE', running_key(e), 0, limit - moved - 1)
    for _, id in ipairs(running) do
      end_attempt(id, e, {fault = 'death', incident = redis.call('HGET', key, 'incarnation') or e,
        max_deaths = max_deaths, requeue_on = '', message = message})
    end
    moved = moved + #running
  end
  if moved < limit then moved = moved + give_back_queue(e, limit - moved) end
  if moved < limit then close_account(e) end
  if not state then increments[key], increments[work_key(e)] = nil, nil end
  if moved < limit then
    if state then
      redis.call('HSET', key, 'queued_tokens', 0, 'running_tokens', 0)
      redis.call('DEL', work_key(e))
      increments[key], increments[work_key(e)] = nil, nil
    end
    -- The engine stays listed until its hash expires, so that its model is known and calls wait for it to come back.
    local beat = tonumber(redis.call('ZSCORE', ENGINES, e) or '0')
    if not state or beat < NOW - tonumber(SESSION_TTL) then
      redis.call('ZREM', ENGINES, e)
      redis.call('PEXPIRE', key, SESSION_TTL)
    end
  end
end
write_all()
return {moved, unpack(dead)}
