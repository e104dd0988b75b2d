--- @include lib residents residence terminal stop
-- Cancels all calls of a session, on every engine. Calls that are still on the router stream end on arrival, because
-- the session remembers up to which entry it is cancelled. Large sessions take several rounds.
--
-- ARGV     session reason cursor ("0" starts a cancel) batch tree ("1" = calls of its descendants that are still on the
--          stream end on arrival, too; their other calls take a cancel for each descendant)
-- Returns  {cursor ("0" = done), calls ended or flagged in this round, child, …}; the children come with the last round
--          of a tree
-- Emits    one op=cancel per running call to its worker
local session, reason, cursor, batch, tree = ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8] == '1'
local key = session_key(session)
if cursor == '0' then
  local last = redis.call('XREVRANGE', CALLS, '+', '-', 'COUNT', 1)
  if last[1] then
    redis.call('HSET', key, 'cancel_before', last[1][1], 'cancel_reason', reason)
    if tree then redis.call('HSET', key, 'cancel_tree_before', last[1][1]) end
    redis.call('PEXPIRE', key, SESSION_TTL)
  end
end
local scan = redis.call('SSCAN', session_calls_key(session), cursor, 'COUNT', batch)
local n = 0
for _, id in ipairs(scan[2]) do
  local done = stop_call(id, 'user', reason)
  if done == 'ended' or done == 'flagged' then n = n + 1 end
end
write_all()
local children = tree and scan[1] == '0' and redis.call('ZRANGE', children_key(session), 0, -1) or {}
return {scan[1], n, unpack(children)}
