--- @include lib residents residence terminal programs attempts
-- Takes an engine out of service: it gets no new calls, its waiting ones go to other engines, its running ones finish.
--
-- ARGV     engine op ("drain" | "stop": leave when the running calls are done, or at the end of the grace) limit
--          incarnation (of a worker that drains itself, which must not drain its successor; "" = any)
-- Returns  how many calls were given back in this round; -1 = no such engine, or another incarnation's
-- Emits    the op to the worker, once
local e, op, limit, incarnation = ARGV[4], ARGV[5], tonumber(ARGV[6]), ARGV[7]
local r = redis.call('HMGET', engine_key(e), 'state', 'incarnation', 'stopping')
local state, stopping = r[1], r[3]
if not state or state == 'STOPPED' or state == 'DEAD' then return -1 end
if incarnation ~= '' and incarnation ~= r[2] then return -1 end
if state ~= 'DRAINING' or (op == 'stop' and not stopping) then
  redis.call('HSET', engine_key(e), 'state', 'DRAINING')
  if op == 'stop' then redis.call('HSET', engine_key(e), 'stopping', 1) end
  send_command(e, 'op', op)
end
local n = give_back_queue(e, limit)
write_all()
return n
