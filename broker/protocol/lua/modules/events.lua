--- @needs lib
-- add_event: adds an event of a streamed call to its log and to its client's inbox.

-- What an entry of a log takes up besides its content.
local ENTRY_BYTES = 32

-- c has gen, inbox and log_bytes of the call. n: the event's number. event: its field-value pairs. replay: a backend's
-- private note, which goes only into the log.
local function add_event(id, c, n, event, replay)
  local logged = {'n', n, unpack(event)}
  if replay ~= '' then
    logged[#logged + 1] = 'replay'
    logged[#logged + 1] = replay
  end
  local size = ENTRY_BYTES + #replay
  for i = 2, #event, 2 do size = size + #event[i] end
  local eid = redis.call('XADD', log_key(id), '*', unpack(logged))
  redis.call('HSET', call_key(id), 'events', int(tonumber(n) + 1), 'log_bytes',
    int((tonumber(c.log_bytes) or 0) + size))
  if c.inbox ~= '' then
    redis.call('XADD', inbox_key(c.inbox), 'MAXLEN', '~', LIMITS.inbox_max, '*', 'call', id, 'gen', c.gen, 'eid', eid,
      'n', n, unpack(event))
    touch(inbox_key(c.inbox), RESULT_TTL)
  end
end
