--- @include lib create terminal
-- The router makes records for calls that were pushed by a bare XADD. The body moves inside Redis, from
-- the entry to the record; a refused entry leaves the stream, an admitted one stays until it is assigned.
--
-- ARGV     per call: entry id session kind model priority prompt_tokens deadline_ms stream inbox traceparent
--          digest body_field ("json" | "body")
-- Returns  list, per call: "new" | "duplicate" | "conflict" | "gone" (another router was faster)
-- Emits    on conflict: a dead letter, and an "end" event to the inbox that the entry named
local names = {'entry', 'id', 'session', 'kind', 'model', 'priority', 'prompt_tokens', 'deadline_ms', 'stream',
  'inbox', 'traceparent', 'digest', 'body_field'}
local conflict = 'This id belongs to another call with another body; choose a new id.'
local out = {}
for at = 4, #ARGV, #names do
  local c = {}
  for i, name in ipairs(names) do c[name] = ARGV[at + i - 1] end
  local found = redis.call('XRANGE', CALLS, c.entry, c.entry)
  local code = 'gone'
  if found[1] then
    local body, fields = '', found[1][2]
    for i = 1, #fields, 2 do
      if fields[i] == c.body_field then body = fields[i + 1] end
    end
    if redis.call('HGET', call_key(c.id), 'gen') == c.entry then
      code = 'duplicate' -- this very entry, read again after its router died: assign goes on with it
    else
      code = create_call(c.entry, c, c.body_field, body)
      if code ~= 'new' then take_entry(c.entry) end
    end
  end
  if code == 'conflict' then
    bury(c.id, 'conflict', conflict, 'session', c.session, 'kind', c.kind, 'model', c.model)
    tell_inbox(c.inbox, c.id, 'FAILED', 'conflict', conflict, '', '0', {'gen', c.entry})
  end
  out[#out + 1] = code
end
write_counters()
return out
