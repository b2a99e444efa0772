-- head: says that this server's contents were checked, unless it is not that server any more.
--
-- KEYS  1 the head  2 the epoch sentinel
-- ARGV  1 the sentinel's value as it was checked  2 the run id that was checked  3 the signed head
-- Answer: 1 when written, 0 when the sentinel or the server is another. May be repeated.

if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
if string.match(redis.call('INFO', 'server'), 'run_id:(%w+)') ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[1], ARGV[3])
return 1
