--- @needs nothing
-- The rules of program scheduling: numbers in, numbers out. There is no key, no clock and no Redis here, so the
-- simulator runs this very file, with a `return {…}` appended. Times in ms; service in the unit that the engines
-- report.
--
-- Source: Autellix (arXiv 2502.13965), section 4.2 and Algorithm 1. A program is a session with all its descendants.

-- A program counts as having run for at least this long. Otherwise every program would starve as soon as it begins.
local RUN_FLOOR_MS = 1000
local NEVER = math.huge
-- How many starving calls are promoted at once, the longest overdue first.
local PROMOTE_MANY = 64
-- How many ancestors a session may have. Each costs a read wherever a call of a descendant is placed or ends.
local MOST_DEEP = 32
-- What a program has used, as fields of the entry of its root.
local totals = {'service', 'waited_ms', 'ran_ms', 'paid_waited_ms', 'paid_ran_ms'}

-- The bin of an amount of service: 0 is the best, #level_bounds the last. A call enters the level of what its program
-- has had. In a plain MLFQ every call would enter the first level.
local function level_of(service, level_bounds)
  for i, bound in ipairs(level_bounds) do
    if service < bound then return i - 1 end
  end
  return #level_bounds
end

-- Algorithm 1, line 4: what a program has had once a call has ended that started when it had had `inherited`. Calls one
-- after another add up; of parallel calls the longest path counts. It holds for service, waiting and running alike. The
-- outcome is the same in whichever order calls are charged, and by whichever router or worker.
local function charged(now, inherited, own) return math.max(now, inherited + own) end

-- The same for service, the only total with a choice (RSM_SERVICE_RULE): "path", as above, or "total": all calls add
-- up. A wide program, such as a tree search, is short by its longest path and large by all that it takes from others.
local function served(rule, now, inherited, own)
  if rule == 'total' then return now + own end
  return charged(now, inherited, own)
end

-- What is left of a program's waiting, or running, since a promotion last paid for it. The paper has no such payment:
-- there, a program that has starved once is promoted on every call until its running has caught up with its waiting.
local function unpaid(total, paid) return math.max(0, total - paid) end

-- When a call starves that has been waiting since `since`: once wait / run >= beta (line 26) for the whole program. The
-- wait includes the program's waiting so far and this call's. beta 0: never.
local function starves_at(since, waited, ran, beta)
  if beta <= 0 then return NEVER end
  return since + math.max(0, beta * math.max(ran, RUN_FLOOR_MS) - waited)
end

-- The place of a call that came at `arrival` and is assigned now, given what its program has had, and has waited and
-- run since a promotion last paid. Returns its level, when it starves there, and whether it starves already and is
-- promoted.
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
