--- @include lib poison
-- The first calls in the queues of loaded engines, for a router that may move some of them to idle ones
-- (router/work_stealing/decision.py). Read only.
--
-- ARGV     max_deaths most (calls from each queue) idle (how many idle engines follow), these, then the loaded ones
-- Returns  {reserved, calls}
--          reserved: the idle engines that are reserved for a suspect of poison, and would start no other call
--          calls: per waiting call that is no suspect, in the order of its queue: {id, gen, engine, session, model,
--          priority, level, prompt_tokens, reuse, stolen_from}
local max_deaths, most, idle = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local reserved, calls = {}, {}
for i = 7, 6 + idle do
  if redis.call('HEXISTS', engine_key(ARGV[i]), 'alone') == 1 then reserved[#reserved + 1] = ARGV[i] end
end

local fields = {'state', 'engine', 'gen', 'session', 'model', 'priority', 'level', 'prompt_tokens', 'reuse',
  'stolen_from', 'deaths'}
for i = 7 + idle, #ARGV do
  local e = ARGV[i]
  for _, id in ipairs(redis.call('ZRANGE', queue_key(e), 0, most - 1)) do
    local c = read_call(id, fields)
    if c.state == 'PENDING' and c.engine == e and not is_suspect(c.deaths, max_deaths) then
      calls[#calls + 1] = {id, c.gen, e, c.session, c.model, c.priority, c.level, c.prompt_tokens, c.reuse,
        c.stolen_from}
    end
  end
end
return {reserved, calls}
