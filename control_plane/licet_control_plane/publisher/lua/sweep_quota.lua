-- sweep_quota: removes what nobody needs any more from a quota whose window is long or never ends.
--
-- KEYS  1 the tenant's mark  2 the quota    (layout: licet/wire/registers.py)
-- ARGV  1 milliseconds tombstones are kept  2 milliseconds until a share of a rate that nothing was said of is over
--       3 marker name when the quota is a rate's, else empty
-- `server_run` is put before (licet/wire/registers.py).
-- Answer: registers removed, 1 when the whole quota was. May be repeated.
--
-- Tombstones hold nothing, so that they go from any quota. Shares of a rate that are over count for nobody: they go too,
-- and a rate that nobody has a share of goes as a whole, its marker with it, as if it had never been used.
-- Invariant: sum = base + Σ g. Nothing is done while the mark is learning, or of another server.

local function text(number) return string.format('%.0f', number) end
local REGISTER = '^(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(%w+)|(%d+)|(%d)|(%d+)$'
local FIELDS_MAX = 1000 -- in one HDEL: Lua cannot unpack without end

local mark = redis.call('HMGET', KEYS[1], 'phase', 'run')
if mark[1] ~= 'open' or mark[2] ~= server_run() then return {0, 0} end
local all = redis.call('HGETALL', KEYS[2])
if #all == 0 then return {0, 0} end
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local kept_ms, share_ms, is_rate = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3] ~= ''
local old, left, freed = {}, 0, 0
local base, sum = 0, 0
for i = 1, #all, 2 do
  local name, value = all[i], all[i + 1]
  if name == 'base' then base = tonumber(value) end
  if name == 'sum' then sum = tonumber(value) end
  if string.sub(name, 1, 2) == 'r|' then
    local g, u, h, _, _, _, _, at_ms, sealed = string.match(value, REGISTER)
    at_ms = tonumber(at_ms or now_ms) -- a damaged register stays, to be looked at
    local tombstone = sealed == '1' and g == '0' and at_ms + kept_ms <= now_ms
    local over = is_rate and sealed == '0' and u == '0' and h == '0' and at_ms + share_ms <= now_ms
    if tombstone or over then
      old[#old + 1] = name
      freed = freed + tonumber(g)
    else
      left = left + 1
    end
  end
end
if is_rate and left == 0 and base == 0 then
  redis.call('DEL', KEYS[2])
  redis.call('HDEL', KEYS[1], 'm|' .. ARGV[3])
  return {#old, 1}
end
for i = 1, #old, FIELDS_MAX do
  redis.call('HDEL', KEYS[2], unpack(old, i, math.min(i + FIELDS_MAX - 1, #old)))
end
if freed > 0 then redis.call('HSET', KEYS[2], 'sum', text(sum - freed)) end
return {#old, 0}
