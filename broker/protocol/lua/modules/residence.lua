--- @needs lib residents
-- The accounts of residents.lua in Redis: the contexts in the engines' KV caches.
--
-- engine:E:residents  the sums of an engine: `active` and `thinking` by tier, as of `at`. Also `calls`, the number of
--                     calls counted, and `half` and `factor` as the last router used them, so that the scripts that end
--                     calls need not know them.
-- residency:SESSION   by engine: "CALLS TOKENS SINCE TIER EPOCH" of that session there
--
-- A call that was assigned under admission has a `context` in its record as long as an engine has the call. `arrive`
-- (assign.lua) adds it to the account. When the call leaves its engine, in end_call or in to_router, it is taken out
-- once. If the call stays with an engine whose process died and came back, it stays counted.
-- An `epoch` is the lifetime of a cache: the contexts of idle sessions are lost with the engine's process.

-- What this batch has read of engines (false: nothing was ever counted there) and of sessions, and what it has changed.
local accounts, residencies, changed = {}, {}, {engines = {}, sessions = {}}

-- A count of tokens, calls or ms; `default` if it is invalid, because other programs may have written it.
local function valid(text, default)
  local n = tonumber(text or '')
  return n and n >= 0 and n < 2 ^ 53 and n or default
end

local function by_tier(text)
  local list = {}
  for n in string.gmatch(text or '', '%S+') do list[#list + 1] = valid(n, 0) end
  for tier = #list + 1, LAST_TIER + 1 do list[tier] = 0 end
  return list
end

local function account_of(e)
  if accounts[e] == nil then
    local v = redis.call('HMGET', residents_key(e), 'at', 'half', 'factor', 'calls', 'epoch', 'active', 'thinking')
    accounts[e] = v[1] and {at = valid(v[1], NOW), half = math.max(1, valid(v[2], 1)), factor = valid(v[3], 1),
      calls = valid(v[4], 0), epoch = v[5] or '', active = by_tier(v[6]), thinking = by_tier(v[7])} or false
  end
  return accounts[e]
end

-- half: the half-life of the decay, in ms.
local function new_account(half, epoch)
  return {at = NOW, half = half, calls = 0, epoch = epoch, active = by_tier(), thinking = by_tier()}
end

local function open_account(e, half)
  accounts[e] = account_of(e) or new_account(half, redis.call('HGET', engine_key(e), 'incarnation') or '')
  return accounts[e]
end

-- A session's residency on each engine.
local function residency_of(s)
  if residencies[s] then return residencies[s] end
  local flat, found = redis.call('HGETALL', residency_key(s)), {}
  for i = 1, #flat, 2 do
    local calls, tokens, since, tier, epoch = string.match(flat[i + 1], '^(%S+) (%S+) (%S+) (%S+) ?(%S*)$')
    found[flat[i]] = {calls = valid(calls, 0), tokens = valid(tokens, 0), since = valid(since, 0),
      tier = math.min(math.floor(valid(tier, 0)), LAST_TIER), epoch = epoch or ''}
  end
  residencies[s] = found
  return found
end

-- Its residency on one engine; empty if that engine's cache is gone.
local function residency_on(s, e)
  local mine, account = residency_of(s)[e], account_of(e)
  if mine and (mine.calls > 0 or (account and account.epoch == mine.epoch)) then return mine end
  return {calls = 0, tokens = 0, since = 0, tier = 0, epoch = ''}
end

local function note(s, e) gather(changed.sessions, s)[e] = true end

-- A call has been assigned to an engine.
local function arrive(s, e, tier, context, new, half, factor)
  local account, mine = open_account(e, half), residency_on(s, e)
  account.half, account.factor = half, factor
  arrives(account, mine, context, new, tier, NOW, half)
  account.calls = account.calls + 1
  residency_of(s)[e], changed.engines[e] = mine, true
  note(s, e)
end

-- A call leaves its engine. c.more: how much larger its context is than expected, if it ran. If the call is its own
-- session, no later call will use its context, so nothing of it stays counted.
local function depart(id, c)
  if c.context == '' or c.engine == '' then return end
  local mine = residency_of(c.session)[c.engine]
  if not mine or mine.calls == 0 then return end
  local account = account_of(c.engine) or new_account(1, '')
  leaves(account, mine, c.session ~= id and c.more or nil, NOW, account.half)
  account.calls, mine.epoch = math.max(0, account.calls - 1), account.epoch
  if accounts[c.engine] then changed.engines[c.engine] = true end
  note(c.session, c.engine)
end

-- An engine has no calls left, and gets none before it registers again.
local function close_account(e)
  accounts[e], changed.engines[e] = false, nil
  redis.call('DEL', residents_key(e))
end

-- An engine has no calls now. The account may say otherwise if records were deleted by hand.
local function empty_account(e)
  local account = account_of(e)
  if not account or account.calls == 0 then return end
  account.calls, account.active, changed.engines[e] = 0, by_tier(), true
end

-- An engine's process died and another takes its place: the calls are still there, but the cache is empty.
local function begin_epoch(e, incarnation)
  local account = account_of(e)
  if not account then return end
  account.epoch, account.thinking, changed.engines[e] = incarnation, by_tier(), true
end

-- A session has ended, so no later call will use its contexts.
local function forget_session(s)
  for e, mine in pairs(residency_of(s)) do
    local account = account_of(e)
    if account and mine.calls == 0 and mine.epoch == account.epoch then
      settle(account, NOW, account.half)
      local at = mine.tier + 1
      account.thinking[at] = math.max(0, account.thinking[at] - share_of(mine, NOW, account.half))
      changed.engines[e] = true
    end
  end
  residencies[s] = {}
  redis.call('DEL', residency_key(s))
end

-- A session's share of an engine's cache, as `fits` expects it.
local function share_on(s, e, half)
  local mine = residency_on(s, e)
  return {tokens = share_of(mine, NOW, half), cached = is_cached_here(mine, NOW, half), tier = mine.tier,
    calls = mine.calls}
end

local function is_cached_anywhere(s, half)
  for e in pairs(residency_of(s)) do
    if share_on(s, e, half).cached then return true end
  end
  return false
end

-- An engine's cache, as `admissible` expects it.
local function cache_of(e, capacity, half)
  local account = account_of(e) or new_account(half, '')
  return {id = e, spoken = spoken_for(account, NOW, half), capacity = capacity, calls = account.calls}
end

local function in_words(list, form)
  local words = {}
  for i, n in ipairs(list) do words[i] = string.format(form, n) end
  return table.concat(words, ' ')
end

local function write_account(e)
  local a = accounts[e]
  redis.call('HSET', residents_key(e), 'at', int(a.at), 'half', a.half, 'factor', a.factor, 'calls', a.calls,
    'epoch', a.epoch, 'active', in_words(a.active, '%.0f'), 'thinking', in_words(a.thinking, '%.3f'))
end

-- The key expires like the session's entry, but not while calls are counted in it.
local function write_residency(s, engines)
  local key, active = residency_key(s), false
  for e in pairs(engines) do
    local m = residencies[s][e]
    if m.calls == 0 and m.tokens == 0 then
      redis.call('HDEL', key, e)
    else
      redis.call('HSET', key, e, string.format('%d %.0f %.0f %d %s', m.calls, m.tokens, m.since, m.tier, m.epoch))
    end
  end
  for _, m in pairs(residencies[s]) do active = active or m.calls > 0 end
  if active then redis.call('PERSIST', key) else redis.call('PEXPIRE', key, SESSION_TTL) end
end

before_writing[#before_writing + 1] = function()
  for e in pairs(changed.engines) do write_account(e) end
  for s, engines in pairs(changed.sessions) do write_residency(s, engines) end
end
