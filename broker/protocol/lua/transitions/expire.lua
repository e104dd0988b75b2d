--- @include lib residents residence terminal stop
-- Any router, on a timer: ends calls past their deadline. A waiting one fails at once, a running one is aborted.
-- It is also the router's heartbeat. A consumer's idle time would not do: Redis 7.0 counts a blocked read as idle.
--
-- ARGV     limit router ("" = none: no heartbeat)
-- Returns  how many deadlines had passed
-- Emits    op=cancel to the workers of running calls
local due = redis.call('ZRANGEBYSCORE', DEADLINES, '-inf', int(NOW), 'LIMIT', 0, ARGV[4])
if ARGV[5] ~= '' then
  redis.call('ZADD', P .. 'routers', int(NOW), ARGV[5])
  redis.call('ZREMRANGEBYSCORE', P .. 'routers', '-inf', int(NOW - tonumber(SESSION_TTL)))
  redis.call('PEXPIRE', P .. 'routers', SESSION_TTL)
end
for _, id in ipairs(due) do
  redis.call('ZREM', DEADLINES, id)
  stop_call(id, 'deadline', 'The deadline passed while the call was waiting.')
end
write_all()
return #due
