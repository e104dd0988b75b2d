--- @include lib
-- A router leaves, or died long ago: its consumer goes, unless entries are pending for it, which would go with it.
-- One step, for an entry may be handed to it between a look and the deletion.
--
-- ARGV     consumer
-- Returns  1 = gone, 0 = entries are pending for it
local consumer = ARGV[4]
if #redis.call('XPENDING', CALLS, 'router', '-', '+', 1, consumer) > 0 then return 0 end
redis.call('XGROUP', 'DELCONSUMER', CALLS, 'router', consumer)
return 1
