-- begin: makes a tenant's mark, in learning. Only where there is none.
--
-- KEYS  1 the tenant's mark                 (layout: licet/wire/registers.py)
-- ARGV  1 epoch, allocated in the database
-- `server_run` is put before (licet/wire/registers.py).
-- Answer: run when the mark was made, nothing (nil) when there was one already. May be repeated.

if redis.call('EXISTS', KEYS[1]) == 1 then return false end
local time = redis.call('TIME')
local now_ms = string.format('%.0f', tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000))
local run = server_run()
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'run', run, 'phase', 'learning', 'since', now_ms, 'revision', '0')
return run
