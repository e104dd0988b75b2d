--- @include lib
-- The process table's own steps, for programs that report to it themselves (SessionManager, GlobalProcessTable).
--
-- ARGV     op session …
--          "start"                       makes the entry; Returns 1 if it is new
--          "end"                         removes entry and affinity unless calls are active; Returns calls active
--          "charge" inherited service waiting_ms   service = max(service, inherited + own); inherited "" = the
--                                        entry's present service (a sequential call). Returns the new service
local op, s = ARGV[4], ARGV[5]
local key = session_key(s)
if op == 'start' then
  local new = redis.call('HSETNX', key, 'started_ms', int(NOW))
  redis.call('HSETNX', key, 'service', 0)
  redis.call('PEXPIRE', key, SESSION_TTL)
  return new
elseif op == 'end' then
  local active = redis.call('SCARD', session_calls_key(s))
  if active == 0 then redis.call('DEL', key, affinity_key(s), session_recent_key(s)) end
  return active
end
local service = tonumber(redis.call('HGET', key, 'service')) or 0
local inherited = ARGV[6] == '' and service or tonumber(ARGV[6])
service = math.max(service, inherited + tonumber(ARGV[7]))
redis.call('HSET', key, 'service', int(service), 'last_completion_ms', int(NOW))
redis.call('HINCRBY', key, 'waiting_ms', int(tonumber(ARGV[8])))
redis.call('HINCRBY', key, 'completed', 1)
redis.call('PEXPIRE', key, SESSION_TTL)
return int(service)
