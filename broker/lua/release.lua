--- @include lib terminal attempts
-- A worker gives running calls back: it drains, or an attempt failed and may be tried again elsewhere.
--
-- ARGV     engine max_attempts, then per call: id gen attempt fault ("1" counts against max_attempts) error_code error
-- Returns  list, per call: "released" | "stale"
local e, max_attempts = ARGV[4], tonumber(ARGV[5])
local out = {}
for at = 6, #ARGV, 6 do
  local id = ARGV[at]
  local r = redis.call('HMGET', call_key(id), 'state', 'gen', 'attempt', 'engine')
  if r[1] == 'RUNNING' and r[2] == ARGV[at + 1] and r[3] == ARGV[at + 2] and r[4] == e then
    end_attempt(id, e, ARGV[at + 3] == '1', max_attempts, '', ARGV[at + 4], ARGV[at + 5])
    out[#out + 1] = 'released'
  else
    out[#out + 1] = 'stale'
  end
end
write_all()
return out
