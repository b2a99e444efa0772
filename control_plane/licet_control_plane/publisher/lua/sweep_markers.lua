-- sweep_markers: forgets windows that are long over, so that a mark does not grow with every value of a scope.
--
-- KEYS  1 the tenant's mark, then for each marker the hashes of its newest window and of the one before (when there was
--       none, the newest one's again)       (layout: licet/wire/registers.py)
-- ARGV  1 seconds after its end for which a window is remembered (its grace, and how long its hash outlives that)
--       then for each marker: name, window start, previous window start, as they were read
-- `server_run` is put before (licet/wire/registers.py).
-- Answer: how many were removed. May be repeated.
--
-- A marker stays when the mark is learning or of another server, when it is not the one that was read, when its window is not over for long
-- enough by the clock of Redis, and when one of its hashes is still there. The end of a window decides CLOSED before
-- its marker is looked at, so that a marker that is gone never lets an old window begin again.

local mark = redis.call('HMGET', KEYS[1], 'phase', 'run')
if mark[1] ~= 'open' or mark[2] ~= server_run() then return 0 end
local now_s = tonumber(redis.call('TIME')[1])
local kept_s = tonumber(ARGV[1])
local removed = 0
for i = 1, (#ARGV - 1) / 3 do
  local at = 2 + 3 * (i - 1)
  local name, start, previous = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local marker = redis.call('HGET', KEYS[1], 'm|' .. name)
  if marker then
    local newest, ends, before = string.match(marker, '^(%d+)|(%d+)|(%d+)')
    if newest == start and before == previous and now_s >= tonumber(ends) + kept_s
      and redis.call('EXISTS', KEYS[2 * i], KEYS[2 * i + 1]) == 0 then
      redis.call('HDEL', KEYS[1], 'm|' .. name)
      removed = removed + 1
    end
  end
end
return removed
