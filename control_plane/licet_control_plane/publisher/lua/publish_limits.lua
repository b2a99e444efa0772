-- publish_limits: replaces the limits in a tenant's mark by those of a newer revision.
--
-- KEYS  1 the tenant's mark                 (layout: licet/wire/registers.py)
-- ARGV  1 revision  2 number of limits, then limit key and amount for each
-- Answer: OK | NOMARK (begin it first) | OLDER (the mark has limits of a newer revision). May be repeated.

local revision = redis.call('HGET', KEYS[1], 'revision')
if not revision then return 'NOMARK' end
if tonumber(revision) > tonumber(ARGV[1]) then return 'OLDER' end
local names = redis.call('HKEYS', KEYS[1])
for _, name in ipairs(names) do
  if string.sub(name, 1, 2) == 'l|' then redis.call('HDEL', KEYS[1], name) end
end
for i = 1, tonumber(ARGV[2]) do redis.call('HSET', KEYS[1], 'l|' .. ARGV[1 + 2 * i], ARGV[2 + 2 * i]) end
redis.call('HSET', KEYS[1], 'revision', ARGV[1])
return 'OK'
