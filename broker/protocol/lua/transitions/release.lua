--- @include lib residents residence terminal programs attempts events poison lost
-- A worker gives running calls back, because it drains, or because an attempt failed and may be repeated elsewhere.
--
-- ARGV     engine max_attempts max_deaths, then per call: id gen attempt fault ("death" | "error" | "") error_code
--          error
-- Returns  list, per call: "released" | "stale"
local e, max_attempts, max_deaths = ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
local incarnation = redis.call('HGET', engine_key(e), 'incarnation') or e
local out = {}
for at = 7, #ARGV, 6 do
  local id = ARGV[at]
  local r = redis.call('HMGET', call_key(id), 'state', 'gen', 'attempt', 'engine')
  if r[1] == 'RUNNING' and r[2] == ARGV[at + 1] and r[3] == ARGV[at + 2] and r[4] == e then
    end_attempt(id, e, {fault = ARGV[at + 3], incident = incarnation, max_attempts = max_attempts,
      max_deaths = max_deaths, requeue_on = '', code = ARGV[at + 4], message = ARGV[at + 5]})
    out[#out + 1] = 'released'
  else
    out[#out + 1] = 'stale'
  end
end
write_all()
return out
