-- Whose contexts an engine's KV cache holds: numbers and tables in, numbers out. No key, no clock and no Redis here, so
-- that the simulator runs this very file. Times in ms, contexts in tokens.
--
-- A session is resident on an engine where it has unfinished calls (its context counts in full), and for a while after
-- the last of them has ended, while tools or people think: then its context counts for less and less, half as much after
-- each half-life, as it gets less likely that it will be asked for before others have taken its place.
--
-- sums   of an engine: {active, thinking, at}: contexts of sessions with calls there, and decayed ones as of `at`. One
--        number for all that think is enough, for all of them shrink alike; so each step costs the same, however many.
-- mine   of a session on an engine: {calls, tokens, since}: unfinished calls, its context, when the last call ended
--
-- Sources: ThunderAgent (arXiv 2602.13692), which pauses programs where contexts, decayed so, exceed the cache; CONCUR
-- (arXiv 2601.22705). Beyond both: calls wait in the order of their class and level, so no size of program starves.

-- A session that thinks is let in without question as long as so much of its share is left: for two half-lives.
local KEEP = 0.25
-- Calls behind the first one that may go ahead of it where they fit and it does not.
local BYPASS = 3

local function decayed(tokens, ms, half) return tokens * 2 ^ (-math.max(0, ms) / half) end

-- Tokens of an engine's cache that are spoken for.
local function spoken_for(sums, now, half) return sums.active + decayed(sums.thinking, now - sums.at, half) end

-- A session's share of that.
local function share_of(mine, now, half)
  return mine.calls > 0 and mine.tokens or decayed(mine.tokens, now - mine.since, half)
end

-- Whether a session's next call may go there without question.
local function is_home(mine, now, half)
  return mine.calls > 0 or (mine.tokens > 0 and share_of(mine, now, half) >= KEEP * mine.tokens)
end

-- What would be spoken for with a call of a session, of so large a context, and whether that fits. A context that is
-- larger than the cache fits where nothing else runs.
local function fits(spoken, share, context, capacity, calls)
  return capacity <= 0 or spoken - share + context <= capacity or (context > capacity and calls == 0)
end

local function settle(sums, now, half) sums.thinking, sums.at = decayed(sums.thinking, now - sums.at, half), now end

-- A call comes. context: all that it will hold; new: what of it no other call of its session holds there.
local function arrives(sums, mine, context, new, now, half)
  settle(sums, now, half)
  if mine.calls == 0 then
    sums.thinking = math.max(0, sums.thinking - share_of(mine, now, half))
    mine.tokens, new = 0, context
  end
  mine.calls, mine.tokens, sums.active = mine.calls + 1, mine.tokens + new, sums.active + new
end

-- A call leaves. more: by how much its context has become larger than was thought, if it ran; none: it did not run.
local function leaves(sums, mine, more, now, half)
  settle(sums, now, half)
  local tokens = math.max(0, mine.tokens + (more or 0))
  sums.active = math.max(0, sums.active + tokens - mine.tokens)
  mine.calls, mine.tokens = math.max(0, mine.calls - 1), tokens
  if mine.calls > 0 then return end
  sums.active = math.max(0, sums.active - tokens)
  if more then
    sums.thinking, mine.since = sums.thinking + tokens, now
  else
    mine.tokens = 0
  end
end

-- Which of the calls that wait may go now: their positions. The first one goes first; behind one that fits nowhere, a few
-- others may, unless it starves: then all wait until there is room for it.
-- waiting: the first calls in order, each {context, shares (by engine, or none), starves}
-- rooms    of the engines: {id, spoken, capacity, calls}; counts what is let in
local function let_in(waiting, rooms)
  local chosen, passed = {}, 0
  for i, c in ipairs(waiting) do
    local best, least
    for _, r in ipairs(rooms) do
      local share = c.shares and c.shares[r.id] or 0
      local left = r.capacity <= 0 and math.huge or r.capacity - (r.spoken - share + c.context)
      if fits(r.spoken, share, c.context, r.capacity, r.calls) and (not best or left > least) then
        best, least = r, left
      end
    end
    if best then
      best.spoken, best.calls = best.spoken - (c.shares and c.shares[best.id] or 0) + c.context, best.calls + 1
      chosen[#chosen + 1] = i
    else
      passed = passed + 1
      if c.starves or passed > BYPASS then break end
    end
  end
  return chosen
end
