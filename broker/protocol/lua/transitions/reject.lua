--- @include lib programs family create residents residence terminal
-- The router refuses entries that cannot become calls. If the id is valid and free, the refusal becomes a FAILED
-- record, else a dead letter. In both cases the entry leaves the stream and blocks no other.
--
-- ARGV     per entry: entry id ("" = no valid one) gen ("" = the entry itself) session inbox error_code error
-- Returns  list, per entry: "failed" | "buried" (a dead letter) | "stale" (its call has ended or was assigned
--          meanwhile) | "gone"
-- The fields of a refused entry are unchecked, so a letter takes no more of them than this, in bytes.
local FIELD_MAX, BODY_MAX = 128, 65536

-- The usable fields of an entry, in case it is replayed.
local function letter_of_entry(fields)
  local c = {}
  for i = 1, #fields, 2 do c[fields[i]] = fields[i + 1] end
  local format = c.json and 'json' or 'body'
  local body = c[format] or ''
  if #body > BODY_MAX then body = '' end
  for _, name in ipairs(letter_fields) do
    if c[name] and #c[name] > FIELD_MAX then c[name] = '' end
  end
  return letter_of(c, format, body)
end

local function refuse(entry, id, gen, session, inbox, code, message)
  local found = redis.call('XRANGE', CALLS, entry, entry)[1]
  if not found then return 'gone' end
  take_entry(entry)
  local c = {state = 'none'}
  if id ~= '' then c = read_call(id) end
  if c.state == '' then
    create_call({id = id, session = session, kind = '', model = '', priority = '0', prompt_tokens = '0',
      deadline_ms = '', stream = '0', inbox = inbox, traceparent = '', digest = ''},
      function() return entry end, 'body', '')
    c = read_call(id)
  elseif c.gen == gen and (c.state ~= 'PENDING' or c.engine ~= '') then
    return 'stale'
  elseif c.gen ~= gen then
    add_dead_letter(id, code, message, 'entry', entry, unpack(letter_of_entry(found[2])))
    report_end(inbox, id, 'FAILED', code, message, '', 'n', 0, 'gen', entry)
    return 'buried'
  end
  end_call(id, c, 'FAILED', code, message, '')
  return 'failed'
end

local out = {}
for at = 4, #ARGV, 7 do
  local gen = ARGV[at + 2]
  if gen == '' then gen = ARGV[at] end
  out[#out + 1] = refuse(ARGV[at], ARGV[at + 1], gen, ARGV[at + 3], ARGV[at + 4], ARGV[at + 5], ARGV[at + 6])
end
write_all()
return out
