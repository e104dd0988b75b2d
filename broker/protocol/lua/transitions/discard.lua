--- @include lib
-- A dead letter is removed: its call has been sent again.
--
-- ARGV     entry
-- Returns  1 = removed, 0 = it was gone
return redis.call('XDEL', DEAD, ARGV[4])
