--- @include lib
-- Renews a worker's lease and reports its load. Only the incarnation that registered may do so.
--
-- ARGV     engine incarnation state ("STARTING" | "READY" | "DRAINING" | "STOPPED"), then field value … of the load
-- Returns  "ok" | "fenced" (the lease was lost: drop every call and register again)
local e, incarnation, state = ARGV[4], ARGV[5], ARGV[6]
local key = engine_key(e)
local r = redis.call('HMGET', key, 'incarnation', 'state')
if r[1] ~= incarnation or r[2] == 'DEAD' or r[2] == 'STOPPED' then return 'fenced' end
-- An incarnation's state never goes back. A heartbeat may arrive after a later one, and an operator's drain must hold
-- until the worker has seen it.
local rank = {STARTING = 1, READY = 2, DRAINING = 3, STOPPED = 4}
if rank[state] < (rank[r[2]] or 0) then state = r[2] end
local fields = {}
for i = 7, #ARGV do fields[#fields + 1] = ARGV[i] end
redis.call('HSET', key, 'state', state, unpack(fields))
redis.call('ZADD', ENGINES, int(NOW), e)
-- It stays listed for a while, so that its model is known and calls wait for it to come back.
if state == 'STOPPED' then
  redis.call('PEXPIRE', key, SESSION_TTL)
  redis.call('PEXPIRE', residents_key(e), SESSION_TTL)
end
return 'ok'
