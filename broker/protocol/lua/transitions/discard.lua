--- @include lib
-- Deletes a dead letter whose call has been pushed again.
--
-- ARGV     entry
-- Returns  1 = removed, 0 = it was gone
return redis.call('XDEL', DEAD, ARGV[4])
