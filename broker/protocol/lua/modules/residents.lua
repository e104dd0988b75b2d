--- @needs nothing
-- The contexts in an engine's KV cache: pure functions of numbers and tables. There is no key, no clock and no Redis
-- here, so the simulator runs this same file. Times in ms, contexts in tokens.
--
-- A session is resident on an engine while it has unfinished calls there, and its context counts in full. It stays
-- resident for a while after the last of them has ended, while tools run or people think. Its context then counts less
-- and less, half as much after each half-life, because others become more likely to replace it before it is used again.
--
-- Headroom is given in the order of the queue. For a call, the contexts of its own tier and of better tiers are taken.
-- Those of worse tiers are headroom: the engine evicts them, and their next calls must be admitted again.
--
-- sums   of an engine: {at, active, thinking}. By tier, the contexts of sessions with calls there, and the decayed
--        contexts of the others as of `at`. All decay at one rate, so one number is enough for all of a tier.
-- mine   of a session on an engine: {calls, tokens, since, tier}: its unfinished calls, its context, when its last call
--        ended, and the tier in which it is counted
--
-- Sources: ThunderAgent (arXiv 2602.13692), which pauses programs while contexts, decayed like this, exceed the cache;
-- CONCUR (arXiv 2601.22705). Beyond both: calls wait in the order of their class and level, so no size of program
-- starves.

-- Tiers go from 0, the best, to this one.
local LAST_TIER = 15
-- The context of an idle session counts as cached while this share of it is left, which is for two half-lives.
local KEEP = 0.25
-- How many calls may overtake the first one if they fit and it does not.
local BYPASS = 3

-- The user's classes before the normal one are in the best tier, those after it in the last.
local function tier_of(priority, level)
  if priority ~= 0 then return priority < 0 and 0 or LAST_TIER end
  return math.min(level, LAST_TIER)
end

local function decayed(tokens, ms, half) return tokens * 2 ^ (-math.max(0, ms) / half) end

local function settle(sums, now, half)
  for tier = 1, LAST_TIER + 1 do sums.thinking[tier] = decayed(sums.thinking[tier], now - sums.at, half) end
  sums.at = now
end

-- How much of an engine's cache is spoken for, in tokens by tier.
local function spoken_for(sums, now, half)
  local spoken = {}
  for tier = 1, LAST_TIER + 1 do
    spoken[tier] = sums.active[tier] + decayed(sums.thinking[tier], now - sums.at, half)
  end
  return spoken
end

-- How much of it belongs to a tier and the better ones.
local function up_to(spoken, tier)
  local sum = 0
  for i = 1, tier + 1 do sum = sum + spoken[i] end
  return sum
end

-- A session's share of an engine's cache, in tokens.
local function share_of(mine, now, half)
  return mine.calls > 0 and mine.tokens or decayed(mine.tokens, now - mine.since, half)
end

-- Whether the cache probably still holds its context.
local function is_cached_here(mine, now, half)
  return mine.calls > 0 or (mine.tokens > 0 and share_of(mine, now, half) >= KEEP * mine.tokens)
end

-- Whether there is headroom for a call. share: its session's share, {tokens, cached, tier}. A session that is cached
-- there competes only with better tiers. A context larger than the cache fits if nothing else runs there.
local function fits(spoken, tier, share, context, capacity, calls)
  if capacity <= 0 or (context > capacity and calls == 0) then return true end
  local against = share.cached and tier - 1 or tier
  return up_to(spoken, against) - (share.tier <= against and share.tokens or 0) + context <= capacity
end

-- A call arrives. context: all tokens that it will hold. new: those that no other call of its session holds there.
local function arrives(sums, mine, context, new, tier, now, half)
  settle(sums, now, half)
  local at = mine.tier + 1
  if mine.calls == 0 then
    sums.thinking[at] = math.max(0, sums.thinking[at] - share_of(mine, now, half))
    mine.tokens, mine.tier, at, new = 0, tier, tier + 1, context
  end
  mine.calls, mine.tokens, sums.active[at] = mine.calls + 1, mine.tokens + new, sums.active[at] + new
end

-- A call leaves. more: how much larger its context is than expected; nil = it did not run.
local function leaves(sums, mine, more, now, half)
  settle(sums, now, half)
  local at, tokens = mine.tier + 1, math.max(0, mine.tokens + (more or 0))
  sums.active[at] = math.max(0, sums.active[at] + tokens - mine.tokens)
  mine.calls, mine.tokens = math.max(0, mine.calls - 1), tokens
  if mine.calls > 0 then return end
  sums.active[at] = math.max(0, sums.active[at] - tokens)
  if more then
    sums.thinking[at], mine.since = sums.thinking[at] + tokens, now
  else
    mine.tokens = 0
  end
end

local NOT_THERE = {tokens = 0, cached = false, tier = 0}

-- The positions of the waiting calls that are admitted now. The first call goes first. If it fits nowhere, a few others
-- may overtake it, unless it starves: then all wait until there is headroom for it.
-- waiting: the first calls in order, each {tier, context, shares (by engine), starves}
-- caches:  of the engines, each {id, spoken, capacity, calls}; admitted calls are counted into them
local function admissible(waiting, caches)
  local chosen, passed = {}, 0
  for i, c in ipairs(waiting) do
    local best, most
    for _, cache in ipairs(caches) do
      local share = c.shares[cache.id] or NOT_THERE
      local left = share.cached and math.huge or cache.capacity - up_to(cache.spoken, c.tier)
      if fits(cache.spoken, c.tier, share, c.context, cache.capacity, cache.calls) and (not best or left > most) then
        best, most = cache, left
      end
    end
    if best then
      local share = c.shares[best.id] or NOT_THERE
      best.spoken[share.tier + 1] = best.spoken[share.tier + 1] - share.tokens
      best.spoken[c.tier + 1], best.calls = best.spoken[c.tier + 1] + c.context, best.calls + 1
      chosen[#chosen + 1] = i
    else
      passed = passed + 1
      if c.starves or passed > BYPASS then break end
    end
  end
  return chosen
end
