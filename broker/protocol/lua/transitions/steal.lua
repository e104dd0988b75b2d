--- @include lib programs residents residence terminal poison attempts
-- Work stealing: calls that wait for a loaded engine go back to the router, which places them with its policy. A
-- session that was bound to that engine is no longer bound.
--
-- The number of moves that the router saw is part of the fence. So no call is moved twice, neither by a retry after a
-- lost reply nor by another router that has chosen the same call. A suspect of poison stays on the engine where it
-- waits to run alone.
--
-- ARGV     max_deaths, then per call: id gen engine moves (how often it was stolen before)
-- Returns  per call: 1 = it was moved; 0 = it has ended, was claimed or moved meanwhile, or is a suspect
local max_deaths = tonumber(ARGV[4])
local steal_fields = {'stolen_from', 'deaths', unpack(call_fields)}

local function moves_of(c)
  local _, n = string.gsub(c.stolen_from, '%S+', '')
  return n
end

local function unbind(session, e)
  if redis.call('HGET', session_key(session), 'engine') == e then redis.call('HDEL', session_key(session), 'engine') end
end

local function steal(id, gen, e, moves)
  local c = read_call(id, steal_fields)
  if c.state ~= 'PENDING' or c.gen ~= gen or c.engine ~= e or moves_of(c) ~= moves then return 0 end
  if is_suspect(c.deaths, max_deaths) then return 0 end
  leave_queue(id, e, c)
  count_waiting(e, c, c.level, -1)
  unbind(c.session, e)
  redis.call('HSET', call_key(id), 'stolen_from', c.stolen_from == '' and e or c.stolen_from .. ' ' .. e)
  count_total('stolen')
  to_router(id, c)
  return 1
end

local out = {}
for at = 5, #ARGV, 4 do
  out[#out + 1] = steal(ARGV[at], ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 3]))
end
write_all()
return out
