-- seal: ends the register of a sidecar that will not come back: what it spent becomes part of the base, the rest is free.
--
-- KEYS  1 the tenant's mark  2 the quota    (layout: licet/wire/registers.py)
-- ARGV  1 epoch  2 run  3 sidecar  4 u, units the ledger knows it spent
--       5 milliseconds a register must have been silent (a hold and its margin)
--       6 milliseconds tombstones are kept; 0 to leave them alone: looking at all costs as much as there are registers
-- `server_run` is put before (licet/wire/registers.py).
-- Answer: status, g, u, h as they were, units that stay counted (now in the base), milliseconds until it may be sealed.
-- Status: SEALED | ALREADY (a tombstone) | NONE (no such register, or no such quota) | LEARNING (only an open quota can
--         be sealed) | STALE (the pair is not the mark's,
--         or the server is another) | LIVE (its last call is too young)
--
-- A tombstone, 0|0|0|incarnation|op|epoch|run|now|1|counted, is left so that the sidecar, should it come back, is told. Older
-- tombstones of the hash are removed on the way. Invariants: sum = base + Σ g; used = base + Σ (u + h). What stays
-- counted is max(u + h, ledger's u): open reservations stay, and g is never raised but for what was spent.
-- May be repeated.

local function text(number) return string.format('%.0f', number) end
local REGISTER = '^(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(%w+)|(%d+)|(%d)|(%d+)$'
local FIELDS_MAX = 1000 -- in one HDEL: Lua cannot unpack without end

local function refused(status) return {status, '0', '0', '0', '0', '0'} end

local mark = redis.call('HMGET', KEYS[1], 'epoch', 'run', 'phase')
if mark[1] ~= ARGV[1] or mark[2] ~= ARGV[2] or mark[2] ~= server_run() then return refused('STALE') end
if mark[3] ~= 'open' then return refused('LEARNING') end
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local silent_ms, kept_ms = tonumber(ARGV[5]), tonumber(ARGV[6])
local field = 'r|' .. ARGV[3]
local state = redis.call('HMGET', KEYS[2], 'base', 'sum', 'used', field)
if not state[4] then return refused('NONE') end
local g, u, h, incarnation, op, _, _, at_ms, sealed = string.match(state[4], REGISTER)
if not g then return redis.error_reply('LICET the register of ' .. ARGV[3] .. ' is damaged') end
g, u, h, at_ms = tonumber(g), tonumber(u), tonumber(h), tonumber(at_ms)
if sealed == '1' and g == 0 then return refused('ALREADY') end
if at_ms + silent_ms >= now_ms then
  return {'LIVE', text(g), text(u), text(h), text(g), text(at_ms + silent_ms - now_ms)}
end
local counted = math.max(u + h, tonumber(ARGV[4]))
local base, sum, used = tonumber(state[1]) + counted, tonumber(state[2]) - g + counted, tonumber(state[3]) - u - h + counted
if sum > 9007199254740991 then return redis.error_reply('LICET the sum would reach 2^53') end

local old = {}
local all = kept_ms > 0 and redis.call('HGETALL', KEYS[2]) or {}
for i = 1, #all, 2 do
  if string.sub(all[i], 1, 2) == 'r|' and all[i] ~= field then
    local r_g, _, _, _, _, _, _, r_at_ms, r_sealed = string.match(all[i + 1], REGISTER)
    if r_sealed == '1' and r_g == '0' and tonumber(r_at_ms) + kept_ms <= now_ms then old[#old + 1] = all[i] end
  end
end
for i = 1, #old, FIELDS_MAX do
  redis.call('HDEL', KEYS[2], unpack(old, i, math.min(i + FIELDS_MAX - 1, #old)))
end
redis.call('HSET', KEYS[2], 'base', text(base), 'sum', text(sum), 'used', text(used),
  field, table.concat({'0', '0', '0', incarnation, op, mark[1], mark[2], text(now_ms), '1', text(counted)}, '|'))
return {'SEALED', text(g), text(u), text(h), text(counted), '0'}
