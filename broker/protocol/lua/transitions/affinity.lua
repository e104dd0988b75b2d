--- @include lib
-- The affinity hash's own steps, for programs that keep it themselves (KVCacheCoordinator).
--
-- ARGV     op …
--          "cached" session engine tokens
--              so many tokens of the session are cached on the engine now
--          "asked" hit
--              a long prompt's engine was asked for: hit = "1" if one has its cache, else "0"
-- Returns  1
local op = ARGV[4]
if op == 'cached' then
  local key = affinity_key(ARGV[5])
  redis.call('HSET', key, ARGV[6], ARGV[7] .. ':' .. NOW_TEXT)
  touch(key, SESSION_TTL)
else
  count_total(ARGV[5] == '1' and 'affinity_hits' or 'affinity_misses')
end
write_all()
return 1
