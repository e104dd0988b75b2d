--- @include lib
-- A router leaves, or died long ago. It is no longer listed, and its consumer is deleted, unless entries are pending
-- for it, which would be lost, too. This is one script, because between a check and the deletion an entry could be
-- delivered to the consumer.
--
-- ARGV     consumer
-- Returns  1 = deleted, 0 = entries are pending for it
local consumer = ARGV[4]
redis.call('ZREM', P .. 'routers', consumer)
if #redis.call('XPENDING', CALLS, 'router', '-', '+', 1, consumer) > 0 then return 0 end
redis.call('XGROUP', 'DELCONSUMER', CALLS, 'router', consumer)
return 1
