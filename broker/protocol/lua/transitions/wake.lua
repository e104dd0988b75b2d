--- @include lib
-- A worker wakes its own claimer, because its engine can take more calls. The claimer blocks on the wake-up list even
-- while its engine is full, because better calls may come.
--
-- ARGV     engine
-- Emits    a wake-up to the engine
-- Returns  1
wake(ARGV[4])
write_all()
return 1
