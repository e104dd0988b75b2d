--- @needs lib programs
-- A program is a session with its descendants. A sub-agent's session names its parent, and the root of the tree is
-- charged for the calls of all of them (programs.lua).

local REFUSAL = {
  self = 'Session %s cannot be its own parent.',
  cycle = 'Session %s is an ancestor of %s, so it cannot also be its child.',
  other = 'Session %s already has another parent than %s. A session keeps its first parent.',
  deep = 'Session %s cannot be a child of %s: a tree of sub-agents is at most ' .. MOST_DEEP .. ' deep.',
}

local function parent_of(s) return redis.call('HGET', session_key(s), 'parent') end

-- A live child keeps the entries of its ancestors alive, and its own place among their children.
local function keep_alive(child, parent)
  touch(session_key(parent), SESSION_TTL)
  later('ZADD', children_key(parent), NOW_TEXT, child)
  touch(children_key(parent), SESSION_TTL)
end

-- Returns the ancestor that has no parent, whether s is among the ancestors, and their number from `parent` on.
local function climb(parent, s)
  local root, steps = parent, 1
  while root ~= s and steps <= MOST_DEEP do
    local above = parent_of(root)
    if not above then return root, false, steps end
    root, steps = above, steps + 1
  end
  return root, root == s, steps
end

-- Adds the totals that s had before it had a parent to its program.
local function transfer_totals(s, root)
  local mine, theirs = redis.call('HMGET', session_key(s), unpack(totals)), nil
  for i, name in ipairs(totals) do
    if mine[i] and tonumber(mine[i]) > 0 then
      theirs = theirs or redis.call('HMGET', session_key(root), unpack(totals))
      redis.call('HSET', session_key(root), name, int(math.max(tonumber(mine[i]), tonumber(theirs[i] or 0))))
    end
  end
end

-- Makes `parent` the parent of s. Returns nil, or an error message that says why it cannot be.
local function adopt(s, parent)
  if s == parent then return string.format(REFUSAL.self, s) end
  local old = parent_of(s)
  if old and old ~= parent then return string.format(REFUSAL.other, s, parent) end
  if not old then
    local root, cycle, steps = climb(parent, s)
    if cycle then return string.format(REFUSAL.cycle, s, parent) end
    if steps > MOST_DEEP then return string.format(REFUSAL.deep, s, parent) end
    redis.call('HSET', session_key(s), 'parent', parent)
    redis.call('PEXPIRE', session_key(s), SESSION_TTL)
    redis.call('HSETNX', session_key(parent), 'service', 0)
    transfer_totals(s, root)
    -- Children that have been idle for this long no longer have an entry.
    redis.call('ZREMRANGEBYSCORE', children_key(parent), '-inf', int(NOW - tonumber(SESSION_TTL)))
  end
  keep_alive(s, parent)
end

-- The totals of the sessions' programs, as this batch sees them: read once, and written once.
local programs = {}
local function program_of(s, steps)
  local p = programs[s]
  if p then return p end
  local v = redis.call('HMGET', session_key(s), 'parent', unpack(totals))
  if v[1] and (steps or 0) < MOST_DEEP then
    keep_alive(s, v[1])
    p = program_of(v[1], (steps or 0) + 1)
    set_later(p.key, 'last_completion_ms', NOW_TEXT)
  else
    p = {id = s, key = session_key(s)}
    for i, name in ipairs(totals) do p[name] = tonumber(v[1 + i]) or 0 end
  end
  programs[s] = p
  return p
end

local function charge_total(p, name, inherited, own, rule)
  local total = served(rule, p[name], inherited, own)
  if total > p[name] then
    p[name] = total
    set_later(p.key, name, int(total))
  end
end
