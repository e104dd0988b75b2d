--- @include lib
-- A worker wakes its own claimer, which sleeps on the bell though there is no room, for better calls may come: now there
-- is room.
--
-- ARGV     engine
-- Emits    a ring to the engine's bell
-- Returns  1
ring(ARGV[4])
write_all()
return 1
