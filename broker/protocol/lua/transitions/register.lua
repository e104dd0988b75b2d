--- @include lib residents residence terminal programs attempts events poison lost
-- A worker takes an engine id. A second worker with the same id is refused while the first one's lease is valid. A
-- worker that comes back under its id takes back the calls of its dead predecessor.
--
-- A worker may outlive its lease, because it hung or was cut off. It then names its previous incarnation. As no process
-- died, no call is suspected of that death any more.
--
-- ARGV     engine incarnation lease_ms max_deaths survived (the incarnation that the same process was, "" = none),
--          then field value … of the registration
-- Returns  {"ok", id to read the control stream from} | {"taken", heartbeat_ms, node, pid}
local e, incarnation, lease, max_deaths, survived = ARGV[4], ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8]
local key = engine_key(e)
local old = redis.call('HMGET', key, 'incarnation', 'state', 'node', 'pid')
local beat = tonumber(redis.call('ZSCORE', ENGINES, e) or '0')
local alive = old[1] and old[2] ~= 'STOPPED' and old[2] ~= 'DEAD' and beat > NOW - lease
if alive and old[1] ~= incarnation then
  return {'taken', int(beat), old[3] or '', old[4] or ''}
end
if survived ~= '' then solve({survived}) end
if old[1] ~= incarnation then
  local fault = old[1] == survived and '' or 'death'
  -- Its cache is gone, too. The count jumps so far that a cache of any size counts as replaced (router/cost_model.py).
  if old[1] and fault == 'death' then count(key, 'computed', 2 ^ 40) end
  if fault == 'death' then begin_epoch(e, incarnation) end
  for _, id in ipairs(redis.call('ZRANGE', running_key(e), 0, -1)) do
    end_attempt(id, e, {fault = fault, incident = old[1] or e, max_deaths = max_deaths, requeue_on = e,
      message = 'The worker died while the call was running.'})
  end
end
local fields = {}
for i = 9, #ARGV, 2 do
  -- A worker that has to ask its engine for the model does not know it yet. Until then the predecessor's model stays,
  -- so that calls of that model wait for the engine. Without it they would be refused.
  if ARGV[i] ~= 'model' or ARGV[i + 1] ~= '' then
    fields[#fields + 1] = ARGV[i]
    fields[#fields + 1] = ARGV[i + 1]
  end
end
redis.call('HSET', key, 'incarnation', incarnation, 'state', 'STARTING', 'registered_ms', int(NOW), unpack(fields))
redis.call('HDEL', key, 'claim_no', 'claimed', 'alone', 'stopping', 'prefill_until')
redis.call('PERSIST', key)
redis.call('PERSIST', residents_key(e))
redis.call('ZADD', ENGINES, int(NOW), e)
write_all()
local last = redis.call('XREVRANGE', control_key(e), '+', '-', 'COUNT', 1)
return {'ok', last[1] and last[1][1] or '0-0'}
