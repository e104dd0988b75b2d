--- @include lib
-- A worker publishes what its calls have produced. An old fence changes nothing; an event number that is
-- already in the log is the retry of a publish whose reply was lost.
--
-- ARGV     engine, then per event: id gen attempt n text token_ids chunk replay
--          n: the event's number in the call, from 0, across attempts
-- Returns  list, per event: "ok" | "seen" | "stale" (tell the engine to stop)
-- Emits    the event to the call's log, and to the client's inbox with the log's entry id
local e = ARGV[4]
local out, told = {}, {}
for at = 5, #ARGV, 8 do
  local id, gen, attempt, n = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local text, token_ids, chunk, replay = ARGV[at + 4], ARGV[at + 5], ARGV[at + 6], ARGV[at + 7]
  local key = call_key(id)
  local r = redis.call('HMGET', key, 'state', 'gen', 'attempt', 'engine', 'events', 'inbox')
  if r[1] ~= 'RUNNING' or r[2] ~= gen or r[3] ~= attempt or r[4] ~= e then
    out[#out + 1] = 'stale'
  elseif tonumber(n) < tonumber(r[5]) then
    out[#out + 1] = 'seen'
  else
    local event = {'n', n}
    if chunk ~= '' then
      event[#event + 1] = 'chunk'; event[#event + 1] = chunk
    else
      event[#event + 1] = 'text'; event[#event + 1] = text
      event[#event + 1] = 'token_ids'; event[#event + 1] = token_ids
    end
    local logged = {unpack(event)}
    if replay ~= '' then logged[#logged + 1] = 'replay'; logged[#logged + 1] = replay end
    local eid = redis.call('XADD', log_key(id), '*', unpack(logged))
    redis.call('HSET', key, 'events', int(tonumber(n) + 1))
    if r[6] ~= '' then
      redis.call('XADD', inbox_key(r[6]), 'MAXLEN', '~', INBOX_MAX, '*', 'call', id, 'gen', gen, 'eid', eid, unpack(event))
      told[r[6]] = true
    end
    out[#out + 1] = 'ok'
  end
end
for client in pairs(told) do redis.call('PEXPIRE', inbox_key(client), RESULT_TTL) end
return out
