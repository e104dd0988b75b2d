--- @include lib programs residents residence attempts
-- An engine of this model is ready: calls that were parked for it go back to the router, oldest first.
--
-- ARGV     model ("" = calls that name no model) limit
-- Returns  how many
local model, limit = ARGV[4], tonumber(ARGV[5])
local ids = redis.call('ZRANGE', parked_key(model), 0, limit - 1)
for _, id in ipairs(ids) do
  later('ZREM', parked_key(model), id)
  local c = read_call(id)
  if c.state == 'PENDING' and c.engine == '' then to_router(id, c) end
end
write_all()
return #ids
