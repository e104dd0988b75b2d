--- @include lib attempts
-- An engine of this model is ready: calls that waited for one go back to the router, oldest first.
--
-- ARGV     model ("" = calls that named none) limit
-- Returns  how many
local model, limit = ARGV[4], tonumber(ARGV[5])
local ids = redis.call('ZRANGE', parked_key(model), 0, limit - 1)
for _, id in ipairs(ids) do
  redis.call('ZREM', parked_key(model), id)
  local r = redis.call('HMGET', call_key(id), 'state', 'engine', 'gen', 'session', 'model')
  if r[1] == 'PENDING' and r[2] == '' then to_router(id, r[3], r[4], r[5]) end
end
return #ids
