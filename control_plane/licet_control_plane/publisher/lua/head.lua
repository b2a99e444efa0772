-- head: says that this server's contents were checked, unless it is not that server any more.
--
-- KEYS  1 the head  2 the epoch sentinel  3 the stream of changes
-- ARGV  1 the sentinel's value as it was checked  2 the run that was checked  3 the signed head
--       4 the revision it names
-- `server_run` is put before (licet/wire/registers.py).
-- Answer: 1 when written, 0 when the sentinel or the server is another, or the stream does not end at that revision:
-- then something was lost, or another publisher went on while this one was paused. May be repeated.

if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
if server_run() ~= ARGV[2] then return 0 end
local last = redis.call('XREVRANGE', KEYS[3], '+', '-', 'COUNT', 1)[1]
if (last and last[1] or '0-0') ~= ARGV[4] .. '-0' then return 0 end
redis.call('SET', KEYS[1], ARGV[3])
return 1
