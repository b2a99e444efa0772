"""Where in the log the answer to an idempotency key is: a compact index of all keyed events that the log still has.

An entry is sixteen bytes: a 64-bit hash of (tenant, action, key), and the position of the event. Entries with the same
last bits of the hash share a bucket, in the order of the log, newest last. So nothing is ever rehashed, a lookup is one
search for eight bytes, and what the log has deleted is cut off at the front.

A hash may be shared by two keys: whoever finds an entry compares the event's own key. Hashes are salted by the process
(``PYTHONHASHSEED``), so that nobody can choose keys that share one.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Final

from licet_sidecar.adapters.usage_log import POSITION_BITS

BUCKET_BITS: Final = 14
"""1.2 million entries, ten minutes of 2,000 calls a second, are 73 in each: a search of a third of a microsecond. More
buckets would each be smaller, and their memory more broken up."""
ENTRIES_MAX: Final = 2_000_000
"""About 50 MB. Reached only when the ledger acknowledges nothing for a quarter of an hour of 2,000 calls a second, or
with more calls than that: then the oldest segment's go."""
SWEPT_AT_ONCE: Final = 1_024
"""Buckets looked at in one step, of 0.3 ms: all of them in 16 steps."""

_ENTRY: Final = struct.Struct("<qQ")
_ENTRY_BYTES: Final = _ENTRY.size
_entry: Final = _ENTRY.pack
_hash_bytes: Final = struct.Struct("<q").pack
_HASH_BYTES: Final = 8
_MASK: Final = (1 << BUCKET_BITS) - 1


class AnswerIndex:
    """Owned by one event loop. ``entries``: how many there are, as of the last time all were swept."""

    def __init__(self) -> None:
        self._buckets: list[bytearray | None] = [None] * (_MASK + 1)
        self._swept = 0
        self._counted = 0
        self._oldest_kept = 0  # ordinal of the oldest segment whose entries find room
        self.entries = 0

    def add(self, hashed: int, position: int) -> None:
        """Notes where the newest event of a key is."""
        bucket = self._buckets[hashed & _MASK]
        if bucket is None:
            self._buckets[hashed & _MASK] = bytearray(_entry(hashed, position))
        else:
            bucket += _entry(hashed, position)

    def add_older(self, entries: bytes) -> Iterator[None]:
        """Notes entries (made by ``packed``, oldest first) that are older than any that is there; in small steps."""
        for end in range(len(entries), 0, -_ENTRY_BYTES):
            entry = entries[end - _ENTRY_BYTES : end]
            at = _ENTRY.unpack(entry)[0] & _MASK
            bucket = self._buckets[at]
            if bucket is None:
                self._buckets[at] = bytearray(entry)
            else:
                bucket[:0] = entry
            yield

    def knows(self, hashed: int) -> bool:
        """Whether ``positions`` may have something: now and then it is wrong, when it says so."""
        bucket = self._buckets[hashed & _MASK]
        return bucket is not None and bucket.rfind(_hash_bytes(hashed)) >= 0

    def positions(self, hashed: int) -> list[int]:
        """Positions noted for a hash, newest first."""
        bucket, needle = self._buckets[hashed & _MASK] or b"", _hash_bytes(hashed)
        found = []
        at = bucket.rfind(needle)
        while at >= 0:
            if at % _ENTRY_BYTES == 0:  # and not somewhere across two entries
                found.append(int(_ENTRY.unpack_from(bucket, at)[1]))
            at = bucket.rfind(needle, 0, at + _HASH_BYTES - 1)
        return found

    def sweep(self, ordinals: Sequence[int]) -> int:
        """One step of forgetting entries of segments that are gone, or that are too many.

        ``ordinals`` are those of all segments, oldest first. How many entries were forgotten that the log still has.
        """
        kept, early = frozenset(ordinals), 0
        for at in range(self._swept, self._swept + SWEPT_AT_ONCE):
            bucket = self._buckets[at]
            if bucket is None:
                continue
            end = 0
            while end < len(bucket):
                ordinal = _ENTRY.unpack_from(bucket, end)[1] >> POSITION_BITS
                if ordinal in kept:
                    if ordinal >= self._oldest_kept:
                        break
                    early += 1
                end += _ENTRY_BYTES
            if end:
                # A copy: what is cut off in place keeps its memory.
                self._buckets[at] = bucket = bucket[end:] if end < len(bucket) else None
            self._counted += len(bucket or b"") // _ENTRY_BYTES
        self._swept = (self._swept + SWEPT_AT_ONCE) & _MASK
        if self._swept == 0:
            self.entries, self._counted = self._counted, 0
            if self.entries > ENTRIES_MAX and ordinals:
                dropped = max(self._oldest_kept, ordinals[0])
                self._oldest_kept = next((one for one in ordinals if one > dropped), dropped)
        return early

    @property
    def size_bytes(self) -> int:
        """Memory it takes."""
        return sys.getsizeof(self._buckets) + sum(sys.getsizeof(one) for one in self._buckets if one is not None)

    @staticmethod
    def packed(hashed: int, position: int) -> bytes:
        """One entry."""
        return _entry(hashed, position)
