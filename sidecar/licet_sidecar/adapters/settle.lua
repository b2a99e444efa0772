-- settle: the one script by which a sidecar moves units between itself and the quotas of one tenant.
--
-- It reports what the sidecar spent (u) and reserved (h), returns what it no longer holds, and acquires more, for any
-- number of quotas, all or nothing. Repeating a call verbatim repeats its answer. All checks come before all writes,
-- because Lua keeps the writes that came before an error. `server_run` is put before (licet/wire/registers.py).
--
-- KEYS  1      the tenant's mark            (layout: licet/wire/registers.py)
--       2…     one quota hash each
-- ARGV  1 sidecar  2 incarnation  3 op  4 epoch  5 run  6 revision  7 live sidecars (at least 1)
--       8 window grace, seconds  9 seconds a quota hash outlives its grace  10 milliseconds until a share of a rate
--       that nothing was said of is over
--       11 1 when the sidecar retires: its registers without reservations become part of the base
--       12 1 when a repeated call has to write again, for the WAIT that follows it
--       then twelve for each quota:
--         limit key, marker name, window start, window end (seconds, end exclusive),
--         cap (what the sidecar believes it holds), u, h, want, min (units; want = min = 0: report or return),
--         the amount the sidecar believes the limit has,
--         kind: hard | soft (leases past the amount when min needs it) | rate (shares),
--         1 when a call about this quota was answered under this pair before, so that there must be a register
-- Answer: status, sidecar, incarnation, op, epoch, run, phase, Redis time in ms, then
--         OK:     for each quota  g, granted by this call, u, amount, sum, used, wanted (1 when others lack units)
--         else:   the number of the quota it is about (1…), or 0
-- Status: OK | LEARN (no mark, or a quota hash is lost) | STALE (the pair is not the mark's) | UNPUBLISHED (the mark is
--         older than the caller's revision, so nothing can be granted) | OUTDATED (the reverse: the mark is newer, and
--         the limit that units are asked of is not in it any more) | CLOSED (the window is over) | EARLY (the caller's
--         clock is ahead) | SEALED (take a new sidecar id) | FENCED (a newer call was seen)
--
-- Units are integers in [0, 2^53). Invariants: sum = base + Σ g; used = base + Σ (u + h); u + h <= g for each
-- register; a grant of a hard limit or a rate implies sum <= amount.

local UNITS_MAX = 9007199254740991
local ARGUMENTS_BEFORE = 12
local ARGUMENTS_EACH = 12
local GENEROUS_SHARE = 64 -- far from the limit a lease is at least remaining / (GENEROUS_SHARE * live)
local FAIR_SHARE = 2      -- a lease is at most remaining / (FAIR_SHARE * live), or what the waiting call needs
local WANTED_MS = 2000    -- how long idle holders are asked to return units after a call fell short
local MARKER = '^(%d+)|(%d+)|(%d+)|?(%d*)|?(%d*)$' -- older programs wrote three fields
local REGISTER = '^(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(%w+)|(%d+)|(%d)|(%d+)$'

local function text(number) return string.format('%.0f', number) end

local function units(value)
  local number = tonumber(value)
  if not number or number < 0 or number > UNITS_MAX or number ~= math.floor(number) then return nil end
  return number
end

local mark_key = KEYS[1]
local sidecar = ARGV[1]
local incarnation, op = tonumber(ARGV[2]), tonumber(ARGV[3])
local revision = tonumber(ARGV[6])
local live = math.max(1, tonumber(ARGV[7]))
local grace_s, kept_s, share_ms = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local retiring, writes_again = ARGV[11] == '1', ARGV[12] == '1'
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local now_s = tonumber(time[1])

local mark = redis.call('HMGET', mark_key, 'epoch', 'run', 'phase', 'revision', 'since')
local epoch, run, phase, mark_revision, since_ms = mark[1], mark[2], mark[3], tonumber(mark[4]), tonumber(mark[5])

local function answer(status, quota)
  return {status, sidecar, ARGV[2], ARGV[3], epoch or '0', run or '', phase or '', text(now_ms), quota or 0}
end

-- 1. The mark.
if not epoch then return answer('LEARN', 0) end
local this_run = server_run()
if run ~= this_run then
  -- Another server, or the same one restarted or promoted: writes may be lost. Nothing is granted until it was learned.
  run, phase, since_ms = this_run, 'learning', now_ms
  redis.call('HSET', mark_key, 'run', run, 'phase', phase, 'since', text(now_ms))
end
if ARGV[4] ~= epoch or ARGV[5] ~= run then return answer('STALE', 0) end

-- 2. Each quota: read and check, write nothing.
local quotas = {}
local new_markers = {} -- two windows of one limit share a marker
local repeated = 0
for i = 2, #KEYS do
  local at = ARGUMENTS_BEFORE + (i - 2) * ARGUMENTS_EACH
  local q = {
    key = KEYS[i], limit = ARGV[at + 1], marker = ARGV[at + 2],
    starts = tonumber(ARGV[at + 3]), ends = tonumber(ARGV[at + 4]),
    cap = units(ARGV[at + 5]), u = units(ARGV[at + 6]), h = units(ARGV[at + 7]),
    want = units(ARGV[at + 8]), min = units(ARGV[at + 9]), believed = units(ARGV[at + 10]),
    soft = ARGV[at + 11] == 'soft', rate = ARGV[at + 11] == 'rate', known = ARGV[at + 12] == '1',
  }
  if not (q.cap and q.u and q.h and q.want and q.min and q.believed) or q.u + q.h > UNITS_MAX then
    return redis.error_reply('LICET quota ' .. (i - 1) .. ': units must be integers from 0 to 2^53 - 1')
  end
  if now_s >= q.ends + grace_s then return answer('CLOSED', i - 1) end
  if q.starts > now_s + grace_s then return answer('EARLY', i - 1) end
  -- Replaced or removed, and the caller does not know yet: "there is nothing left" would be wrong.
  if phase == 'open' and mark_revision > revision and (q.want > 0 or q.min > 0)
    and redis.call('HEXISTS', mark_key, 'l|' .. q.limit) == 0 then return answer('OUTDATED', i - 1) end

  local state = redis.call('HMGET', q.key, 'base', 'sum', 'used', 'wanted', 'r|' .. sidecar)
  q.exists = state[2] and true or false
  q.base, q.sum, q.used = tonumber(state[1] or '0'), tonumber(state[2] or '0'), tonumber(state[3] or '0')
  q.wanted = tonumber(state[4] or '0')

  -- The marker remembers the two newest windows a hash was made for, more than can be open at once as long as the
  -- grace is at most half of the shortest window and a limit's period does not change.
  local marker = new_markers[q.marker] or redis.call('HGET', mark_key, 'm|' .. q.marker)
  local newest, newest_end, previous, said, previous_said = 0, '0', 0, 0, 0
  if marker then
    newest, newest_end, previous, said, previous_said = string.match(marker, MARKER)
    newest, previous = tonumber(newest), tonumber(previous)
    said, previous_said = tonumber(said) or 0, tonumber(previous_said) or 0
  end
  local says = phase == 'learning' and since_ms or 0
  local new = nil
  if not marker then
    new = {q.starts, text(q.ends), 0, says, 0}
  elseif q.starts > newest then
    new = {q.starts, text(q.ends), newest, says, said}
  elseif q.starts < newest and q.starts > previous then
    new = {newest, newest_end, q.starts, said, says}
  else
    local last_said = q.starts == newest and said or q.starts == previous and previous_said or 0
    -- A marker without its hash is a loss, never new. So is, while learning, a hash that was said something into in
    -- this phase: whoever said it will not say it again.
    if not q.exists and (phase == 'open' or last_said == since_ms) then return answer('LEARN', i - 1) end
    if phase == 'learning' and last_said ~= since_ms then
      if q.starts == newest then said = since_ms elseif q.starts == previous then previous_said = since_ms end
      new = {newest, newest_end, previous, said, previous_said}
    end
    if q.starts == newest and newest_end ~= text(q.ends) then -- the license's term was moved
      new = {newest, text(q.ends), previous, said, previous_said}
    end
  end
  if new then
    new_markers[q.marker] = table.concat({text(new[1]), new[2], text(new[3]), text(new[4]), text(new[5])}, '|')
  end

  if state[5] then
    local g, u, h, r_incarnation, r_op, r_epoch, r_run, _, sealed, d = string.match(state[5], REGISTER)
    if not g then return redis.error_reply('LICET quota ' .. (i - 1) .. ': the register is damaged') end
    r_incarnation, r_op = tonumber(r_incarnation), tonumber(r_op)
    if sealed == '1' and not (retiring and r_incarnation == incarnation and r_op == op) then
      return answer('SEALED', i - 1)
    end
    if r_incarnation > incarnation or (r_incarnation == incarnation and r_op > op) then
      return answer('FENCED', i - 1)
    end
    q.repeated = r_incarnation == incarnation and r_op == op
    if q.repeated then repeated = repeated + 1 end
    q.g, q.old_g, q.old_used, q.d = tonumber(g), tonumber(g), tonumber(u) + tonumber(h), tonumber(d)
    -- What was spent stays spent: a sidecar that forgot (its clock stepped back over a window's end) is told.
    q.u = q.repeated and tonumber(u) or math.max(q.u, tonumber(u))
    q.asserted = r_epoch == epoch and r_run == run
  else
    q.g, q.old_g, q.old_used, q.d = 0, 0, 0, 0
    -- It had a register, and nothing was lost since: it was sealed, and its tombstone removed.
    if q.known and not q.rate then return answer('SEALED', i - 1) end
    -- A sidecar that holds nothing has nothing to assert: its first lease can be granted at once. A share of a rate
    -- that is not there any more was over.
    q.asserted = q.rate and q.known or q.cap == 0 and q.u + q.h == 0
  end
  quotas[#quotas + 1] = q
end

local function result()
  local reply = answer('OK', 0)
  reply[9] = nil
  for _, q in ipairs(quotas) do
    local amount = units(redis.call('HGET', mark_key, 'l|' .. q.limit) or '0') or 0
    for _, value in ipairs({q.g, q.d, q.u, amount, q.sum, q.used, q.wanted > now_ms and 1 or 0}) do
      reply[#reply + 1] = text(value)
    end
  end
  return reply
end

-- 3. The same call again: the same answer.
if repeated == #quotas then
  if writes_again then -- so that what WAIT waits for includes what the first call wrote, on whatever connection
    for _, q in ipairs(quotas) do redis.call('HSET', q.key, 'wanted', text(q.wanted)) end
  end
  return result()
end

-- 4. What each register becomes, computed before anything is written. A register that has this call already stays as
-- it is: one of the others was lost since, while learning, and only that one is said again.
local granting = phase == 'open' and repeated == 0
for i, q in ipairs(quotas) do
  if not q.repeated then
    local floor = q.u + q.h
    q.acquiring = q.want > 0 or q.min > 0
    q.d = 0
    if q.asserted and q.acquiring and q.g > q.cap then
      q.g = math.max(q.g, floor) -- the reply to an earlier grant was lost: the answer tells, and grants nothing
      granting = false
    elseif q.asserted and q.rate then
      q.g = math.min(q.g, q.cap) -- lowered by its holder, or over
    else
      -- Not asserted: exactly, even past the limit, because these units were spent or may be; and grants nothing.
      if not q.asserted and q.acquiring then granting = false end
      q.g = math.max(q.cap, floor)
    end
    q.sum = q.sum + (q.g - q.old_g)
    if q.sum > UNITS_MAX then -- beyond that a double loses count, for good
      return redis.error_reply('LICET quota ' .. i .. ': all sidecars together would hold more than 2^53 - 1 units')
    end
    q.used = q.used + (floor - q.old_used)
  end
end

-- 5. What is granted: to every quota what it must have, or nothing to any.
local short = false
local function sweep(q) -- takes back shares of a rate whose holders are silent for so long that they may not use them
  local state = redis.call('HGETALL', q.key)
  for at = 1, #state, 2 do
    if string.sub(state[at], 1, 2) == 'r|' and state[at] ~= 'r|' .. sidecar then
      local g, u, h, i, o, e, r, said_ms, sealed, d = string.match(state[at + 1], REGISTER)
      if g and tonumber(g) > 0 and tonumber(said_ms) + share_ms < now_ms then
        q.swept = q.swept or {}
        q.swept[#q.swept + 1] = {state[at], table.concat({'0', u, h, i, o, e, r, said_ms, sealed, d}, '|')}
        q.sum = q.sum - tonumber(g)
      end
    end
  end
end
if granting then
  for i, q in ipairs(quotas) do
    if q.acquiring then
      local amount = units(redis.call('HGET', mark_key, 'l|' .. q.limit) or '')
      if mark_revision < revision and amount ~= q.believed then return answer('UNPUBLISHED', i) end
      local remaining = math.max(0, (amount or 0) - q.sum)
      if q.rate and remaining < math.max(q.want, q.min) then
        sweep(q)
        remaining = math.max(0, (amount or 0) - q.sum)
      end
      local room = q.soft and UNITS_MAX - q.sum or remaining -- beyond that a double loses count
      if room < q.min then
        q.short, short = true, true
      elseif q.rate then
        q.grant = math.min(remaining, math.max(q.want, q.min))
        q.short = q.grant < q.want -- whoever has more than a fair share is asked for it
      elseif remaining < q.min then
        q.grant = math.min(room, math.max(q.want, q.min)) -- past the amount, because a check needs it
      else
        local share = math.max(q.want, math.floor(remaining / (GENEROUS_SHARE * live)))
        share = math.min(share, math.floor(remaining / (FAIR_SHARE * live)))
        q.grant = math.max(q.min, share)
      end
    end
  end
end

-- 6. Write.
for _, q in ipairs(quotas) do
  if q.grant and not short then
    q.d = q.grant
    q.g = q.g + q.d
    q.sum = q.sum + q.d
  end
  if q.short then q.wanted = now_ms + WANTED_MS end
  if q.swept then
    for _, one in ipairs(q.swept) do redis.call('HSET', q.key, one[1], one[2]) end
  end
  if not q.repeated then
    local g, u, sealed, d = q.g, q.u, '0', q.d
    if retiring and q.h == 0 and not q.rate then
      -- What it spent becomes part of the base. A tombstone stays for a while, against calls that are still under way; it
      -- says how much that was, for the day when Redis loses some of it.
      q.base = q.base + q.g
      q.used = q.used + (q.g - q.u)
      g, u, sealed, d = 0, 0, '1', q.g
    end
    local register = table.concat({text(g), text(u), text(q.h), text(incarnation), text(op), epoch, run,
      text(now_ms), sealed, text(d)}, '|')
    redis.call('HSET', q.key, 'base', text(q.base), 'sum', text(q.sum), 'used', text(q.used),
      'wanted', text(q.wanted), 'r|' .. sidecar, register)
    redis.call('EXPIREAT', q.key, math.min(q.ends + grace_s + kept_s, 253402300799))
  end
end
for name, marker in pairs(new_markers) do redis.call('HSET', mark_key, 'm|' .. name, marker) end
return result()
