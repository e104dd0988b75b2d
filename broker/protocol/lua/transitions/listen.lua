--- @include lib
-- A client wants the news of an open call that somebody else pushed. A call that has ended is left as it is, and of one
-- whose record has expired nothing is written: it would stay for ever.
--
-- ARGV     id inbox
-- Returns  state of the record, "" = there is none
local id, inbox = ARGV[4], ARGV[5]
local state = redis.call('HGET', call_key(id), 'state') or ''
if state == 'PENDING' or state == 'RUNNING' then redis.call('HSET', call_key(id), 'inbox', inbox) end
return state
