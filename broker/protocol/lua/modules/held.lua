--- @needs lib programs residents residence attempts
-- Calls that wait at the router until there is room for their contexts.
--
-- A held call is PENDING without an engine. It stands in held:MODEL in the order of an engine's queue, and in
-- starving:MODEL until it starves, if it is not in the first level; `holding` names the models of which calls are held.
-- Its record has what it is asked by: level, starves_ms, context.
local HOLDING = P .. 'holding'
local held_fields = {'state', 'engine', 'gen', 'session', 'model', 'priority', 'level', 'starves_ms', 'prompt_tokens',
  'context'}

local function is_holding() return redis.call('SCARD', HOLDING) > 0 end

local function leave_place(id, model)
  redis.call('ZREM', held_starving_key(model), id)
  return redis.call('ZREM', held_key(model), id) == 1
end

-- Another router that had its entry in hand may have held it.
local function hold_no_more(id, model)
  if leave_place(id, model) then redis.call('HDEL', call_key(id), 'level', 'starves_ms', 'context') end
end

-- One whose record has been deleted by hand waits for nothing.
local function is_held(c) return c.state == 'PENDING' and c.engine == '' end

-- score: its place (queue_score). starves: the moment, "" = never.
local function hold_call(id, c, score, level, starves, context, why)
  hold_no_more(id, c.model)
  redis.call('HDEL', call_key(id), 'let_in')
  set_fields(call_key(id), {'why', why, 'context', context, 'level', level > 0 and level or '', 'starves_ms', starves})
  redis.call('ZADD', held_key(c.model), score, id)
  if level > 0 and starves ~= '' then redis.call('ZADD', held_starving_key(c.model), starves, id) end
  redis.call('SADD', HOLDING, c.model)
  if redis.call('HSETNX', call_key(id), 'held_ms', NOW_TEXT) == 1 then count_total('held') end
end

-- As in an engine's queue (claim.lua): calls that starve by now go to the best level of their class.
local function promote_held(model)
  local due = redis.call('ZRANGEBYSCORE', held_starving_key(model), '-inf', NOW_TEXT, 'LIMIT', 0, PROMOTE_MANY)
  for _, id in ipairs(due) do
    local c = read_call(id, {'state', 'engine', 'priority', 'submitted_ms'})
    redis.call('ZREM', held_starving_key(model), id)
    if is_held(c) then
      local score = int(queue_score(tonumber(c.priority) or 0, 0, tonumber(c.submitted_ms)))
      redis.call('HDEL', call_key(id), 'level')
      redis.call('ZADD', held_key(model), 'XX', score, id)
    end
  end
end

-- The first of those that an engine of a model may take: calls that name it, and calls that name none.
local function first_held(model, many)
  local found = {}
  for _, of in ipairs(model == '' and {''} or {model, ''}) do
    promote_held(of)
    local flat = redis.call('ZRANGE', held_key(of), 0, many - 1, 'WITHSCORES')
    for i = 1, #flat, 2 do found[#found + 1] = {id = flat[i], score = tonumber(flat[i + 1]), model = of} end
  end
  table.sort(found, function(a, b) return a.score < b.score or (a.score == b.score and a.id < b.id) end)
  for i = #found, many + 1, -1 do found[i] = nil end
  return found
end

-- Whether calls are held that go ahead of this one, which is at home nowhere.
local function must_wait(id, s, model, score, half)
  local first = first_held(model, 1)[1]
  return first ~= nil and first.id ~= id and first.score <= tonumber(score) and not is_home_anywhere(s, half)
end

-- Back to the router, which places it by its policy. It has had its turn, so that those ahead of it are not asked again.
local function let_go(id, c)
  hold_no_more(id, c.model)
  to_router(id, c, 'level', c.level == '' and '0' or c.level)
  redis.call('HSET', call_key(id), 'let_in', '1')
end

-- With their records.
local function still_held(found)
  local list = {}
  for _, h in ipairs(found) do
    h.call = read_call(h.id, held_fields)
    if is_held(h.call) then list[#list + 1] = h else leave_place(h.id, h.model) end
  end
  return list
end

local function asks(c, rooms, half)
  local shares = {}
  for _, room in ipairs(rooms) do shares[room.id] = share_on(c.session, room.id, half) end
  local tier = tier_of(tonumber(c.priority) or 0, tonumber(c.level) or 0)
  local starves = c.starves_ms ~= '' and tonumber(c.starves_ms) <= NOW
  return {tier = tier, context = tonumber(c.context) or 0, shares = shares, starves = starves}
end

-- Lets calls of a model in where there is room, until one has to wait on. Returns how many, `most` or a few more.
local function open_doors(model, rooms, half, most)
  local many = 0
  repeat
    local first, waiting = still_held(first_held(model, BYPASS + 1)), {}
    for i, h in ipairs(first) do waiting[i] = asks(h.call, rooms, half) end
    local chosen = let_in(waiting, rooms)
    for _, i in ipairs(chosen) do let_go(first[i].id, first[i].call) end
    many = many + #chosen
  until #first == 0 or #chosen < #first or many >= most
  return many
end
