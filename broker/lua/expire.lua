--- @include lib terminal stop
-- Any router, on a timer: calls past their deadline. A waiting one fails at once, a running one is aborted.
--
-- ARGV     limit
-- Returns  how many deadlines passed
-- Emits    op=cancel to the workers of running calls
local due = redis.call('ZRANGEBYSCORE', DEADLINES, '-inf', int(NOW), 'LIMIT', 0, ARGV[4])
for _, id in ipairs(due) do
  redis.call('ZREM', DEADLINES, id)
  stop_call(id, 'deadline', 'The deadline passed while the call was waiting.')
end
write_all()
return #due
