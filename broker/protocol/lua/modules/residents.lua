--- @needs nothing
-- Whose contexts an engine's KV cache holds: numbers and tables in, numbers out. No key, no clock and no Redis here, so
-- that the simulator runs this very file. Times in ms, contexts in tokens.
--
-- A session is resident on an engine where it has unfinished calls (its context counts in full), and for a while after
-- the last of them has ended, while tools or people think: then its context counts for less and less, half as much after
-- each half-life, as it gets less likely that it will be asked for before others have taken its place.
--
-- The cache is given away in the order of the queue: a call finds taken what those of its tier and of better ones have;
-- what worse ones have is room, for the engine takes their place away, and their next calls have to ask again.
--
-- sums   of an engine: {at, active, thinking}: by tier, contexts of sessions with calls there, and the decayed ones of the
--        others as of `at`. They all shrink alike, so one number holds many, and each step costs the same.
-- mine   of a session on an engine: {calls, tokens, since, tier}: unfinished calls, its context, when the last call ended
--
-- Sources: ThunderAgent (arXiv 2602.13692), which pauses programs where contexts, decayed so, exceed the cache; CONCUR
-- (arXiv 2601.22705). Beyond both: calls wait in the order of their class and level, so no size of program starves.

-- 0, the best, to this one.
local LAST_TIER = 15
-- A session that thinks is at home as long as so much of its share is left: for two half-lives.
local KEEP = 0.25
-- Calls behind the first one that may go ahead of it where they fit and it does not.
local BYPASS = 3

-- The user's classes ahead of the normal one are the best tier, those behind it the last.
local function tier_of(priority, level)
  if priority ~= 0 then return priority < 0 and 0 or LAST_TIER end
  return math.min(level, LAST_TIER)
end

local function decayed(tokens, ms, half) return tokens * 2 ^ (-math.max(0, ms) / half) end

local function settle(sums, now, half)
  for tier = 1, LAST_TIER + 1 do sums.thinking[tier] = decayed(sums.thinking[tier], now - sums.at, half) end
  sums.at = now
end

-- What of its cache is spoken for: tokens by tier.
local function spoken_for(sums, now, half)
  local spoken = {}
  for tier = 1, LAST_TIER + 1 do
    spoken[tier] = sums.active[tier] + decayed(sums.thinking[tier], now - sums.at, half)
  end
  return spoken
end

-- The part of it that a tier and those ahead of it have.
local function up_to(spoken, tier)
  local sum = 0
  for i = 1, tier + 1 do sum = sum + spoken[i] end
  return sum
end

-- What a session has of an engine's cache.
local function share_of(mine, now, half)
  return mine.calls > 0 and mine.tokens or decayed(mine.tokens, now - mine.since, half)
end

-- Whether the cache still holds its context, by all that is known.
local function is_home(mine, now, half)
  return mine.calls > 0 or (mine.tokens > 0 and share_of(mine, now, half) >= KEEP * mine.tokens)
end

-- Whether a call finds room. share: what its session has there, {tokens, home, tier}; one that is at home asks against
-- better tiers alone. A context that is larger than the cache fits where nothing else runs.
local function fits(spoken, tier, share, context, capacity, calls)
  if capacity <= 0 or (context > capacity and calls == 0) then return true end
  local against = share.home and tier - 1 or tier
  return up_to(spoken, against) - (share.tier <= against and share.tokens or 0) + context <= capacity
end

-- A call comes. context: all that it will hold; new: what of it no other call of its session holds there.
local function arrives(sums, mine, context, new, tier, now, half)
  settle(sums, now, half)
  local at = mine.tier + 1
  if mine.calls == 0 then
    sums.thinking[at] = math.max(0, sums.thinking[at] - share_of(mine, now, half))
    mine.tokens, mine.tier, at, new = 0, tier, tier + 1, context
  end
  mine.calls, mine.tokens, sums.active[at] = mine.calls + 1, mine.tokens + new, sums.active[at] + new
end

-- A call leaves. more: by how much its context has become larger than was thought, if it ran; none: it did not run.
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

local NOT_THERE = {tokens = 0, home = false, tier = 0}

-- Which of the calls that wait may go now: their positions. The first one goes first; behind one that fits nowhere a few
-- others may, unless it starves: then all wait until there is room for it.
-- waiting: the first calls in order, each {tier, context, shares (by engine), starves}
-- rooms    of the engines: {id, spoken, capacity, calls}; counts what is let in
local function let_in(waiting, rooms)
  local chosen, passed = {}, 0
  for i, c in ipairs(waiting) do
    local best, most
    for _, r in ipairs(rooms) do
      local share = c.shares[r.id] or NOT_THERE
      local left = share.home and math.huge or r.capacity - up_to(r.spoken, c.tier)
      if fits(r.spoken, c.tier, share, c.context, r.capacity, r.calls) and (not best or left > most) then
        best, most = r, left
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
