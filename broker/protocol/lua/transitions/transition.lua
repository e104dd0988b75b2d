--- @include lib programs family create residents residence terminal
-- One legal step of a call's state, for programs that run calls outside the workers (RequestLifecycleManager).
--
-- ARGV     id, state ("PENDING" creates the record; only then session and engine are used), session engine reason
-- Returns  {"ok", state before} | {"illegal", state before ("" = no such call)}
local id, state, session, engine, reason = ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8]
local legal = {
  ['PENDING>RUNNING'] = true, ['PENDING>CANCELLED'] = true, ['PENDING>FAILED'] = true,
  ['RUNNING>COMPLETED'] = true, ['RUNNING>CANCELLED'] = true, ['RUNNING>FAILED'] = true,
  ['>PENDING'] = true,
}
local function no_entry() return '0-' .. int(NOW) end -- a generation that is not an entry of the router stream

local key = call_key(id)
local before = redis.call('HGET', key, 'state') or ''
if not legal[before .. '>' .. state] then return {'illegal', before} end
if state == 'PENDING' then
  create_call({id = id, session = session, kind = 'generate', model = '', priority = '0', prompt_tokens = '0',
    deadline_ms = '', stream = '0', inbox = '', traceparent = '', digest = ''}, no_entry, 'body', '')
  redis.call('HSET', key, 'engine', engine)
elseif state == 'RUNNING' then
  redis.call('HSET', key, 'state', 'RUNNING', 'started_ms', int(NOW))
else
  end_call(id, read_call(id), state, state == 'FAILED' and 'engine_error' or '', reason, '')
end
write_all()
return {'ok', before}
