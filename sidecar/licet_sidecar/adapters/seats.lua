-- seats: the one script by which a sidecar acquires, renews, takes over and releases seats of one tenant.
--
-- Any number of asks, each about one holder of one feature. No ask makes more holders than there are seats, except
-- that while learning, sidecars say again what they hold ("assert"). Nothing an ask does shortens a hold, and a
-- release removes only what its own sidecar answers for, so that a repeated or late call does no harm. All checks come
-- before all writes, because Lua keeps the writes that came before an error. `server_run` is put before.
--
-- KEYS  1      the tenant's mark            (layout: licet/wire/registers.py)
--       2…     for each feature its set of seats and its hash of holders
-- ARGV  1 sidecar  2 incarnation  3 op  4 epoch  5 run  6 revision  7 how long a hold lasts from this call, ms
--       8 number of features, then for each: its name, and the number of seats the sidecar believes it has
--       then for each ask: number of its feature (1…), verb, holder, who (opaque bytes, kept beside the holder)
-- Verbs:  acquire (the holder's own seat, or a free one) | renew (this sidecar's) | assert (renew, and while learning
--         add what is missing) | take (answer for the seat from now on, whoever did) | release | look (write nothing)
-- Answer: status, sidecar, incarnation, op, epoch, run, phase, Redis time in ms, then, when OK:
--         for each feature  number of seats, holders, earliest end of a hold (ms, 0 for none)
--         for each ask      result, who
-- Status: OK | LEARN (no mark) | STALE (the pair is not the mark's)
-- Result: HELD | FREE (look) | FULL | LEARNING (nothing new is given now) | UNPUBLISHED (the mark is older than the
--         caller's revision) | LOST (the set is missing although it was made) | GONE (not held by anybody) | MOVED
--         (another sidecar answers for it) | RELEASED | FENCED (a newer call about it was seen)
--
-- Times are milliseconds of the Redis clock. Invariant: the marker s|<feature> in the mark exists once the set does.

local ARGUMENTS_BEFORE = 8
local ASK_ARGUMENTS = 4
local PURGED_MAX = 512 -- expired holders removed in one call; those left over do not count as holders
local SENTINEL = '*'
local NOBODY, SEVERAL = '-', '*' -- in place of a sidecar: released, and counted on; more than one may answer for it
local VERBS = {acquire = true, renew = true, assert = true, take = true, release = true, look = true}

local function text(number) return string.format('%.0f', number) end

local mark_key = KEYS[1]
local sidecar, incarnation, op = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local revision, kept_ms, feature_count = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local mark = redis.call('HMGET', mark_key, 'epoch', 'run', 'phase', 'revision')
local epoch, run, phase, mark_revision = mark[1], mark[2], mark[3], tonumber(mark[4])

local function answer(status)
  return {status, sidecar, ARGV[2], ARGV[3], epoch or '0', run or '', phase or '', text(now_ms)}
end

-- 1. The mark, as in settle.lua.
if not epoch then return answer('LEARN') end
local present_run = server_run()
if run ~= present_run then
  run, phase = present_run, 'learning'
  redis.call('HSET', mark_key, 'run', run, 'phase', phase, 'since', text(now_ms))
end
if ARGV[4] ~= epoch or ARGV[5] ~= run then return answer('STALE') end
local pair = epoch .. '|' .. run
local is_open = phase == 'open'

-- 2. Each feature: read, write nothing.
local features = {}
for i = 1, feature_count do
  local at = ARGUMENTS_BEFORE + 2 * (i - 1)
  local f = {set = KEYS[2 * i], holders = KEYS[2 * i + 1], name = ARGV[at + 1], believed = tonumber(ARGV[at + 2]),
    records = {}, touched = {}}
  if not (f.set and f.holders and f.name and f.believed) then
    return redis.error_reply('LICET feature ' .. i .. ': keys, name and number of seats are needed')
  end
  f.exists = redis.call('ZSCORE', f.set, SENTINEL) and true or false
  f.marker = redis.call('HGET', mark_key, 's|' .. f.name)
  -- A marker without its set is a loss, and never new. While learning the first call makes it again, but only once:
  -- what was asserted in this learning phase and is missing now was lost again.
  f.lost = not f.exists and f.marker and (is_open or f.marker == pair)
  f.count = redis.call('ZCOUNT', f.set, '(' .. text(now_ms), '+inf') - (f.exists and 1 or 0)
  f.seats = math.max(0, tonumber(redis.call('HGET', mark_key, 'l|' .. f.name .. '#seats') or '0') or 0)
  features[i] = f
end

local RECORD = '^([^|]+)|(%d+)|(%d+)|([^|]*)|(%d+)|(%d+)|(%d+)|(%d+|[^|]+)|(.*)$'

-- Whether the call (a, b) was made before the call (c, d): incarnation first, then the number within it.
local function is_before(a, b, c, d) return a < c or (a == c and b < d) end

local function record_of(f, holder)
  local r = f.records[holder]
  if not r then
    r = {holder = holder, ends = tonumber(redis.call('ZSCORE', f.set, holder) or '0'), from = '', from_ends = 0}
    r.live = r.ends > now_ms
    local packed = r.live and redis.call('HGET', f.holders, holder)
    if packed then
      local owner, r_incarnation, r_op, from, from_incarnation, from_op, from_ends, r_pair, who =
        string.match(packed, RECORD)
      if owner then -- what cannot be read is nobody's: whoever says first that it answers for it does
        r.owner, r.incarnation, r.op, r.who = owner, tonumber(r_incarnation), tonumber(r_op), who
        r.from_ends, r.pair = tonumber(from_ends), r_pair
        if r.from_ends > now_ms then
          r.from, r.from_incarnation, r.from_op = from, tonumber(from_incarnation), tonumber(from_op)
        end
      end
    end
    f.records[holder] = r
  end
  return r
end

-- 3. What each ask comes to.
local function hold(f, r, who)
  if not r.live then f.count = f.count + 1 end
  if r.live and r.owner and r.owner ~= sidecar and r.owner ~= NOBODY then
    -- It moves here. Until it hears of that, the other sidecar goes on telling the holder that the seat is held.
    if r.from == '' or r.from == sidecar or r.from == r.owner then
      r.from, r.from_incarnation, r.from_op = r.owner, r.incarnation, r.op
    else
      r.from, r.from_incarnation, r.from_op = SEVERAL, 0, 0
    end
    r.from_ends = r.ends
  elseif r.from == sidecar then
    r.from = ''
  end
  r.live, r.pair = true, pair
  r.ends = math.max(r.ends, now_ms + kept_ms) -- a late call does not shorten a hold
  r.owner, r.incarnation, r.op = sidecar, incarnation, op
  if who ~= '' or not r.who then r.who = who end
  f.touched[r.holder] = r
  return 'HELD'
end

local function vacate(f, r)
  f.touched[r.holder] = r
  if r.from ~= '' then
    r.owner, r.ends = NOBODY, r.from_ends
  else
    r.live, r.ends, r.owner = false, 0, nil
    f.count = f.count - 1
  end
  return 'RELEASED'
end

local function release(f, r)
  if not r.live then return 'GONE' end
  if not r.owner or r.owner == sidecar then return vacate(f, r) end
  if r.from == sidecar and is_before(r.from_incarnation, r.from_op, incarnation, op) then
    r.from = '' -- it heard that the seat moved, and answers for it no more
    f.touched[r.holder] = r
    if r.owner == NOBODY then return vacate(f, r) end
  end
  return 'MOVED'
end

local function decide(f, r, verb, who)
  if f.lost then return 'LOST' end
  if r.owner == sidecar and is_before(incarnation, op, r.incarnation, r.op) then return 'FENCED' end
  if verb == 'release' then return release(f, r) end
  local held = r.live and r.owner ~= NOBODY
  local renewing = verb == 'renew' or verb == 'assert'
  if verb == 'assert' and not is_open then return hold(f, r, who) end
  -- A holder whose seat was not used under this pair may be one that a failover brought back after it had left. It
  -- counts, but has the seat only when there is one for each that counts.
  local doubtful = r.live and r.pair ~= pair and verb ~= 'assert' and not (is_open and f.count <= f.seats)
  if doubtful and not is_open then return 'LEARNING' end
  if renewing and r.live and r.owner and r.owner ~= sidecar then return 'MOVED' end
  if doubtful then return (renewing or verb == 'take') and 'GONE' or 'FULL' end
  if verb == 'look' and held then return 'HELD' end
  if held or (r.live and verb == 'acquire') then return hold(f, r, who) end
  if not is_open then return 'LEARNING' end
  if renewing or verb == 'take' then return 'GONE' end
  if mark_revision < revision and f.believed ~= f.seats then return 'UNPUBLISHED' end
  if f.count >= f.seats and not r.live then return 'FULL' end
  if verb == 'look' then return 'FREE' end
  return hold(f, r, who)
end

local results = {}
for at = ARGUMENTS_BEFORE + 2 * feature_count + 1, #ARGV, ASK_ARGUMENTS do
  local f = features[tonumber(ARGV[at])]
  if not (f and VERBS[ARGV[at + 1]] and ARGV[at + 2] and ARGV[at + 2] ~= SENTINEL and ARGV[at + 3]) then
    return redis.error_reply('LICET ask ' .. (#results + 1) .. ': a feature, a verb, a holder and whose it is are needed')
  end
  local r = record_of(f, ARGV[at + 2])
  local result = decide(f, r, ARGV[at + 1], ARGV[at + 3])
  results[#results + 1] = {result, r.who or ''}
end

-- 4. Write.
for _, f in ipairs(features) do
  local expired = redis.call('ZRANGE', f.set, '-inf', text(now_ms), 'BYSCORE', 'LIMIT', 0, PURGED_MAX)
  for _, holder in ipairs(expired) do
    redis.call('ZREM', f.set, holder)
    redis.call('HDEL', f.holders, holder)
  end
  local used = f.exists
  for holder, r in pairs(f.touched) do
    if r.live then
      used = true
      redis.call('ZADD', f.set, text(r.ends), holder)
      redis.call('HSET', f.holders, holder, table.concat({r.owner or NOBODY, text(r.incarnation or 0),
        text(r.op or 0), r.from, text(r.from_incarnation or 0), text(r.from_op or 0), text(r.from_ends),
        r.pair or '0|-', r.who or ''}, '|'))
    else
      redis.call('ZREM', f.set, holder)
      redis.call('HDEL', f.holders, holder)
    end
  end
  if not f.lost and not f.exists and f.marker then used = true end -- lost before this learning: begins empty
  if used then
    if not f.exists then redis.call('ZADD', f.set, '+inf', SENTINEL) end
    if f.marker ~= pair then redis.call('HSET', mark_key, 's|' .. f.name, pair) end
  end
end

local reply = answer('OK')
for _, f in ipairs(features) do
  local earliest = redis.call('ZRANGE', f.set, '(' .. text(now_ms), '+inf', 'BYSCORE', 'LIMIT', 0, 1, 'WITHSCORES')
  reply[#reply + 1] = text(f.seats)
  reply[#reply + 1] = text(f.count)
  reply[#reply + 1] = (earliest[1] and earliest[1] ~= SENTINEL) and text(tonumber(earliest[2])) or '0'
end
for _, result in ipairs(results) do
  reply[#reply + 1] = result[1]
  reply[#reply + 1] = result[2]
end
return reply
