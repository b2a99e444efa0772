-- open: ends learning: writes the newest limits and lets leases be granted again.
--
-- KEYS  1 the tenant's mark  2… quota hashes the mark has markers for and whose window is not over: those that are
--       missing are made empty, or else a marker without its hash would read as another loss
-- ARGV  1 epoch  2 run  3 revision  4 number of limits, then limit key and amount for each,
--       then, for each of KEYS 2…, when it expires (seconds since the Unix epoch)
-- Answer: 1 when opened, 0 when not: not learning, another pair, or the mark has limits of a newer revision.

local mark = redis.call('HMGET', KEYS[1], 'epoch', 'run', 'phase', 'revision')
if mark[1] ~= ARGV[1] or mark[2] ~= ARGV[2] or mark[3] ~= 'learning' then return 0 end
if tonumber(mark[4]) > tonumber(ARGV[3]) then return 0 end
if string.match(redis.call('INFO', 'server'), 'run_id:(%w+)') ~= mark[2] then return 0 end
local count = tonumber(ARGV[4])
local names = redis.call('HKEYS', KEYS[1])
for _, name in ipairs(names) do
  if string.sub(name, 1, 2) == 'l|' then redis.call('HDEL', KEYS[1], name) end
end
for i = 1, count do redis.call('HSET', KEYS[1], 'l|' .. ARGV[3 + 2 * i], ARGV[4 + 2 * i]) end
for i = 2, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 0 then
    redis.call('HSET', KEYS[i], 'base', '0', 'sum', '0', 'used', '0', 'wanted', '0')
    redis.call('EXPIREAT', KEYS[i], ARGV[4 + 2 * count + i - 1])
  end
end
local time = redis.call('TIME')
local now_ms = string.format('%.0f', tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000))
redis.call('HSET', KEYS[1], 'phase', 'open', 'since', now_ms, 'revision', ARGV[3])
return 1
