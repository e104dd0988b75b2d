--- @include lib programs family residents residence
-- Updates of the process table by programs that report to it themselves (SessionManager, GlobalProcessTable).
--
-- ARGV     op session …
--          "start" parent ("" = none)
--              creates the entry. Returns 1 if it is new, or an error message that says why it cannot be that parent's
--              child
--          "end"
--              removes entry and affinity unless calls are active. Returns how many are, including its descendants'
--          "charge" call service waited_ms ran_ms rule
--              charges a finished call (programs.lua, `served`). The call inherits the totals in its record. If no
--              router has assigned it, it inherits the program's current totals, as a sequential call does. Returns the
--              program's service
local op, s = ARGV[4], ARGV[5]
local key = session_key(s)

local function start(parent)
  if redis.call('HEXISTS', key, 'started_ms') == 1 then return 0 end
  local refusal = parent ~= '' and adopt(s, parent)
  if refusal then return refusal end
  redis.call('HSET', key, 'started_ms', int(NOW))
  redis.call('HSETNX', key, 'service', 0)
  touch(key, SESSION_TTL)
  return 1
end

local function active_calls(of, steps)
  local n = redis.call('SCARD', session_calls_key(of))
  if steps > MOST_DEEP then return n end
  for _, child in ipairs(redis.call('ZRANGE', children_key(of), 0, -1)) do n = n + active_calls(child, steps + 1) end
  return n
end

local function finish()
  local active = active_calls(s, 1)
  if active > 0 then return active end
  local parent = parent_of(s)
  if parent then redis.call('ZREM', children_key(parent), s) end
  forget_session(s)
  redis.call('DEL', key, affinity_key(s), session_recent_key(s), children_key(s))
  return 0
end

local function charge(call, service, waited, ran, rule)
  local p = program_of(s)
  local c = redis.call('HMGET', call_key(call), 'assigned_ms', 'inherited', 'waited_ms', 'ran_ms')
  local function inherited(i, name) return c[1] and (tonumber(c[i]) or 0) or p[name] end
  charge_total(p, 'service', inherited(2, 'service'), service, rule)
  charge_total(p, 'waited_ms', inherited(3, 'waited_ms'), waited)
  charge_total(p, 'ran_ms', inherited(4, 'ran_ms'), ran)
  set_later(key, 'last_completion_ms', int(NOW))
  set_later(p.key, 'service', int(p.service)) -- even if it is 0, so that the entry exists
  count(key, 'completed', 1)
  touch(key, SESSION_TTL)
  touch(p.key, SESSION_TTL)
  return int(p.service)
end

local reply
if op == 'start' then
  reply = start(ARGV[6] or '')
elseif op == 'end' then
  reply = finish()
else
  reply = charge(ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9]), ARGV[10])
end
write_all()
return reply
