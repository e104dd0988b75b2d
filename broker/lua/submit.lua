--- @include lib create
-- Client.submit: stores each body in the call's record and pushes routing fields only, in one step.
--
-- ARGV     per call: id session kind model priority prompt_tokens deadline_ms stream inbox traceparent
--          on_engine_loss ("" = continue) digest body
-- Returns  flat list, per call: code ("new" | "duplicate" | "conflict"), state of the record
local names = {'id', 'session', 'kind', 'model', 'priority', 'prompt_tokens', 'deadline_ms', 'stream', 'inbox',
  'traceparent', 'on_engine_loss', 'digest'}
local out = {}
for at = 4, #ARGV, #names + 1 do
  local c = {}
  for i, name in ipairs(names) do c[name] = ARGV[at + i - 1] end
  local function push()
    return redis.call('XADD', CALLS, '*', 'id', c.id, 'session', c.session, 'model', c.model,
      'prompt_tokens', c.prompt_tokens, 'ref', '1')
  end
  local code, state = create_call(c, push, 'body', ARGV[at + #names])
  out[#out + 1] = code
  out[#out + 1] = state
end
write_all()
return out
