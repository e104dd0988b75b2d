--- @include lib programs family create overload residents residence terminal
-- The router creates records for calls that a bare XADD pushed. The body is moved inside Redis, from the entry to the
-- record. A refused entry leaves the stream; an accepted one stays until it is assigned.
--
-- ARGV     per call: entry id session kind model priority prompt_tokens deadline_ms stream inbox traceparent
--          on_engine_loss ("" = continue) parent_session ("" = not given) digest format ("json" | "body")
-- Returns  list, per call: "new" | "duplicate" | "conflict" | "overloaded" | "invalid" | "gone" (another router was
--          faster)
-- Emits    on conflict: a dead letter, and an end to the inbox that the entry named
--          if overloaded or invalid: a FAILED record without the body, and its end
local names = {'entry', 'id', 'session', 'kind', 'model', 'priority', 'prompt_tokens', 'deadline_ms', 'stream',
  'inbox', 'traceparent', 'on_engine_loss', 'parent_session', 'digest', 'format'}
local overloaded = 'The limit RSM_MAX_%s is reached. Push the call again in %s ms or later; the same id is fine.'
local conflict = 'This id already belongs to a different call. Choose a new id.'

local function body_of(fields, name)
  for i = 1, #fields, 2 do
    if fields[i] == name then return fields[i + 1] end
  end
  return ''
end

local function accept(c)
  local found = redis.call('XRANGE', CALLS, c.entry, c.entry)
  if not found[1] then return 'gone' end
  -- This entry, read again after its router died: assign continues with it.
  if redis.call('HGET', call_key(c.id), 'gen') == c.entry then return 'duplicate' end
  local function entry() return c.entry end
  local body = body_of(found[1][2], c.format)
  local function refuse(error_code, message)
    c.parent_session = ''
    create_call(c, entry, c.format, '')
    end_call(c.id, read_call(c.id), 'FAILED', error_code, message, '')
  end
  local code, detail = create_call(c, entry, c.format, body, headroom)
  if code ~= 'new' then take_entry(c.entry) end
  if code == 'overloaded' then
    refuse('overloaded', string.format(overloaded, string.upper(detail), retry_after(c, detail, #body)))
  elseif code == 'invalid' then
    refuse('invalid_request', detail)
  end
  if code == 'conflict' then
    add_dead_letter(c.id, 'conflict', conflict, unpack(letter_of(c, c.format, body)))
    report_end(c.inbox, c.id, 'FAILED', 'conflict', conflict, '', 'n', 0, 'gen', c.entry)
  end
  return code
end

local out = {}
for at = 4, #ARGV, #names do
  local c = {}
  for i, name in ipairs(names) do c[name] = ARGV[at + i - 1] end
  out[#out + 1] = accept(c)
end
write_all()
return out
