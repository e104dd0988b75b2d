--- @include lib programs family create overload
-- Client.submit: stores each body in the call's record and pushes the routing fields only, in one step.
--
-- ARGV     per call: id session kind model priority prompt_tokens deadline_ms (or "+" and ms from now) stream inbox
--          traceparent on_engine_loss ("" = continue) parent_session ("" = not given) digest
--          format ("body" = msgpack | "json") body
-- Returns  flat list, per call: code, detail
--          "new" | "duplicate" | "conflict", state of the record
--          "invalid" (nothing has changed), an error message
--          "overloaded" (nothing has changed), "LIMIT RETRY_MS" (overload.lua)
local names = {'id', 'session', 'kind', 'model', 'priority', 'prompt_tokens', 'deadline_ms', 'stream', 'inbox',
  'traceparent', 'on_engine_loss', 'parent_session', 'digest', 'format'}
local out = {}
for at = 4, #ARGV, #names + 1 do
  local c = {}
  for i, name in ipairs(names) do c[name] = ARGV[at + i - 1] end
  local function push() return push_entry(c, 'ref', '1') end
  local body = ARGV[at + #names]
  local code, detail = create_call(c, push, c.format, body, headroom)
  if code == 'overloaded' then detail = detail .. ' ' .. retry_after(c, detail, #body) end
  out[#out + 1] = code
  out[#out + 1] = detail
end
write_all()
return out
