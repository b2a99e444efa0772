-- fill: while learning, counts what the ledger knows one sidecar spent of one quota, unless it said so itself; or what
-- it knows all retired ones spent, whose registers became part of the base.
--
-- KEYS  1 the tenant's mark  2 the quota    (layout: licet/wire/registers.py)
-- ARGV  1 epoch  2 run  3 sidecar, or nothing for all that are retired  4 u, units from the ledger  5 marker name
--       6 window start  7 window end (seconds)  8 window grace, seconds  9 seconds the hash outlives its grace
-- Answer: 1 when the register (or the base) was raised, 0 when not: not learning, another pair, already asserted or
--         sealed, not below u, the window is over, the hash was lost in this phase, or the sum would reach 2^53. May be
--         repeated.

local mark = redis.call('HMGET', KEYS[1], 'epoch', 'run', 'phase', 'since')
if mark[1] ~= ARGV[1] or mark[2] ~= ARGV[2] or mark[3] ~= 'learning' then return 0 end
local time = redis.call('TIME')
if tonumber(time[1]) >= tonumber(ARGV[7]) + tonumber(ARGV[8]) then return 0 end
local function text(number) return string.format('%.0f', number) end
local spent = tonumber(ARGV[4])
local field = 'r|' .. ARGV[3]
local state = redis.call('HMGET', KEYS[2], 'base', 'sum', 'used', 'wanted', field)
local g, u, h, incarnation, op, epoch, run, at, sealed, d = 0, 0, 0, '0', '0', '0', '0', '0', '0', '0'
if state[5] then
  g, u, h, incarnation, op, epoch, run, at, sealed, d =
    string.match(state[5], '^(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(%w+)|(%d+)|(%d)|(%d+)$')
  g, u, h = tonumber(g), tonumber(u), tonumber(h)
  if epoch == mark[1] and run == mark[2] then return 0 end -- it asserted itself: it knows better
  if sealed == '1' then return 0 end -- what it spent is in the base
end
-- The marker also tells that something was said in this phase: the hash may not be lost again unnoticed.
local since, starts = mark[4], ARGV[6]
local marker = redis.call('HGET', KEYS[1], 'm|' .. ARGV[5])
local new, last_said = {starts, ARGV[7], '0', since, '0'}, '0'
if marker then
  local newest, newest_end, previous, said, previous_said =
    string.match(marker, '^(%d+)|(%d+)|(%d+)|?(%d*)|?(%d*)$') -- older programs wrote three fields
  said, previous_said = tonumber(said) and said or '0', tonumber(previous_said) and previous_said or '0'
  if tonumber(starts) > tonumber(newest) then
    new = {starts, ARGV[7], newest, since, said}
  elseif starts == newest then
    new, last_said = {newest, newest_end, previous, since, previous_said}, said
  elseif tonumber(starts) > tonumber(previous) then
    new = {newest, newest_end, starts, said, since}
  elseif starts == previous then
    new, last_said = {newest, newest_end, previous, said, since}, previous_said
  else
    new = nil -- older than what markers remember
  end
end
if not state[2] and last_said == since then return 0 end

local base = tonumber(state[1] or '0')
local retired = ARGV[3] == ''
if retired then g, u = base, base end
if spent <= u then return 0 end
local new_g = math.max(g, spent + h)
local sum, used = tonumber(state[2] or '0') + (new_g - g), tonumber(state[3] or '0') + (spent - u)
if sum > 9007199254740991 then return 0 end -- beyond 2^53 - 1 a double loses count, for good
if retired then
  base = spent
else
  redis.call('HSET', KEYS[2], field,
    table.concat({text(new_g), text(spent), text(h), incarnation, op, epoch, run, at, sealed, d}, '|'))
end
redis.call('HSET', KEYS[2], 'base', text(base), 'sum', text(sum), 'used', text(used), 'wanted', state[4] or '0')
redis.call('EXPIREAT', KEYS[2], tonumber(ARGV[7]) + tonumber(ARGV[8]) + tonumber(ARGV[9]))
if new then redis.call('HSET', KEYS[1], 'm|' .. ARGV[5], table.concat(new, '|')) end
return 1
