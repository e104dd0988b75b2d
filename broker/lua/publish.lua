--- @include lib
-- A worker publishes what its calls have produced. An old fence changes nothing; an event number that is
-- already in the log is the retry of a publish whose reply was lost; one that leaves a gap behind the log's end says
-- that Redis lost events that it had acknowledged.
--
-- ARGV     engine, then per event: id gen attempt n text token_ids chunk replay
--          n: the event's number in the call, from 0, across attempts
-- Returns  list, per event: "ok" | "seen" | "stale" (tell the engine to stop)
--          | "gap" (nothing is written: give the attempt up; the next one goes on behind the log)
-- Emits    the event to the call's log, and to the client's inbox with the log's entry id
local e = ARGV[4]
-- What an entry of a log takes beside what it says.
local PIECE_BYTES = 32

local function write_event(id, gen, inbox, log_bytes, n, text, token_ids, chunk, replay)
  local event = {'n', n, 'text', text, 'token_ids', token_ids}
  if chunk ~= '' then event = {'n', n, 'chunk', chunk} end
  local logged = {unpack(event)}
  if replay ~= '' then
    logged[#logged + 1] = 'replay'
    logged[#logged + 1] = replay
  end
  local eid = redis.call('XADD', log_key(id), '*', unpack(logged))
  log_bytes = log_bytes + PIECE_BYTES + #text + #token_ids + #chunk + #replay
  redis.call('HSET', call_key(id), 'events', int(tonumber(n) + 1), 'log_bytes', int(log_bytes))
  if inbox ~= '' then
    redis.call('XADD', inbox_key(inbox), 'MAXLEN', '~', BOUND.inbox_max, '*', 'call', id, 'gen', gen, 'eid', eid,
      unpack(event))
    touch(inbox_key(inbox), RESULT_TTL)
  end
end

local function publish(id, gen, attempt, n, ...)
  local r = redis.call('HMGET', call_key(id), 'state', 'gen', 'attempt', 'engine', 'events', 'inbox', 'log_bytes')
  if r[1] ~= 'RUNNING' or r[2] ~= gen or r[3] ~= attempt or r[4] ~= e then return 'stale' end
  local events = tonumber(r[5]) or 0
  if tonumber(n) < events then return 'seen' end
  if tonumber(n) > events then return 'gap' end
  write_event(id, gen, r[6] or '', tonumber(r[7]) or 0, n, ...)
  return 'ok'
end

local out = {}
for at = 5, #ARGV, 8 do out[#out + 1] = publish(unpack(ARGV, at, at + 7)) end
write_all()
return out
