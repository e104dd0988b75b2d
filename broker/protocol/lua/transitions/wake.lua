--- @include lib
-- A worker wakes its own claimer. The claimer waits on the wake-up list even while its engine is full, because better
-- calls may come; now the engine can take more.
--
-- ARGV     engine
-- Emits    a wake-up to the engine
-- Returns  1
wake(ARGV[4])
write_all()
return 1
