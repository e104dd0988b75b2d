--- @include lib
-- A client wants the events of an open call that another client pushed. A call that has ended stays unchanged. If the
-- record has expired, nothing is written, because it would have no expiry.
--
-- ARGV     id inbox
-- Returns  the call's state, "" = it has no record
local id, inbox = ARGV[4], ARGV[5]
local state = redis.call('HGET', call_key(id), 'state') or ''
if state == 'PENDING' or state == 'RUNNING' then redis.call('HSET', call_key(id), 'inbox', inbox) end
return state
