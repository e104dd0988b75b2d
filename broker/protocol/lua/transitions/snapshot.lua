--- @include lib programs residents residence
-- What a router needs to choose engines for a batch: the fleet, where the sessions' caches are, and their programs'
-- service. Read only.
--
-- ARGV     level_bounds beta: as in assign.lua
--          fleet ("1" = the engines, too; "" = the sessions only) half (as in admit_throttled.lua), then sessions
-- Returns  {engines, sessions, now_ms}
--          engines: per engine {id, heartbeat_ms, queued, running, work, prefill_ms, and the fields below, spoken_for}
--          work: the waiting calls, by rank: "RANK CALLS RANK:tokens TOKENS …", "" = none
--          prefill_ms: the time to compute the prompts of the calls that it has claimed
--          spoken_for: with admission, tokens of its cache by tier
--          sessions: per session {bound engine, flat affinity hash, program, service, level of a call that arrives now,
--          completed calls, tokens of their answers, shares}
--          shares: with admission, its shares of caches: engine, "TOKENS CACHED CALLS TIER", …
local level_bounds = {}
for b in string.gmatch(ARGV[4], '%S+') do level_bounds[#level_bounds + 1] = tonumber(b) end
local beta, half = tonumber(ARGV[5]), tonumber(ARGV[7])

local engine_fields = {'state', 'model', 'queued_tokens', 'running_tokens', 'served', 'max_num_seqs', 'tokens_per_s',
  'kv_tokens', 'kv_usage', 'speed', 'computed', 'completion_tokens', 'cache_age_s', 'reuse_found', 'prefill_until'}
local function engine_row(e, beat)
  local v = redis.call('HMGET', engine_key(e), unpack(engine_fields))
  local queued, work = redis.call('ZCARD', queue_key(e)), ''
  if queued > 0 then work = table.concat(redis.call('HGETALL', work_key(e)), ' ') end
  local prefill = math.max(0, (tonumber(v[#engine_fields]) or 0) - NOW)
  local row = {e, beat, queued, redis.call('ZCARD', running_key(e)), work, int(prefill)}
  for i = 1, #engine_fields - 1 do row[#row + 1] = v[i] or '' end
  row[#row + 1] = half and account_of(e) and in_words(spoken_for(account_of(e), NOW, half), '%.0f') or ''
  return row
end

-- A session's program is the root of its tree. family.lua has the same rule, and also keeps the entries alive.
local function program_of(s)
  local steps = 0
  while true do
    local v = redis.call('HMGET', session_key(s), 'parent', unpack(totals))
    if not v[1] or steps == MOST_DEEP then return s, v end
    s, steps = v[1], steps + 1
  end
end

local function shares_of(s)
  local list = {}
  for e in pairs(half and residency_of(s) or {}) do
    local share = share_on(s, e, half)
    list[#list + 1] = e
    list[#list + 1] = string.format('%.0f %d %d %d', share.tokens, share.cached and 1 or 0, share.calls, share.tier)
  end
  return list
end

local function session_row(s)
  local v = redis.call('HMGET', session_key(s), 'engine', 'completed', 'completion_tokens')
  local program, used = program_of(s)
  local n = {}
  for i = 1, #totals do n[i] = tonumber(used[1 + i]) or 0 end
  local level = place(n[1], unpaid(n[2], n[4]), unpaid(n[3], n[5]), NOW, NOW, level_bounds, beta)
  return {v[1] or '', redis.call('HGETALL', affinity_key(s)), program, int(n[1]), level, v[2] or '', v[3] or '',
    shares_of(s)}
end

local engines, sessions = {}, {}
if ARGV[6] == '1' then
  local beats = redis.call('ZRANGE', ENGINES, 0, -1, 'WITHSCORES')
  for i = 1, #beats, 2 do engines[#engines + 1] = engine_row(beats[i], beats[i + 1]) end
end
for i = 8, #ARGV do sessions[#sessions + 1] = session_row(ARGV[i]) end
return {engines, sessions, NOW_TEXT}
