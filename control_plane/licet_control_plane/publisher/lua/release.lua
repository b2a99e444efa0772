-- release: while learning, frees what a register holds though its sidecar, which has said all it holds, does not: the
-- register came back with an older state of this server, and nobody else would give its units back.
--
-- KEYS  1 the tenant's mark  2 the quota    (layout: licet/wire/registers.py)
-- ARGV  1 epoch  2 run  3 sidecar
-- Answer: 1 when units were freed, 0 when not: not learning, another pair, no such register, asserted, sealed, or holding
--         nothing but what was spent. May be repeated.

local mark = redis.call('HMGET', KEYS[1], 'epoch', 'run', 'phase')
if mark[1] ~= ARGV[1] or mark[2] ~= ARGV[2] or mark[3] ~= 'learning' then return 0 end
local field = 'r|' .. ARGV[3]
local state = redis.call('HMGET', KEYS[2], 'sum', 'used', field)
if not state[3] then return 0 end
local g, u, h, incarnation, op, epoch, run, at, sealed, d =
  string.match(state[3], '^(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(%w+)|(%d+)|(%d)|(%d+)$')
if not g or sealed == '1' or (epoch == mark[1] and run == mark[2]) then return 0 end
if tonumber(g) <= tonumber(u) then return 0 end
local function text(number) return string.format('%.0f', number) end
redis.call('HSET', KEYS[2], field, table.concat({u, u, '0', incarnation, op, epoch, run, at, sealed, d}, '|'),
  'sum', text(tonumber(state[1]) - tonumber(g) + tonumber(u)), 'used', text(tonumber(state[2]) - tonumber(h)))
return 1
