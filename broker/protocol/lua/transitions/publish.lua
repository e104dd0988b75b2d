--- @include lib events
-- A worker publishes what its calls have produced. An old fence changes nothing. An event number that is already in the
-- log is the retry of a publish whose reply was lost. A number that leaves a gap after the log's end means that Redis
-- has lost events that it had acknowledged.
--
-- ARGV     engine, then per event: id gen attempt n text token_ids chunk replay
--          n: the event's number in the call, from 0, across attempts
-- Returns  list, per event: "ok" | "seen" | "stale" (tell the engine to stop)
--          | "gap" (nothing is written: give the attempt up; the next one resumes after the log)
-- Emits    the event to the call's log, and to the client's inbox with the log's entry id
local e = ARGV[4]

local event_fields = {'state', 'gen', 'attempt', 'engine', 'events', 'inbox', 'log_bytes'}
local function publish(id, gen, attempt, n, text, token_ids, chunk, replay)
  local c = read_call(id, event_fields)
  if c.state ~= 'RUNNING' or c.gen ~= gen or c.attempt ~= attempt or c.engine ~= e then return 'stale' end
  local events = tonumber(c.events) or 0
  if tonumber(n) < events then return 'seen' end
  if tonumber(n) > events then return 'gap' end
  local event = chunk ~= '' and {'chunk', chunk} or {'text', text, 'token_ids', token_ids}
  add_event(id, c, n, event, replay)
  return 'ok'
end

local out = {}
for at = 5, #ARGV, 8 do out[#out + 1] = publish(unpack(ARGV, at, at + 7)) end
write_all()
return out
