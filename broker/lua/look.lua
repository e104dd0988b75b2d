--- @include lib
-- What a router needs to choose engines for a batch: the fleet, and where the sessions' caches are. Read only.
--
-- ARGV     sessions
-- Returns  {engines, sessions}
--          engines: per engine {id, heartbeat_ms, queued, running, state, model, queued_tokens, running_tokens,
--          served, max_num_seqs, tokens_per_s}
--          sessions: per session {bound engine, flat affinity hash}
local engines, sessions = {}, {}
local beats = redis.call('ZRANGE', ENGINES, 0, -1, 'WITHSCORES')
for i = 1, #beats, 2 do
  local e = beats[i]
  local v = redis.call('HMGET', engine_key(e), 'state', 'model', 'queued_tokens', 'running_tokens', 'served',
    'max_num_seqs', 'tokens_per_s')
  local row = {e, beats[i + 1], redis.call('ZCARD', queue_key(e)), redis.call('ZCARD', running_key(e))}
  for j = 1, 7 do row[#row + 1] = v[j] or '' end
  engines[#engines + 1] = row
end
for i = 4, #ARGV do
  local s = ARGV[i]
  sessions[#sessions + 1] = {redis.call('HGET', session_key(s), 'engine') or '',
    redis.call('HGETALL', affinity_key(s))}
end
return {engines, sessions}
