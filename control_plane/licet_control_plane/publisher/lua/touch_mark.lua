-- touch_mark: what a tenant's mark says; puts it in learning when the server is not the one it was last used on.
--
-- KEYS  1 the tenant's mark                 (layout: licet/wire/registers.py)
-- `server_run` is put before (licet/wire/registers.py).
-- Answer: nothing (nil) when there is no mark; else epoch, run, phase, since (ms), revision, Redis time in ms.
-- May be repeated.

local mark = redis.call('HMGET', KEYS[1], 'epoch', 'run', 'phase', 'since', 'revision')
if not mark[1] then return false end
local time = redis.call('TIME')
local now_ms = string.format('%.0f', tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000))
local this_run = server_run()
if mark[2] ~= this_run then
  mark[2], mark[3], mark[4] = this_run, 'learning', now_ms
  redis.call('HSET', KEYS[1], 'run', this_run, 'phase', 'learning', 'since', now_ms)
end
mark[6] = now_ms
return mark
