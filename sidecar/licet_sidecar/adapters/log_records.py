"""Records of the usage log as bytes: how they are framed, and what can be read of a file that is torn or damaged.

A record is its length, a CRC-32 of kind and payload, its kind, and the payload. Behind a damaged one, reading goes on
at the next whole record, wherever that is: events carry their own numbers, so that what lies between is known exactly.
Pure: bytes in, records and extents out.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from licet.wire import usage

EVENT: Final = 1
LEASE: Final = 2
HEADER: Final = 3
FLOOR: Final = 4
RESERVATION: Final = 5
SEAT: Final = 6

FRAME: Final = struct.Struct("<IIB")
RECORD_BYTES_MAX: Final = 1024 * 1024
EVENT_BYTES_MIN: Final = FRAME.size + 3 + 22
"""A record of the shortest event: each of its 22 fields takes a byte at least. Bounds what a stretch of bytes held."""

_PLAUSIBLE: Final = re.compile(rb"(?s)(?=..[\x00-\x10]\x00....[\x01-\x06])")
"""Where a record may begin: a length of at most ``RECORD_BYTES_MAX``, and a kind that exists."""


class Record(NamedTuple):
    """A whole record; ``end`` is the offset behind it."""

    kind: int
    payload: bytes
    end: int


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes ``start`` to ``end`` (exclusive) of a file that cannot be read, and the events lost with them.

    ``first_lost`` and ``last_lost`` are bounds included; none is lost when ``last_lost < first_lost``. ``exact`` is
    false at the end of a log, where ``last_lost`` is as many as the bytes could have held.
    """

    start: int
    end: int
    first_lost: int
    last_lost: int
    exact: bool = True

    @property
    def lost(self) -> int:
        """How many events are lost, at most."""
        return max(0, self.last_lost - self.first_lost + 1)

    @property
    def reason(self) -> str:
        """In words, for the ledger and for people."""
        if self.start == self.end:
            return f"numbers are missing at byte {self.start:,} of the log"
        return f"bytes {self.start:,} to {self.end:,} of the log are damaged{'' if self.exact else ' (at most)'}"


@dataclass(frozen=True, slots=True)
class Examined:
    """What a file holds. ``header`` is the payload of its header, if there is one that can be read.

    ``torn_at``: from there on it is a record that was never finished, ``None`` when the file ends with a whole one or
    with damage. ``events``: how many can be read.
    """

    header: bytes | None
    last_seq: int
    events: int
    damage: list[Damage]
    torn_at: int | None


def frame(kind: int, payload: bytes) -> bytes:
    """One record, ready to be appended."""
    return FRAME.pack(len(payload), zlib.crc32(payload, kind), kind) + payload


def records(data: bytes, offset: int = 0) -> Iterator[Record]:
    """Each whole record from ``offset`` on, up to the first that is not."""
    size = len(data)
    while offset + FRAME.size <= size:
        length, checksum, kind = FRAME.unpack_from(data, offset)
        start = offset + FRAME.size
        if not 0 < length <= RECORD_BYTES_MAX or start + length > size:  # zeros, say, have no length and a right sum
            return
        payload = data[start : start + length]
        if zlib.crc32(payload, kind) != checksum:
            return
        offset = start + length
        yield Record(kind, payload, offset)


def readable(data: bytes) -> Iterator[Record]:
    """Each whole record, through all damage."""
    offset = 0
    while 0 <= offset < len(data):
        for record in records(data, offset):
            yield record
            offset = record.end
        offset = next_record(data, offset + 1)


def is_broken(data: bytes) -> bool:
    """Whether no record can begin with ``data``, however it goes on."""
    if len(data) < FRAME.size:
        return False
    length, checksum, kind = FRAME.unpack_from(data)
    if not 0 < length <= RECORD_BYTES_MAX:
        return True
    payload = data[FRAME.size : FRAME.size + length]
    return bool(len(payload) == length and zlib.crc32(payload, kind) != checksum)


def next_record(data: bytes, offset: int) -> int:
    """Where the next whole record from ``offset`` on begins; -1 when there is none."""
    for match in _PLAUSIBLE.finditer(data, offset):
        start = match.start()
        if next(records(data, start), None) is not None:
            return start
    return -1


def examine(data: bytes, first_seq: int) -> Examined:
    """Reads a file whose first event is number ``first_seq``, through all damage."""
    header: bytes | None = None
    last_seq, events, offset = first_seq - 1, 0, 0
    found: list[Damage] = []
    unread: list[tuple[int, int]] = []  # damage behind the last event read

    def lost_up_to(seq: int, *, exact: bool = True) -> None:
        """Everything between the last event read and ``seq`` was in ``unread``, or was never written."""
        if unread:
            found.extend(Damage(start, end, last_seq + 1, last_seq, exact=exact) for start, end in unread[:-1])
            found.append(Damage(*unread[-1], last_seq + 1, seq - 1, exact=exact))
        elif seq > last_seq + 1:
            found.append(Damage(offset, offset, last_seq + 1, seq - 1))
        unread.clear()

    while offset < len(data):
        for kind, payload, end in records(data, offset):
            if kind == EVENT:
                seq = usage.event_seq(payload)
                if seq > last_seq:
                    lost_up_to(seq)
                    last_seq, events = seq, events + 1
                else:  # of another log, or written twice: it must not pass for what it is not
                    unread.append((offset, end))
            elif kind == HEADER and header is None:
                header = payload
            offset = end
        if offset == len(data):
            break
        following = next_record(data, offset + 1)
        if following < 0:
            break
        unread.append((offset, following))
        offset = following
    tail_events = _events_in_tail(data[offset:])
    torn_at = offset if offset < len(data) and not tail_events else None
    held_at_most = sum((end - start) // EVENT_BYTES_MIN for start, end in unread) + tail_events
    if tail_events:
        unread.append((offset, len(data)))
    if unread:
        lost_up_to(last_seq + 1 + held_at_most, exact=False)
        last_seq += held_at_most
    return Examined(header, last_seq, events, found, torn_at)


def _events_in_tail(tail: bytes) -> int:
    """How many events the end of a file, in which no whole record begins, may have held. 0: it is a record that was
    not finished when the process or the power went, and that nobody was answered for, or nothing of ours.
    """
    if len(tail) < EVENT_BYTES_MIN:
        return 0
    length, checksum, kind = FRAME.unpack_from(tail)
    if zlib.crc32(tail[FRAME.size :], kind) == checksum:
        return 1  # all of it is there, and its length is not what it was
    end = FRAME.size + length
    if not 0 < length <= RECORD_BYTES_MAX or end > len(tail):
        return 0
    return 1 + int(len(tail) - end) // EVENT_BYTES_MIN
