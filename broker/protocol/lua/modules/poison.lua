--- @needs lib
-- Poison: calls that are suspected of killing their engines, and engines that are reserved for one of them.
--
-- An incident is the incarnation of an engine whose process died. A call's field `deaths` lists the incidents during
-- which it ran. An incident whose cause was found, or that was no death after all, is in the zset `solved` and does not
-- count against any call.
-- An engine's field `alone` names a suspect: the engine is emptied for it, or runs it alone.
local SOLVED = P .. 'solved'

-- but: an incident to leave out.
local function unsolved(deaths, but)
  local open = {}
  for incident in string.gmatch(deaths, '%S+') do
    if incident ~= but and not redis.call('ZSCORE', SOLVED, incident) then open[#open + 1] = incident end
  end
  return open
end

local function solve(incidents)
  for _, incident in ipairs(incidents) do redis.call('ZADD', SOLVED, int(NOW), incident) end
  redis.call('ZREMRANGEBYSCORE', SOLVED, '-inf', int(NOW - tonumber(SESSION_TTL)))
  redis.call('PEXPIRE', SOLVED, SESSION_TTL)
end

-- A suspect is a call that may not see another death. It runs alone, so that the cause of a death is certain.
local function is_suspect(deaths, max_deaths)
  return deaths ~= '' and #unsolved(deaths) >= max_deaths - 1
end

-- Whether anything runs on an engine. A running set may hold the id of a call that has ended or moved.
local function is_busy(e)
  for _, id in ipairs(redis.call('ZRANGE', running_key(e), 0, -1)) do
    local r = redis.call('HMGET', call_key(id), 'state', 'engine')
    if r[1] == 'RUNNING' and r[2] == e then return true end
  end
  return false
end
