-- relearn: puts an existing mark in learning under a new epoch, because some of the tenant's quotas were lost.
--
-- KEYS  1 the tenant's mark                 (layout: licet/wire/registers.py)
-- ARGV  1 the epoch the mark has now  2 the new epoch, greater, allocated in the database
-- `server_run` is put before (licet/wire/registers.py).
-- Answer: run when it was done; nothing (nil) when there is no mark or it has another epoch. May be repeated.

local epoch, since = unpack(redis.call('HMGET', KEYS[1], 'epoch', 'since'))
if epoch ~= ARGV[1] or tonumber(ARGV[2]) <= tonumber(epoch) then return false end
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
now_ms = string.format('%.0f', math.max(now_ms, tonumber(since) + 1)) -- names the phase: never the same twice
local run = server_run()
redis.call('HSET', KEYS[1], 'epoch', ARGV[2], 'run', run, 'phase', 'learning', 'since', now_ms)
return run
