-- open: ends learning: writes the newest limits and lets leases be granted again.
--
-- KEYS  1 the tenant's mark  2… quota hashes the mark has markers for and whose window is not over, then sets of seats
--       the mark has markers for: those that are missing are made empty, or else a marker without what it promises
--       would read as another loss
-- ARGV  1 epoch  2 run  3 revision  4 number of quotas  5 number of limits, then limit key and amount for each,
--       then, for each quota: when it expires (seconds since the Unix epoch), marker name, window start,
--       then, for each set of seats, its feature
-- `server_run` is put before (licet/wire/registers.py).
-- Answer: 1 when opened; 0 when not: not learning, another pair, or the mark has limits of a newer revision; -1 when
--       one is lost that something was said into in this phase: it has to be learned again, under a new epoch.

local mark = redis.call('HMGET', KEYS[1], 'epoch', 'run', 'phase', 'revision', 'since')
if mark[1] ~= ARGV[1] or mark[2] ~= ARGV[2] or mark[3] ~= 'learning' then return 0 end
if tonumber(mark[4]) > tonumber(ARGV[3]) then return 0 end
if server_run() ~= mark[2] then return 0 end
local quotas, count = tonumber(ARGV[4]), tonumber(ARGV[5])
local missing, without_seats = {}, {}
for i = 2, 1 + quotas do
  if redis.call('EXISTS', KEYS[i]) == 0 then
    local at = 5 + 2 * count + 3 * (i - 2)
    local marker = redis.call('HGET', KEYS[1], 'm|' .. ARGV[at + 2])
    if marker then
      local newest, previous, said, previous_said = string.match(marker, '^(%d+)|%d+|(%d+)|?(%d*)|?(%d*)$')
      local last_said = ARGV[at + 3] == newest and said or ARGV[at + 3] == previous and previous_said or '0'
      if last_said == mark[5] then return -1 end
    end
    missing[#missing + 1] = {KEYS[i], ARGV[at + 1]}
  end
end
for i = 2 + quotas, #KEYS do
  if not redis.call('ZSCORE', KEYS[i], '*') then
    local feature = ARGV[5 + 2 * count + 3 * quotas + i - 1 - quotas]
    if redis.call('HGET', KEYS[1], 's|' .. feature) == mark[1] .. '|' .. mark[2] then return -1 end
    without_seats[#without_seats + 1] = KEYS[i]
  end
end
local names = redis.call('HKEYS', KEYS[1])
for _, name in ipairs(names) do
  if string.sub(name, 1, 2) == 'l|' then redis.call('HDEL', KEYS[1], name) end
end
for i = 1, count do redis.call('HSET', KEYS[1], 'l|' .. ARGV[4 + 2 * i], ARGV[5 + 2 * i]) end
for _, one in ipairs(missing) do
  redis.call('HSET', one[1], 'base', '0', 'sum', '0', 'used', '0', 'wanted', '0')
  redis.call('EXPIREAT', one[1], one[2])
end
for _, set in ipairs(without_seats) do redis.call('ZADD', set, '+inf', '*') end
local time = redis.call('TIME')
local now_ms = string.format('%.0f', tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000))
redis.call('HSET', KEYS[1], 'phase', 'open', 'since', now_ms, 'revision', ARGV[3])
return 1
