--- @include lib programs residents residence terminal attempts throttled
-- Any router, on a timer: throttled calls go back to the router stream if an engine has KV headroom now, because its
-- programs are idle or because it is new. Calls whose model no engine serves now go back, too.
--
-- ARGV     half (half-life of the contexts of idle programs, in ms; "" = admission is off: no call is throttled)
--          factor (the contexts of an engine as a multiple of its KV cache) limit
-- Returns  how many
local half, factor, limit = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
if not any_throttled() then return 0 end

-- By model, the caches of the engines that take calls.
local function caches_by_model()
  local found = {}
  for _, e in ipairs(redis.call('ZRANGE', ENGINES, 0, -1)) do
    local v = redis.call('HMGET', engine_key(e), 'state', 'model', 'kv_tokens')
    if v[1] == 'READY' then
      if redis.call('ZCARD', queue_key(e)) + redis.call('ZCARD', running_key(e)) == 0 then empty_account(e) end
      local caches = gather(found, v[2] or '')
      caches[#caches + 1] = cache_of(e, (tonumber(v[3]) or 0) * factor, half)
    end
  end
  return found
end

local function admit_all(model, most)
  local found = {}
  local ids = redis.call('ZRANGE', throttled_key(model), 0, most - 1)
  for i, id in ipairs(ids) do found[i] = {id = id, model = model} end
  for _, t in ipairs(still_throttled(found)) do admit(t.id, t.call) end
  return #found
end

local many, caches = 0, half and caches_by_model() or {}
for model, of_model in pairs(caches) do
  if many < limit then many = many + admit_waiting(model, of_model, half, limit - many) end
end
for _, model in ipairs(redis.call('SMEMBERS', THROTTLED)) do
  local has_engine = model == '' and next(caches) ~= nil or caches[model] ~= nil
  if not has_engine and many < limit then many = many + admit_all(model, limit - many) end
  if redis.call('ZCARD', throttled_key(model)) == 0 then redis.call('SREM', THROTTLED, model) end
end
write_all()
return many
