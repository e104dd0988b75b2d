--- @include lib
-- Updates of the affinity hash by programs that manage it themselves (KVCacheCoordinator).
--
-- ARGV     op …
--          "cached" session engine tokens
--              this many tokens of the session are now cached on the engine
--          "asked" hit
--              an engine was requested for a long prompt: hit = "1" if one has its cache, else "0"
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
