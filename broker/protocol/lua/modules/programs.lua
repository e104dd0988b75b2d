--- @needs nothing
-- The rules of program scheduling: pure functions of numbers. There is no key, no clock and no Redis here, so the
-- simulator runs this same file, with a `return {…}` appended. Times in ms; service in the unit that the engines
-- report.
--
-- Source: Autellix (arXiv 2502.13965), section 4.2 and Algorithm 1. A program is a session with all its descendants.

-- A program counts as having run for at least this long. Otherwise every new program would starve at once.
local RUN_FLOOR_MS = 1000
local NEVER = math.huge
-- How many starving calls are promoted at once, the longest overdue first.
local PROMOTE_MANY = 64
-- How many ancestors a session may have. Each costs a read wherever a call of a descendant is placed or ends.
local MOST_DEEP = 32
-- A program's totals, as fields of its root's entry.
local totals = {'service', 'waited_ms', 'ran_ms', 'paid_waited_ms', 'paid_ran_ms'}

-- The level for an amount of service: 0 is the best, #level_bounds the last. A call enters the level of its program's
-- service. In a plain MLFQ every call would enter the first level.
local function level_of(service, level_bounds)
  for i, bound in ipairs(level_bounds) do
    if service < bound then return i - 1 end
  end
  return #level_bounds
end

-- Algorithm 1, line 4: a program's total after the end of a call, which was assigned when the total was `inherited`.
-- Sequential calls add up; of parallel calls the longest path counts. The rule is the same for service, wait and run
-- time. The result does not depend on the order in which calls are charged, or on the router or worker that does it.
local function charged(now, inherited, own) return math.max(now, inherited + own) end

-- The same for service, the only total with a choice (RSM_SERVICE_RULE): "path", as above, or "total": all calls add
-- up. A wide program, such as a tree search, has a short longest path, but takes a lot from others.
local function served(rule, now, inherited, own)
  if rule == 'total' then return now + own end
  return charged(now, inherited, own)
end

-- The part of a program's wait, or run time, that no promotion has paid for yet. The paper has no such payment: there,
-- a program that has starved once is promoted on every call until its run time has caught up with its wait.
local function unpaid(total, paid) return math.max(0, total - paid) end

-- When a call that has been waiting since `since` starves: once wait / run >= beta (line 26) for the whole program. The
-- wait includes the program's wait so far and this call's. beta 0: never.
local function starves_at(since, waited, ran, beta)
  if beta <= 0 then return NEVER end
  return since + math.max(0, beta * math.max(ran, RUN_FLOOR_MS) - waited)
end

-- The place of a call that arrived at `arrival` and is assigned now, given its program's service, and its program's
-- unpaid wait and run time. Returns its level, when it starves there, and whether it already starves and is promoted.
local function place(service, waited, ran, arrival, now, level_bounds, beta)
  local level = level_of(service, level_bounds)
  if level == 0 then return 0, NEVER, false end
  local moment = starves_at(arrival, waited, ran, beta)
  if moment <= now then return 0, NEVER, true end
  return level, moment, false
end

-- Orders an engine's queue, smallest first: the user's priority class (-128 to 127), then the level (0 to 15), then the
-- arrival. 8 + 4 + 41 bits: a double holds these integers exactly.
local function queue_score(priority, level, arrival)
  local class = math.max(-128, math.min(127, priority)) + 128
  return (class * 16 + level) * 2199023255552 + arrival
end
