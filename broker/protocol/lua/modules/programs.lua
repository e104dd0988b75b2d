--- @needs nothing
-- The rules of program scheduling: numbers in, numbers out. No key, no clock and no Redis here, so that the simulator
-- runs this very file, with a `return {…}` behind it. Times in ms; service in the unit that the engines report.
--
-- Source: Autellix (arXiv 2502.13965), section 4.2 and Algorithm 1. A program is a session with all its descendants.

-- A program counts as having run for at least so long, or whoever has just begun would starve at once.
local RUN_FLOOR_MS = 1000
local NEVER = math.huge
-- Calls that starve are moved ahead so many at once, the longest overdue first.
local PROMOTE_MANY = 64
-- How many ancestors a session may have. Each costs a read wherever a call of a descendant is placed or ends.
local MOST_DEEP = 32
-- What a program has used, as fields of the entry of its root.
local totals = {'service', 'waited_ms', 'ran_ms', 'paid_waited_ms', 'paid_ran_ms'}

-- The bin of an amount of service: 0 is the best, #bounds the last. Calls enter the queue of what their program has had,
-- not all of them the first one: that is what tells this from a plain MLFQ.
local function level_of(service, bounds)
  for i, bound in ipairs(bounds) do
    if service < bound then return i - 1 end
  end
  return #bounds
end

-- Algorithm 1, line 4: what a program has had, once a call has ended that began when it had had `inherited`. One after
-- another calls add up, and of parallel ones the longest path counts. It holds for service, waiting and running alike,
-- and in whichever order, by whichever router or worker, calls are accounted for, the outcome is the same.
local function charged(now, inherited, own) return math.max(now, inherited + own) end

-- The same of service, which alone has a choice (RSM_SERVICE_RULE): "path", as above, or "total": all calls add up.
-- A wide program, such as a tree search, is short by its longest path and large by all that it takes from others.
local function served(rule, now, inherited, own)
  if rule == 'total' then return now + own end
  return charged(now, inherited, own)
end

-- What is left of a program's waiting, or running, since a promotion last paid for it. Beyond the paper, where a
-- program that has starved once is promoted again and again until its running has caught up with all it ever waited.
local function unpaid(total, paid) return math.max(0, total - paid) end

-- The moment at which a call starves that waits since `since`: wait / run >= beta (line 26) of the whole program, of
-- its waiting and running so far and of this call's waiting. beta 0: never.
local function starves_at(since, waited, ran, beta)
  if beta <= 0 then return NEVER end
  return since + math.max(0, beta * math.max(ran, RUN_FLOOR_MS) - waited)
end

-- Where a call stands that came at `arrival` and is assigned now, by what its program has had, and has waited and run
-- since a promotion last paid: its level; the moment at which it starves there; whether it does already, and is promoted.
local function place(service, waited, ran, arrival, now, bounds, beta)
  local level = level_of(service, bounds)
  if level == 0 then return 0, NEVER, false end
  local moment = starves_at(arrival, waited, ran, beta)
  if moment <= now then return 0, NEVER, true end
  return level, moment, false
end

-- Orders an engine's queue, the smallest first: the user's priority class (-128 to 127), then the level (0 to 15), then
-- the arrival. 8 + 4 + 41 bits: the exact integers of a double.
local function queue_score(priority, level, arrival)
  local class = math.max(-128, math.min(127, priority)) + 128
  return (class * 16 + level) * 2199023255552 + arrival
end
