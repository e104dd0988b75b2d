--- @include lib programs residents residence terminal attempts held
-- Any router, on a timer: calls that wait for room go back to the router stream where an engine has some by now (its
-- programs think, or it has just come), and so do those for which no engine takes calls.
--
-- ARGV     half (of the decay of what programs that think have left, in ms; "" = admission is off: none are to wait)
--          factor (contexts that an engine may have, over its KV cache) limit
-- Returns  how many
local half, factor, limit = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
if not is_holding() then return 0 end

-- By model, the engines that take calls, as rooms.
local function rooms_by_model()
  local found = {}
  for _, e in ipairs(redis.call('ZRANGE', ENGINES, 0, -1)) do
    local v = redis.call('HMGET', engine_key(e), 'state', 'model', 'kv_tokens')
    if v[1] == 'READY' then
      if redis.call('ZCARD', queue_key(e)) + redis.call('ZCARD', running_key(e)) == 0 then empty_account(e) end
      local rooms = gather(found, v[2] or '')
      rooms[#rooms + 1] = room_of(e, (tonumber(v[3]) or 0) * factor, half)
    end
  end
  return found
end

local function let_go_all(model, most)
  local found = {}
  for i, id in ipairs(redis.call('ZRANGE', held_key(model), 0, most - 1)) do found[i] = {id = id, model = model} end
  for _, h in ipairs(still_held(found)) do let_go(h.id, h.call) end
  return #found
end

local many, rooms = 0, half and rooms_by_model() or {}
for model, of_model in pairs(rooms) do
  if many < limit then many = many + open_doors(model, of_model, half, limit - many) end
end
for _, model in ipairs(redis.call('SMEMBERS', HOLDING)) do
  local has_engine = model == '' and next(rooms) ~= nil or rooms[model] ~= nil
  if not has_engine and many < limit then many = many + let_go_all(model, limit - many) end
  if redis.call('ZCARD', held_key(model)) == 0 then redis.call('SREM', HOLDING, model) end
end
write_all()
return many
