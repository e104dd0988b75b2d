--- @include lib
-- A worker compares the calls that it has with those that run on it according to Redis. A Redis that has lost its
-- latest writes (a crash under appendfsync everysec, a failover to a replica that lagged) may have forgotten a claim or
-- an end. Changes nothing.
--
-- ARGV     engine incarnation, then per call that the worker has: id gen attempt
-- Returns  {"fenced"} if another incarnation owns the engine, else {lost, unknown}:
--          lost     positions, from 0, of the worker's calls that do not run here under that fence
--          unknown  {id, gen, attempt} of each call that runs here and that the worker does not have
local e, incarnation = ARGV[4], ARGV[5]
if redis.call('HGET', engine_key(e), 'incarnation') ~= incarnation then return {'fenced'} end

local fences = {}
local function fence_of(id)
  if fences[id] == nil then
    local r = redis.call('HMGET', call_key(id), 'state', 'engine', 'gen', 'attempt')
    fences[id] = r[1] == 'RUNNING' and r[2] == e and {r[3], r[4]}
  end
  return fences[id]
end

local known, lost, unknown = {}, {}, {}
for at = 6, #ARGV, 3 do
  local id, fence = ARGV[at], fence_of(ARGV[at])
  if fence and fence[1] == ARGV[at + 1] and fence[2] == ARGV[at + 2] then
    known[id] = true
  else
    lost[#lost + 1] = (at - 6) / 3
  end
end
for _, id in ipairs(redis.call('ZRANGE', running_key(e), 0, -1)) do
  local fence = fence_of(id)
  if fence and not known[id] then unknown[#unknown + 1] = {id, fence[1], fence[2]} end
end
return {lost, unknown}
