--- @include lib residents residence terminal stop
-- Cancels one call: a waiting one at once, a running one by a flag and a command to its worker.
--
-- ARGV     id reason
-- Returns  "cancelled" (now or before, because a cancel can be repeated after a lost reply)
--          | "cancelling" (the worker will end it and keep the partial text) | "finished" (too late)
--          | "noted" (no record yet, but the router stream is not empty: the call ends on arrival) | "unknown"
-- Emits    to the worker: op=cancel with the call's generation and attempt
local id, reason = ARGV[4], ARGV[5]
local done = stop_call(id, 'user', reason)
write_all()
if done == 'ended' or done == 'CANCELLED' then return 'cancelled' end
if done == 'flagged' or done == 'before' then return 'cancelling' end
if done ~= '' then return 'finished' end
local last = redis.call('XREVRANGE', CALLS, '+', '-', 'COUNT', 1)
if not last[1] then return 'unknown' end
redis.call('HSET', call_key(id), 'cancel_before', last[1][1], 'cancel_reason', reason)
redis.call('PEXPIRE', call_key(id), RESULT_TTL)
return 'noted'
