--- @needs lib programs residents residence attempts
-- Throttled calls: they wait in the router until an engine has KV headroom for their contexts.
--
-- A throttled call is PENDING and has no engine. It is in held:MODEL, in the order of an engine's queue. Unless its
-- level is 0, it is also in starving:MODEL until it starves. `holding` names the models that have throttled calls. The
-- record has the fields that decide about the call: level, starves_ms and context.
local THROTTLED = P .. 'holding'
local throttled_fields = {'state', 'engine', 'gen', 'session', 'model', 'priority', 'level', 'starves_ms',
  'prompt_tokens', 'context'}

local function any_throttled() return redis.call('SCARD', THROTTLED) > 0 end

local function leave_throttled(id, model)
  redis.call('ZREM', throttled_starving_key(model), id)
  return redis.call('ZREM', throttled_key(model), id) == 1
end

-- Also for calls that seem not to be throttled: another router that had read the call's entry may have throttled it.
local function unthrottle(id, model)
  if leave_throttled(id, model) then redis.call('HDEL', call_key(id), 'level', 'starves_ms', 'context') end
end

-- False for a call whose record was deleted by hand.
local function is_throttled(c) return c.state == 'PENDING' and c.engine == '' end

-- score: the call's place (queue_score). starves: when it starves, "" = never.
local function throttle(id, c, score, level, starves, context, why)
  unthrottle(id, c.model)
  redis.call('HDEL', call_key(id), 'let_in')
  set_fields(call_key(id), {'why', why, 'context', context, 'level', level > 0 and level or '', 'starves_ms', starves})
  redis.call('ZADD', throttled_key(c.model), score, id)
  if level > 0 and starves ~= '' then redis.call('ZADD', throttled_starving_key(c.model), starves, id) end
  redis.call('SADD', THROTTLED, c.model)
  if redis.call('HSETNX', call_key(id), 'held_ms', NOW_TEXT) == 1 then count_total('held') end
end

-- As in an engine's queue (claim.lua): calls that starve now move to the best level of their class.
local function promote_throttled(model)
  local due = redis.call('ZRANGEBYSCORE', throttled_starving_key(model), '-inf', NOW_TEXT, 'LIMIT', 0, PROMOTE_MANY)
  for _, id in ipairs(due) do
    local c = read_call(id, {'state', 'engine', 'priority', 'submitted_ms'})
    redis.call('ZREM', throttled_starving_key(model), id)
    if is_throttled(c) then
      local score = int(queue_score(tonumber(c.priority) or 0, 0, tonumber(c.submitted_ms)))
      redis.call('HDEL', call_key(id), 'level')
      redis.call('ZADD', throttled_key(model), 'XX', score, id)
    end
  end
end

-- The first throttled calls that an engine of a model may take: calls that name the model, and calls that name none.
local function first_throttled(model, many)
  local found = {}
  for _, of in ipairs(model == '' and {''} or {model, ''}) do
    promote_throttled(of)
    local flat = redis.call('ZRANGE', throttled_key(of), 0, many - 1, 'WITHSCORES')
    for i = 1, #flat, 2 do found[#found + 1] = {id = flat[i], score = tonumber(flat[i + 1]), model = of} end
  end
  table.sort(found, function(a, b) return a.score < b.score or (a.score == b.score and a.id < b.id) end)
  for i = #found, many + 1, -1 do found[i] = nil end
  return found
end

-- Whether a call must wait after throttled ones. A call whose context is still in some cache never must.
local function must_wait(id, s, model, score, half)
  local first = first_throttled(model, 1)[1]
  return first ~= nil and first.id ~= id and first.score <= tonumber(score) and not is_cached_anywhere(s, half)
end

-- Gives a call back to the router, which places it with its policy. `let_in` marks it as admitted, so that it need not
-- wait again after those ahead of it.
local function admit(id, c)
  unthrottle(id, c.model)
  to_router(id, c, 'level', c.level == '' and '0' or c.level)
  redis.call('HSET', call_key(id), 'let_in', '1')
end

-- Those that are still throttled, each with its record as `call`.
local function still_throttled(found)
  local list = {}
  for _, t in ipairs(found) do
    t.call = read_call(t.id, throttled_fields)
    if is_throttled(t.call) then list[#list + 1] = t else leave_throttled(t.id, t.model) end
  end
  return list
end

-- A call, as `admissible` expects it.
local function demand_of(c, caches, half)
  local shares = {}
  for _, cache in ipairs(caches) do shares[cache.id] = share_on(c.session, cache.id, half) end
  local tier = tier_of(tonumber(c.priority) or 0, tonumber(c.level) or 0)
  local starves = c.starves_ms ~= '' and tonumber(c.starves_ms) <= NOW
  return {tier = tier, context = tonumber(c.context) or 0, shares = shares, starves = starves}
end

-- Admits throttled calls of a model while there is headroom, until one must continue to wait. Returns how many; at most
-- a few more than `most`.
local function admit_waiting(model, caches, half, most)
  local many = 0
  repeat
    local first, waiting = still_throttled(first_throttled(model, BYPASS + 1)), {}
    for i, t in ipairs(first) do waiting[i] = demand_of(t.call, caches, half) end
    local chosen = admissible(waiting, caches)
    for _, i in ipairs(chosen) do admit(first[i].id, first[i].call) end
    many = many + #chosen
  until #first == 0 or #chosen < #first or many >= most
  return many
end
