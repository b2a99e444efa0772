-- set_if_newer: stores a signed document unless the one that is there is of the same or a newer version.
--
-- KEYS  1 the document
-- ARGV  1 deployment  2 generation  3 revision  4 the signed document (licet/wire/signing.py)
-- Answer: 1 when stored, 0 when not. May be repeated.
--
-- The version that is there is read from the document itself, so that the value is exactly the signed bytes and no
-- second key can disagree with it. A signed document is msgpack
--   [1, "signed", [key id (16 characters), signature (64 bytes, bin), body (bin)]]
-- whose head has a fixed length, so that the body's bin marker is its 94th byte; the body is msgpack
--   [deployment, kind, key, generation, revision, payload].
-- What cannot be read that way was not written by this program, and is replaced. So is another deployment's.

local BODY_MARKER_AT = 94
local WIDTH_OF_LENGTH = {[0xc4] = 1, [0xc5] = 2, [0xc6] = 4}

local old = redis.call('GET', KEYS[1])
if old then
  local width = WIDTH_OF_LENGTH[string.byte(old, BODY_MARKER_AT) or 0]
  if width then
    local body = string.sub(old, BODY_MARKER_AT + 1 + width)
    -- From offset 1: behind the marker of the array.
    local read, _, deployment, _, _, generation, revision = pcall(cmsgpack.unpack_limit, body, 5, 1)
    if read and deployment == ARGV[1] and type(generation) == 'number' and type(revision) == 'number' then
      local new_generation, new_revision = tonumber(ARGV[2]), tonumber(ARGV[3])
      if generation > new_generation or (generation == new_generation and revision >= new_revision) then return 0 end
    end
  end
end
redis.call('SET', KEYS[1], ARGV[4])
return 1
